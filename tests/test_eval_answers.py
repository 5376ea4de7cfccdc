"""Answers come through the serving engine: from the weights that were asked for, or the run ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters.errors import Conflict, DataRefused, NotReady, ServerUnreachable
from adapters.home import Home
from adapters.prompts import Message
from adapters.records import PromptFormat
from adapters.reports import Role
from loadtests.processes import loraplane
from train.answers import ATTEMPTS, CONCURRENCY, Ask, System, collect
from train.child import private_server, serve_command
from train.data import Row
from train.progress import Quiet

ROWS = [Row(str(i), (Message("user", f"question {i}"), Message("assistant", "x"))) for i in range(40)]
CANDIDATE = System(Role.CANDIDATE, "a@3", "c" * 64, "b" * 64)
DRESS = PromptFormat(system="Be brief.", prefix="<", suffix=">", stops=("\n",))
BASE = System(Role.BASE, "base", None, "b" * 64, DRESS)
FAKE = [sys.executable, str(Path(__file__).with_name("fake_serve.py"))]


class Server:
    """Answers `model: last message`, and remembers what it was asked. odd: what to answer instead, by call number."""

    def __init__(self, odd: Callable[[int], httpx.Response | None] = lambda call: None) -> None:
        self.odd, self.asked, self.paths = odd, [], []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body: dict[str, Any] = json.loads(request.content)
        self.asked.append(body)
        self.paths.append(request.url.path)
        odd = self.odd(len(self.asked))
        if odd is not None:
            return odd
        return answer(body)

    asked: list[dict[str, Any]]
    paths: list[str]


def answer(body: dict[str, Any], **changed: object) -> httpx.Response:
    last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    text = f"{body['model']}: {last}"
    whose = None if body["model"] == "base" else "c" * 64
    fields = {"adapter_digest": whose, "base_digest": "b" * 64, **changed}
    choice = {"message": {"content": text}} if "messages" in body else {"text": text}
    return httpx.Response(200, json={"choices": [choice], **fields})


def failing(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": code, "code": code}}, headers=headers)


def ask(server: Server, *systems: System, rows: list[Row] = ROWS) -> list[Any]:
    return collect(rows, systems, Ask("http://test", "lp_key", 9), Quiet(), httpx.MockTransport(server))


def test_every_row_gets_every_systems_answer() -> None:
    server = Server()
    found = ask(server, BASE, CANDIDATE)
    assert [f[Role.CANDIDATE] for f in found] == [f"a@3: question {i}" for i in range(40)]
    assert [f[Role.BASE] for f in found] == [f"base: <question {i}>" for i in range(40)]
    assert all((body["temperature"], body["max_tokens"]) == (0, 9) for body in server.asked)


def test_systems_are_asked_side_by_side_rather_than_one_after_the_other() -> None:
    server = Server()
    ask(server, BASE, CANDIDATE)
    assert {body["model"] for body in server.asked[: CONCURRENCY + 2]} == {"base", "a@3"}


def test_the_base_is_dressed_as_the_candidate_and_the_candidate_by_the_server() -> None:
    server = Server()
    ask(server, BASE, CANDIDATE, rows=ROWS[:1])
    base, candidate = sorted(server.asked, key=lambda body: body["model"] != "base")
    assert base["messages"][0] == {"role": "system", "content": "Be brief."}
    assert base["stop"] == ["\n"]
    assert candidate["messages"] == [{"role": "user", "content": "question 0"}]


def test_a_text_format_asks_the_base_for_a_completion() -> None:
    server = Server()
    plain = System(Role.BASE, "base", None, "b" * 64, PromptFormat(style="text", prefix="Q: ", suffix=" A:"))
    assert ask(server, plain, rows=ROWS[:1]) == [{Role.BASE: "base: Q: question 0 A:"}]
    assert server.paths == ["/v1/completions"]


@pytest.mark.parametrize("wrong", [{"adapter_digest": "d" * 64}, {"adapter_digest": None}, {"base_digest": "d" * 64}])
def test_an_answer_from_other_weights_ends_the_run(wrong: dict[str, object]) -> None:
    server = Server(lambda call: answer(server.asked[-1], **wrong) if call == 20 else None)
    with pytest.raises(Conflict, match="a@3 was answered by"):
        ask(server, CANDIDATE)


def test_a_busy_server_is_asked_again_and_a_dead_one_not_for_ever() -> None:
    busy = Server(lambda call: failing(503, "not_ready", **{"retry-after": "0"}) if call < 4 else None)
    assert len(ask(busy, CANDIDATE, rows=ROWS[:1])) == 1
    dead = Server(lambda call: failing(503, "not_ready", **{"retry-after": "0"}))
    with pytest.raises(NotReady):
        ask(dead, CANDIDATE, rows=ROWS[:1])
    assert len(dead.asked) == ATTEMPTS


def test_a_refusal_is_not_asked_again_and_names_its_row() -> None:
    server = Server(lambda call: failing(400, "invalid_value"))
    with pytest.raises(DataRefused, match="row 0 cannot be asked of a@3"):
        ask(server, CANDIDATE, rows=ROWS[:1])
    assert len(server.asked) == 1


def test_what_is_no_loraplane_server_is_told() -> None:
    with pytest.raises(ServerUnreachable, match="check the URL"):
        ask(Server(lambda call: httpx.Response(200, text="hello")), CANDIDATE)


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
            return True
        time.sleep(0.02)
    return False


def pids_of(home: Home) -> list[int]:
    return [int(p) for p in (home.root / "pids").read_text().split()]


def test_a_private_server_lives_as_long_as_the_job_and_leaves_nothing(tmp_path: Path) -> None:
    """Its own child ignores SIGTERM, as an engine may; the whole group is gone all the same."""
    home = Home.find(tmp_path)
    with private_server(home, "base", lambda _: None, FAKE) as url:
        assert httpx.get(f"{url}/ready").is_success
        assert home.server() is not None
    assert gone(pids_of(home))
    assert home.server() is None


def test_a_private_server_starts_from_a_folder_that_holds_packages_of_the_same_names(tmp_path: Path) -> None:
    """`No module named 'serving.cli'` was all one got in a project with a folder of its own called serving."""
    for room in ("adapters", "serving", "train"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    for line in (serve_command("base"), loraplane("serve")):
        done = subprocess.run([*line, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_private_server_is_stopped_when_the_job_fails(tmp_path: Path) -> None:
    home = Home.find(tmp_path)
    with pytest.raises(ZeroDivisionError), private_server(home, "base", lambda _: None, FAKE):
        _ = 1 / 0
    assert gone(pids_of(home))


def test_a_private_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerUnreachable, match=r"code 4: error\[base_missing\]: no such base"),
        private_server(Home.find(tmp_path), "base", lambda _: None, [*FAKE, "--fail", "no such base"]),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_job_stops_its_server_too(tmp_path: Path, number: signal.Signals) -> None:
    job = (
        "import sys, time\nfrom adapters.home import Home\nfrom train.child import private_server, serve_command\n"
        "with private_server(Home.find(sys.argv[1]), 'base', print, sys.argv[2:]) as url:\n"
        "    print(url, flush=True)\n    time.sleep(600)\n"
    )
    line = [sys.executable, "-c", job, str(tmp_path), *FAKE]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        out = process.stdout
        assert out is not None
        while "http://" not in out.readline():
            assert process.poll() is None
        process.send_signal(number)
        process.wait(timeout=30)
    assert gone(pids_of(Home.find(tmp_path)))
