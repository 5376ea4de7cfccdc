"""Content-addressed blobs in a folder. A blob is there whole, under the SHA-256 of its bytes, or it is not there.

blobs/sha256/ab/abcdef...   immutable, read-only files
blobs/tmp/...               what writers hold now; left behind only by a writer that was killed

Behind the folder there may be a shared store (see shared_store): what is written goes to both, and what the folder
lacks, or has only rotten, comes from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from adapters.errors import DigestMismatch, InvalidRequest, PayloadTooLarge, RecordNotFound, StoreFailed

CHUNK_BYTES = 1 << 20
LEFTOVER_AGE_S = 60.0
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

Source: TypeAlias = bytes | Path | Iterable[bytes | memoryview]
_T = TypeVar("_T")


class Shared(Protocol):
    """Blobs that several machines share."""

    def read(self, digest: str) -> bytes:
        """A blob's bytes, checked. Raises RecordNotFound; StoreFailed when it cannot be read or has rotted."""

    def write(self, digest: str, source: Path) -> None:
        """Put a blob there, whole or not at all. Its bytes were digested by the caller. Raises StoreFailed."""


@dataclass(slots=True)
class Staged:
    """Bytes on their way into the store: whole, synced and digested, but visible to nobody until `commit`."""

    digest: str
    size_bytes: int
    path: Path
    _target: Path
    _shared: Shared | None = None
    committed: bool = False

    def commit(self) -> str:
        """Make the blob durable under its digest, which is returned. Doing it twice is harmless."""
        if not self.committed:
            if self._shared is not None:
                self._shared.write(self.digest, self.path)
            with _as_store_failure("keep a blob"):
                _make_folder(self._target.parent)
                # Also over a blob that is there: these bytes were just digested, the old ones may have rotted.
                self.path.replace(self._target)
                _sync_folder(self._target.parent)
            self.path, self.committed = self._target, True
        return self.digest


class BlobStore:
    """Blobs of one registry. Safe for several threads and processes at once.

    Opening it removes what killed writers left behind. A full or failing disk raises StoreFailed.
    """

    def __init__(self, root: Path, now: Callable[[], float] = time.time, shared: Shared | None = None) -> None:
        self.root = root
        self._shared = shared
        self._blobs = root / "sha256"
        self._staging = root / "tmp"
        with _as_store_failure("open the blob store"):
            _make_folder(self._blobs)
            _make_folder(self._staging)
            self._sweep(now())

    @contextmanager
    def stage(self, source: Source, *, declared: str | None = None, max_bytes: int | None = None) -> Iterator[Staged]:
        """Take bytes in without showing them to anyone; unless committed, they are gone when the context ends.

        Raises PayloadTooLarge beyond max_bytes, DigestMismatch when the bytes are not the declared ones.
        """
        with _as_store_failure("take bytes in"):
            descriptor, path = self._temporary()
        try:
            digest, size = self._fill(descriptor, source, max_bytes)
            if declared is not None and digest != declared:
                raise DigestMismatch(declared, digest)
            staged = Staged(digest, size, path, self.path(digest), self._shared)
            yield staged
        finally:
            # The descriptor carries the lock that keeps the sweep of another process away from this file.
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def put(self, source: Source, *, declared: str | None = None, max_bytes: int | None = None) -> str:
        """Store bytes durably and return their SHA-256 hex. The same bytes twice are one blob. Raises as `stage`."""
        with self.stage(source, declared=declared, max_bytes=max_bytes) as staged:
            return staged.commit()

    def path(self, digest: str) -> Path:
        """Where a blob lies, whether or not it is there. Raises InvalidRequest when `digest` is not one."""
        if _DIGEST.fullmatch(digest) is None:
            raise InvalidRequest(f"{digest[:80]!r} is not a SHA-256 digest of 64 hexadecimal digits", "digest")
        return self._blobs / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether the blob is in the folder. Its bytes are not looked at."""
        return self.path(digest).is_file()

    def open(self, digest: str) -> BufferedReader:
        """The blob of the folder for reading, unverified. Raises RecordNotFound."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise RecordNotFound(f"no blob {digest} is stored") from None

    def read_verified(self, digest: str) -> bytes:
        """The blob's bytes, checked. Raises RecordNotFound; StoreFailed when they have rotted.

        What only the shared store has lies in the folder from then on.
        """
        return self._mended(digest, lambda: self._read(digest))

    def fetch(self, digest: str) -> bytes:
        """As `read_verified`, for bytes that are needed once: the folder keeps none that it had not."""
        try:
            return self._read(digest)
        except RecordNotFound:
            if self._shared is None:
                raise
            return self._shared.read(digest)
        except StoreFailed:
            return self.read_verified(digest)

    def verify(self, digest: str) -> Path:
        """The blob's path after its bytes were checked. Raises and keeps as `read_verified`."""
        return self._mended(digest, lambda: self._verify(digest))

    def _read(self, digest: str) -> bytes:
        with _as_store_failure("read a blob"), self.open(digest) as file:
            data = file.read()
        self._check(digest, hashlib.sha256(data).hexdigest())
        return data

    def _verify(self, digest: str) -> Path:
        with _as_store_failure("read a blob"), self.open(digest) as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        self._check(digest, actual)
        return self.path(digest)

    def _mended(self, digest: str, read: Callable[[], _T]) -> _T:
        """What is read of the folder, once the shared store has made good what is missing or rotten there."""
        try:
            return read()
        except (RecordNotFound, StoreFailed):
            if self._shared is None:
                raise
        data = self._shared.read(digest)
        descriptor, path = self._temporary()
        try:
            self._fill(descriptor, data, None)
            Staged(digest, len(data), path, self.path(digest)).commit()
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)
        return read()

    def _check(self, digest: str, actual: str) -> None:
        if actual != digest:
            raise StoreFailed(
                f"the blob {digest} has rotted: its bytes now have SHA-256 {actual}. Restore it from a copy, or "
                f"publish the same files again",
                retry_after_s=None,
            )

    def _temporary(self) -> tuple[int, Path]:
        path = self._staging / f"{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor, path

    def _fill(self, descriptor: int, source: Source, max_bytes: int | None) -> tuple[str, int]:
        digest = hashlib.sha256()
        size = 0
        for chunk in _chunks(source):
            size += len(chunk)
            if max_bytes is not None and size > max_bytes:
                raise PayloadTooLarge(f"more than {max_bytes} bytes came; this is the limit")
            digest.update(chunk)
            with _as_store_failure("write a blob"):
                _write_all(descriptor, chunk)
        with _as_store_failure("write a blob"):
            os.fchmod(descriptor, 0o400)
            # An fsync that failed once may report success the next time: never retried, the bytes are dropped.
            os.fsync(descriptor)
        return digest.hexdigest(), size

    def _sweep(self, now: float) -> None:
        """Remove staged files whose writers died: old enough to have taken their lock, and not locked."""
        for path in self._staging.iterdir():
            with suppress(FileNotFoundError, PermissionError):
                if now - path.stat().st_mtime < LEFTOVER_AGE_S:
                    continue
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    pass  # its writer lives
                finally:
                    os.close(descriptor)


def _chunks(source: Source) -> Iterator[bytes | memoryview]:
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path):
        # Non-blocking: a named pipe in place of the file must not hang us.
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidRequest(f"{source.name!r} is not a regular file", "files")
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    else:
        yield from source


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _make_folder(path: Path) -> None:
    """Make a folder that survives a power cut, and its parents."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_store_failure(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(
            f"could not {what}: {error.strerror or error}. Free or mend the disk that holds LORAPLANE_HOME, then retry"
        ) from error
