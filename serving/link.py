"""The data plane: one private socket per (gateway, engine replica), a frame a step.

A frame is a 4-byte little-endian length and a msgpack message of `serving/engine/request.py`. A unix socket on one
machine, TCP to a replica on another; the first frame proves the gateway by a token. End of file is the sign of death
for both sides, at once; a machine that falls silent without one is given up after twenty seconds. TCP here is not
encrypted: whoever can listen to the network between the machines reads prompts, answers and the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import socket
import struct
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog

from serving.engine.plan import Key, Outgoing
from serving.engine.request import (
    Cancel,
    Drop,
    EngineFacts,
    Event,
    Events,
    Failed,
    Finished,
    FromEngine,
    Heartbeat,
    Hello,
    Keep,
    Moved,
    Pin,
    Sampling,
    Submit,
    ToEngine,
    Told,
    Undrop,
    Unpin,
    Warm,
)

if TYPE_CHECKING:  # the gateway's end needs no torch, and `loraplane serve --help` waits for none
    from serving.engine.engine import Engine

_MAX_FRAME = 32 << 20
# Before a peer has proven itself: nothing but Hello is that small, and nobody makes us hold more.
_MAX_HELLO = 4096
_MAX_GATEWAYS = 64
# A gateway that reads nothing for so long that this piles up is cut off; its sequences are cancelled.
_MAX_UNSENT = 16 << 20
_HEARTBEAT_S = 0.5
_RECONNECT_S = 0.2
_CONNECT_S = 5.0
_log = structlog.get_logger()
_encoder = msgspec.msgpack.Encoder()
_Message = TypeVar("_Message")
_ENDINGS = (Finished, Failed, Moved)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens, and the token that opens it: a unix path, or host and port where that is empty."""

    path: str
    token: str
    replica: str
    host: str = ""
    port: int = 0


def _pack(message: FromEngine | ToEngine) -> bytes:
    body = _encoder.encode(message)
    return struct.pack("<I", len(body)) + body


async def _unpack(
    reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[_Message], limit: int = _MAX_FRAME
) -> _Message | None:
    """The next message, or None when the other side is gone. Raises msgspec.DecodeError on rubbish."""
    try:
        (size,) = struct.unpack("<I", await reader.readexactly(4))
        if size > limit:
            raise msgspec.DecodeError(f"a frame of {size} bytes")
        return decoder.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _notice_death(writer: asyncio.StreamWriter) -> None:
    """Have the system ask a silent TCP peer whether it lives: a machine that lost its power sends no end of file."""
    plug = writer.get_extra_info("socket")
    if plug.family not in (socket.AF_INET, socket.AF_INET6):
        return
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # The same for what was sent and is not acknowledged; the probes above are for a quiet line alone.
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)


