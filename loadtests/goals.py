"""What the benches are held to: each goal with what it compares, its target, and what counts as not done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Word(StrEnum):
    """The verdict on a goal."""

    REACHED = "reached"
    SHORT = "short of it"  # what must be had is there, the target is not
    NOT_DONE = "not done"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """One comparison. bound: what must at least be had (None: the target itself). at_most: less is better."""

    id: str
    what: str
    target: float
    bound: float | None = None
    at_most: bool = False
    unit: str = "x"

    def judge(self, reached: float | None) -> Verdict:
        """The verdict on a figure; None: there is none."""
        if reached is None:
            return Verdict(self, None, Word.UNKNOWN)
        if self._met(reached, self.target):
            return Verdict(self, reached, Word.REACHED)
        if self.bound is not None and self._met(reached, self.bound):
            return Verdict(self, reached, Word.SHORT)
        return Verdict(self, reached, Word.NOT_DONE)

    def _met(self, reached: float, limit: float) -> bool:
        return reached <= limit if self.at_most else reached >= limit

    def shown(self, value: float | None) -> str:
        """A figure of this goal, for people."""
        if value is None:
            return "-"
        return f"{value * 100:.1f} %" if self.unit == "%" else f"{value:.3g} {self.unit}".strip()

    def limit(self, value: float | None) -> str:
        """A limit of this goal, for people."""
        return "-" if value is None else f"{'<=' if self.at_most else '>='} {self.shown(value)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was reached of a goal. reached None: not measured in this run."""

    goal: Goal
    reached: float | None
    word: Word

    @property
    def good(self) -> bool:
        """Whether the bound, at least, was met, or nothing was measured."""
        return self.word is not Word.NOT_DONE

    def row(self) -> tuple[str, ...]:
        """A line of the table of goals."""
        g = self.goal
        return (g.id, g.what, g.shown(self.reached), g.limit(g.target), g.limit(g.bound), self.word.value)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        g = self.goal
        reached = None if self.reached is None else round(self.reached, 4)
        return {
            "goal": g.id, "what": g.what, "reached": reached, "target": g.target, "bound": g.bound,
            "at_most": g.at_most, "unit": g.unit, "verdict": self.word.value,
        }  # fmt: skip


COLUMNS = ("GOAL", "WHAT", "REACHED", "TARGET", "BOUND", "VERDICT")

_ALL = (
    Goal("G1.http", "16 distinct adapters over HTTP, 16 clients / vLLM CPU", 5.0, 3.5),
    Goal("G1.mixed", "decode in-process, 16 distinct adapters / PEFT adapter_names", 10.0, 7.0),
    Goal("G1.serial", "decode in-process, 16 distinct adapters / PEFT one by one", 25.0, 14.0),
    Goal("G2.distinct", "decode in-process, 16 rows on 16 adapters / base alone", 0.70),
    Goal("G2.one", "decode in-process, 16 rows on one adapter / base alone", 0.88),
    Goal("G2.unused", "decode in-process, base rows, adapters resident but unused / LoRA disabled", 0.98),
    Goal("G3", "2,000 adapters, uniform, tok/s to 5 of them / what their bytes allow", 0.97),
    Goal("G3.host", "host memory of adapters, most seen / its budget", 1.0, at_most=True),
    Goal("G4.http", "base over HTTP, 16 clients / vLLM CPU", 2.0, 1.4),
    Goal("G4.static", "base in-process, 16 rows / transformers generate on a static batch", 1.5),
    Goal("G5.idle", "first token of a cold 20 MB adapter on disk over a warm one, idle", 60.0, at_most=True, unit="ms"),
    Goal("G5.load", "the same beside streams, less one step", 60.0, at_most=True, unit="ms"),
    Goal("G5.streams", "p99 between tokens of streams, a cold load every 5 s / a warm one", 1.10, at_most=True),
    Goal("G6.ttft", "median first token, adapters twice the slots, half the slots in flight / warm", 3.0, at_most=True),
    Goal("G6.throughput", "tok/s, twice as many adapters in flight as slots / all of them in slots", 0.8),
    Goal("G6.rows", "the same with two callers on each adapter, so that slots, not rows, are what is short", 0.8),
    Goal("G6.order", "requests that were overtaken for longer than the scheduler's patience allows", 0.0, at_most=True,
         unit=""),
    Goal("G7.cost", "throughput lost to HTTP, data plane and Ray at 16 streams", 0.08, at_most=True, unit="%"),
    Goal("G7.ttft", "added time to the first token, median", 10.0, at_most=True, unit="ms"),
    Goal("G8.t5", "T5, 16 distinct adapters in a batch / PEFT adapter_names", 5.0),
    Goal("G8.bart", "BART, 16 distinct adapters in a batch / PEFT adapter_names", 5.0),
    Goal("G9", "p99 between tokens of 15 streams, with long prompts / without", 2.0, at_most=True),
    Goal("G10", "LoRA SFT, tokens/s / plain Trainer and PEFT with padding", 1.5),
    Goal("G10.curve", "largest difference of the loss on the same batches", 0.01, at_most=True, unit="%"),
    Goal("G11.floor", "CUDA, 32 rows on 32 adapters: share of the step that its memory needs", 0.70),
    Goal("G11.cost", "CUDA, throughput lost to 32 distinct adapters", 0.10, at_most=True, unit="%"),
    Goal("W6.failed", "requests and flips that failed while a version flipped every 2 s", 0.0, at_most=True, unit=""),
    Goal("W6.wrong", "answers of wrong weights meanwhile, by name or by text", 0.0, at_most=True, unit=""),
    Goal("W7", "p99 first token of quiet adapters, one at ten times their rate / all alike", 2.0, at_most=True),
)  # fmt: skip
GOALS: Mapping[str, Goal] = {goal.id: goal for goal in _ALL}


def verdicts(reached: Mapping[str, float | None]) -> list[Verdict]:
    """Verdicts on figures by goal id, in the order of the goals. Raises KeyError for an unknown id."""
    for id_ in reached:
        GOALS[id_]
    return [goal.judge(reached[goal.id]) for goal in _ALL if goal.id in reached]


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs, or None where one of them is missing."""
    return None if ours is None or not theirs else ours / theirs


def all_good(found: Iterable[Verdict]) -> bool:
    """Whether no goal is below its bound."""
    return all(v.good for v in found)
