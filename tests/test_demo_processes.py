"""However the demo ends, what it started ends with it: Ctrl-C at any stage, children that will not hear, and theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtests.processes import Child, interruptible

ROOT = Path(__file__).resolve().parents[1]
# A child that will not hear SIGTERM, with a grandchild in a session of its own; it tells the grandchild's pid.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_stubborn_child_and_its_child_in_another_session_are_gone_after_stop() -> None:
    child = Child([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert child.popen.stdout is not None
    grandchild = int(child.popen.stdout.readline())
    assert lives(grandchild)
    child.stop(grace_s=0.2)
    assert not lives(child.popen.pid)
    assert not lives(grandchild)


def test_orphans_in_the_childs_session_are_gone_too() -> None:
    """The child ends by itself and leaves a process behind, which nobody looked at in time."""
    orphan = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    )
    child = Child([sys.executable, "-c", orphan], stdout=subprocess.PIPE)
    assert child.popen.stdout is not None
    pid = int(child.popen.stdout.readline())
    child.popen.wait(10)
    assert lives(pid)
    child.stop()
    assert not lives(pid)


def test_a_child_that_hears_is_given_the_time_to_end() -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    child = Child([sys.executable, "-c", polite], stdout=subprocess.PIPE)
    assert child.popen.stdout is not None
    child.popen.stdout.readline()
    child.stop(grace_s=30)
    assert child.popen.returncode == 7


def test_a_signal_while_a_child_is_being_started_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal falls between the fork and the moment at which the caller could know of the child."""
    pids: list[int] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            pids.append(self.pid)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt), interruptible():
        Child([sys.executable, "-c", "import time; time.sleep(600)"])
    assert len(pids) == 1
    assert not lives(pids[0])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "LORAPLANE_HOME": str(tmp_path / "home"), "COLUMNS": "120"}


def start_demo(base: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "demo.py"), "--quick", "--base", str(base)],
            env=environment, stdout=out, stderr=out, text=True, start_new_session=True,
        )  # fmt: skip


def family(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


@pytest.fixture
def killed_at_the_end() -> Iterator[list[subprocess.Popen[str]]]:
    """Demos of a failed test do not outlive it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for child in family(process.pid):
                child.kill()
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupt_in_the_first_stage_leaves_nothing_running(
    number: signal.Signals,
    tiny_base: Path,
    environment: dict[str, str],
    tmp_path: Path,
    killed_at_the_end: list[subprocess.Popen[str]],
) -> None:
    log = tmp_path / "demo.log"
    demo = start_demo(tiny_base, environment, log)
    killed_at_the_end.append(demo)
    wait_until(lambda: demo.poll() is not None or bool(family(demo.pid)), 30, "the demo runs a command")
    children = family(demo.pid)
    assert children, log.read_text()
    demo.send_signal(number)
    assert demo.wait(40) == 130, log.read_text()
    assert not [p for p in children if lives(p.pid)]
    assert "nothing was left running" in log.read_text()


@pytest.mark.slow
def test_the_whole_story_holds_after_one_that_was_stopped_under_its_server(
    tiny_base: Path, environment: dict[str, str], tmp_path: Path, killed_at_the_end: list[subprocess.Popen[str]]
) -> None:
    """Small in everything; two minutes. The first demo is stopped while Ray and the engine run."""
    log = tmp_path / "first.log"
    first = start_demo(tiny_base, environment, log)
    killed_at_the_end.append(first)
    wait_until(lambda: first.poll() is not None or "[8]" in log.read_text(), 240, "the server answers")
    children = family(first.pid)
    assert any("raylet" in p.name() for p in children), log.read_text()
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130, log.read_text()
    assert not [p for p in children if lives(p.pid)]

    second = start_demo(tiny_base, environment, tmp_path / "second.log")
    killed_at_the_end.append(second)
    code = second.wait(240)
    told = (tmp_path / "second.log").read_text()
    assert code == 0, told
    assert "reused: docstring-summary@1, which this very run made before" in told
    assert "reused: the report of docstring-summary@1" in told
    assert "✓ the gate refuses docstring-summary@2" in told
    assert "✓ the running stream kept its version and digest to the end" in told
