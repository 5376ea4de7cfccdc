"""Nobody is answered from a slot before it has proven to hold the adapter that it is called after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from adapters.golden import GoldenRow
from serving.engine.breaker import FIRST_S, Doubt
from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import StepPlan, StepResult
from serving.engine.proof import Proofs
from serving.engine.request import Failed, Finished, Moved, Pin, Warm
from serving.engine.runner import Runner
from serving.timing import engine_s, spans
from tests.engine_case import EngineCase, load_tiny, read_peft
from tests.tiny_base import Oracle, save_adapter, save_tiny_base

PROMPT = [1, 72, 104, 111, 35, 72]


@dataclass(frozen=True)
class Bench:
    base: Path
    decoder: Decoder
    folders: dict[str, Path]
    golden: dict[str, tuple[GoldenRow, ...]]

    def read(self, digest: str) -> HostAdapter:
        return replace(read_peft(self.folders[digest]), digest=digest, golden=self.golden.get(digest, ()))

    def case(self, **options: object) -> EngineCase:
        return EngineCase(self.decoder, **{"read": self.read, **options})  # type: ignore[arg-type]

    def expected(self, digest: str | None, count: int = 8) -> list[int]:
        folder = None if digest is None else self.folders[digest]
        return Oracle(self.base, folder).greedy(PROMPT, count, frozenset({2}))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny base, two adapters a and b with golden rows as PEFT answers them, and c without any."""
    root = tmp_path_factory.mktemp("proof")
    base = save_tiny_base(root / "base")
    folders = {name: save_adapter(base, root / name, seed=at) for at, name in enumerate("abc", start=1)}
    golden = {}
    for name in "ab":
        oracle = Oracle(base, folders[name])
        prompts = [tuple(range(5 + 3 * at, 25 + 4 * at)) for at in range(3)]
        golden[name] = tuple(GoldenRow(p, tuple(oracle.greedy(p, 6)), 0.01) for p in prompts)
    return Bench(base, load_tiny(base), folders, golden)


class Wrapped:
    """A runner with a fault planted in it."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return self.inner.run(plan)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        self.inner.install(slot, adapter)

    def tidy(self, plan: StepPlan) -> None:
        self.inner.tidy(plan)

    def probe(self) -> bool:
        return self.inner.probe()


def planted(install: Callable[[Runner, int, HostAdapter], None]) -> Callable[[Runner], Runner]:
    """Puts this in the place of installing."""

    class Planted(Wrapped):
        def install(self, slot: int, adapter: HostAdapter) -> None:
            install(self.inner, slot, adapter)

    return Planted


def nothing(runner: Runner, slot: int, adapter: HostAdapter) -> None:
    """The slot is left as it was."""


def refusal(case: EngineCase, key: object) -> Failed:
    case.run()
    ending = case.answers[key].endings[0]  # type: ignore[index]
    assert isinstance(ending, Failed), ending
    return ending


def test_golden_rows_that_come_out_let_answers_through_and_change_none(bench: Bench) -> None:
    case = bench.case()
    keys = {name: case.submit(PROMPT, name) for name in "abc"}
    for name, key in keys.items():
        assert case.answer(key) == bench.expected(name)
    assert case.engine.heartbeat().quarantined == ()


@pytest.mark.parametrize("wrong", ["zero", "left"])
def test_a_slot_that_was_not_filled_is_refused_with_its_reason(bench: Bench, wrong: str) -> None:
    """Left zero, the base would answer under the adapter's name; left as it was, another adapter would."""
    faulty = wrong == "zero"

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        if not faulty:
            runner.install(slot, adapter)

    case = bench.case(slots=1, wrap=planted(install))
    if wrong == "left":
        case.answer(case.submit(PROMPT, "a"))
        faulty = True
    failed = refusal(case, case.submit(PROMPT, "c"))
    assert (failed.code, failed.message) == ("adapter_quarantined", Doubt.SLOT_CONTENTS.value)
    assert failed.retry_after_s == FIRST_S
    assert case.slots.leases == 0
    assert not case.slots.holds("c")


