"""Proof that a slot holds the adapter that it is called after, before anybody is answered from it. Knows no tensors.

Three proofs, each sharper than the one before: the slot applies the adapter's own numbers (checked where it is
installed); the output on fixed tokens is not the base's (once for each adapter, one small pass, at most one a step);
and the golden rows come out as they did in training. Golden rows ride in the ordinary batch, on cache rows that no
sequence is given; whoever asked for the adapter waits meanwhile, all others go on. A decoder scores a row's answer
together with its prompt; an encoder-decoder reads the prompt whole and is then fed the answer, one token a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from adapters.golden import GoldenRow
from serving.engine.plan import Key, RowPlan, StepPlan, StepResult
from serving.engine.request import Sampling, TokenLogprob

_CONNECTION = -2  # no gateway's: the keys of golden rows
_KEPT = 4096  # adapters that are remembered as proven; the one proven longest ago is proven anew
_SCORED = Sampling(max_tokens=0, temperature=0.0, prompt_logprobs=1)


class Golden(Protocol):
    """An adapter, as far as it is replayed."""

    @property
    def golden(self) -> Sequence[GoldenRow]: ...


Adapter = TypeVar("Adapter", bound=Golden)


@dataclass(slots=True)
class _Replay:
    """A golden row to be replayed. apart: on an encoder-decoder. row: the cache row it is computed in, None until one
    is free."""

    digest: str
    golden: GoldenRow
    apart: bool
    row: int | None = None
    computed: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.golden.prompt, *self.golden.expected[:-1])

    @property
    def least(self) -> int:
        """With how many tokens it goes on at all."""
        return len(self.golden.prompt) if self.apart and not self.computed else 1

    def chunk(self, row: int, slot: int, most: int) -> RowPlan:
        """The next tokens, scored where an expected token follows."""
        start, expected = self.computed, self.golden.expected
        tokens = self.tokens[start : start + (self.least if self.apart else most)]
        first = len(self.golden.prompt) - 1  # the position that the first expected token follows
        skipped = min(max(0, first - start), len(tokens))
        targets = expected[max(0, start - first) : max(0, start + len(tokens) - first)]
        plan = RowPlan(
            Key((_CONNECTION, row)), row, slot, start, tokens, False, _SCORED, 0, 0, targets=targets, skipped=skipped
        )
        return replace(plan, tokens=(), feed=tokens[0]) if self.apart and start else plan


class Proofs(Generic[Adapter]):
    """What is still to be proven of the adapters in the slots.

    spare_rows: the cache rows for golden rows; without any, none is replayed. room: how long an answer to a prompt of
    so many tokens this engine can hold; a golden row that does not fit is passed over, for it says nothing of the
    adapter. apart: whether the base is an encoder-decoder.
    """

    def __init__(
        self, spare_rows: Sequence[int] = (), room: Callable[[int], int] = lambda prompt: 1 << 31, apart: bool = False
    ) -> None:
        self._free = list(spare_rows)
        self._replays: list[_Replay] = []
        self._effects: dict[str, Adapter] = {}
        self._proven: OrderedDict[str, int] = OrderedDict()  # digest -> how often it was
        self._replayable = bool(spare_rows)
        self._room, self._apart = room, apart
        self._faulted: list[int] = []
        self._latest: list[str] = []

    @property
    def pending(self) -> frozenset[str]:
        """Adapters from which nobody is answered yet."""
        return frozenset([*self._effects, *(r.digest for r in self._replays)])

    def known(self, digest: str) -> bool:
        """Whether it has proven itself before, be it in a slot now or not."""
        return digest in self._proven

    def installed(self, digest: str, adapter: Adapter) -> None:
        """An adapter was put into a slot. The first time all of its rows are replayed, later one of them in turn."""
        self.gone(digest)
        before = self._proven.get(digest, 0)
        if not before:
            self._effects[digest] = adapter
        golden = [row for row in adapter.golden if len(row.expected) <= self._room(len(row.prompt))]
        if golden and self._replayable:
            rows = [golden[before % len(golden)]] if before else golden
            self._replays += [_Replay(digest, row, self._apart) for row in rows]
        self._settle(digest)

    def gone(self, digest: str | None) -> None:
        """An adapter is in no slot any more: nothing of it is to be proven."""
        if digest is not None:
            self._effects.pop(digest, None)
        for replay in [r for r in self._replays if r.digest == digest]:
            self._end(replay)

    def doubted(self, digest: str) -> None:
        """An adapter failed: all of it is to be proven when it comes again."""
        self.gone(digest)
        self._proven.pop(digest, None)

    @property
    def next_effect(self) -> tuple[str, Adapter] | None:
        """The adapter whose effect is to be shown next."""
        return next(iter(self._effects.items()), None)

    def shown(self, digest: str) -> None:
        """The output differs from the base's."""
        del self._effects[digest]
        self._settle(digest)

    def rows(self, slot_of: Callable[[str], int], most: int) -> tuple[RowPlan, ...]:
        """What rides in the next step, at most so many tokens (but one row at least goes on)."""
        plans: list[RowPlan] = []
        left = max(1, most)
        for replay in self._replays:
            if left < 1:
                break
            if plans and replay.least > left:
                continue
            if replay.row is None:
                if not self._free:
                    continue
                replay.row = self._free.pop(0)
            plans.append(replay.chunk(replay.row, slot_of(replay.digest), left))
            left -= plans[-1].length
        return tuple(plans)

    def settle(self, plan: StepPlan, result: StepResult) -> tuple[str, ...]:
        """Book a step's outcome; the adapters whose rows came out otherwise."""
        failed: dict[str, None] = {}
        by_row = {replay.row: replay for replay in self._replays}
        for row in plan.rows:
            replay = by_row.get(row.row)
            if row.key[0] != _CONNECTION or replay is None:
                continue
            replay.computed += row.length
            scores = result.scores.get(row.row, ())
            if row.row in result.sampled:  # it asks for no token: this is a fault
                self._faulted.append(row.row)
            if row.row in result.sampled or not _as_expected(scores, len(row.targets), replay.golden.tolerance):
                failed[replay.digest] = None
            elif replay.computed >= len(replay.tokens):
                self._end(replay)
                self._settle(replay.digest)
        return tuple(failed)

    def faulted(self) -> tuple[int, ...]:
        """Cache rows in which faults left rubbish since this was asked last: to be scrubbed before they are used again,
        or the next adapter there would be blamed for it."""
        rows, self._faulted = tuple(self._faulted), []
        return rows

    def proven(self) -> tuple[str, ...]:
        """What has proven itself since this was asked last."""
        latest, self._latest = tuple(self._latest), []
        return latest

    def _end(self, replay: _Replay) -> None:
        self._replays.remove(replay)
        if replay.row is not None:
            self._free.append(replay.row)

    def _settle(self, digest: str) -> None:
        if digest in self.pending:
            return
        self._latest.append(digest)
        self._proven[digest] = self._proven.pop(digest, 0) + 1
        if len(self._proven) > _KEPT:
            self._proven.popitem(last=False)


def _as_expected(scores: Sequence[TokenLogprob], count: int, tolerance: float) -> bool:
    """Whether each of so many expected tokens is the likeliest, or within the tolerance of it. A gap that is no number
    is none that is small enough."""
    return len(scores) == count and all(score.top[0][1] - score.chosen <= tolerance for score in scores)
