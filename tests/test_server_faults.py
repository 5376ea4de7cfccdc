"""One real server with its Ray, kept for all tests here: parity over HTTP, deaths, disconnects, refusals, draining.

The order is the file's: the last tests kill the engine and then stop the server.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from adapters.prompts import Message, Renderer
from adapters.records import PromptFormat
from tests.live_server import LiveServer, live_server, wait_for
from tests.tiny_base import Oracle

SEED = 20261121
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server(tiny_base: Path, tiny_adapters: list[Path]) -> Iterator[LiveServer]:
    with live_server(tiny_base, "--dtype", "float32", "--max-rows", "8", "--slots", "2", "--queue", "16") as made:
        for name, folder in (("alpha", tiny_adapters[0]), ("beta", tiny_adapters[1]), ("gamma", tiny_adapters[2])):
            published = made.cli("adapters", "publish", name, str(folder), "--json")
            assert published.returncode == 0, published.stderr
            promoted = made.cli("promote", f"{name}@1", "--force", "--reason", "fixture", "--json")
            assert promoted.returncode == 0, promoted.stderr
        yield made


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
        **more,
    }


def test_a_mixed_batch_over_http_answers_as_each_adapter_alone(
    server: LiveServer, tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    """Base and three adapters through two slots, 12 requests at a time: text equals the oracle's, digest is named."""
    renderer = Renderer(tiny_base)
    oracles = {
        "base": Oracle(tiny_base, None),
        **{n: Oracle(tiny_base, a) for n, a in zip(("alpha", "beta", "gamma"), tiny_adapters, strict=False)},
    }
    asked = [(name, f"question {i}") for i in range(6) for name in oracles]
    random.Random(SEED).shuffle(asked)
    with server.client() as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda a: client.post("/v1/chat/completions", json=chat(*a)).json(), asked))
        versions = {n: client.get(f"/v1/adapters/{n}").json() for n in ("alpha", "beta", "gamma")}
    for (name, text), answer in zip(asked, answers, strict=True):
        ids = oracles[name].greedy(renderer.chat([Message("user", text)], PromptFormat()), 24)
        assert answer["choices"][0]["message"]["content"] == renderer.decode(ids), (name, text)
        if name != "base":
            assert answer["model"] == f"{name}@1"
            assert answer["adapter_digest"] in json.dumps(versions[name])


def test_the_strict_openai_sdk_is_content_with_the_real_server(server: LiveServer) -> None:
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="unused", max_retries=0, _strict_response_validation=True
    )
    whole = client.chat.completions.create(model="alpha", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    assert whole.model == "alpha@1"
    stream = client.chat.completions.create(
        model="beta@1",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert {c.model for c in chunks} == {"beta@1"}
    assert chunks[-1].usage is not None
    text = client.completions.create(model="base", prompt=["a", "b"], max_tokens=4, n=2, seed=7, logprobs=2)
    assert [c.index for c in text.choices] == [0, 1, 2, 3]
    assert {m.id for m in client.models.list()} >= {"base", "alpha", "beta@1"}
    with pytest.raises(openai.NotFoundError, match="alpha"):
        client.chat.completions.create(model="alpa", messages=[{"role": "user", "content": "hi"}])


def test_a_prompt_is_scored_over_http_as_the_reference_scores_it(
    server: LiveServer, tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    """As lm-eval asks: ids in, one token more, everything repeated; its sum over a continuation is the reference's."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    prompts = [[rng.randrange(3, 250) for _ in range(length)] for length in (2, 30, 90, 200)]
    wishes = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    for name, adapter in (("base", None), ("beta", tiny_adapters[1])):
        oracle = Oracle(tiny_base, adapter)
        with server.client() as client:
            answer = client.post("/v1/completions", json={"model": name, "prompt": prompts, **wishes}).json()
        for prompt, choice in zip(prompts, answer["choices"], strict=True):
            told = choice["logprobs"]
            table = torch.log_softmax(oracle.logits(prompt), dim=-1)
            expected = [float(table[at, token]) for at, token in enumerate(prompt[1:])]
            assert told["token_logprobs"][0] is None
            assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-3)
            best = [max(top.values()) for top in told["top_logprobs"][1:-1]]
            assert best == pytest.approx(table.amax(dim=-1)[:-1].tolist(), abs=1e-3)


def test_a_flip_under_a_running_stream_leaves_it_and_moves_the_next(
    server: LiveServer, tiny_adapters: list[Path]
) -> None:
    published = server.cli("adapters", "publish", "alpha", str(tiny_adapters[3]), "--json")
    assert published.returncode == 0, published.stderr
    seen: list[str] = []
    with server.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=chat("alpha", stream=True, max_tokens=300)) as stream:
            lines = stream.iter_lines()
            seen.append(_model(next(lines)))
            flipped = client.post("/v1/adapters/alpha/promote", json={"version": 2, "reason": "better", "force": True})
            assert flipped.status_code == 200, flipped.text
            after = client.post("/v1/chat/completions", json=chat("alpha")).json()
            seen += [_model(line) for line in lines if line.startswith("data: {")]
        assert set(seen) == {"alpha@1"}
        assert after["model"] == "alpha@2"
        back = client.post("/v1/adapters/alpha/rollback", json={"reason": "was better before"})
        assert back.status_code == 200, back.text
        assert client.post("/v1/chat/completions", json=chat("alpha")).json()["model"] == "alpha@1"
    moves = json.loads(server.cli("history", "alpha", "--json").stdout)["data"]
    assert [m["action"] for m in moves] == ["rollback", "forced", "forced"]


def _model(line: str) -> str:
    return str(json.loads(line.removeprefix("data: "))["model"])


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_F11_clients_that_hang_up_at_any_byte_leave_nothing_behind(server: LiveServer, count: int) -> None:
    """Disconnects at a random byte of the stream, then every gauge is back at zero, leases and quarantine too."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(chat("gamma", stream=True, max_tokens=400)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    request = head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body

    def hang_up(wanted: int) -> None:
        with socket.create_connection((host, int(port)), timeout=30) as wire:
            wire.sendall(request)
            got = 0
            while got < wanted and (data := wire.recv(min(4096, wanted - got))):
                got += len(data)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hang_up, [rng.randrange(0, 6000) for _ in range(count)]))
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "adapter_leases", "adapter_quarantined"):
        wait_for(lambda name=name: server.gauge(name) == 0, 30, name)  # type: ignore[misc]


