"""Where Loraplane keeps its things on this machine, and which server, if any, holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from adapters.errors import HomeLocked, HomeUnusable


@dataclass(frozen=True, slots=True)
class ServerNote:
    """What a running server tells the command line: where it listens and who it is."""

    url: str
    pid: int


@dataclass(frozen=True, slots=True)
class Home:
    """The folder `$LORAPLANE_HOME` (default `~/.loraplane`) and the names of what lies in it."""

    root: Path
    store: str = ""

    @classmethod
    def find(cls, root: Path | str | None = None, store: str | None = None) -> Home:
        """The home given, or of the environment, or the default; made if absent, for its owner's eyes only.

        store: where blobs lie that several machines share, a folder or any URL of fsspec; else LORAPLANE_STORE says it,
        and nothing means that the home's own blobs are all there are. Raises HomeUnusable when it cannot be made.
        """
        wanted = root or os.environ.get("LORAPLANE_HOME") or "~/.loraplane"
        try:
            chosen = Path(wanted).expanduser().absolute()
        except RuntimeError:  # a user without a home folder, or one that nobody has heard of
            raise HomeUnusable(f"{wanted} names no folder here; set LORAPLANE_HOME to a folder of yours") from None
        with usable(chosen):
            chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        shared = store or os.environ.get("LORAPLANE_STORE", "")
        if shared and "://" not in shared:  # other processes of ours are in other folders
            shared = str(Path(shared).expanduser().absolute())
        return cls(chosen, shared)

    @property
    def database(self) -> Path:
        return self.root / "registry.sqlite"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the registry; `LORAPLANE_DATABASE_URL` overrides it."""
        return os.environ.get("LORAPLANE_DATABASE_URL") or f"sqlite:///{self.database}"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def packed(self) -> Path:
        """Adapters as engines install them: a cache, which may be deleted."""
        return self.root / "packed"

    @property
    def bases(self) -> Path:
        return self.root / "bases"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    def server_lock(self) -> FileLock:
        """The lock that a server holds for as long as it uses this home. It dies with its process."""
        return FileLock(self.root / "server.lock", timeout=0)

    def hold(self, note: ServerNote) -> FileLock:
        """Take the home for a server and leave its address. Raises HomeLocked when another server has it."""
        lock = self.server_lock()
        try:
            with usable(self.root):
                lock.acquire(timeout=2)  # the command line holds it for an instant to see whether a server does
        except Timeout:
            other = self._note()
            where = f" at {other.url} (pid {other.pid})" if other else ""
            raise HomeLocked(
                f"another server{where} holds {self.root}; stop it, or set LORAPLANE_HOME to another folder"
            ) from None
        with usable(self.root):
            self.write_note(note)
        return lock

    def write_note(self, note: ServerNote) -> None:
        """Leave the server's address for the command line, readable in one piece at any time."""
        staged = self.root / f"server.json.{os.getpid()}"
        staged.write_text(json.dumps({"url": note.url, "pid": note.pid}))
        staged.replace(self.root / "server.json")

    def server(self) -> ServerNote | None:
        """The server that holds this home now, or None. Raises HomeUnusable."""
        lock = self.server_lock()
        try:
            with usable(self.root):
                lock.acquire()
        except Timeout:
            return self._note()
        lock.release()
        return None

    def _note(self) -> ServerNote | None:
        try:
            raw = json.loads((self.root / "server.json").read_text())
            return ServerNote(url=str(raw["url"]), pid=int(raw["pid"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turns the disk's no to what is done in a folder of the home into HomeUnusable, which says what to do."""
    try:
        yield
    except Timeout:  # an OSError too: somebody has the lock, and the folder is as it should be
        raise
    except OSError as error:
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        why = "it is not a folder" if no_folder else error.strerror or str(error)
        raise HomeUnusable(
            f"Loraplane cannot keep its things in {folder}: {why}; set LORAPLANE_HOME, or --home, to a folder that "
            f"you can write to"
        ) from error
