"""The data plane between gateway and engine: real sockets, a real engine thread on the tiny base."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine.build import build_engine
from serving.engine.config import EngineConfig
from serving.engine.engine import Engine
from serving.engine.plan import Key, Outgoing
from serving.engine.request import Event, Failed, Finished, Sampling, Submit, Tokens
from serving.link import Address, EngineLink, LinkServer

TOKEN = "0123456789abcdef"


class Replica:
    """An engine and its end of the link, in this process."""

    def __init__(self, base: Path, folder: Path, name: str) -> None:
        self.address = Address(str(folder / name), TOKEN, name)
        self.link = LinkServer(folder / name, TOKEN)
        config = EngineConfig(
            base_folder=str(base),
            base_name="tiny",
            base_digest="0" * 64,
            family="llama",
            modules={},
            blobs=str(folder / "blobs"),
            dtype="float32",
            threads=1,
            max_model_len=256,
            max_rows=4,
            probe_after_s=0.2,
        )
        self.config = config
        self.engine: Engine = build_engine(config, self.link.sink)
        self.engine.start()
        self.link.start(self.engine)

    def stop(self) -> None:
        self.engine.stop()
        self.link.stop()


@pytest.fixture
def replica(tiny_base: Path) -> Iterator[Replica]:
    # A unix socket's path has at most 107 bytes: pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="lp-") as folder:
        made = Replica(tiny_base, Path(folder), "one")
        yield made
        made.stop()


@asynccontextmanager
async def connected(*replicas: Replica) -> AsyncIterator[EngineLink]:
    order = iter([*replicas, *[replicas[-1]] * 1000])

    async def locate() -> Address:
        return next(order).address

    link = EngineLink(locate)
    task = asyncio.create_task(link.run())
    await until(lambda: link.facts is not None)
    try:
        yield link
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(true: object, seconds: float = 20.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(seconds):
        while not true():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def collect(link: EngineLink, count: int, prompt: tuple[int, ...] = (5, 6, 7)) -> list[Event]:
    sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
    return [event async for event in link.submit(prompt, sampling, None, 0, 60.0, "")]


def test_eight_sequences_over_one_socket_each_end_once(replica: Replica) -> None:
    async def scenario() -> None:
        async with connected(replica) as link:
            answers = await asyncio.gather(*(collect(link, 5 + i) for i in range(8)))
            for i, events in enumerate(answers):
                assert sum(len(e.ids) for e in events if isinstance(e, Tokens)) == 5 + i
                assert [isinstance(e, Finished) for e in events] == [False] * (len(events) - 1) + [True]

    asyncio.run(scenario())


def test_closing_the_iterator_frees_the_row(replica: Replica) -> None:
    async def scenario() -> None:
        async with connected(replica) as link:
            sampling = Sampling(max_tokens=250, temperature=0.0, ignore_eos=True)
            stream = link.submit((5, 6, 7), sampling, None, 0, 60.0, "")
            assert isinstance(await anext(stream), Tokens)
            await stream.aclose()  # type: ignore[attr-defined]
            await until(lambda: link.heartbeat is not None and link.heartbeat.running == 0)
            assert link.heartbeat is not None
            assert link.heartbeat.tokens < 250

    asyncio.run(scenario())


def test_a_dead_engine_ends_its_streams_by_name_and_the_next_one_is_found(replica: Replica, tiny_base: Path) -> None:
    async def scenario(second: Replica) -> None:
        async with connected(replica, second) as link:
            sampling = Sampling(max_tokens=250, temperature=0.0, ignore_eos=True)
            stream = link.submit((5, 6, 7), sampling, None, 0, 60.0, "")
            assert isinstance(await anext(stream), Tokens)
            replica.link.stop()
            rest = [event async for event in stream]
            assert [e.code for e in rest if isinstance(e, Failed)] in (["engine_lost"], [])
            assert isinstance(rest[-1], Failed | Finished)
            await until(lambda: link.facts is not None and link.facts.replica == second.engine.facts.replica)
            assert isinstance((await collect(link, 3))[-1], Finished)

    with tempfile.TemporaryDirectory(prefix="lp-") as folder:
        second = Replica(tiny_base, Path(folder), "two")
        try:
            asyncio.run(scenario(second))
        finally:
            second.stop()


def test_a_wrong_token_is_shown_the_door(replica: Replica) -> None:
    async def scenario() -> bytes:
        reader, writer = await asyncio.open_unix_connection(replica.address.path)
        from serving.engine.request import Hello
        from serving.link import _pack

        writer.write(_pack(Hello("wrong")))
        return await reader.read()

    assert asyncio.run(scenario()) == b""


def test_rubbish_on_the_socket_harms_nobody_else(replica: Replica) -> None:
    async def scenario() -> None:
        async with connected(replica) as link:
            for rubbish in (b"\xff" * 64, b"\x04\x00\x00\x00abcd", b"\x00\x00\x00\x00"):
                reader, writer = await asyncio.open_unix_connection(replica.address.path)
                writer.write(rubbish)
                assert await reader.read() == b""
            assert isinstance((await collect(link, 3))[-1], Finished)

    asyncio.run(scenario())


def test_an_idle_engine_proves_itself_by_a_probe(replica: Replica) -> None:
    async def scenario() -> None:
        async with connected(replica) as link:
            await until(lambda: link.heartbeat_age_s < 5 and replica.engine.idle_s < 0.2)
            await asyncio.sleep(0)

    asyncio.run(scenario())


def test_loading_an_adapter_leaves_the_engines_thread_its_own_number_of_threads(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads compute with one thread each: OpenMP pools beside the engine's double the time of every step."""
    seen: list[tuple[str, int]] = []

    def watched(owner: Any, name: str, label: str) -> None:
        plain = getattr(owner, name)

        def call(*args: Any) -> Any:
            seen.append((label, torch.get_num_threads()))
            return plain(*args)

        monkeypatch.setattr(owner, name, call)

    ended = threading.Event()
    config = replace(replica.config, threads=2)
    engine = build_engine(config, lambda outgoing: ended.set() if _ends(outgoing) else None)
    watched(engine._host, "_read", "load")
    watched(engine._runner, "run", "step")
    engine.start()
    for number, adapter in enumerate((None, "0" * 64, None)):  # the load fails, on its own thread
        ended.clear()
        sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)
        engine.submit(Key((0, number)), Submit(number, (5, 6), sampling, adapter))
        assert ended.wait(30)
    engine.stop()
    assert set(seen) == {("load", 1), ("step", 2)}


def _ends(outgoing: Sequence[Outgoing]) -> bool:
    return any(isinstance(event, Finished | Failed) for _, event in outgoing)
