"""One real server with two engine replicas on its Ray: who answers what, and what a death costs. In the file's order:
the last tests kill a replica and then stop the server."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapters.prompts import Message, Renderer
from adapters.records import PromptFormat
from tests.live_server import LiveServer, live_server, wait_for
from tests.tiny_base import Oracle

pytestmark = pytest.mark.timeout(400)
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")


@pytest.fixture(scope="module")
def server(tiny_base: Path, tiny_adapters: list[Path]) -> Iterator[LiveServer]:
    options = ("--dtype", "float32", "--max-rows", "8", "--slots", "2", "--queue", "16", "--replicas", "2")
    with live_server(tiny_base, *options) as made:
        for name, folder in zip(NAMES, tiny_adapters, strict=False):
            published = made.cli("adapters", "publish", name, str(folder), "--json")
            assert published.returncode == 0, published.stderr
        wait_for(lambda: made.gauge("engine_replicas") == 2, 90, "both replicas")
        yield made


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16, "ignore_eos": True, **more}


def by_replica(server: LiveServer, name: str) -> dict[str, float]:
    """A metric's samples by their replica."""
    with server.client() as client:
        text = client.get("/metrics").text
    return {r: float(v) for r, v in re.findall(rf'^{name}\{{replica="([^"]+)"\}} (\S+)$', text, re.MULTILINE)}


def test_distinct_adapters_keep_apart_and_answer_as_each_alone(
    server: LiveServer, tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    """Four adapters, two replicas of two slots: each lies in one slot of one replica, and nothing is ever evicted."""
    renderer = Renderer(tiny_base)
    oracles = {name: Oracle(tiny_base, folder) for name, folder in zip(NAMES[:4], tiny_adapters, strict=False)}
    with server.client() as client:
        for turn in range(3):
            prompt = renderer.chat([Message("user", f"question {turn}")], PromptFormat())
            for name, oracle in oracles.items():
                answer = client.post("/v1/chat/completions", json=chat(f"{name}@1", f"question {turn}")).json()
                told = answer["choices"][0]["message"]["content"]
                assert told == renderer.decode(oracle.greedy(prompt, 16)), (turn, name)
                assert answer["model"] == f"{name}@1"
    wait_for(lambda: server.gauge("engine_replica_adapters_device") == 4, 10, "all four resident")
    assert sorted(by_replica(server, "engine_replica_adapters_device").values()) == [2, 2]
    assert server.gauge("adapter_loads_total") == 4
    assert server.gauge("adapter_evictions_total") == 0


def test_a_hot_adapter_lands_on_both_replicas(server: LiveServer) -> None:
    """Seven streams of one adapter fill most of its replica's eight rows: the other one gets a copy."""
    before = by_replica(server, "engine_replica_adapters_host")
    assert sorted(before.values()) == [2, 2]
    stop = threading.Event()

    def ask(number: int) -> int:
        asked = 0
        with server.client() as client:
            while not stop.is_set():
                body = chat("alpha@1", "the same question", max_tokens=300)
                assert client.post("/v1/chat/completions", json=body).status_code == 200
                asked += 1
        return asked

    with ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(ask, number) for number in range(7)]
        try:
            wait_for(lambda: max(by_replica(server, "engine_replica_adapters_host").values()) >= 3, 60, "a copy")
        finally:
            stop.set()
        assert sum(future.result() for future in asked) >= 7


def test_choices_of_one_request_share_a_replica_and_requests_spread(server: LiveServer) -> None:
    sent = by_replica(server, "engine_replica_sequences_total")
    with server.client() as client:
        body = {"model": "base", "prompt": "one of four", "n": 4, "max_tokens": 8, "ignore_eos": True}
        assert len(client.post("/v1/completions", json=body).json()["choices"]) == 4
        since = by_replica(server, "engine_replica_sequences_total")
        assert sorted(since[name] - sent[name] for name in sent) == [0, 4]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: client.post("/v1/chat/completions", json=chat("base", f"{i}" * 9)), range(8)))
    spread = by_replica(server, "engine_replica_sequences_total")
    assert all(spread[name] - since[name] >= 2 for name in sent)


def test_what_is_warmed_and_what_is_retired_is_so_on_both_replicas(server: LiveServer) -> None:
    before = by_replica(server, "engine_replica_adapters_host")
    with server.client() as client:
        path = "/v1/adapters/epsilon/versions/1"
        warm = client.post(f"{path}/warm", json={"ttl_s": 60})
        assert warm.status_code == 200, warm.text
        wait_for(lambda: _more(server, before) == [1, 1], 10, "one more on each")
        retired = client.post(f"{path}/retire", json={"reason": "test", "deadline_s": 5})
        assert retired.status_code == 200, retired.text
        wait_for(lambda: _more(server, before) == [0, 0], 10, "gone from each")
        assert client.post("/v1/chat/completions", json=chat("epsilon@1")).status_code in {404, 409, 410}


