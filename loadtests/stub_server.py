"""A server that speaks the protocol without a model, and lies on demand: the load tester is tested against it.

python -m loadtests.stub_server [--lie wrong_digest] [--port 8000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BASE_DIGEST = "b" * 64
NAME = "summarize"
_STARTED_WITHIN_S = 10.0
_ODD = 5  # every fifth answer has other words, where that is the lie


class Lie(StrEnum):
    """What the stub does wrong."""

    NONE = "none"
    HTTP_503 = "http_503"
    NOT_A_STREAM = "not_a_stream"
    ERROR_EVENT = "error_event"
    TRUNCATED = "truncated"  # the connection breaks after some tokens
    MISSING_DONE = "missing_done"
    SECOND_DONE = "second_done"
    SILENT_END = "silent_end"  # half an answer, then [DONE], no finish reason
    CUT_SHORT = "cut_short"  # finish_reason length, half the tokens
    AFTER_FINISH = "after_finish"
    NO_USAGE = "no_usage"
    UNNAMED = "unnamed"  # chunks without adapter_digest
    DIGEST_CHANGES = "digest_changes"  # another version's digest from the middle on
    WRONG_DIGEST = "wrong_digest"  # the right name, other weights throughout
    WRONG_VERSION = "wrong_version"
    WRONG_BASE = "wrong_base"
    BASE_ANSWERS = "base_answers"  # the base in place of an adapter
    HEADERS_DISAGREE = "headers_disagree"
    STALE_ALIAS = "stale_alias"  # a name is answered by a version that is champion no more
    WRONG_CONTENT = "wrong_content"  # now and then other words, under the right name and digest
    REGISTRY_DOWN = "registry_down"


def digest_of(number: int) -> str:
    """The digest of a version of the stub's one adapter."""
    return f"{number:064x}"