class LinkServer:
    """The engine's end: runs its own event loop in a thread, so that the engine's thread only ever hands over.

    host: listen on a free TCP port of this address in place of the unix socket at `path`; `port` tells which.
    """

    def __init__(self, path: Path, token: str, host: str = "") -> None:
        self._path, self._token, self._host = path, token, host
        self.port = 0
        self._engine: Engine | None = None
        self._loop = asyncio.new_event_loop()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._live: dict[int, set[int]] = {}
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._listening = threading.Event()

    def sink(self, outgoing: Sequence[Outgoing]) -> None:
        """Take a step's events from the engine's thread."""
        frames: dict[int, list[Told]] = {}
        for key, event in outgoing:
            frames.setdefault(key[0], []).append(event)
        packed = [
            (number, _pack(Events(tuple(events))), [e.id for e in events if isinstance(e, _ENDINGS)])
            for number, events in frames.items()
        ]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._send, packed)

    def start(self, engine: Engine) -> None:
        """Listen, for this engine; returns once gateways can connect."""
        self._engine = engine
        self._thread.start()
        if not self._listening.wait(timeout=30):
            raise TimeoutError(f"no socket at {self._path} after 30 s")

    def stop(self) -> None:
        """Close all connections and remove the socket."""
        self._loop.call_soon_threadsafe(self._close)
        self._thread.join(timeout=5)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._path.unlink(missing_ok=True)
        # Both are kept: a server or a task that nobody refers to is collected, and its socket closed.
        server = self._loop.run_until_complete(self._listen())
        beat = self._loop.create_task(self._beat())
        self._listening.set()
        self._loop.run_forever()
        server.close()
        beat.cancel()
        self._loop.run_until_complete(asyncio.gather(beat, return_exceptions=True))

    async def _listen(self) -> asyncio.Server:
        if self._host:
            server = await asyncio.start_server(self._serve, self._host, 0)
            self.port = server.sockets[0].getsockname()[1]
            return server
        server = await asyncio.start_unix_server(self._serve, str(self._path))
        self._path.chmod(0o600)
        return server

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.transport.abort()
        self._loop.call_soon(self._loop.stop)  # after the transports have closed their sockets

    def _send(self, packed: Sequence[tuple[int, bytes, Sequence[int]]]) -> None:
        for number, frame, ended in packed:
            self._live.get(number, set()).difference_update(ended)
            writer = self._writers.get(number)
            if writer is None:
                continue
            writer.write(frame)
            if writer.transport.get_write_buffer_size() > _MAX_UNSENT:
                _log.error("gateway_stuck", connection=number)
                writer.transport.abort()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            if self._engine is not None and self._engine.alive:
                frame = _pack(self._engine.heartbeat())
                self._send([(number, frame, ()) for number in self._writers])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine = self._engine
        if engine is None or len(self._live) >= _MAX_GATEWAYS:
            writer.close()
            return
        number = next(self._numbers)
        live = self._live[number] = set()
        decoder = msgspec.msgpack.Decoder(ToEngine)
        try:
            _notice_death(writer)
            hello = await asyncio.wait_for(_unpack(reader, decoder, _MAX_HELLO), timeout=5)
            if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), self._token.encode()):
                return
            self._writers[number] = writer
            writer.write(_pack(engine.facts))
            writer.write(_pack(engine.heartbeat()))
            while (message := await _unpack(reader, decoder)) is not None:
                if isinstance(message, Submit):
                    live.add(message.id)
                    engine.submit(Key((number, message.id)), message)
                elif isinstance(message, Cancel):
                    live.discard(message.id)
                    engine.cancel(Key((number, message.id)), message.id)
                elif not isinstance(message, Hello):
                    live.add(message.id)
                    engine.keep(Key((number, message.id)), message)
        except (msgspec.DecodeError, TimeoutError) as error:
            _log.warning("gateway_refused", error=str(error)[:200])
        finally:
            self._writers.pop(number, None)
            for identity in self._live.pop(number):
                engine.cancel(Key((number, identity)), identity)
            writer.close()


_NOT_READY = Failed(0, "not_ready", "No engine is ready; it is starting or restarting.", retry_after_s=2.0)
Locate = Callable[[], Awaitable[Address]]