def _more(server: LiveServer, before: dict[str, float]) -> list[float]:
    after = by_replica(server, "engine_replica_adapters_host")
    return sorted(after[name] - before[name] for name in before)


def test_kill_9_of_a_replica_ends_its_own_streams_alone_and_it_is_replaced(server: LiveServer) -> None:
    """F-01 with two replicas: 8 streams; those of the dead one end by engine_lost, the others in full, and the next
    request is answered within 2 s. /ready never says no. The replacement holds what is pinned."""
    with server.client() as client:
        assert client.put("/v1/adapters/alpha/versions/1/pin").status_code == 200
    started = threading.Barrier(9)

    def stream(number: int) -> str:
        body = chat("base", f"{number}" * 12, stream=True, max_tokens=480)
        with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            lines = [line for line in _first_then_all(response.iter_lines(), started) if line]
        assert lines[-1] == "data: [DONE]"
        assert lines.count("data: [DONE]") == 1
        last = json.loads(lines[-2].removeprefix("data: "))
        return str(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])

    sent = by_replica(server, "engine_replica_sequences_total")
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(stream, i) for i in range(8)]
        started.wait(timeout=60)
        loads = by_replica(server, "engine_replica_load")
        victim = max(loads, key=lambda name: loads[name])
        psutil.Process(int(victim.split("-")[0])).send_signal(signal.SIGKILL)
        begun = time.monotonic()
        since = by_replica(server, "engine_replica_sequences_total")
        with server.client() as client:
            statuses: list[int] = []
            while not statuses or statuses[-1] != 200:
                assert client.get("/ready").status_code == 200
                statuses.append(client.post("/v1/chat/completions", json=chat("beta@1")).status_code)
            recovered = time.monotonic() - begun
        endings = [future.result(timeout=60) for future in futures]
    print(f"{endings}; next success after {recovered:.2f} s, {statuses}")
    assert recovered < 2
    assert set(endings) == {"engine_lost", "length"}
    assert endings.count("engine_lost") <= since[victim] - sent[victim]
    assert endings.count("length") >= sum(since[name] - sent[name] for name in since if name != victim)
    wait_for(lambda: len(_taking(server) - {victim}) == 2, 60, "a replacement")
    print(f"replaced after {time.monotonic() - begun:.1f} s")
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=chat("beta@1")).status_code == 200
    assert server.gauge("engine_replicas") == 2
    # Nobody has asked the new one for it: it was told what is pinned.
    (new,) = _taking(server) - {victim} - set(loads)
    wait_for(lambda: by_replica(server, "engine_replica_adapters_device").get(new, 0) >= 1, 20, "the pinned adapter")


@pytest.mark.slow
def test_a_replica_that_hangs_gets_nothing_new_and_is_replaced(server: LiveServer) -> None:
    """Stopped, not dead: its socket stays open and says nothing. After 3 s everything goes to the other; Ray's checks
    end it, its stream hears `engine_lost`, and a new one comes."""
    victim = min(_taking(server))
    others = _taking(server) - {victim}
    psutil.Process(int(victim.split("-")[0])).send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    wait_for(lambda: by_replica(server, "engine_replica_heartbeat_age_seconds")[victim] > 3.2, 20, "it is silent")
    sent = by_replica(server, "engine_replica_sequences_total")[victim]
    with server.client() as client:
        for number in range(10):
            answer = client.post("/v1/chat/completions", json=chat("base", f"{number}" * 9))
            assert answer.status_code == 200
        assert client.get("/ready").status_code == 200
    assert by_replica(server, "engine_replica_sequences_total")[victim] == sent
    wait_for(lambda: len(_taking(server) - {victim} - others) == 1, 120, "a replacement")
    print(f"replaced after {time.monotonic() - begun:.1f} s")


def _taking(server: LiveServer) -> set[str]:
    return {name for name, value in by_replica(server, "engine_replica_connected").items() if value}


def _first_then_all(lines: Iterator[str], started: threading.Barrier) -> Iterator[str]:
    yield next(lines)
    started.wait(timeout=60)
    yield from lines


def test_sigterm_lets_streams_on_both_replicas_finish_and_leaves_no_process(server: LiveServer) -> None:
    family = server.family()
    started = threading.Barrier(5)

    def stream(number: int) -> str:
        body = chat("base", f"{number}" * 12, stream=True, max_tokens=480)
        with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line for line in _first_then_all(response.iter_lines(), started) if line]
        return str(json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"])

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(stream, i) for i in range(4)]
        started.wait(timeout=60)
        server.process.send_signal(signal.SIGTERM)
        assert [future.result(timeout=60) for future in futures] == ["length"] * 4
    assert server.process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
