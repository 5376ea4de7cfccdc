"""Beam search over one prompt: which hypotheses live on, which are finished, and when nothing better can come.

The rules are those of transformers' `generate(num_beams=...)`, whose answers users of encoder-decoders know: scores are
sums of log-probabilities, a finished hypothesis is ranked by score / length ** length_penalty (Wu et al. 2016, sec. 7,
without the constant), and enough candidates are looked at that `width` live ones remain.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from serving.engine.request import Sampling


class Candidate(NamedTuple):
    """A token that could follow a hypothesis, and its log-probability there."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Tokens chosen so far. score: sum of their log-probabilities; of a finished one, that over its length's power."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class BeamRules:
    """How to search. early: stop as soon as `width` hypotheses are finished. ends: tokens that finish one.

    forced: tokens that every answer begins with and that count in its length though nobody chose them.
    """

    width: int
    max_tokens: int
    ends: frozenset[int]
    length_penalty: float = 1.0
    early: bool = False
    forced: int = 0

    @property
    def looked_at(self) -> int:
        """How many candidates of each live hypothesis the search wants to see."""
        return max(2, 1 + len(self.ends)) * self.width


@dataclass(slots=True)
class BeamSearch:
    """The state of a search. live: at most `width` hypotheses, the best first; finished: likewise."""

    rules: BeamRules
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    def advance(self, offered: Sequence[Sequence[Candidate]]) -> list[int]:
        """One step further: for each hypothesis that lives on, the index of the one it continues.

        offered: for each live hypothesis its `looked_at` likeliest candidates.
        """
        rules = self.rules
        reached = rules.forced + len(self.live[0].tokens) + 1
        best = heapq.nlargest(
            rules.looked_at,
            (
                (hypothesis.score + candidate.logprob, -parent, candidate.token)
                for parent, (hypothesis, candidates) in enumerate(zip(self.live, offered, strict=True))
                for candidate in candidates
                if candidate.logprob > float("-inf")
            ),
        )
        at_the_limit = len(self.live[0].tokens) + 1 >= rules.max_tokens
        old, self.live, parents = self.live, [], []
        for rank, (score, negative, token) in enumerate(best):
            grown = Hypothesis((*old[-negative].tokens, token), score)
            if token in rules.ends or at_the_limit:
                if rank < rules.width:
                    self._finish(Hypothesis(grown.tokens, score / reached**rules.length_penalty))
            elif len(self.live) < rules.width:
                self.live.append(grown)
                parents.append(-negative)
        self.done = not self.live or not self._hopeful(reached)
        return parents

    def _finish(self, hypothesis: Hypothesis) -> None:
        ranked = sorted([*self.finished, hypothesis], key=attrgetter("score"), reverse=True)
        self.finished = ranked[: self.rules.width]

    def _hopeful(self, reached: int) -> bool:
        """Whether a live hypothesis could still beat the worst finished one."""
        if len(self.finished) < self.rules.width:
            return True
        return not self.rules.early and (
            self.live[0].score / reached**self.rules.length_penalty > self.finished[-1].score
        )

    @property
    def answer(self) -> Hypothesis | None:
        """The best hypothesis; None where nothing could be said at all."""
        ranked = self.finished or self.live
        return ranked[0] if ranked else None


def search_for(sampling: Sampling, eos: frozenset[int], forced: int) -> BeamSearch:
    """The search that a request asks for. forced: see BeamRules."""
    return BeamSearch(
        BeamRules(
            width=sampling.num_beams,
            max_tokens=sampling.max_tokens,
            ends=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos),
            length_penalty=sampling.length_penalty,
            early=sampling.early_stopping,
            forced=forced,
        )
    )


def moves(parents: Sequence[int], rows: Sequence[int], spare: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows for the hypotheses of the next step, and copies (source, target) that bring each its parent's cache.

    rows: of the hypotheses before; spare: rows of this search that nobody used. A parent's first child keeps its row,
    so no source is ever overwritten.
    """
    free = [*spare, *(row for index, row in enumerate(rows) if index not in set(parents))]
    taken: set[int] = set()
    found: list[int] = []
    copies: list[tuple[int, int]] = []
    for parent in parents:
        row = rows[parent]
        if parent in taken:
            row = free.pop(0)
            copies.append((rows[parent], row))
        taken.add(parent)
        found.append(row)
    return found, copies