def test_an_adapter_whose_slot_changes_nothing_is_refused_with_its_reason(bench: Bench) -> None:
    """Its tensors lie in the slot as they should, and are zero: publishing refuses that, a fault on the way may not."""

    def read(digest: str) -> HostAdapter:
        adapter = bench.read(digest)
        return replace(adapter, pairs={m: (a, torch.zeros_like(b)) for m, (a, b) in adapter.pairs.items()})

    case = bench.case(read=read)
    key = case.submit(PROMPT, "c")
    failed = refusal(case, key)
    assert (failed.code, failed.message) == ("adapter_quarantined", Doubt.NO_EFFECT.value)
    assert not case.answers[key].ids


class Blind:
    """Sees neither contents nor effect: golden rows are the last line."""

    spare_rows: Sequence[int] = (9, 10, 11)

    def applies(self, slot: int, adapter: HostAdapter) -> bool:
        return True

    def moves(self, slot: int, adapter: HostAdapter) -> bool:
        return True


def swapped(bench: Bench) -> Callable[[Runner], Runner]:
    """b's tensors lie wherever a was to be put."""

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        runner.install(slot, bench.read("b") if adapter.digest == "a" else adapter)

    return planted(install)


def test_another_adapters_weights_in_the_slot_fail_the_golden_rows_before_anybody_is_answered(bench: Bench) -> None:
    case = bench.case(wrap=swapped(bench))
    case.engine._prover = Blind()
    neighbour, base = case.submit(PROMPT, "b"), case.submit(PROMPT)
    case.run(lambda: len(case.answers[neighbour].ids) > 0)
    wrong = [case.submit(PROMPT, "a") for _ in range(3)]
    case.run()
    for key in wrong:
        ending = case.answers[key].endings[0]
        assert isinstance(ending, Failed)
        assert ending.message == Doubt.GOLDEN_MISMATCH.value
        assert case.answers[key].ids == []
    assert case.answer(neighbour) == bench.expected("b")
    assert case.answer(base) == bench.expected(None)
    refused = refusal(case, case.submit(PROMPT, "a"))
    assert refused.code == "adapter_quarantined"
    assert refused.retry_after_s is not None


