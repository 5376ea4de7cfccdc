"""Blobs in a place that several machines share: any URL that fsspec knows (s3://, gs://, file://, memory://).

The same layout as the home's own store, sha256/ab/abcdef...; nothing read from there is believed before a digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from adapters.errors import ConfigInvalid, ExtraMissing, RecordNotFound, StoreFailed
from adapters.store import BlobStore, Shared

_USER_PART = re.compile(r"//[^/@]*@")


class Files(Protocol):
    """What is asked of a file system; fsspec's have it."""

    def cat_file(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""

    def put_file(self, lpath: str, rpath: str) -> Any: ...

    def mv(self, path1: str, path2: str) -> Any: ...

    def rm_file(self, path: str) -> Any: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> Any: ...


def open_shared(url: str) -> Shared | None:
    """The store that a URL or the path of a folder names; None for an empty text, which names none.

    Raises ConfigInvalid for what names nothing, ExtraMissing when the package for its protocol is not installed.
    """
    if not url:
        return None
    shown = _USER_PART.sub("//", url)  # a URL may hold a password
    from fsspec.core import url_to_fs  # 60 ms that a command line without a shared store need not pay
    from fsspec.implementations.local import LocalFileSystem

    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        raise ExtraMissing("s3", f"the store {shown} ({error})") from None
    except Exception as error:  # each protocol has errors of its own
        raise ConfigInvalid(
            f"LORAPLANE_STORE (--store): {shown} is no place for blobs: {type(error).__name__}; give a folder, or a "
            f"URL such as s3://bucket/prefix"
        ) from None
    if isinstance(files, LocalFileSystem):
        try:
            return FolderStore(Path(root))
        except StoreFailed as error:
            why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else str(error)
            raise ConfigInvalid(
                f"LORAPLANE_STORE (--store): no blobs can lie in {shown}: {why}; give a folder that you can write to"
            ) from error
    return SharedStore(files, root, shown)


class FolderStore:
    """A shared store that is a folder, for instance of a network file system: written as durably as the home's own."""

    def __init__(self, root: Path) -> None:
        self._blobs = BlobStore(root)

    def read(self, digest: str) -> bytes:
        """See Shared."""
        return self._blobs.read_verified(digest)

    def write(self, digest: str, source: Path) -> None:
        """See Shared."""
        self._blobs.put(source, declared=digest)


class SharedStore:
    """A shared store behind fsspec. files: an open file system; root: a folder of it; shown: its name in messages."""

    def __init__(self, files: Files, root: str, shown: str) -> None:
        self._files, self._root, self.shown = files, root.rstrip("/"), shown

    def read(self, digest: str) -> bytes:
        """See Shared."""
        with self._failures(f"blob {digest[:12]} cannot be read"):
            try:
                data = self._files.cat_file(self._path(digest))
            except FileNotFoundError:
                raise RecordNotFound(f"no blob {digest} is stored in {self.shown}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreFailed(
                f"the blob {digest} has rotted in {self.shown}; publish the same files again, or restore a copy",
                retry_after_s=None,
            )
        return data

    def write(self, digest: str, source: Path) -> None:
        """See Shared."""
        target = self._path(digest)
        staged = f"{self._root}/tmp/{token_hex(8)}"
        with self._failures(f"blob {digest[:12]} cannot be written"):
            for folder in (staged, target):
                self._files.makedirs(folder.rpartition("/")[0], exist_ok=True)
            try:
                self._files.put_file(str(source), staged)
                # Also over a blob that is there: these bytes were just digested, the old ones may have rotted.
                self._files.mv(staged, target)
            except BaseException:
                with suppress(Exception):
                    self._files.rm_file(staged)
                raise

    def _path(self, digest: str) -> str:
        return f"{self._root}/sha256/{digest[:2]}/{digest}"

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except RecordNotFound:
            raise
        except Exception as error:  # each protocol has errors of its own
            why = f"{type(error).__name__}: {_USER_PART.sub('//', str(error))[:200]}"
            raise StoreFailed(f"{what} in {self.shown}: {why}") from error