@dataclass
class Stub:
    """One base and one adapter with `versions` versions, of which `champion` is live. lie: what it does wrong.

    flips: how often the champion moved; `move` moves it, `publish` adds a version. gap_s: between tokens.
    """

    lie: Lie = Lie.NONE
    versions: int = 2
    champion: int = 2
    gap_s: float = 0.002
    asked: int = 0
    moves: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        champion, self.champion = self.champion, 0
        for number in range(1, champion + 1):
            self.move(number)

    def move(self, number: int) -> None:
        """Make a version the champion."""
        self.champion = number
        self.moves.append({"alias": "champion", "to_number": number, "generation": len(self.moves) + 1})

    def publish(self) -> int:
        """The number of a new version, which nobody points at yet."""
        self.versions += 1
        return self.versions

    def app(self) -> Starlette:
        """The routes that a load tester asks."""
        chat, plain = "/v1/chat/completions", "/v1/completions"
        return Starlette(
            routes=[
                Route("/ready", lambda _: JSONResponse({"status": "ready"})),
                Route("/v1/models", self._models),
                Route(f"/v1/adapters/{NAME}", self._adapter),
                Route(f"/v1/adapters/{NAME}/history", lambda _: JSONResponse({"data": self.moves})),
                Route(chat, self._answer, methods=["POST"]),
                Route(plain, self._answer, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        ids: list[tuple[str, int | None]] = [("base", None), (NAME, self.champion)]
        ids += [(f"{NAME}@champion", self.champion), *((f"{NAME}@{n}", n) for n in range(1, self.versions + 1))]
        return JSONResponse({"object": "list", "data": [{"id": id_, **_weights(number)} for id_, number in ids]})

    async def _adapter(self, request: Request) -> Response:
        if self.lie is Lie.REGISTRY_DOWN:
            return JSONResponse({"error": {"code": "store_failed"}}, 503)
        alias = {"alias": "champion", "number": self.champion, "generation": len(self.moves)}
        versions = [{"number": n, "digest": digest_of(n)} for n in range(1, self.versions + 1)]
        return JSONResponse({"name": NAME, "aliases": [alias], "versions": versions})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked += 1
        number = self._number(body["model"])
        if self.lie is Lie.HTTP_503:
            return JSONResponse({"error": {"code": "not_ready", "message": "no"}}, 503)
        if self.lie is Lie.NOT_A_STREAM:
            return JSONResponse({"choices": []})
        if self.lie is Lie.BASE_ANSWERS:
            number = None
        weights = _weights(number)
        headers = {
            "x-adapter": weights["adapter"] or "base",
            "x-base-digest": BASE_DIGEST if self.lie is not Lie.WRONG_BASE else "c" * 64,
        }
        if number is not None:
            headers |= {"x-adapter-version": str(number), "x-adapter-digest": digest_of(number)}
        if self.lie is Lie.HEADERS_DISAGREE:
            headers["x-adapter-digest"] = digest_of(99)
        elif self.lie is Lie.WRONG_DIGEST and number is not None:
            headers["x-adapter-digest"] = digest_of(number + 7)
        stream = self._stream(number, int(body["max_tokens"]), "messages" in body)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    def _number(self, model: str) -> int | None:
        if model == "base":
            return None
        number = int(model.partition("@")[2]) if model[-1].isdigit() else self.champion
        if self.lie is Lie.WRONG_VERSION:
            return number + 1
        if self.lie is Lie.STALE_ALIAS and not model[-1].isdigit():
            return number - 1
        return number

    async def _stream(self, number: int | None, max_tokens: int, chat: bool) -> AsyncIterator[bytes]:
        half = max(1, max_tokens // 2)
        word = "x" if self.lie is Lie.WRONG_CONTENT and self.asked % _ODD == 0 else "w"
        for i in range(max_tokens):
            await asyncio.sleep(self.gap_s)
            if i >= half:
                if self.lie is Lie.TRUNCATED:
                    raise ConnectionResetError("the stub cuts the body")
                if self.lie is Lie.ERROR_EVENT:
                    yield _event({"error": {"code": "engine_lost", "message": "the engine died"}})
                    yield b"data: [DONE]\n\n"
                    return
                if self.lie is Lie.SILENT_END:
                    break
            last = i == max_tokens - 1 or (self.lie is Lie.CUT_SHORT and i + 1 >= half)
            finish = "length" if last and self.lie is not Lie.SILENT_END else None
            yield _event({**self._named(number, i), "choices": [_choice(chat, f"{word}{i} ", finish)]})
            if last:
                break
        if self.lie is Lie.AFTER_FINISH:
            yield _event({**self._named(number, 0), "choices": [_choice(chat, "more", None)]})
        if self.lie is not Lie.NO_USAGE:
            usage = {"prompt_tokens": 3, "completion_tokens": half if self.lie is Lie.CUT_SHORT else max_tokens}
            yield _event({**self._named(number, 0), "choices": [], "usage": usage})
        if self.lie is not Lie.MISSING_DONE:
            yield b"data: [DONE]\n\n"
        if self.lie is Lie.SECOND_DONE:
            yield b"data: [DONE]\n\n"

    def _named(self, number: int | None, index: int) -> dict[str, Any]:
        weights = _weights(number)
        if self.lie is Lie.WRONG_BASE:
            weights["base_digest"] = "c" * 64
        if number is None:
            return {"model": "base", **weights}
        if self.lie is Lie.UNNAMED:
            del weights["adapter_digest"]
        elif self.lie is Lie.WRONG_DIGEST or (self.lie is Lie.DIGEST_CHANGES and index > 0):
            weights["adapter_digest"] = digest_of(number + 7)
        return {"model": f"{NAME}@{number}", **weights}


def _weights(number: int | None) -> dict[str, Any]:
    return {
        "adapter": None if number is None else NAME,
        "adapter_version": number,
        "adapter_digest": None if number is None else digest_of(number),
        "base_digest": BASE_DIGEST,
    }


def _choice(chat: bool, text: str, finish: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    return {"index": 0, "finish_reason": finish, **content}


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


@contextlib.contextmanager
def serving(stub: Stub, port: int = 0) -> Iterator[str]:
    """The stub on a socket, in a thread. Yields its URL."""
    # log_config None: uvicorn's own would close every log handler of this process, and with one of them its stderr.
    config = uvicorn.Config(
        stub.app(), host="127.0.0.1", port=port, log_level="critical", log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _STARTED_WITHIN_S
        while not server.started:
            if time.monotonic() > deadline:
                raise TimeoutError("the stub did not start")
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.stub_server")
    parser.add_argument("--lie", type=Lie, default=Lie.NONE, choices=list(Lie), help="what it does wrong")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    options = parser.parse_args()
    with serving(Stub(options.lie), options.port) as url, contextlib.suppress(KeyboardInterrupt):
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
