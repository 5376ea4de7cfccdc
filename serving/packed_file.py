"""One adapter as one file: scaled, in the slots' dtype and form, aligned, and every byte of it covered by a checksum.

    magic (8) | SHA-256 of all that follows (32) | length of the header (8, little-endian) | header (JSON) | tensors

The header says whose tensors these are and for which engine; each tensor begins at a multiple of 64 bytes. A file is
read whole into memory of our own and believed only then: what happens to it afterwards reaches nobody.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import torch
from torch import Tensor

from adapters.golden import GoldenRow
from serving.engine.lora import End, Form, HostAdapter

FORMAT = 1  # to be changed with what is written, and with what scaling makes of the same weights
MAX_FILE_BYTES = 16 << 30
_MAGIC = b"LPPACK\x00\x01"
_HASHED_FROM = len(_MAGIC) + 32
_PREFIX = _HASHED_FROM + 8
_ALIGN = 64
_MAX_HEADER_BYTES = 4 << 20
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8)
}

Stage = Callable[[int], Tensor]


class Damaged(Exception):
    """The file is not what it should be; its text says in what. It is to be deleted and made anew."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For which engine a file is: the digest of its base, its dtype, the kind of its slots."""

    base: str
    dtype: str
    kind: str


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor lies; begin: bytes from the first tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's header. cost_s: what it took to make this from the store, the price of losing it."""

    format: int
    adapter: str
    target: Target
    rank: int
    cost_s: float
    modules: tuple[str, ...]
    golden: tuple[GoldenRow, ...]
    tensors: tuple[_Entry, ...]


