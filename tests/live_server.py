"""A real server: `loraplane serve` in its own process, with its Ray, on a free port and a home of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from adapters.home import Home

LORAPLANE = str(Path(sys.executable).with_name("loraplane"))


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until the condition gives something true."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class LiveServer:
    """The process and how to reach it."""

    def __init__(self, home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.env = {**os.environ, "LORAPLANE_HOME": str(home), "OMP_NUM_THREADS": "1", **(env or {})}
        self.log = home / "serve.log"
        # Every server here starts from a folder whose packages are called as ours are: none of them may be taken.
        shadow = home / "cwd"
        for room in ("adapters", "serving"):
            (shadow / room).mkdir(parents=True)
            (shadow / room / "__init__.py").touch()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [LORAPLANE, "serve", "--port", "0", "--threads", "1", *arguments],
                env=self.env,
                cwd=shadow,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        note = wait_for(self._listening, 60, f"the server listens\n{self.log.read_text()}")
        self.url: str = note.url

    def _listening(self) -> Any:
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}: {self.log.read_text()}")
        return Home(self.home).server()

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def wait_ready(self, seconds: float = 90) -> float:
        """Seconds until /ready says yes."""
        begun = time.monotonic()
        with self.client() as client:
            wait_for(lambda: client.get("/ready").status_code == 200, seconds, self.log.read_text()[-2000:])
        return time.monotonic() - begun

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, on this home: it goes through the running server."""
        return subprocess.run([LORAPLANE, *arguments], env=self.env, capture_output=True, text=True, timeout=120)

    def family(self) -> list[psutil.Process]:
        """The server and every process below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def engine(self) -> psutil.Process | None:
        """The engine replica's process."""
        for process in self.family():
            try:
                if process.name().startswith("ray::ServeRepli") or "ServeReplica" in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    def gauge(self, name: str) -> float:
        """The sum of a metric's samples."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def stop(self) -> int:
        """SIGTERM, and wait; the exit code. Whatever of it still lives afterwards is killed and reported."""
        family = self.family() if self.process.poll() is None else []
        if family:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            process.kill()
        if alive:
            raise AssertionError(f"left running: {[p.name() for p in alive]}")
        return code


@contextmanager
def live_server(base: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[LiveServer]:
    """A ready server on this base, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="lp-home-") as folder:
        server = LiveServer(Path(folder), "--base", str(base), *arguments, env=env)
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()
