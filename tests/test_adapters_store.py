"""The blob store: whole under its digest, or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import DigestMismatch, InvalidRequest, PayloadTooLarge, RecordNotFound, StoreFailed
from adapters.store import LEFTOVER_AGE_S, BlobStore


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_blob_lies_under_the_sha256_of_its_bytes(store: BlobStore) -> None:
    digest = store.put(b"hello")
    assert digest == hashlib.sha256(b"hello").hexdigest()
    assert store.path(digest) == store.root / "sha256" / digest[:2] / digest
    assert store.read_verified(digest) == b"hello"
    assert store.verify(digest).stat().st_mode & 0o222 == 0


def test_bytes_paths_and_streams_give_one_blob(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    digests = {store.put(b"abc" * 1000), store.put(tmp_path / "f"), store.put(iter([b"abc"] * 1000))}
    assert len(digests) == 1
    assert len(files_in(store.root)) == 1


def test_bytes_that_are_not_the_declared_ones_leave_nothing(store: BlobStore) -> None:
    with pytest.raises(DigestMismatch):
        store.put(b"hello", declared="0" * 64)
    assert files_in(store.root) == []


def test_bytes_beyond_the_limit_are_refused_while_they_come(store: BlobStore) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    with pytest.raises(PayloadTooLarge):
        store.put(endless(), max_bytes=5000)
    assert taken == 6
    assert files_in(store.root) == []


def test_staged_bytes_are_visible_to_nobody_and_go_unless_committed(store: BlobStore) -> None:
    with store.stage(b"x") as staged:
        assert not store.has(staged.digest)
    assert files_in(store.root) == []


def test_committing_twice_is_harmless(store: BlobStore) -> None:
    with store.stage(b"x") as staged:
        assert staged.commit() == staged.commit()
    assert store.read_verified(staged.digest) == b"x"


def test_a_flipped_bit_is_detected_and_putting_the_bytes_again_mends_it(store: BlobStore) -> None:
    digest = store.put(b"weights")
    store.path(digest).chmod(0o600)
    store.path(digest).write_bytes(b"weightt")
    with pytest.raises(StoreFailed, match="rotted") as caught:
        store.read_verified(digest)
    assert caught.value.retry_after_s is None
    with pytest.raises(StoreFailed):
        store.verify(digest)
    store.put(b"weights")
    assert store.read_verified(digest) == b"weights"


def test_what_is_not_there_is_not_found(store: BlobStore) -> None:
    with pytest.raises(RecordNotFound):
        store.read_verified("0" * 64)
    with pytest.raises(RecordNotFound):
        store.open("0" * 64)


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_a_digest_becomes_a_path(store: BlobStore, digest: str) -> None:
    with pytest.raises(InvalidRequest):
        store.path(digest)


def test_a_named_pipe_in_place_of_a_file_does_not_hang(store: BlobStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest):
        store.put(tmp_path / "pipe")


def test_opening_sweeps_what_dead_writers_left_and_spares_the_living(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    store = BlobStore(root)
    dead, young = root / "tmp" / "1-dead", root / "tmp" / "1-young"
    dead.write_bytes(b"half")
    young.write_bytes(b"half")
    later = time.time() + LEFTOVER_AGE_S + 10
    os.utime(young, (later, later))
    with store.stage(b"alive") as staged:
        BlobStore(root, now=lambda: later)
        assert (dead.exists(), young.exists(), staged.path.exists()) == (False, True, True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_or_failing_disk_is_a_typed_error_and_leaves_nothing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(StoreFailed, match=os.strerror(number)):
        store.put(b"bytes")
    monkeypatch.undo()
    assert files_in(store.root) == []
    assert store.read_verified(store.put(b"bytes")) == b"bytes"


def test_short_writes_are_continued(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    digest = store.put(b"0123456789" * 10)
    assert store.read_verified(digest) == b"0123456789" * 10


def test_many_writers_of_one_blob_agree(store: BlobStore) -> None:
    threads = [threading.Thread(target=lambda: store.put(b"same" * 10_000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    digest = hashlib.sha256(b"same" * 10_000).hexdigest()
    assert store.read_verified(digest) == b"same" * 10_000
    assert len(files_in(store.root)) == 1
