"""Golden rows of encoder-decoders: replayed beside everybody else, before anybody is answered from a slot."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, T5Config

from adapters.golden import MAX_EXPECTED, GoldenRow
from serving.engine.breaker import Doubt
from serving.engine.lora import HostAdapter
from serving.engine.plan import Key, Sampled, StepPlan, StepResult
from serving.engine.proof import Proofs
from serving.engine.request import Failed
from serving.engine.runner import Runner
from serving.engine.seq2seq import EncoderDecoder, load_encoder_decoder
from tests.engine_case import DEVICE, EngineCase, read_peft
from tests.test_engine_seq2seq import BART, T5, VOCAB, Oracle
from tests.test_proof_engine import Blind, Wrapped, nothing, planted, refusal
from tests.tiny_base import save_adapter, save_random_seq2seq

SEED = 20261122
LENGTH = 96
PROMPT = [7, 72, 14, 51, 35, 72, 9]
CLOSE = 1e-3  # nats: float32 against float32
BASES: dict[str, Any] = {
    "t5": lambda: T5Config(**T5),
    "bart": lambda: BartConfig(**BART),
    "bart, each answer begun": lambda: BartConfig(**BART),
}
TARGETS = {"t5": ("q", "k", "v", "o", "wi", "wo"), "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}


@dataclass(frozen=True)
class Bench:
    folder: Path
    base: EncoderDecoder
    folders: dict[str, Path]
    golden: dict[str, tuple[GoldenRow, ...]]

    def read(self, digest: str) -> HostAdapter:
        return replace(read_peft(self.folders[digest]), digest=digest, golden=self.golden.get(digest, ()))

    def case(self, **options: object) -> EngineCase:
        return EngineCase(self.base, **{"read": self.read, **options})  # type: ignore[arg-type]

    def expected(self, digest: str | None, count: int = 8) -> list[int]:
        return greedy(self.base, Oracle(self.folder, self.folders.get(digest or "")), PROMPT, count, end=True)


def greedy(base: EncoderDecoder, oracle: Oracle, prompt: Sequence[int], count: int, end: bool = False) -> list[int]:
    """What transformers + PEFT answer, whatever begins every answer left out. end: stop before the end of text."""
    ids: list[int] = []
    for _ in range(count):
        token = int(oracle.logits(list(prompt), [*base.start_token_ids, *ids])[-1].argmax())
        if end and token in base.stop_token_ids:
            break
        ids.append(token)
    return ids


@pytest.fixture(scope="module", params=sorted(BASES))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base, adapters a and b with golden rows as PEFT answers them, and c without any."""
    root = tmp_path_factory.mktemp("proof")
    folder = save_random_seq2seq(
        BASES[request.param](), root / "base", seed=5, forced=5 if "begun" in request.param else None
    )
    base = load_encoder_decoder(folder, torch.float32, DEVICE, LENGTH)
    assert len(base.start_token_ids) == (2 if "begun" in request.param else 1)
    targets = TARGETS["t5" if request.param == "t5" else "bart"]
    folders = {
        name: save_adapter(folder, root / name, at, targets=targets, seq2seq=True)
        for at, name in enumerate("abc", start=1)
    }
    golden = {}
    for name in "ab":
        oracle = Oracle(folder, folders[name])
        prompts = [tuple(range(5 + 3 * at, 25 + 4 * at)) for at in range(3)]
        golden[name] = tuple(GoldenRow(p, tuple(greedy(base, oracle, p, 6)), CLOSE) for p in prompts)
    return Bench(folder, base, folders, golden)


def golden_rows(plan: StepPlan) -> list[Any]:
    return [row for row in plan.rows if row.key[0] == -2]


def swapped(bench: Bench) -> Any:
    """b's tensors lie wherever a was to be put."""

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        runner.install(slot, bench.read("b") if adapter.digest == "a" else adapter)

    return planted(install)


def test_golden_rows_that_come_out_let_answers_through_and_change_none(bench: Bench) -> None:
    case = bench.case()
    keys = {name: case.submit(PROMPT, name) for name in "abc"}
    for name, key in keys.items():
        assert case.answer(key) == bench.expected(name)
    assert case.engine.heartbeat().set_aside == ()
    assert case.answer(case.submit(PROMPT)) == bench.expected(None)


