"""What one sequence contributes to a step: its decode rows, or the next chunk of its prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace

from serving.engine.kv import Scope
from serving.engine.plan import RowPlan
from serving.engine.request import State
from serving.engine.sequence import Sequence


def prompts_in_turn(running: Iterable[Sequence], unproven: Collection[str]) -> list[Sequence]:
    """Whose prompts are computed, the first first: of each tenant and adapter the oldest, then of each the next, so
    that many long prompts of one hold up another's by one of them. Shadows' come behind all others.

    unproven: adapters whose sequences wait.
    """
    before: Counter[Scope] = Counter()
    found: list[tuple[bool, int, Sequence]] = []
    for sequence in running:
        if sequence.state is State.PREFILL and sequence.adapter not in unproven:
            found.append((sequence.submit.shadow, before[sequence.scope], sequence))
            before[sequence.scope] += 1
    return [sequence for *_, sequence in sorted(found, key=lambda at: at[:2])]


def decode_rows(sequence: Sequence, slot: int, eos: frozenset[int]) -> list[RowPlan]:
    """One row, or of a beam search one for each live hypothesis."""
    row = _row(sequence, slot, eos, sequence.computed, tokens=(), sample=True)
    if sequence.search is None:
        return [row]
    return [
        replace(row, row=at, feed=hypothesis.tokens[-1], output=hypothesis.tokens)
        for at, hypothesis in zip(sequence.used_rows, sequence.search.live, strict=True)
    ]


def prefill_row(sequence: Sequence, slot: int, eos: frozenset[int], most: int) -> RowPlan:
    """The next prompt tokens, at most so many; with the last of them the row samples."""
    prompt, start, sampling = sequence.submit.prompt, sequence.computed, sequence.submit.sampling
    end = min(len(prompt), start + most)
    targets = () if sampling.prompt_logprobs is None else prompt[start + 1 : end + 1]
    sample = end == len(prompt) and sampling.max_tokens > 0
    return _row(sequence, slot, eos, start, prompt[start:end], sample, targets)


def _row(
    sequence: Sequence,
    slot: int,
    eos: frozenset[int],
    start: int,
    tokens: tuple[int, ...],
    sample: bool,
    targets: tuple[int, ...] = (),
) -> RowPlan:
    sampling, search = sequence.submit.sampling, sequence.search
    position = len(sequence.output if search is None else search.live[0].tokens)
    looks_back = sample and sampling.looks_back
    return RowPlan(
        key=sequence.key,
        row=sequence.row,
        slot=slot,
        start=start,
        tokens=tokens,
        sample=sample,
        sampling=sampling,
        choice=sequence.submit.choice,
        position=position,
        ban=(*eos, *sampling.stop_token_ids) if position < sampling.min_tokens else (),
        prompt=sequence.submit.prompt if looks_back else (),
        output=tuple(sequence.output) if looks_back else (),
        targets=targets,
        candidates=0 if search is None else search.rules.looked_at,
    )