def write_packed(file: BinaryIO, adapter: HostAdapter, target: Target, cost_s: float) -> int:
    """Write an adapter to an empty file, without syncing it; how many bytes."""
    entries: list[_Entry] = []
    raws: list[tuple[int, memoryview]] = []
    end = 0
    for name, tensor in _named(adapter):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        entries.append(_Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        raws.append((end, raw))
        end = _aligned(end + len(raw))
    modules = () if adapter.form is None else tuple(sorted(adapter.form.modules))
    said = Header(FORMAT, adapter.digest, target, adapter.rank, cost_s, modules, adapter.golden, tuple(entries))
    header = msgspec.json.encode(said)
    start = _aligned(_PREFIX + len(header))
    header += b" " * (start - _PREFIX - len(header))
    digest = hashlib.sha256()
    file.write(bytes(_HASHED_FROM))

    def put(part: bytes | memoryview) -> None:
        digest.update(part)
        file.write(part)

    put(len(header).to_bytes(8, "little"))
    put(header)
    at = 0
    for begin, raw in raws:
        put(bytes(begin - at))
        put(raw)
        at = begin + len(raw)
    file.seek(0)
    file.write(_MAGIC + digest.digest())
    file.seek(0, os.SEEK_END)
    return start + at


def read_packed(
    path: Path, adapter: str, target: Target, *, max_bytes: int = MAX_FILE_BYTES, stage: Stage | None = None
) -> HostAdapter:
    """The adapter of a file, once all of it has been checked. stage: memory for it, (bytes,) uint8.

    Raises OSError; Damaged when it is no file, too large, cut, rotten, or another adapter's or engine's.
    """
    with _opened(path) as file:
        info = os.fstat(file.fileno())
        if not _PREFIX <= info.st_size <= max_bytes:
            raise Damaged(f"it is no file of {_PREFIX} to {max_bytes} bytes")
        # The tensors are to be aligned in memory as they are in the file.
        whole = (stage or _plain)(info.st_size)
        view = whole.numpy().data
        at = 0
        while at < len(view) and (count := file.readinto(view[at:])):
            at += count
    if at != len(view):
        raise Damaged("it was cut while it was read")
    if view[: len(_MAGIC)] != _MAGIC:
        raise Damaged("it is not a packed adapter of this version")
    if hashlib.sha256(view[_HASHED_FROM:]).digest() != view[len(_MAGIC) : _HASHED_FROM]:
        raise Damaged("its bytes do not match their checksum")
    header, start = _header(view)
    if header.adapter != adapter or header.target != target:
        raise Damaged("it is another adapter's, or for another engine")
    tensors = {entry.name: _tensor(whole, start + entry.begin, entry) for entry in header.tensors}
    return _adapter(header, tensors)


def read_header(path: Path) -> Header:
    """The header alone, unchecked: good for what is no harm if it lies. Raises OSError, Damaged."""
    with _opened(path) as file:
        prefix = file.read(_PREFIX)
        size = int.from_bytes(prefix[_HASHED_FROM:], "little")
        if len(prefix) < _PREFIX or not prefix.startswith(_MAGIC) or size > _MAX_HEADER_BYTES:
            raise Damaged("it has no header")
        return _decoded(file.read(size))


def _opened(path: Path) -> BufferedReader:
    # What lies in its place may be a link, a pipe, a socket or a folder, which would lead elsewhere or never end.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Damaged("it is a link or a socket") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged("it is no file")
    return os.fdopen(descriptor, "rb")


def _header(view: memoryview) -> tuple[Header, int]:
    """The header, and where the first tensor begins."""
    size = int.from_bytes(view[_HASHED_FROM:_PREFIX], "little")
    start = _PREFIX + size
    if size > _MAX_HEADER_BYTES or start > len(view) or start % _ALIGN:
        raise Damaged(f"its header would have {size} bytes")
    return _decoded(bytes(view[_PREFIX:start])), start


def _decoded(text: bytes) -> Header:
    try:
        header = msgspec.json.decode(text, type=Header)
    except msgspec.MsgspecError as error:
        raise Damaged(f"its header cannot be read: {error}") from None
    if header.format != FORMAT:
        raise Damaged(f"it has format {header.format}")
    return header


def _tensor(whole: Tensor, begin: int, entry: _Entry) -> Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None or entry.begin < 0 or entry.begin % _ALIGN or any(n < 0 for n in entry.shape):
        raise Damaged(f"tensor {entry.name[:80]!r} is described wrongly")
    end = begin + int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
    if not begin <= end <= len(whole):
        raise Damaged(f"tensor {entry.name[:80]!r} lies beyond the file's end")
    return whole[begin:end].view(dtype).view(entry.shape)


def _named(adapter: HostAdapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter, with its name in a file."""
    for module, (a, b) in adapter.pairs.items():
        yield f"a:{module}", a
        yield f"b:{module}", b
    for module, gain in adapter.gains.items():
        yield f"gain:{module}", gain
    for name, end in (("embedding", adapter.embedding), ("head", adapter.head)):
        if end is not None:
            yield f"{name}.a", end.a
            yield f"{name}.b", end.b
            if end.gain is not None:
                yield f"{name}.gain", end.gain
    if adapter.form is not None:
        for number, tensor in enumerate(adapter.form.tensors):
            yield f"form.{number}", tensor


def _adapter(header: Header, tensors: Mapping[str, Tensor]) -> HostAdapter:
    """The adapter of these tensors, each of which must have its place in it."""
    left = dict(tensors)
    pairs, gains = {}, {}
    try:
        for name in tensors:
            kind, _, module = name.partition(":")
            if kind == "a" and module:
                pairs[module] = (left.pop(name), left.pop(f"b:{module}"))
            elif kind == "gain" and module:
                gains[module] = left.pop(name)
        ends = {
            which: End(left.pop(f"{which}.a"), left.pop(f"{which}.b"), left.pop(f"{which}.gain", None))
            for which in ("embedding", "head")
            if f"{which}.a" in left
        }
    except KeyError as error:
        raise Damaged(f"it lacks tensor {error}") from None
    laid = [left.pop(f"form.{number}") for number in range(len(left)) if f"form.{number}" in left]
    form = Form(header.target.kind, tuple(laid), frozenset(header.modules)) if laid else None
    if left:
        raise Damaged(f"it has tensors that belong nowhere, among them {min(left)[:80]!r}")
    return HostAdapter(header.adapter, header.rank, pairs, gains, form=form, golden=header.golden, **ends)


def _plain(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