def test_golden_rows_are_replayed_after_each_swap_one_in_turn(bench: Bench) -> None:
    runner: list[Wrapped] = []

    def wrap(inner: Runner) -> Runner:
        runner.append(Wrapped(inner))
        return runner[0]

    case = bench.case(slots=1, wrap=wrap)
    replayed = []
    for name in "abababab":
        before = len(runner[0].plans)
        assert case.answer(case.submit(PROMPT, name)) == bench.expected(name)
        rows = [row for plan in runner[0].plans[before:] for row in plan.rows if row.key[0] == -2]
        replayed.append(sum(len(row.targets) for row in rows) // 6)
    assert replayed == [3, 3, 1, 1, 1, 1, 1, 1]


def test_a_slot_that_goes_wrong_at_a_later_swap_is_found_by_the_row_of_that_swap(bench: Bench) -> None:
    good = True

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        runner.install(slot, adapter if good else bench.read("b"))

    case = bench.case(slots=1, wrap=planted(install))
    case.engine._prover = Blind()
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")
    assert case.answer(case.submit(PROMPT, "b")) == bench.expected("b")
    good = False
    assert refusal(case, case.submit(PROMPT, "a")).message == Doubt.GOLDEN_MISMATCH.value


def test_the_replay_stalls_nobody_and_takes_at_most_half_of_a_steps_prompt_tokens(bench: Bench) -> None:
    runner: list[Wrapped] = []

    def wrap(inner: Runner) -> Runner:
        runner.append(Wrapped(inner))
        return runner[0]

    case = bench.case(chunk=16, wrap=wrap)
    stream = case.submit(PROMPT, max_tokens=60, ignore_eos=True)
    case.run(lambda: len(case.answers[stream].ids) > 2)
    runner[0].plans.clear()
    case.submit(PROMPT, "a")
    case.run()
    golden = [p for p in runner[0].plans if any(row.key[0] == -2 for row in p.rows)]
    assert len(golden) > 3
    for plan in golden:
        assert sum(row.length for row in plan.rows if row.key[0] == -2) <= 8
        assert any(not row.tokens for row in plan.rows), "the stream's token was left out"
    alone = bench.case()
    assert case.answer(stream) == alone.answer(alone.submit(PROMPT, max_tokens=60, ignore_eos=True))


def test_after_its_time_one_request_tries_the_adapter_and_the_others_are_told_to_come_again(bench: Bench) -> None:
    broken = True

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        if not broken:
            runner.install(slot, adapter)

    case = bench.case(wrap=planted(install))
    assert refusal(case, case.submit(PROMPT, "a")).retry_after_s == FIRST_S
    case.time += FIRST_S
    assert refusal(case, case.submit(PROMPT, "a")).retry_after_s == 2 * FIRST_S
    broken = False
    case.time += 2 * FIRST_S
    trial = case.submit(PROMPT, "a")
    case.run(lambda: len(case.answers[trial].ids) > 0)
    early = refusal_now(case, case.submit(PROMPT, "a"))
    assert early.code == "adapter_quarantined"
    assert early.retry_after_s is not None
    assert early.retry_after_s <= 2.0
    assert case.answer(trial) == bench.expected("a")
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")


def refusal_now(case: EngineCase, key: object) -> Failed:
    case.run(lambda: bool(case.answers[key].endings))  # type: ignore[index]
    ending = case.answers[key].endings[0]  # type: ignore[index]
    assert isinstance(ending, Failed), ending
    return ending


def test_of_a_burst_after_its_time_one_request_alone_tries_the_adapter(bench: Bench) -> None:
    broken = True

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        if not broken:
            runner.install(slot, adapter)

    case = bench.case(wrap=planted(install))
    refusal(case, case.submit(PROMPT, "a"))
    broken = False
    case.time += FIRST_S
    burst = [case.submit(PROMPT, "a") for _ in range(4)]
    case.run()
    endings = [case.answers[key].endings[0] for key in burst]
    assert [type(ending) for ending in endings] == [Finished, Failed, Failed, Failed]
    assert {e.code for e in endings if isinstance(e, Failed)} == {"adapter_quarantined"}
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")


def test_several_warmed_at_once_are_proven_one_a_step(bench: Bench) -> None:
    shown: list[int] = []

    class Counting(Blind):
        spare_rows = ()

        def moves(self, slot: int, adapter: HostAdapter) -> bool:
            shown.append(slot)
            return True

    case = bench.case()
    case.engine._prover = Counting()
    case.engine._proofs = Proofs()
    keys = [case.keep(lambda number, name=name: Warm(number, name, 60.0)) for name in "abc"]  # type: ignore[misc]
    case.run(lambda: len(case.host.digests()) == 3)
    while any(case.told[key] is None for key in keys):
        before = len(shown)
        case.step()
        assert len(shown) - before <= 1
    assert sorted(shown) == [1, 2, 3]


def test_a_trial_that_is_cancelled_leaves_the_next_one_to_try(bench: Bench) -> None:
    broken = True

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        if not broken:
            runner.install(slot, adapter)

    case = bench.case(wrap=planted(install))
    refusal(case, case.submit(PROMPT, "a"))
    broken = False
    case.time += FIRST_S
    trial = case.submit(PROMPT, "a")
    case.run(lambda: len(case.answers[trial].ids) > 0)
    case.engine.cancel(trial, trial[1])
    case.step()
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")


def test_cancels_and_evictions_amid_a_replay_leave_nothing_behind(bench: Bench) -> None:
    case = bench.case(slots=1, chunk=4)
    for name in "abcabc":
        key = case.submit(PROMPT, name)
        case.run(lambda name=name: case.slots.holds(name))  # type: ignore[misc]
        case.engine.cancel(key, key[1])
        case.step()
        del case.answers[key]
    assert case.answer(case.submit(PROMPT, "b")) == bench.expected("b")
    case.run(lambda: not case.engine._proofs.pending)
    assert sorted(case.engine._proofs._free) == [9, 10, 11]
    assert case.scheduler.balanced()
    assert case.slots.leases == 0


def test_what_a_sequence_waits_for_proof_counts_as_device_time_and_all_its_spans_as_the_whole(bench: Bench) -> None:
    case = bench.case(chunk=4)
    cold = case.submit(PROMPT, "a")
    case.run()
    warm = case.submit(PROMPT, "a")
    case.run()
    for key, waits in ((cold, True), (warm, False)):
        ending = case.answers[key].endings[0]
        assert isinstance(ending, Finished)
        assert (ending.timing.device_s > 0) is waits
        assert min(spans(ending.timing).values()) >= 0
    before = case.now()
    key = case.submit(PROMPT, "b")
    case.run()
    ending = case.answers[key].endings[0]
    assert isinstance(ending, Finished)
    assert engine_s(ending.timing) == pytest.approx(case.now() - before, abs=0.011)  # the last step ends when it began


def test_warming_is_answered_only_when_the_adapter_has_proven_itself(bench: Bench) -> None:
    case = bench.case(chunk=4)
    key = case.keep(lambda number: Warm(number, "a", 60.0))
    case.run(lambda: case.slots.holds("a"))
    assert case.told[key] is None
    case.run(lambda: case.told[key] is not None)
    assert isinstance(case.told[key], Moved)
    assert case.engine._proofs.pending == frozenset()


@pytest.mark.parametrize("make", [lambda n: Warm(n, "a", 60.0), lambda n: Pin(n, "a", 5.0)])
def test_warming_and_pinning_what_fails_its_golden_rows_are_refused_with_the_reason(
    bench: Bench, make: Callable[[int], Warm | Pin]
) -> None:
    case = bench.case(wrap=swapped(bench))
    case.engine._prover = Blind()
    key = case.keep(make)
    case.run(lambda: case.told[key] is not None)
    told = case.told[key]
    assert isinstance(told, Failed)
    assert (told.code, told.message) == ("adapter_quarantined", Doubt.GOLDEN_MISMATCH.value)
    assert not case.slots.holds("a")
    assert case.slots.pinned == ()


def test_what_is_to_be_proven_is_given_a_slot_that_nobody_uses_and_refused_before_anybody_asks_for_it(
    bench: Bench,
) -> None:
    """Slots are full as a rule: a promotion to what fails its golden rows was made, and all of its requests refused."""
    case = bench.case(wrap=swapped(bench), slots=1)
    case.engine._prover = Blind()
    assert case.answer(case.submit(PROMPT, "b")) == bench.expected("b")
    plain = case.keep(lambda number: Warm(number, "a", 60.0))
    case.run(lambda: case.told[plain] is not None)
    assert isinstance(case.told[plain], Moved)
    assert case.slots.holds("b"), "what is only warmed evicts nothing"
    key = case.keep(lambda number: Warm(number, "a", 60.0, prove=True))
    case.run(lambda: case.told[key] is not None)
    told = case.told[key]
    assert isinstance(told, Failed)
    assert (told.code, told.message) == ("adapter_quarantined", Doubt.GOLDEN_MISMATCH.value)
    assert case.answer(case.submit(PROMPT, "b")) == bench.expected("b")


def test_where_all_slots_are_used_and_where_it_is_known_already_nothing_goes_for_a_proof(bench: Bench) -> None:
    case = bench.case(slots=1)
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")
    running = case.submit(PROMPT, "b", max_tokens=40, ignore_eos=True)
    case.run(lambda: len(case.answers[running].ids) > 2)
    for name in ("c", "a"):
        key = case.keep(lambda number, name=name: Warm(number, name, 60.0, prove=True))  # type: ignore[misc]
        case.run(lambda key=key: case.told[key] is not None)  # type: ignore[misc]
        told = case.told[key]
        assert isinstance(told, Moved)
        assert told.tier == "host"
    assert not case.answers[running].endings
    case.run(lambda: bool(case.answers[running].endings))
    key = case.keep(lambda number: Warm(number, "a", 60.0, prove=True))
    case.run(lambda: case.told[key] is not None)
    assert case.slots.holds("b"), "a has proven itself before"