def test_a_full_queue_answers_429_and_loses_nobody(server: LiveServer) -> None:
    """8 rows and 16 waiting places, 60 requests at once: each is answered in full or told when to come back."""
    with server.client() as client, ThreadPoolExecutor(60) as pool:
        answers = list(
            pool.map(
                lambda i: client.post("/v1/chat/completions", json=chat("base", f"q{i}", max_tokens=300)), range(60)
            )
        )
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 24
    for answer in answers:
        if answer.status_code == 429:
            assert 0 < float(answer.headers["retry-after"]) < 120
            assert answer.json()["error"]["code"] == "queue_full"
        else:
            assert answer.json()["usage"]["completion_tokens"] == 300


def test_F16_a_60_mb_header_is_cut_and_others_do_not_notice(server: LiveServer) -> None:
    """F-16 at full size, one client: it is refused unread, and its neighbours are answered meanwhile."""
    host, port = server.url.removeprefix("http://").split(":")
    worst: list[float] = []
    stop = threading.Event()

    def neighbour() -> None:
        with server.client() as client:
            while not stop.is_set() or len(worst) < 5:
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                worst.append(time.monotonic() - begun)

    thread = threading.Thread(target=neighbour)
    thread.start()
    try:
        with socket.create_connection((host, int(port)), timeout=30) as wire:
            wire.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-big: ")
            sent, chunk = 0, b"a" * (1 << 20)
            try:
                for _ in range(60):
                    wire.sendall(chunk)
                    sent += len(chunk)
                answer = wire.recv(64)
            except OSError:
                answer = b""
        assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
        assert sent < 60 << 20
    finally:
        stop.set()
        thread.join()
    print(f"slowest of {len(worst)} neighbours: {max(worst):.2f} s")


def test_F01_kill_9_of_the_engine_ends_each_stream_once_and_service_returns(server: LiveServer) -> None:
    """F-01 at reduced scale: 3 kills, 6 streams each: 18 of 18 end by C1, 503 + retry-after meanwhile, back in 30 s."""
    for kill in range(3):
        started = threading.Barrier(7)

        def stream(number: int, started: threading.Barrier = started) -> tuple[str, int]:
            body = chat(("base", "beta", "gamma")[number % 3], f"s{number}", stream=True, max_tokens=480)
            with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                lines = [line for line in _first_then_all(response.iter_lines(), started) if line]
            assert lines[-1] == "data: [DONE]"
            assert lines.count("data: [DONE]") == 1
            last = json.loads(lines[-2].removeprefix("data: "))
            return ("error", 1) if "error" in last else ("complete", last["choices"][0]["finish_reason"] == "length")

        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(stream, i) for i in range(6)]
            engine = server.engine()
            assert engine is not None
            started.wait(timeout=60)
            engine.send_signal(signal.SIGKILL)
            begun = time.monotonic()
            with server.client() as client:
                meanwhile = client.post("/v1/chat/completions", json=chat("base"))
                endings = [f.result(timeout=60) for f in futures]
                assert all(good for _, good in endings)
                assert any(kind == "error" for kind, _ in endings)
                if meanwhile.status_code != 200:
                    assert meanwhile.status_code == 503
                    assert 0 < float(meanwhile.headers["retry-after"]) < 120
                wait_for(
                    lambda client=client: client.post("/v1/chat/completions", json=chat("beta")).status_code == 200,  # type: ignore[misc]
                    30,
                    "the next success",
                )
                print(f"kill {kill}: {endings}, back after {time.monotonic() - begun:.1f} s")
                listed = {m["id"] for m in client.get("/v1/models").json()["data"]}
                assert {"alpha", "beta", "gamma"} <= listed


def _first_then_all(lines: Iterator[str], started: threading.Barrier) -> Iterator[str]:
    yield next(lines)
    started.wait(timeout=60)
    yield from lines


def test_sigterm_lets_the_running_stream_finish_and_leaves_no_process(server: LiveServer) -> None:
    family = server.family()
    with server.client() as client:
        body = chat("base", stream=True, max_tokens=480)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
