"""An HTTP edge for tests: the real app and registry, a fake engine, over ASGI or a real socket."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from adapters.home import Home
from adapters.records import AdapterVersion, PromptFormat
from adapters.registry import Registry
from serving.api.app import build_app, build_gateway
from serving.api.server import uvicorn_config
from serving.config import EdgeSettings
from serving.gateway import Gateway
from serving.metrics import Metrics
from serving.warden import Warden
from tests.adapter_factory import adapter_files, base_record
from tests.fakes import VOCABULARY, ByteTokenizer, FakeEngine

URL = "http://127.0.0.1"


@dataclass
class Case:
    """Everything of one edge, at hand."""

    app: FastAPI
    engine: FakeEngine
    gateway: Gateway
    registry: Registry
    settings: EdgeSettings
    metrics: Metrics

    @property
    def warden(self) -> Warden:
        """What makes this edge follow the registry's decrees; `follow` once, or `run` it."""
        found: Warden = self.app.state.services.warden
        return found

    def publish(
        self, name: str = "summarize", seed: int = 0, *, promote: bool = True, fmt: PromptFormat | None = None
    ) -> AdapterVersion:
        """Publish a small adapter and, by force, make it the champion."""
        files: Any = adapter_files(seed)
        version = self.registry.publish(name, files, prompt_format=fmt, facts={}, who="test", note="")
        if promote:
            self.registry.promote(name, version.number, who="test", reason="test", force=True)
        return version

    def client(self, **options: Any) -> httpx.AsyncClient:
        """A client straight into the app, which answers whole."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=URL, **options)


def make_case(folder: Path, engine: FakeEngine | None = None, **settings: Any) -> Case:
    """An edge with one base, `tiny`, and no adapters."""
    shutil.copytree(_home(), folder, dirs_exist_ok=True)
    return open_case(Home.find(folder), engine, **settings)


def open_case(home: Home, engine: FakeEngine | None = None, **settings: Any) -> Case:
    """An edge on a home that is there, beside others perhaps; it gets the base if it has none."""
    engine = engine or FakeEngine()
    registry = Registry.open(home)
    base = registry.add_base(base_record("tiny", vocab_size=VOCABULARY))
    chosen = EdgeSettings(**settings)
    gateway, metrics = build_gateway(engine, registry, base, ByteTokenizer(), chosen)
    return Case(build_app(gateway, registry, chosen, metrics), engine, gateway, registry, chosen, metrics)


@cache
def _home() -> str:
    """A home with the base in it, made once a run: its tables cost more than all else of a case."""
    folder = tempfile.mkdtemp(prefix="lp-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    registry = Registry.open(Home.find(folder))
    registry.add_base(base_record("tiny", vocab_size=VOCABULARY))
    registry.close()
    return folder


@contextmanager
def served(case: Case) -> Iterator[str]:
    """The case on a real socket with all limits, in a thread with a loop of its own. Yields its URL."""
    settings = case.settings.model_copy(update={"port": 0})
    server = uvicorn.Server(uvicorn_config(case.app, settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"{URL}:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Poll until the condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)
