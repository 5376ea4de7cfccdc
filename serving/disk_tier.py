"""The disk tier: packed adapters in a folder of the home, a cache of what the store has, bounded by bytes.

Any number of engines, of any bases and forms, share the folder: a file's name says whose it is and for whom, it comes
by a rename and goes by an unlink, and a file that is being read may go. What is there is believed only after a check;
what fails it is deleted, and the store makes it anew. That the disk is full or broken costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import msgspec
import structlog
from filelock import FileLock, Timeout

from serving.engine.lora import HostAdapter
from serving.packed_file import Damaged, Stage, Target, read_header, read_packed, write_packed

_SUFFIX = ".packed"
_STAGED = ".staged-"
_ASIDE = ".aside-"  # a folder that stood in a file's place
_LEFTOVER_AGE_S = 600.0
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own blocks are
_COST_UNKNOWN_S = 0.1
_LOCK_S = 10.0
_COSTS_KEPT = 16384
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the folder. bytes: that it occupies; used_at: when an adapter was last read from it."""

    path: Path
    bytes: int
    used_at: float


class DiskTier:
    """Packed adapters for one engine. Every method may be called from any thread, and may block for as long as the
    disk does; budget_bytes 0: nothing is kept. stage: where files are read to; now: the wall clock, as files have it.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        *,
        budget_bytes: int,
        stage: Stage | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._target, self._stage, self._now = folder, target, stage, now
        self._tag = hashlib.sha256(msgspec.json.encode(target)).hexdigest()[:12]
        # Another engine that was stopped amid a write keeps it: then we go on without this tier's writes.
        self._lock = FileLock(folder / "lock", timeout=_LOCK_S)
        self._guard = threading.Lock()
        self._costs: OrderedDict[str, float] = OrderedDict()
        self.budget_bytes = budget_bytes
        self.count = self.bytes = self.healed = self.evictions = 0
        if budget_bytes:
            self._open()

    def get(self, digest: str) -> HostAdapter | None:
        """The adapter if it is here, sound, and for this engine. What is not sound is deleted on the way."""
        if not self.budget_bytes:
            return None
        path = self._path(digest)
        try:
            adapter = read_packed(path, digest, self._target, max_bytes=self.budget_bytes, stage=self._stage)
            os.utime(path, (self._now(), self._now()))
        except FileNotFoundError:
            return None
        except Damaged as fault:
            _log.warning("disk_tier_healed", adapter=digest[:12], fault=str(fault))
            self._remove(path)
            with self._guard:
                self.healed += 1
            return None
        except OSError as error:
            _log.warning("disk_tier_unreadable", adapter=digest[:12], error=error.strerror)
            return None
        return adapter

    def bytes_of(self, digest: str) -> int:
        """Bytes that the adapter's file occupies, sound or not; 0 when there is none."""
        if not self.budget_bytes:
            return 0
        try:
            info = self._path(digest).lstat()
        except OSError:
            return 0
        return info.st_blocks * _BLOCK_BYTES if stat.S_ISREG(info.st_mode) else 0

    def put(self, adapter: HostAdapter, cost_s: float) -> None:
        """Keep a verified adapter, and let others go for it. cost_s: what it took to have it from the store."""
        if not self.budget_bytes or adapter.size_bytes > self.budget_bytes:
            return
        path = self._path(adapter.digest)
        staged = self._folder / f"{_STAGED}{os.getpid()}-{token_hex(8)}"
        try:
            descriptor = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                write_packed(file, adapter, self._target, cost_s)
                file.flush()
                os.fsync(file.fileno())
            self._remember(path.name, cost_s)
            with self._lock:
                size = staged.stat().st_blocks * _BLOCK_BYTES
                self._make_room(size, but=path.name)
                _make_way(path)
                staged.replace(path)
                _sync_folder(self._folder)
                self._booked(1, size)
        except OSError as error:
            # Nobody waits for this: the next one who needs the adapter has it from the store.
            _log.warning("disk_tier_full", adapter=adapter.digest[:12], error=error.strerror)
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def drop(self, digest: str) -> int:
        """Delete an adapter; how many bytes that freed."""
        return self._remove(self._path(digest)) if self.budget_bytes else 0

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}-{self._tag}{_SUFFIX}"

    def _open(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._folder.glob(f"{_STAGED}*"):
                with suppress(FileNotFoundError):
                    if self._now() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                        path.unlink()
            with self._lock:
                self._make_room(0)
        except Timeout:
            _log.warning("disk_tier_busy")
        except OSError as error:
            _log.warning("disk_tier_off", error=error.strerror)
            self.budget_bytes = 0

    def _make_room(self, bytes_wanted: int, but: str = "") -> None:
        """Delete until so many bytes fit: first what was not read for long, is large, and is cheap to have again.

        but: the name that is about to be replaced.
        """
        files = [file for file in self._files() if file.path.name != but]
        count, total = len(files), sum(file.bytes for file in files)
        if total + bytes_wanted > self.budget_bytes:
            now = self._now()

            def worth(file: _File) -> float:
                """Seconds that a byte saves, over the time that it was not wanted."""
                return self._cost_s(file.path) / max(file.bytes, 1) / max(now - file.used_at, 1.0)

            for file in sorted(files, key=worth):
                if total + bytes_wanted <= self.budget_bytes:
                    break
                file.path.unlink(missing_ok=True)
                count, total = count - 1, total - file.bytes
                with self._guard:
                    self.evictions += 1
        with self._guard:
            self.count, self.bytes = count, total

    def _files(self) -> Iterator[_File]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(info.st_mode):  # not ours: it is neither counted nor evicted
                            continue
                        yield _File(Path(entry.path), info.st_blocks * _BLOCK_BYTES, info.st_mtime)

    def _cost_s(self, path: Path) -> float:
        if path.name not in self._costs:
            try:
                self._remember(path.name, max(read_header(path).cost_s, 1e-4))
            except (OSError, Damaged):
                self._remember(path.name, _COST_UNKNOWN_S)
        return self._costs[path.name]

    def _remember(self, name: str, cost_s: float) -> None:
        self._costs[name] = cost_s
        if len(self._costs) > _COSTS_KEPT:
            self._costs.popitem(last=False)

    def _remove(self, path: Path) -> int:
        try:
            if _make_way(path):
                return 0
            freed = path.lstat().st_blocks * _BLOCK_BYTES
            path.unlink()
        except FileNotFoundError:
            return 0
        except OSError as error:
            _log.warning("disk_tier_undeletable", error=error.strerror)
            return 0
        self._booked(-1, -freed)
        return freed

    def _booked(self, count: int, size: int) -> None:
        """So much more lies here; what other engines did since is counted at the next `put`."""
        with self._guard:
            self.count, self.bytes = max(0, self.count + count), max(0, self.bytes + size)


def _make_way(path: Path) -> bool:
    """Take away a folder that stands where a file belongs; whether there was one. Raises OSError.

    An empty one is deleted. Any other is given another name beside it: what is in it was never ours to delete. Neither
    follows a link.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return False
    except FileNotFoundError:
        return False
    aside = path.with_name(f"{_ASIDE}{token_hex(8)}")
    try:
        path.rmdir()
    except OSError:
        path.rename(aside)
        _log.warning("disk_tier_folder_renamed", folder=path.name[:12], to=aside.name)
    return True


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
