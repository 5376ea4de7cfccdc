"""A stranger's safetensors file: its tensors as views, or a refusal; and the one way we write such a file.

The reader caps sizes before it parses, believes nothing it has not counted, and needs numpy only. It never calls the
safetensors library, which accepts duplicate names, misaligned data and headers that cost gigabytes.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from adapters.errors import AdapterRefused, Reason
from adapters.spec import LFS_MAGIC
from adapters.strict_json import read_strict, shown

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap
Bits: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
_NUMPY: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_INFINITY_BITS: Mapping[str, int] = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_NOT_SAFETENSORS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor where it lies: dtype `F32`, `F16` or `BF16`, one or two dimensions, its bytes, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    buffer: memoryview

    @property
    def array(self) -> Bits:
        """A numpy view without a copy. BF16, which numpy lacks, comes as uint16 bit patterns."""
        return np.frombuffer(self.buffer, dtype=_NUMPY[self.dtype]).reshape(self.shape)

    @property
    def largest(self) -> float:
        """The largest magnitude; infinity when any value is infinite or not a number."""
        # Without their sign bits, floats order as their bit patterns do, NaN above infinity: one pass over integers.
        bits = np.frombuffer(self.buffer, dtype=f"<u{_ITEM_BYTES[self.dtype]}")
        top = int((bits & np.array((1 << (8 * bits.itemsize - 1)) - 1, dtype=bits.dtype)).max())
        if top >= _INFINITY_BITS[self.dtype]:
            return float("inf")
        if self.dtype == "BF16":
            return float(np.array(top << 16, dtype="<u4").view("<f4"))
        return float(np.array(top, dtype=bits.dtype).view(_NUMPY[self.dtype]))


def read_tensors(data: Buffer) -> dict[str, TensorView]:
    """The tensors of a stranger's safetensors bytes. Raises AdapterRefused, each fault with its own reason."""
    view = memoryview(data)
    _refuse_other_formats(bytes(view[:64]))
    header, start = _header(view)
    return _layout(header, view[start:])


def tensor_chunks(tensors: Mapping[str, TensorView]) -> Iterator[bytes | memoryview]:
    """The one byte form of these tensors, piece by piece: no metadata, dtypes as they came.

    Wider dtypes first and then by name, so that every tensor is aligned; the header is padded to 8 bytes.
    """
    named = sorted(tensors.items(), key=lambda item: (-_ITEM_BYTES[item[1].dtype], item[0]))
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in named:
        end = offset + tensor.buffer.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in named:
        yield tensor.buffer


def _refuse_other_formats(head: bytes) -> None:
    if head.startswith(LFS_MAGIC):
        raise AdapterRefused(
            Reason.LFS_POINTER,
            "adapter_model.safetensors is a git-lfs pointer, not the weights; run `git lfs pull` and publish again",
        )
    for magic, what in _NOT_SAFETENSORS:
        # A safetensors file may begin with any byte (its header's length), but its ninth is always an opening brace.
        if head.startswith(magic) and head[8:9] != b"{":
            raise AdapterRefused(
                Reason.NOT_SAFETENSORS, f"the weights are {what}; save them with safe_serialization=True (safetensors)"
            )


def _header(view: memoryview) -> tuple[dict[str, object], int]:
    """The header's entries, and where the data begins."""
    if len(view) < 8:
        raise _truncated(f"it has {len(view)} bytes, too few for a header")
    (length,) = struct.unpack("<Q", view[:8])
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise AdapterRefused(
            Reason.HEADER_SIZE, f"the safetensors header would have {length} bytes; 2 to {MAX_HEADER_BYTES} are read"
        )
    if 8 + length > len(view):
        raise _truncated(f"its header needs {8 + length} bytes, the file has {len(view)}")
    text = bytes(view[8 : 8 + length])
    if not text.startswith(b"{"):
        raise AdapterRefused(Reason.HEADER_JSON, "the safetensors header must begin with '{'; this is another format")
    # Every tensor needs a "dtype"; counting them first bounds what the parser may build.
    if text.count(b'"dtype"') > MAX_TENSORS:
        raise AdapterRefused(Reason.TENSOR_SET, f"the header names more than {MAX_TENSORS} tensors")
    try:
        header = read_strict(text)
    except ValueError as error:
        raise AdapterRefused(Reason.HEADER_JSON, f"the safetensors header cannot be read: {error}") from None
    if not isinstance(header, dict) or text.rstrip(b" ")[-1:] != b"}":
        raise AdapterRefused(
            Reason.HEADER_JSON, "the safetensors header must be one JSON object, padded with spaces only"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterRefused(Reason.HEADER_JSON, "__metadata__ of the safetensors header must map texts to texts")
    if not 1 <= len(header) <= MAX_TENSORS:
        raise AdapterRefused(Reason.TENSOR_SET, f"the file names {len(header)} tensors; 1 to {MAX_TENSORS} are read")
    return header, 8 + length


def _layout(header: Mapping[str, object], data: memoryview) -> dict[str, TensorView]:
    """Cut the data into the header's tensors, which must cover it exactly, in a row, aligned."""
    entries = sorted(((*_entry(name, raw), name) for name, raw in header.items()), key=lambda e: (e[0], e[1]))
    tensors: dict[str, TensorView] = {}
    expected = 0
    for begin, end, dtype, shape, name in entries:
        if end > len(data):
            raise _truncated(f"{name[:120]!r} ends at byte {end} of the data, which has {len(data)}")
        if begin != expected:
            raise bad_layout(name, f"begins at {begin} where {expected} is expected; no gaps and no overlaps")
        if begin % _ITEM_BYTES[dtype]:
            raise bad_layout(name, f"begins at {begin}, which is not aligned for {dtype}")
        tensors[name] = TensorView(dtype, shape, data[begin:end])
        expected = end
    if expected != len(data):
        raise AdapterRefused(Reason.LAYOUT, f"{len(data) - expected} bytes follow the last tensor; nothing may")
    return tensors


def _entry(name: str, raw: object) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one header entry."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise AdapterRefused(
            Reason.HEADER_JSON, f"tensor {name[:120]!r} must have dtype, shape and data_offsets, and nothing else"
        )
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise AdapterRefused(
            Reason.DTYPE, f"tensor {name[:120]!r} has dtype {shown(dtype)}; F32, F16 and BF16 are served, convert it"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or not _whole_numbers(shape):
        raise bad_layout(name, "needs whole numbers from 0 as its shape and its two offsets")
    if len(shape) not in (1, 2) or 0 in shape:
        raise bad_layout(name, f"has shape {shown(shape)}; an adapter's tensors have one or two dimensions and no zero")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise bad_layout(name, f"has {end - begin} bytes for {dtype} of shape {shown(shape)}")
    return begin, end, dtype, tuple(shape)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def bad_layout(name: str, why: str) -> AdapterRefused:
    """The refusal of a tensor that does not lie as it should."""
    return AdapterRefused(Reason.LAYOUT, f"tensor {name[:120]!r} {why}")


def _truncated(why: str) -> AdapterRefused:
    return AdapterRefused(Reason.TRUNCATED, f"adapter_model.safetensors was cut short: {why}. Copy it again, whole")
