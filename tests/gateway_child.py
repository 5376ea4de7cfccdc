"""A gateway in a process of its own, on a home that others share: prints its URL, and stops when its input ends.

Its engine is a fake that says the digest of whatever it was asked for, slowly.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import uvicorn

from adapters.home import Home
from serving.api.server import uvicorn_config
from tests.fakes import FakeEngine, Submission
from tests.http_case import URL, open_case


def say_digest(submission: Submission) -> Sequence[int]:
    """The digest over and over, until max_tokens."""
    digest = (submission.adapter or "base").encode()
    return [digest[at % len(digest)] for at in range(submission.sampling.max_tokens)]


async def serve(folder: str) -> None:
    engine = FakeEngine(script=say_digest, pause_s=0.02, max_model_len=100_000)
    case = open_case(Home.find(folder), engine)
    server = uvicorn.Server(uvicorn_config(case.app, case.settings.model_copy(update={"port": 0})))
    serving = asyncio.create_task(server.serve())
    watching = asyncio.create_task(case.warden.run())
    while not server.started:
        await asyncio.sleep(0.01)
    print(f"{URL}:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    watching.cancel()
    server.should_exit = server.force_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