async def _open(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.path:
        return await asyncio.open_unix_connection(address.path)
    async with asyncio.timeout(_CONNECT_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
    _notice_death(writer)
    return reader, writer


class EngineLink:
    """The gateway's end: `EngineDoor` over the socket. `run` keeps it connected to whatever replica lives."""

    def __init__(self, locate: Locate, now: Callable[[], float] = time.monotonic) -> None:
        self._locate, self._now = locate, now
        self._facts: EngineFacts | None = None
        self._heartbeat: Heartbeat | None = None
        self._heartbeat_at = float("-inf")
        self._writer: asyncio.StreamWriter | None = None
        self._queues: dict[int, asyncio.Queue[Told]] = {}
        self._ids = itertools.count(1)
        self.connections = 0

    @property
    def facts(self) -> EngineFacts | None:
        """See EngineDoor."""
        return self._facts

    @property
    def heartbeat(self) -> Heartbeat | None:
        """See EngineDoor."""
        return self._heartbeat

    @property
    def heartbeat_age_s(self) -> float:
        """See EngineDoor."""
        return self._now() - self._heartbeat_at

    async def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None,
        choice: int,
        deadline_s: float,
        tenant: str,
        *,
        shadow: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """See EngineDoor."""
        writer = self._writer
        if writer is None:
            yield _NOT_READY
            return
        number = next(self._ids)
        events: asyncio.Queue[Told] = asyncio.Queue()
        self._queues[number] = events
        ended = False
        try:
            ids = tuple(prompt)
            writer.write(_pack(Submit(number, ids, sampling, adapter, choice, deadline_s, tenant, shadow=shadow)))
            while not ended:
                event = await events.get()
                ended = isinstance(event, _ENDINGS)
                if not isinstance(event, Moved):
                    yield event
        finally:
            del self._queues[number]
            if not ended and self._writer is writer:
                writer.write(_pack(Cancel(number)))

    async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
        """See EngineDoor."""
        return await self._ask(Warm(next(self._ids), digest, ttl_s, prove))

    async def pin(self, digest: str, on: bool) -> Moved | Failed:
        """See EngineDoor."""
        number = next(self._ids)
        return await self._ask(Pin(number, digest) if on else Unpin(number, digest))

    async def drop(self, digest: str, deadline_s: float) -> Moved | Failed:
        """See EngineDoor."""
        return await self._ask(Drop(next(self._ids), digest, deadline_s))

    async def undrop(self, digest: str) -> Moved | Failed:
        """See EngineDoor."""
        return await self._ask(Undrop(next(self._ids), digest))

    async def _ask(self, message: Keep) -> Moved | Failed:
        writer = self._writer
        if writer is None:
            return _NOT_READY
        answers: asyncio.Queue[Told] = asyncio.Queue()
        self._queues[message.id] = answers
        try:
            writer.write(_pack(message))
            while True:
                answer = await answers.get()
                if isinstance(answer, Moved | Failed):
                    return answer
        finally:
            del self._queues[message.id]

    async def run(self) -> None:
        """Connect, read until the engine is gone, fail what it was working on, and again. Ends when cancelled."""
        while True:
            try:
                address = await self._locate()
                reader, writer = await _open(address)
            except (OSError, TimeoutError) as error:
                _log.debug("engine_not_reachable", error=str(error))
                await asyncio.sleep(_RECONNECT_S)
                continue
            try:
                await self._read(reader, writer, address)
            except msgspec.DecodeError as error:
                _log.error("engine_speaks_rubbish", error=str(error)[:200])
            finally:
                self._lose()
                writer.close()
            await asyncio.sleep(_RECONNECT_S)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: Address) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        writer.write(_pack(Hello(address.token)))
        while (message := await _unpack(reader, decoder)) is not None:
            if isinstance(message, Events):
                for event in message.events:
                    waiting = self._queues.get(event.id)
                    if waiting is not None:
                        waiting.put_nowait(event)
            elif isinstance(message, Heartbeat):
                self._heartbeat, self._heartbeat_at = message, self._now()
            else:
                self._facts, self._writer = message, writer
                self.connections += 1
                _log.info("engine_connected", replica=address.replica, base=message.base_name)

    def _lose(self) -> None:
        """The engine is gone: each running sequence ends now, once, and by name."""
        self._writer = self._facts = self._heartbeat = None
        self._heartbeat_at = float("-inf")
        self.fail_running("engine_lost", "The engine died while it worked on this request.")

    def fail_running(self, code: str, message: str) -> None:
        """End every running sequence with this failure, for instance because the gateway stops."""
        for number, waiting in self._queues.items():
            waiting.put_nowait(Failed(number, code, message, retry_after_s=2.0))
