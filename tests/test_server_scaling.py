"""Serve's autoscaling by the load that engines report: up under load, down after it, and nobody's stream is cut."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from serving.engine.config import EngineConfig
from serving.engine.request import Event, Finished, Sampling, Tokens
from serving.rayenv import prepare
from serving.router import Router
from serving.scaling import Scaling
from serving.server import socket_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def config(base: Path) -> EngineConfig:
    return EngineConfig(
        base_folder=str(base),
        base_name="tiny",
        base_digest="0" * 64,
        family="llama",
        modules={},
        blobs=str(base / "blobs"),
        dtype="float32",
        threads=1,
        max_model_len=512,
        max_rows=4,
    )


def test_replicas_follow_the_load_and_one_that_goes_lets_its_streams_finish(tiny_base: Path) -> None:
    prepare()
    from serving.deployment import EngineCluster

    async def scenario(sockets: Path) -> None:
        scaling = Scaling(1, 1, 2, up_after_s=1.0, down_after_s=2.0)
        cluster = EngineCluster(config(tiny_base), sockets, scaling, drain_s=20.0)
        router = Router(cluster.addresses)
        task = asyncio.create_task(router.run())

        def taking() -> int:
            return sum(view.connected and not view.leaving for view in router.views())

        try:
            await asyncio.to_thread(cluster.start)
            await until(lambda: taking() == 1, 60)
            busy = [asyncio.create_task(_forever(router, number)) for number in range(6)]
            await until(lambda: taking() == 2, 120)
            for work in busy:
                work.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
            # Two streams that never rest until one replica has been told to go: one on each.
            last = [asyncio.create_task(_until_leaving(router, number)) for number in range(2)]
            await until(lambda: any(view.leaving for view in router.views()), 120)
            for events in await asyncio.gather(*last):
                assert isinstance(events[-1], Finished)
                assert sum(len(e.ids) for e in events if isinstance(e, Tokens)) == 400
            await until(lambda: len(router.views()) == 1, 60)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(cluster.stop)

    with socket_folder() as folder:
        asyncio.run(scenario(folder))


async def _ask(router: Router, number: int) -> list[Event]:
    sampling = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)
    return [event async for event in router.submit((number + 3,), sampling, None, 0, 60.0, "")]


async def _forever(router: Router, number: int) -> None:
    while True:
        await _ask(router, number)


async def _until_leaving(router: Router, number: int) -> list[Event]:
    """Ask again and again; the answers that ran while a replica left, or came after, must be whole."""
    while True:
        events = await _ask(router, number)
        if any(view.leaving for view in router.views()) or not isinstance(events[-1], Finished):
            return events


async def until(true: object, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not true():  # type: ignore[operator]
                await asyncio.sleep(0.05)
    assert true()  # type: ignore[operator]
