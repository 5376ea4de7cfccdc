"""The training bench: rows like DialogSum's, sides that take turns, and one loss curve whoever trains."""

from __future__ import annotations

import io
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters.prompts import Renderer
from adapters.records import PromptFormat
from loadtests import bench_train
from loadtests.bench_shell import BenchFailed
from loadtests.bench_train import LONG, SHORT, Sided, curve_difference, lengths, make_sides, synthetic, take_turns, told
from loadtests.goals import Word
from loadtests.peers import PeerFailed
from loadtests.train_side import OURS, PLAIN, PLAIN_OURS, Told, train_ours, train_plain
from train.data import render

SEED = 20261122


def test_lengths_are_like_those_of_dialogsum() -> None:
    """Its dialogues have a median of 195 tokens, its summaries one of 32, long ones together."""
    print(f"seed {SEED}")
    drawn = [lengths(rng) for rng in [random.Random(SEED)] for _ in range(4000)]
    prompts, answers = zip(*drawn, strict=True)
    assert statistics.median(prompts) == pytest.approx(192, abs=8)
    assert statistics.median(answers) == pytest.approx(32, abs=2)
    assert statistics.correlation(prompts, answers) > 0.5
    assert max(p + a for p, a in drawn) < bench_train.MAX_LENGTH


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_every_side_has_a_turn_that_counts(size: bench_train.Size) -> None:
    assert size.batches > size.turn


def test_all_sides_train_on_the_same_rows(tiny_base: Path) -> None:
    renderer = Renderer(tiny_base)
    rows = synthetic(renderer, renderer.vocab_size, 12)
    examples = render(rows, renderer, PromptFormat(), bench_train.MAX_LENGTH).examples  # every row fits
    sides = make_sides(examples, 4)
    assert all(sorted(i for batch in batches for i in batch) == list(range(12)) for batches in sides.values())
    assert sides[OURS] == sides[PLAIN_OURS] != sides[PLAIN]


class FakeWorker:
    """A side whose steps take a second each, and whose loss falls by one a step."""

    def __init__(self, log: list[str], name: str, fault: str | None = None) -> None:
        self._log, self._name, self._fault, self._loss = log, name, fault, 10.0

    def ask(self, **asked: object) -> dict[str, object]:
        if self._fault is not None:
            raise PeerFailed(self._fault)
        steps = int(str(asked["steps"]))
        self._log.append(f"{self._name}{steps}")
        losses = [self._loss - i for i in range(steps)]
        self._loss -= steps
        return {"seconds": float(steps), "losses": losses}


def sided(name: str, tokens: int, seconds: list[float], losses: list[float]) -> Sided:
    return Sided(name, [tokens] * len(losses), [tokens * 2] * len(losses), seconds, losses)


def test_sides_train_in_turns_to_the_same_end() -> None:
    log: list[str] = []
    sides = [Sided(name, [100] * 5, [100] * 5) for name in "ab"]
    take_turns(sides, {n: FakeWorker(log, n) for n in "ab"}, 2)  # type: ignore[misc]
    assert log == ["a2", "b2", "a2", "b2", "a1", "b1"]
    assert sides[0].losses == [10.0, 9.0, 8.0, 7.0, 6.0]
    assert sides[0].rate(2) == 100.0
    assert sides[0].rates(2) == [100.0, 100.0]


def test_a_side_that_fails_is_named() -> None:
    worker = FakeWorker([], "a", "RuntimeError: no memory")
    with pytest.raises(BenchFailed, match="training, a: RuntimeError: no memory"):
        take_turns([Sided("a", [1], [1])], {"a": worker}, 1)  # type: ignore[dict-item]


def test_the_first_turn_warms_up_and_padding_is_not_counted() -> None:
    sides = [
        sided(OURS, 300, [9.0, 2.0], [3.0, 2.0, 1.0, 0.5]),
        sided(PLAIN, 200, [9.0, 2.0], [3.5, 2.0, 1.0, 0.5]),
        sided(PLAIN_OURS, 300, [9.0, 3.0], [3.0, 2.01, 1.0, 0.5]),
    ]
    said = told("tiny", "rows", True, 2, sides, turn=2)
    assert said.report["ratios"] == {"ours / plain": 1.5, "ours / plain on our batches": 1.5}
    assert {v.goal.id: v.word for v in said.goals} == {"G10": Word.REACHED, "G10.curve": Word.REACHED}


def test_a_curve_that_parts_from_the_peers_is_seen() -> None:
    assert curve_difference([2.0, 1.0], [2.0, 1.25]) == 0.2
    sides = [sided(n, 100, [1.0, 1.0], [2.0, 1.0 if n == OURS else 1.25]) for n in (OURS, PLAIN, PLAIN_OURS)]
    words = {v.goal.id: v.word for v in told("tiny", "rows", True, 2, sides, turn=1).goals}
    assert words == {"G10": Word.NOT_DONE, "G10.curve": Word.NOT_DONE}


def test_a_side_makes_as_many_steps_as_it_is_told_and_waits() -> None:
    asked = io.StringIO('{"steps": 2}\n{"steps": 1}\n')
    answers = io.StringIO()
    clock = iter(float(i) for i in range(100))
    told_by = Told(asked, answers, lambda: next(clock))
    told_by.ready()
    told_by.stepped(3.0)
    told_by.stepped(2.0)
    with pytest.raises(SystemExit):
        told_by.stepped(1.0)  # nobody asks for more
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"ready": True},
        {"seconds": 1.0, "losses": [3.0, 2.0]},
        {"seconds": 1.0, "losses": [1.0]},
    ]


class Recorder(Told):
    """Lets the loop run to its end and keeps its losses."""

    def __init__(self) -> None:
        super().__init__(io.StringIO(), io.StringIO())
        self.losses: list[float] = []

    def ready(self) -> None:
        pass

    def stepped(self, loss: float) -> None:
        self.losses.append(loss)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_our_loop_and_plain_trainer_have_one_loss_curve_on_the_same_batches(tiny_base: Path, tmp_path: Path) -> None:
    """Ours pads on the left and computes the logits of answers alone; float32, so that only a mistake could differ."""
    renderer = Renderer(tiny_base)
    rng = random.Random(SEED)
    examples = []
    for _ in range(12):
        ids = [rng.randrange(3, renderer.vocab_size) for _ in range(rng.randint(8, 40))]
        examples.append((ids, [0] * 5 + [1] * (len(ids) - 5)))
    asked = {
        "folder": str(tiny_base), "threads": 1, "bf16": False, "rank": 4, "lr": 0.01, "seed": 0, "max_length": 64,
        "pad_id": renderer.pad_token_id, "examples": examples,
        "batches": [[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10, 11]],
    }  # fmt: skip
    ours, plain = Recorder(), Recorder()
    train_ours(ours, asked, tmp_path / "ours")
    train_plain(plain, asked, tmp_path / "plain")
    assert len(ours.losses) == 4
    assert curve_difference(ours.losses, plain.losses) < 1e-3
