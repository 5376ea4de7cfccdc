"""Processes that we start, and end with everything they started, however we end ourselves.

Each gets a session of its own, so that Ctrl-C in a terminal reaches us alone and we decide the order of the ending.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import httpx
import psutil

from adapters.home import Home

SERVER_DEADLINE_S = 180.0
_POLL_S = 0.1
_KILL_WAIT_S = 5.0
_STARTED: set[Child] = set()  # and not yet stopped


class ServerFailed(Exception):
    """The server that we started did not become ready; the message holds its last words."""


def loraplane(*words: str) -> list[str]:
    """The command line of the product, of this very environment, whatever lies in the folder it is started from."""
    # -P: a folder of the caller's that is called serving or adapters must not be taken for ours.
    return [sys.executable, "-P", "-m", "adapters.cli", *words]


class Child:
    """A process of ours and its descendants."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: IO[str] | int = subprocess.DEVNULL,
        stderr: IO[str] | int = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._family: dict[int, psutil.Process] = {}
        # A Ctrl-C between the fork and the caller's `with` would leave a process that nobody knows.
        with _impatience() as interrupted:
            self.popen = subprocess.Popen(
                list(command), stdin=stdin, stdout=stdout, stderr=stderr, text=True, bufsize=1,
                start_new_session=True, env={**os.environ, **(env or {})},
            )  # fmt: skip
            _STARTED.add(self)
        if interrupted():
            raise KeyboardInterrupt
        self.look()

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def look(self) -> None:
        """Remember what descends from it now: a dead parent no longer tells whose children are whose."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.popen.pid).children(recursive=True):
                self._family[process.pid] = process

    def left_over(self) -> list[psutil.Process]:
        """Descendants, and members of its session, that still run. A pid that was given away again does not count."""
        mine = {**self._family}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
                if process.pid != self.popen.pid and os.getsid(process.pid) == self.popen.pid:
                    mine[process.pid] = process
        return [p for p in mine.values() if _lives(p)]

    def pause(self) -> None:
        """Stop it and everything it started from running at all, until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def cpu_share(self, seconds: float = 2.0) -> float:
        """How many cores it and its descendants use, over so many seconds from now."""
        before = self._cpu_s()
        begun = time.monotonic()
        time.sleep(seconds)
        after = self._cpu_s()
        return sum(s - before[pid] for pid, s in after.items() if pid in before) / (time.monotonic() - begun)

    def _signal(self, number: signal.Signals) -> None:
        self.look()
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)
        for process in self.left_over():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _cpu_s(self) -> dict[int, float]:
        """CPU seconds used so far, by process."""
        self.look()
        found = {}
        for pid in (self.popen.pid, *(p.pid for p in self.left_over())):
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                found[pid] = times.user + times.system
        return found

    def stop(self, grace_s: float = 30.0) -> None:
        """Ask it to end, wait, and kill what is left of it and of everything it started. A second call is free."""
        self.look()
        if self in _STARTED:
            self.resume()  # a paused process would not hear that it is to end
        with _impatience() as hurried:
            if self.running:
                with contextlib.suppress(ProcessLookupError):
                    self.popen.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + grace_s
                while self.running and time.monotonic() < deadline and not hurried():
                    self.look()
                    time.sleep(_POLL_S)
            if self.running:
                self.popen.kill()
            self.popen.wait()
            left = self.left_over()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=_KILL_WAIT_S)
            _STARTED.discard(self)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ServerProcess:
    """`loraplane serve` on a free port as a child of ours. Made at once; `ready` waits for it."""

    def __init__(self, home: Home, log: Path, *options: str) -> None:
        self._home, self._log = home, log
        self._out = log.open("w", encoding="utf-8")
        command = loraplane("serve", "--port", "0", "--home", str(home.root), *options)
        self.child = Child(command, stdout=self._out, stderr=self._out)
        self._deadline = time.monotonic() + SERVER_DEADLINE_S

    def ready(self) -> str:
        """The URL, once it takes requests. Raises ServerFailed."""
        while time.monotonic() < self._deadline:
            if not self.child.running:
                raise ServerFailed(f"the server ended with code {self.child.popen.returncode}: {self._last_words()}")
            note = self._home.server()
            if note is not None and note.pid == self.child.popen.pid and is_ready(note.url):
                self.child.look()
                return note.url
            time.sleep(_POLL_S)
        raise ServerFailed(f"the server was not ready within {SERVER_DEADLINE_S:g} s: {self._last_words()}")

    def resume(self) -> None:
        """Let a paused server go on; returns once it takes requests again. Raises ServerFailed."""
        self.child.resume()
        self._deadline = time.monotonic() + SERVER_DEADLINE_S
        self.ready()

    def stop(self) -> None:
        """End it and everything it started."""
        self.child.stop()
        self._out.close()

    def _last_words(self) -> str:
        self._out.flush()
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-3:]) or "it said nothing"


def is_ready(url: str) -> bool:
    """Whether the server at `url` takes requests now."""
    try:
        return httpx.get(f"{url}/ready", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end us as Ctrl-C does: through every `finally` on the way. No child of ours outlives this."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, on_signal) for n in numbers}
    try:
        yield
    finally:
        for child in tuple(_STARTED):
            child.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _impatience() -> Iterator[_Hurry]:
    """While we start a process or clean up, signals are only noted: they must not leave processes behind."""
    hurry = _Hurry()
    try:
        before = {n: signal.signal(n, hurry.on_signal) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread, which alone gets signals
        yield hurry
        return
    try:
        yield hurry
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Hurry:
    def __init__(self) -> None:
        self._asked = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
