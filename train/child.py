"""A server for the length of one job, when none runs: started as a child, waited for, and wholly gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import httpx

from adapters.errors import ServerUnreachable
from adapters.home import Home

CONTEXT_TOKENS = 2048  # prompt and answer together, as far as the base's positions reach
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 45.0
_POLL_S = 0.2


@contextmanager
def private_server(home: Home, base: str, say: Callable[[str], None], command: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a server on a free loopback port that serves this home until the block ends.

    The child leads a process group of its own, which is killed whole if it does not stop by itself: Ctrl-C and SIGTERM
    included. command: in place of `loraplane serve`. Raises ServerUnreachable with the server's last words when it
    ends early or takes too long.
    """
    log = home.root / "eval-server.log"
    line = command or serve_command(base)
    with log.open("wb") as out, _terminable():
        child = subprocess.Popen(
            [*line, "--host", "127.0.0.1", "--port", "0", "--home", str(home.root)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "LORAPLANE_HOME": str(home.root)},
        )
        try:
            say("no server holds this home; starting one for this job")
            yield _ready(child, home, lambda: log.read_text(encoding="utf-8", errors="replace"))
        finally:
            _stop(child)


def serve_command(base: str) -> list[str]:
    """`loraplane serve` of this very environment, whatever lies in the folder that it is started from."""
    # -P: a folder of the caller's that is called serving or adapters must not be taken for ours.
    context = ["--max-model-len", str(CONTEXT_TOKENS)]
    return [sys.executable, "-P", "-m", "adapters.cli", "serve", "--base", base, *context]


def _ready(child: subprocess.Popen[bytes], home: Home, words: Callable[[], str]) -> str:
    """The child's URL, once it can answer."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            last = [text for text in words().splitlines() if text.strip()][-1:] or ["it said nothing"]
            raise ServerUnreachable(f"the server started for this job ended with code {child.returncode}: {last[0]}")
        note = home.server()
        if note is not None and note.pid == child.pid:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{note.url}/ready", timeout=5.0, trust_env=False).is_success:
                    return note.url
        time.sleep(_POLL_S)
    raise ServerUnreachable(f"the server started for this job was not ready in {START_TIMEOUT_S:.0f} s; see its log")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to drain and stop; then kill whatever is left of its group."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does, so that it cleans up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