def test_what_the_engine_itself_answers_is_what_its_golden_rows_may_say(bench: Bench) -> None:
    """An end of text within them too: it is fed and scored as any other token."""
    plain = bench.case()
    prompts = [tuple(range(11 + at, 40)) for at in range(3)]
    answers = [plain.answer(plain.submit(p, "c", max_tokens=MAX_EXPECTED, ignore_eos=True)) for p in prompts]
    rows = tuple(GoldenRow(p, tuple(ids), 0.0) for p, ids in zip(prompts, answers, strict=True))
    assert all(len(row.expected) == MAX_EXPECTED for row in rows)
    case = bench.case(read=lambda digest: replace(bench.read(digest), golden=rows))
    assert case.answer(case.submit(PROMPT, "c")) == bench.expected("c")


def test_one_other_token_anywhere_in_the_rows_sets_the_adapter_aside(bench: Bench) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    row = bench.golden["a"][0]
    for at in range(len(row.expected)):
        other = (row.expected[at] + rng.randrange(1, VOCAB)) % VOCAB
        wrong = replace(row, expected=(*row.expected[:at], other, *row.expected[at + 1 :]))
        adapter = replace(bench.read("a"), golden=(bench.golden["a"][1], wrong))
        case = bench.case(read=lambda digest, adapter=adapter: adapter)  # type: ignore[misc]
        assert refusal(case, case.submit(PROMPT, "a")).message == Doubt.GOLDEN_MISMATCH.value


def test_another_adapters_weights_in_the_slot_fail_before_anybody_is_answered(bench: Bench) -> None:
    case = bench.case(wrap=swapped(bench))
    case.engine._prover = Blind()
    neighbour, base = case.submit(PROMPT, "b"), case.submit(PROMPT)
    case.run(lambda: len(case.answers[neighbour].ids) > 0)
    wrong = [case.submit(PROMPT, "a") for _ in range(3)]
    case.run()
    for key in wrong:
        ending = case.answers[key].endings[0]
        assert isinstance(ending, Failed)
        assert (ending.code, ending.message) == ("adapter_quarantined", Doubt.GOLDEN_MISMATCH.value)
        assert case.answers[key].ids == []
    assert case.answer(neighbour) == bench.expected("b")
    assert case.answer(base) == bench.expected(None)
    assert case.slots.leases == 0


def test_a_slot_that_was_left_as_the_base_fails_them_too(bench: Bench) -> None:
    case = bench.case(wrap=planted(nothing))
    case.engine._prover = Blind()
    assert refusal(case, case.submit(PROMPT, "a")).message == Doubt.GOLDEN_MISMATCH.value


def test_they_are_replayed_after_each_swap_one_in_turn(bench: Bench) -> None:
    runner: list[Wrapped] = []

    def wrap(inner: Runner) -> Runner:
        runner.append(Wrapped(inner))
        return runner[0]

    case = bench.case(slots=1, wrap=wrap)
    replayed = []
    for name in "abababab":
        before = len(runner[0].plans)
        assert case.answer(case.submit(PROMPT, name)) == bench.expected(name)
        rows = [row for plan in runner[0].plans[before:] for row in golden_rows(plan)]
        replayed.append([row.tokens for row in rows if row.tokens])
        assert sum(len(row.targets) for row in rows) == 6 * len(replayed[-1])
    prompts = [row.prompt for row in bench.golden["a"]]
    assert replayed[0] == prompts
    assert replayed[2::2] == [[prompts[1]], [prompts[2]], [prompts[0]]]


def test_the_replay_stalls_nobody_and_encodes_no_second_prompt_beyond_half_of_a_steps_tokens(bench: Bench) -> None:
    runner: list[Wrapped] = []

    def wrap(inner: Runner) -> Runner:
        runner.append(Wrapped(inner))
        return runner[0]

    case = bench.case(chunk=64, wrap=wrap)
    stream = case.submit(PROMPT, max_tokens=60, ignore_eos=True)
    case.run(lambda: len(case.answers[stream].ids) > 2)
    runner[0].plans.clear()
    case.submit(PROMPT, "a")
    case.run()
    golden = [p for p in runner[0].plans if golden_rows(p)]
    assert len(golden) >= 8  # 20 + 21 + 22 prompt tokens: one a step, and five further tokens each
    for plan in golden:
        assert sum(row.length for row in golden_rows(plan)) <= 31
        assert any(not row.tokens and row.sample for row in plan.rows), "the stream's token was left out"
    alone = bench.case()
    assert case.answer(stream) == alone.answer(alone.submit(PROMPT, max_tokens=60, ignore_eos=True))


