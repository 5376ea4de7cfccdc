"""A router over fake replicas, and the directory that names them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from serving.engine.request import Event, Failed, Sampling
from serving.link import Address
from serving.router import Router
from tests.fakes import FakeEngine

SEED = 20261122
X, Y, Z = "x" * 64, "y" * 64, "z" * 64
GREEDY = Sampling(max_tokens=8, temperature=0.0)


class FakeReplica(FakeEngine):
    """A FakeEngine with the life of a link: it can die, which ends what runs there by `engine_lost`."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.dead = asyncio.Event()
        self.failed: list[str] = []
        self.ended = False

    async def submit(self, *arguments: Any, **options: Any) -> AsyncGenerator[Event, None]:
        scripted: Any = super().submit(*arguments, **options)
        async with contextlib.aclosing(scripted) as stream:
            while not self.dead.is_set():
                following = asyncio.ensure_future(anext(stream, None))
                dying = asyncio.ensure_future(self.dead.wait())
                try:
                    await asyncio.wait((following, dying), return_when=asyncio.FIRST_COMPLETED)
                    if following.done() and (event := following.result()) is not None:
                        yield event
                    elif following.done():
                        return
                finally:
                    dying.cancel()
                    following.cancel()
                    await asyncio.wait((following, dying))
        yield Failed(0, "engine_lost", "gone")

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True

    def fail_running(self, code: str, message: str) -> None:
        self.failed.append(code)

    def die(self) -> None:
        self.connected = False
        self.dead.set()


class Fleet:
    """Replicas by name, and the directory that names them."""

    def __init__(self, **replicas: FakeReplica) -> None:
        self.replicas = replicas
        self.named = list(replicas)

    async def directory(self) -> Sequence[Address]:
        return [Address("", "", name) for name in self.named]

    def router(self) -> Router:
        return Router(self.directory, lambda address: self.replicas[address.replica], rng=random.Random(SEED))


@asynccontextmanager
async def routed(fleet: Fleet) -> AsyncIterator[Router]:
    router = fleet.router()
    task = asyncio.create_task(router.run())
    try:
        await until(lambda: len(router.views()) == len(fleet.named))
        yield router
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: object, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def ask(router: Router, adapter: str | None = None, prompt: Sequence[int] = (1, 2, 3)) -> list[Event]:
    return [event async for event in router.submit(prompt, GREEDY, adapter, 0, 60.0, "t")]


def run(scenario: object) -> None:
    asyncio.run(scenario)  # type: ignore[arg-type]
