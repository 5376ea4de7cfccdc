"""Answers of several systems to the same prompts, through the serving engine, each checked for whose weights spoke."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from adapters.errors import (
    Conflict,
    DataRefused,
    InvalidRequest,
    LoraplaneError,
    Overloaded,
    ServerUnreachable,
    Unavailable,
)
from adapters.http_errors import error_from_response
from adapters.prompts import Message, dressed, flat
from adapters.records import PromptFormat
from adapters.reports import Role
from train.data import Row
from train.progress import Reporter

CONCURRENCY = 16
ATTEMPTS = 6
_TIMEOUT_S = 600.0
_LONGEST_WAIT_S = 15.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class System:
    """Who is asked. digest: of the adapter version that must answer, None for the base itself.

    dress: what the base is dressed in before it is asked; a version's own format is the server's business.
    """

    role: Role
    model: str
    digest: str | None
    base_digest: str
    dress: PromptFormat | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """How answers are made: greedy, at most max_tokens long."""

    url: str
    key: str | None
    max_tokens: int


def collect(
    rows: Sequence[Row],
    systems: Sequence[System],
    ask: Ask,
    reporter: Reporter,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[Mapping[Role, str]]:
    """For each row, every system's answer; all in one run, row by row, so that all meet the same conditions.

    Raises Conflict when an answer came from other weights than were asked for, DataRefused with the row when one cannot
    be asked, such as one too long for the server, ServerUnreachable when nobody answers, else what the server raised.
    One failure ends the run: a mean over what happened to succeed would say nothing.
    """
    return asyncio.run(_collect(rows, systems, ask, reporter, transport))


async def _collect(
    rows: Sequence[Row],
    systems: Sequence[System],
    ask: Ask,
    reporter: Reporter,
    transport: httpx.AsyncBaseTransport | None,
) -> list[Mapping[Role, str]]:
    found: list[dict[Role, str]] = [{} for _ in rows]
    waiting = [(i, system) for i in range(len(rows)) for system in systems]
    total, done = len(waiting), 0
    queue = iter(waiting)
    reporter.begin("answers", total)

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal done
        for i, system in queue:  # shared: each worker takes the next one
            found[i][system.role] = await _answer(client, rows[i], system, ask)
            done += 1
            reporter.step(done)

    async with httpx.AsyncClient(
        base_url=ask.url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {ask.key}"} if ask.key else {},
        timeout=httpx.Timeout(_TIMEOUT_S, connect=10.0),
        transport=transport,
        # A proxy of the environment must not come between us and our own machine.
        trust_env=urlsplit(ask.url).hostname not in _LOOPBACK,
    ) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CONCURRENCY, total)):
                    group.create_task(work(client))
        except* LoraplaneError as errors:
            raise errors.exceptions[0] from None
        finally:
            reporter.end()
    return list(found)


async def _answer(client: httpx.AsyncClient, row: Row, system: System, ask: Ask) -> str:
    path, body = _request(row, system, ask)
    attempt = 0
    while True:
        attempt += 1
        try:
            response = await client.post(path, json=body)
        except httpx.HTTPError as error:
            raise ServerUnreachable(f"{ask.url} does not answer ({error or type(error).__name__})") from error
        if not response.is_error:
            return _checked(response, system)
        problem = error_from_response(response)
        if isinstance(problem, InvalidRequest):
            # Too long for this server, or refused by the base's template: of many rows, this one.
            raise DataRefused(f"row {row.id} cannot be asked of {system.model}: {problem}") from problem
        if attempt == ATTEMPTS or not isinstance(problem, Overloaded | Unavailable) or problem.retry_after_s is None:
            raise problem
        await asyncio.sleep(min(problem.retry_after_s, _LONGEST_WAIT_S))


def _request(row: Row, system: System, ask: Ask) -> tuple[str, dict[str, object]]:
    body: dict[str, object] = {"model": system.model, "max_tokens": ask.max_tokens, "temperature": 0}
    turns: Sequence[Message] = row.prompt
    if system.dress is not None:
        turns = dressed(turns, system.dress)
        if system.dress.stops:
            body["stop"] = list(system.dress.stops)
        if system.dress.style == "text":
            return "/v1/completions", {**body, "prompt": flat(turns)}
    return "/v1/chat/completions", {**body, "messages": [{"role": m.role, "content": m.content} for m in turns]}


def _checked(response: httpx.Response, system: System) -> str:
    """The answer's text. Raises Conflict when it does not name the weights that were to answer."""
    try:
        body = response.json()
        spoke = (body["adapter_digest"], body["base_digest"])
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServerUnreachable(f"{response.url.host} does not answer as a Loraplane server; check the URL") from error
    if spoke != (system.digest, system.base_digest):
        raise Conflict(
            f"{system.model} was answered by adapter {spoke[0]} on base {spoke[1]}, not by {system.digest} on "
            f"{system.base_digest}; nothing is scored. Does the server hold the same registry?"
        )
    return str(text or "")