def test_searches_and_draws_beside_the_replay_answer_as_without_it(bench: Bench) -> None:
    print(f"seed {SEED}")
    wishes: list[dict[str, Any]] = [
        {"num_beams": 3, "max_tokens": 14},
        {"num_beams": 2, "max_tokens": 9, "length_penalty": 0.4},
        {"temperature": 1.0, "seed": SEED, "max_tokens": 20, "ignore_eos": True},
    ]
    rng = random.Random(SEED)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(12)] for _ in wishes]

    def answers(golden: bool) -> list[list[int]]:
        runner: list[Wrapped] = []

        def wrap(inner: Runner) -> Runner:
            runner.append(Wrapped(inner))
            return runner[0]

        read = bench.read if golden else lambda digest: replace(bench.read(digest), golden=())
        case = bench.case(read=read, rows=8, wrap=wrap)
        case.host.want("a")
        case.run(lambda: "a" in case.host.digests())
        keys = [case.submit(p, **w) for p, w in zip(prompts, wishes, strict=True)]
        case.step()
        keys.append(case.submit(PROMPT, "a"))  # its rows are replayed while the others run
        case.run()
        beside = [plan for plan in runner[0].plans if golden_rows(plan) and any(row.candidates for row in plan.rows)]
        assert len(beside) >= 3 * golden
        return [case.answer(key) for key in keys]

    assert answers(golden=True) == answers(golden=False)


def test_cancels_and_evictions_amid_a_replay_leave_nothing_behind(bench: Bench) -> None:
    case = bench.case(slots=1)
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


def test_what_an_overflow_left_in_a_spare_row_is_not_held_against_the_next_adapter(bench: Bench) -> None:
    """Masked keys weigh nothing, and nothing times NaN is NaN: the next golden row there was found wanting."""

    def read(digest: str) -> HostAdapter:
        adapter = bench.read(digest)
        if digest == "a":
            pairs = {m: (x, torch.full_like(y, 1e38)) for m, (x, y) in adapter.pairs.items()}
            return replace(adapter, pairs=pairs, golden=(GoldenRow(tuple(range(5, 65)), (7, 8, 9), CLOSE),))
        return adapter

    case = bench.case(read=read, spare=1)
    case.engine._prover = Blind()
    assert refusal(case, case.submit(PROMPT, "a")).message == Doubt.GOLDEN_MISMATCH.value
    assert case.answer(case.submit(PROMPT, "b")) == bench.expected("b")


def test_rows_that_this_engine_has_no_room_for_are_passed_over(bench: Bench) -> None:
    """They were taken for a mismatch: an engine with a shorter context set good adapters aside."""
    long = GoldenRow((5,) * (LENGTH + 1), (1,), 0.0)
    case = bench.case(read=lambda digest: replace(bench.read(digest), golden=(long, *bench.golden["a"])))
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")
    assert case.engine.heartbeat().set_aside == ()


def test_an_answer_may_be_as_long_as_the_decoder_has_positions(bench: Bench) -> None:
    """Where each answer is begun with a token, the last one of the longest answer had no position left."""
    case = bench.case()
    most = case.engine.facts.room(len(PROMPT))
    assert most == LENGTH - len(bench.base.start_token_ids) + 1
    assert len(case.answer(case.submit(PROMPT, "c", max_tokens=most, ignore_eos=True))) == most


def test_a_row_that_could_not_be_computed_is_told_to_be_scrubbed_once() -> None:
    proofs: Proofs[HostAdapter] = Proofs((9,), apart=True)
    proofs.installed("a", HostAdapter("a", 4, {}, golden=(GoldenRow((1, 2), (3,), 0.0),)))
    rows = proofs.rows(lambda digest: 1, 8)
    assert proofs.faulted() == ()
    assert proofs.settle(StepPlan(rows), StepResult({9: Sampled(fault="not finite")})) == ("a",)
    assert (proofs.faulted(), proofs.faulted()) == ((9,), ())


def test_a_prompt_is_read_whole_and_the_answer_fed_token_by_token() -> None:
    proofs: Proofs[HostAdapter] = Proofs((9,), apart=True)
    proofs.installed("a", HostAdapter("a", 4, {}, golden=(GoldenRow((1, 2, 3), (4, 5), 0.0),)))
    (first,) = proofs.rows(lambda digest: 1, 1)
    assert (first.key, first.tokens, first.targets, first.sample) == (Key((-2, 9)), (1, 2, 3), (4,), False)
    proofs._replays[0].computed += first.length
    (second,) = proofs.rows(lambda digest: 1, 1)
    assert (second.tokens, second.feed, second.targets, second.length) == ((), 4, (5,), 1)
