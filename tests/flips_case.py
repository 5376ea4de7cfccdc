"""An edge whose engine says the digest of what it is asked for: whoever answers, shows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import FakeEngine
from tests.gateway_child import say_digest
from tests.http_case import Case, make_case

FORCE = {"force": True, "reason": "test"}


def flips_case(tmp_path: Path) -> Case:
    """summarize@1 is champion, summarize@2 waits. The engine says the digest of whatever it is asked for."""
    case = make_case(tmp_path, FakeEngine(script=say_digest, max_model_len=10_000))
    case.publish("summarize", 1)
    case.publish("summarize", 2, promote=False)
    return case


async def promote(client: httpx.AsyncClient, number: int, **more: Any) -> httpx.Response:
    body = {"version": number, **FORCE, **more}
    return await client.post("/v1/adapters/summarize/promote", json=body)


async def ask(client: httpx.AsyncClient, model: str = "summarize", tokens: int = 4, **more: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": tokens, **more})


async def on(client: httpx.AsyncClient, number: int, verb: str, **body: Any) -> httpx.Response:
    return await client.post(f"/v1/adapters/summarize/versions/{number}/{verb}", json=body)


def digest_of(case: Case, number: int) -> str:
    return case.registry.version("summarize", number).digest


async def until(condition: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def events(text: str) -> list[Any]:
    """The events of a stream, its [DONE] checked and left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
