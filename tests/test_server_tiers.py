"""One real server before a shared store: what a new engine finds on the disk, and what it makes of rot there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live_server import LiveServer, live_server, wait_for
from tests.test_tiers_store import SEED, flip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("shared")
    with live_server(tiny_base, "--dtype", "float32", "--store", str(store)) as made:
        yield made


def ask(server: LiveServer) -> tuple[str, str]:
    """(the answer, the tier that its adapter came from)."""
    wanted = {"model": "ours@1", "prompt": "hello", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    with server.client() as client:
        answer = client.post("/v1/completions", json=wanted)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers["x-adapter-cache"]


def replace_engine(server: LiveServer) -> None:
    """Kill the engine; return when another one answers."""
    engine = server.engine()
    assert engine is not None
    engine.kill()
    wait_for(lambda: (found := server.engine()) is not None and found.pid != engine.pid, 60, "a new engine")
    server.wait_ready()


def test_a_new_engine_has_it_from_the_disk_and_from_the_store_when_the_disk_has_rotted(
    server: LiveServer, tiny_adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    published = server.cli("adapters", "publish", "ours", str(tiny_adapters[0]), "--json")
    assert published.returncode == 0, published.stderr
    expected, source = ask(server)
    assert (source, ask(server)) == ("store", (expected, "device"))
    wait_for(lambda: server.gauge("adapter_disk_bytes") > 0, 20, "the packed file")

    replace_engine(server)
    assert ask(server) == (expected, "disk")

    (packed,) = (server.home / "packed").glob("*.packed")
    flip(packed, random.Random(SEED))
    shutil.rmtree(server.home / "blobs" / "sha256")  # the shared store has them all
    replace_engine(server)
    assert ask(server) == (expected, "store")
    wait_for(lambda: server.gauge("adapter_healed_total") == 1, 20, "the healed file is told of")
