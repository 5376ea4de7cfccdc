"""The data plane across machines: the same frames and the same token over TCP. No engine: one that answers at once."""

from __future__ import annotations

import asyncio
import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from serving.engine.engine import Engine
from serving.engine.plan import Key, Outgoing
from serving.engine.request import Event, Failed, Finished, FinishReason, Heartbeat, Sampling, Submit, Timing, Tokens
from serving.link import Address, EngineLink, LinkServer
from tests.fakes import FakeEngine

TOKEN = "0123456789abcdef"


class AnsweringEngine:
    """What a LinkServer asks of an engine; every sequence gets one token and ends."""

    alive = True

    def __init__(self, sink: Callable[[Sequence[Outgoing]], None]) -> None:
        self._sink, self._fake = sink, FakeEngine()
        facts = self._fake.facts
        if facts is None:
            raise ValueError("a fake engine without facts")
        self.facts = facts

    def heartbeat(self) -> Heartbeat:
        beat = self._fake.heartbeat
        if beat is None:
            raise ValueError("a fake engine without a heartbeat")
        return beat

    def submit(self, key: Key, message: Submit) -> None:
        tokens = Tokens(message.id, message.prompt)
        self._sink([(key, tokens), (key, Finished(message.id, FinishReason.STOP, Timing()))])

    def cancel(self, key: Key, number: int) -> None:
        """Nothing runs."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LinkServer]:
    made = LinkServer(tmp_path / "unused", TOKEN, "127.0.0.1")
    made.start(cast("Engine", AnsweringEngine(made.sink)))
    yield made
    made.stop()


async def ask(address: Address, seconds: float = 10.0) -> list[Event]:
    async def locate() -> Address:
        return address

    link = EngineLink(locate)
    task = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(seconds):
            while link.facts is None and not task.done():
                await asyncio.sleep(0.01)
        return [event async for event in link.submit((5, 6, 7), Sampling(max_tokens=3), None, 0, 60.0, "")]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def address(server: LinkServer, **changes: Any) -> Address:
    return Address(
        **{"path": "", "token": TOKEN, "replica": "far", "host": "127.0.0.1", "port": server.port, **changes}
    )


def test_a_sequence_goes_and_comes_over_tcp(server: LinkServer) -> None:
    events = asyncio.run(ask(address(server)))
    assert [e.ids for e in events if isinstance(e, Tokens)] == [(5, 6, 7)], events
    assert isinstance(events[-1], Finished)


def test_a_wrong_token_gets_nothing(server: LinkServer) -> None:
    for wrong in ("", "0123456789abcdeg", "\N{SNOWMAN}" * 16):
        with pytest.raises(TimeoutError):
            asyncio.run(ask(address(server, token=wrong), seconds=0.5))


def test_nobody_unproven_makes_us_hold_more_than_a_hello(server: LinkServer) -> None:
    """A first frame that says it is 16 MiB long is hung up on at its length, before any of it is read."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        wire.sendall(struct.pack("<I", 16 << 20))
        assert wire.recv(1) == b""


def test_a_first_frame_that_is_no_hello_is_hung_up_on(server: LinkServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        body = msgspec.msgpack.encode(Submit(1, (1,), Sampling(max_tokens=1)))
        wire.sendall(struct.pack("<I", len(body)) + body)
        assert wire.recv(1) == b""


def test_connections_are_bounded(server: LinkServer) -> None:
    """The 65th is closed at once; those before it may stay silent for five seconds."""
    wires = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(65)]
    try:
        assert wires[64].recv(1) == b""
    finally:
        for wire in wires:
            wire.close()


def test_a_peer_that_falls_silent_is_asked_whether_it_lives(
    server: LinkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that lost its power sends no end of file: both ends probe, and give up after twenty seconds."""
    seen: list[tuple[int, int, int]] = []
    plain = TransportSocket.setsockopt

    def watched(self: Any, *option: int) -> None:
        seen.append(cast("tuple[int, int, int]", option))
        plain(self, *option)

    monkeypatch.setattr(TransportSocket, "setsockopt", watched)
    asyncio.run(ask(address(server)))
    assert seen.count((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)) == 2
    assert seen.count((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)) == 2


def test_nobody_at_the_address_is_not_ready_and_no_error() -> None:
    async def scenario() -> list[Event]:
        async def locate() -> Address:
            return Address("", TOKEN, "gone", "127.0.0.1", 1)

        link = EngineLink(locate)
        task = asyncio.create_task(link.run())
        await asyncio.sleep(0)
        events = [event async for event in link.submit((1,), Sampling(max_tokens=1), None, 0, 1.0, "")]
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return events

    assert [e.code for e in asyncio.run(scenario()) if isinstance(e, Failed)] == ["not_ready"]
