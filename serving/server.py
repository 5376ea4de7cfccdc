"""The whole server in one process and its Ray: gateway at the edge, engine deployed beside it, one life.

It listens before the engine is there, so that /health and /ready tell the truth from the first second; on SIGTERM or
Ctrl-C it takes no new requests, lets the running ones finish, and takes Ray down with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn

from adapters.errors import ConfigInvalid, InsecureBind, PortInUse
from adapters.home import Home, ServerNote
from adapters.prompts import Renderer
from adapters.records import BaseRecord
from adapters.registry import Registry
from serving.api.app import build_app, build_gateway
from serving.api.server import uvicorn_config
from serving.config import EdgeSettings
from serving.keeper import CanaryKeeper
from serving.link import Address
from serving.prefetch import Prefetch
from serving.replica_metrics import ReplicaCollector
from serving.router import OneCopy, Router
from serving.warden import Warden

_SOCKETS = "loraplane-"
# What is left of the drain time for streams to hear that they were cut.
_LAST_WORDS_S = 1.0


class Cluster(Protocol):
    """Where the engine runs."""

    def start(self) -> None:
        """Bring the engine up; blocks until it is healthy."""

    async def addresses(self) -> Sequence[Address]:
        """Where the living replicas listen. Raises ConnectionError while nobody can say."""

    def stop(self) -> None:
        """Take it down; blocks."""


def bind(settings: EdgeSettings) -> socket.socket:
    """A socket that listens at the configured address. Raises PortInUse, InsecureBind or ConfigInvalid."""
    if not settings.loopback and not settings.keys:
        raise InsecureBind(
            f"refusing to listen on {settings.host} without keys, which would let anyone on the network in; set "
            f"LORAPLANE_API_KEYS=lp_..., or use --host 127.0.0.1"
        )
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {settings.port} on {settings.host} is taken by another process; choose one with --port"
            ) from None
        raise ConfigInvalid(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """How to reach a listening socket, with the port that it really has."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a server is made of. say: tells the person who started it one line."""

    home: Home
    registry: Registry
    base: BaseRecord
    base_folder: Path
    settings: EdgeSettings
    cluster: Cluster
    engine_limits: dict[str, float]
    say: Callable[[str], None]


class Server:
    """One life of a server; `run` returns the exit code."""

    def __init__(self, parts: Parts, listener: socket.socket) -> None:
        self._parts, self._listener = parts, listener
        self._router = Router(parts.cluster.addresses)
        self._gateway, metrics = build_gateway(
            self._router, parts.registry, parts.base, Renderer(parts.base_folder), parts.settings, parts.engine_limits
        )
        metrics.registry.register(ReplicaCollector(self._router.views))
        app = build_app(self._gateway, parts.registry, parts.settings, metrics)
        self._warden: Warden = app.state.services.warden
        warm = app.state.services.flips.warm
        self._keeper = CanaryKeeper(parts.registry.canaries, self._gateway.tally, warm=warm, moved=metrics.moved)
        self._prefetch = Prefetch(
            OneCopy(self._router), self._gateway.resolver.size_of, unwanted=lambda: self._warden.unwanted
        )
        self._gateway.audience.add(self._prefetch)
        self._http = _Uvicorn(uvicorn_config(app, parts.settings), self._on_signal)
        self._stopping = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Serve until told to stop."""
        begun = time.monotonic()
        self._loop = asyncio.get_running_loop()
        linked = asyncio.create_task(self._router.run())
        watched = asyncio.gather(self._warden.run(), self._keeper.run(), *self._prefetching())
        started = asyncio.create_task(self._start_engine(begun))
        stopped = asyncio.create_task(self._drain())
        try:
            await self._http.serve(sockets=[self._listener])
        finally:
            await asyncio.gather(started, return_exceptions=True)
            for task in (linked, watched, stopped):
                task.cancel()
            await asyncio.gather(linked, watched, stopped, return_exceptions=True)
            await asyncio.to_thread(self._parts.cluster.stop)
        return 1 if self._failed else 0

    def _prefetching(self) -> list[Coroutine[None, None, None]]:
        return [self._prefetch.run()] if self._parts.settings.prefetch else []

    async def _start_engine(self, begun: float) -> None:
        say = self._parts.say
        try:
            await asyncio.to_thread(self._parts.cluster.start)
        except Exception as error:
            self._failed = True
            say(f"the engine could not be started: {' '.join(str(error).split())[:300]}")
            self._stopping.set()
            return
        while self._router.facts is None and not self._stopping.is_set():
            await asyncio.sleep(0.02)
        facts = self._router.facts
        if facts is not None:
            connected = sum(view.connected for view in self._router.views())
            say(
                f"ready after {time.monotonic() - begun:.1f} s: {facts.dtype} on {facts.device}, "
                f"{facts.max_rows} rows, {facts.slots} adapter slots, context {facts.max_model_len}"
                f"{_replicas(connected)}"
            )

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            self._http.force_exit = self._http.should_exit = True
        self._loop.call_soon_threadsafe(self._stopping.set)

    async def _drain(self) -> None:
        await self._stopping.wait()
        admission = self._gateway.admission
        admission.drain()
        limit = self._parts.settings.drain_s
        if admission.inflight:
            self._parts.say(f"stopping: {admission.inflight} requests may finish within {limit} s; again to stop now")
        if not await admission.wait_empty(max(0.0, limit - _LAST_WORDS_S)):
            self._router.fail_running("not_ready", "The server stops; send the request again elsewhere.")
            await admission.wait_empty(_LAST_WORDS_S)
        self._http.should_exit = True


def _replicas(connected: int) -> str:
    return f", {connected} replicas" if connected > 1 else ""


class _Uvicorn(uvicorn.Server):
    """uvicorn that leaves the meaning of a signal to us, and does not raise it again after the end."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal(sig)


def run_server(parts: Parts, listener: socket.socket) -> int:
    """Hold the home, serve, let go. Returns the exit code. Raises HomeLocked."""
    url = url_of(listener, parts.settings.host)
    lock = parts.home.hold(ServerNote(url=url, pid=os.getpid()))
    try:
        parts.say(f"{parts.base.name} ({parts.base.digest[:12]}) at {url}; the engine starts")
        server = Server(parts, listener)
        return asyncio.run(server.run())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        lock.release()


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A private folder for the link's sockets, short enough for a unix socket's 107 bytes.

    Folders of servers that were killed are swept: their name says whose they were.
    """
    root = _short_root()
    for left in Path(root or tempfile.gettempdir()).glob(f"{_SOCKETS}*-*"):
        owner = left.name.removeprefix(_SOCKETS).partition("-")[0]
        if owner.isdecimal() and not _lives(int(owner)):
            shutil.rmtree(left, ignore_errors=True)  # another user's stays: the system refuses
    with tempfile.TemporaryDirectory(prefix=f"{_SOCKETS}{os.getpid()}-", dir=root) as folder:
        yield Path(folder)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _short_root() -> str | None:
    chosen = tempfile.gettempdir()
    return chosen if len(chosen) < 60 else "/tmp"
