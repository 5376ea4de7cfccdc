"""What one engine promises each sequence: its own sampling, one ending, its own faults, and books that balance."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.errors import AdapterLoadFailed
from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.ops import Ops
from serving.engine.plan import Key, RowPlan, StepPlan
from serving.engine.request import Failed, Finished, FinishReason, Sampling, Tokens
from serving.engine.runner import DecoderRunner, make_slots
from serving.engine.sampling import sample, uniform
from tests.engine_case import EngineCase, load_tiny, read_peft
from tests.test_engine_reliability import Planted
from tests.tiny_base import VOCAB, Oracle, save_random, tiny_config

SEED = 20261122
PROMPT = [5, 9, 33, 61, 17]


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def row(position: int = 0, **sampling: object) -> RowPlan:
    settings = Sampling(**{"max_tokens": 8, **sampling})  # type: ignore[arg-type]
    return RowPlan(Key((0, position)), 0, 0, 0, (1,), True, settings, 0, position)


def test_a_seeded_sequence_has_the_same_tokens_whatever_shares_its_batch(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    wishes = {"temperature": 0.9, "top_p": 0.95, "seed": 4711, "max_tokens": 20, "ignore_eos": True}
    alone = EngineCase(decoder)
    expected = alone.answer(alone.submit(PROMPT, tiny_adapters[0], **wishes))
    crowd = EngineCase(decoder, rows=7, chunk=3)
    for i in range(9):
        crowd.submit([7 + i, 8], [None, *tiny_adapters][i % 4], temperature=1.3, seed=i, max_tokens=15, top_k=5)
        crowd.step()
    assert crowd.answer(crowd.submit(PROMPT, tiny_adapters[0], **wishes)) == expected
    crowd.run()


def test_in_bfloat16_a_seeded_sequence_is_bit_for_bit_independent_of_its_batch(
    tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    """Logit noise moves a draw: six seeds alone, then all together with long neighbours and small prompt chunks."""

    def read(digest: str) -> HostAdapter:
        return read_peft(Path(digest), torch.bfloat16)

    half = load_tiny(tiny_base, torch.bfloat16)
    wishes = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True}
    prompt = [5 + i % 200 for i in range(60)]
    alone = [
        (case := EngineCase(half, read=read)).answer(case.submit(prompt, tiny_adapters[i % 2], seed=i, **wishes))
        for i in range(6)
    ]
    crowd = EngineCase(half, rows=8, chunk=7, read=read)
    crowd.submit([9] * 150, max_tokens=90, ignore_eos=True)
    keys = [crowd.submit(prompt, tiny_adapters[i % 2], seed=i, **wishes) for i in range(6)]
    assert [crowd.answer(key) for key in keys] == alone
    crowd.run()


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "torch alone"])
def test_in_bfloat16_a_prompts_result_does_not_depend_on_where_it_is_cut(tmp_path: Path, plain: bool) -> None:
    """Heads as in SmolLM2; 300 prompts, whole and in two parts: the logits are the same bit for bit."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    shape = tiny_config()
    shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim = 72, 9, 3, 64
    half = load_tiny(save_random(shape, tmp_path, 0), torch.bfloat16)
    if plain:
        half = replace(half, ops=Ops(None))
    runner = DecoderRunner(half, 2, make_slots(half, 1, 8))
    greedy = Sampling(max_tokens=1, temperature=0.0)

    def last(row: int, start: int, tokens: tuple[int, ...]) -> torch.Tensor:
        plan = StepPlan((RowPlan(Key((0, row)), row, 0, start, tokens, True, greedy, 0, 0),))
        return runner.logits(plan)[0].clone()

    for number in range(300):  # one in a hundred rounded another way when a query block had three rows
        length = 65 if number % 2 else rng.randrange(17, 150)
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(length))
        whole = last(0, 0, prompt)
        cut = 64 if number % 2 else rng.randrange(1, length)
        last(1, 0, prompt[:cut])
        assert torch.equal(last(1, cut, prompt[cut:]), whole), (length, cut)


def test_choices_of_one_seed_differ_and_seeds_differ(decoder: Decoder) -> None:
    case = EngineCase(decoder)
    keys = [
        case.submit(PROMPT, temperature=1.5, seed=seed, choice=choice, max_tokens=12, ignore_eos=True)
        for seed in (1, 2)
        for choice in (0, 1)
    ]
    assert len({tuple(case.answer(key)) for key in keys}) == 4


def test_draws_follow_the_softmax() -> None:
    """10,000 draws from four known probabilities: each share within four standard errors (seed 1)."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).expand(2000, 4)
    counts = torch.zeros(4)
    for part in range(5):
        rows = [row(2000 * part + i, temperature=1.0, seed=1) for i in range(2000)]
        counts += torch.bincount(torch.tensor([s.token for s in sample(logits, rows)]), minlength=4)
    shares = counts / 10_000
    for share, p in zip(shares.tolist(), (0.5, 0.25, 0.15, 0.1), strict=True):
        assert abs(share - p) < 4 * (p * (1 - p) / 10_000) ** 0.5


@pytest.mark.parametrize(
    ("wishes", "allowed"),
    [
        ({"top_k": 2}, {7, 3}),
        ({"top_p": 0.5}, {7}),
        ({"top_p": 0.6}, {7, 3}),
        ({"min_p": 0.5}, {7, 3}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.25}, {7, 3, 11}),
        ({"temperature": 1e-6}, {7}),
        ({"logit_bias": ((2, 100.0),)}, {2}),
    ],
)
def test_filters_leave_exactly_the_tokens_they_promise(wishes: dict[str, object], allowed: set[int]) -> None:
    p = torch.full((1, 20), 1e-4)
    p[0, 7], p[0, 3], p[0, 11] = 0.55, 0.28, 0.15
    logits = torch.log(p).expand(400, 20)
    drawn = {s.token for s in sample(logits, [row(i, **{"temperature": 1.0, "seed": 3, **wishes}) for i in range(400)])}
    assert drawn == allowed


@pytest.mark.parametrize(
    "wishes", [{"temperature": 1e-50}, {"temperature": 1e-300, "top_p": 0.5}, {"temperature": 5e-6, "top_k": 3}]
)
def test_a_vanishing_temperature_takes_the_likeliest_token(wishes: dict[str, object]) -> None:
    assert sample(torch.tensor([[0.0, 3.0, 1.0, 2.9]]), [row(seed=5, **wishes)])[0].token == 1


def test_penalties_that_leave_no_finite_number_fail_the_row_alone() -> None:
    logits = torch.tensor([[1.0, 3.0, -1.0], [1.0, 3.0, -1.0]])
    bad = replace(row(repetition_penalty=1e-40, temperature=1.0), prompt=(1,))
    failed, good = sample(logits, [bad, row(temperature=0.0)])
    assert failed.fault is not None
    assert (good.fault, good.token) == (None, 1)


def test_a_wide_nucleus_looks_beyond_the_head() -> None:
    """Flat over 5,000 tokens, top_p 0.9: more than the 1,024 likeliest are needed, and the last tenth never comes."""
    logits = torch.linspace(0.01, 0, 5000)[None].expand(300, 5000)
    tokens = [s.token for s in sample(logits, [row(i, temperature=1.0, top_p=0.9, seed=9) for i in range(300)])]
    assert max(tokens) > 1024
    assert max(tokens) < 4510


def test_random_numbers_are_pure_and_spread() -> None:
    assert uniform(1, 0, 5) == uniform(1, 0, 5)
    values = [uniform(seed, choice, position) for seed in range(10) for choice in range(3) for position in range(30)]
    assert len(set(values)) == 900
    assert abs(sum(values) / 900 - 0.5) < 0.04
    assert all(0 <= v < 1 for v in values)


def test_penalties_and_bans_change_what_greedy_takes(decoder: Decoder) -> None:
    case = EngineCase(decoder)
    plain = case.answer(case.submit(PROMPT, max_tokens=12, ignore_eos=True))
    bound = case.answer(case.submit(PROMPT, max_tokens=12, ignore_eos=True, presence_penalty=1000.0))
    assert len(set(bound)) == 12 >= len(set(plain))
    banned = case.answer(case.submit(PROMPT, max_tokens=3, ignore_eos=True, logit_bias=((plain[0], -1000.0),)))
    assert banned[0] != plain[0]


def test_logprobs_are_the_models_own(decoder: Decoder, tiny_base: Path) -> None:
    case = EngineCase(decoder)
    key = case.submit(PROMPT, max_tokens=4, logprobs=3, ignore_eos=True, temperature=0.7, seed=5)
    ids = case.answer(key)
    table = torch.log_softmax(Oracle(tiny_base, None).logits([*PROMPT, *ids]), dim=-1)
    events = [e for e in case.answers[key].events if isinstance(e, Tokens)]
    for position, event in enumerate(events):
        expected = table[len(PROMPT) - 1 + position]
        assert event.logprobs[0].chosen == pytest.approx(float(expected[ids[position]]), abs=1e-4)
        assert [t for t, _ in event.logprobs[0].top] == expected.topk(3).indices.tolist()


def test_a_stop_token_that_was_asked_for_is_the_last_of_the_answer(decoder: Decoder) -> None:
    """The edge decides whether it shows; the model's own end of text is never part of it."""
    case = EngineCase(decoder)
    free = case.answer(case.submit(PROMPT, max_tokens=10, ignore_eos=True))
    key = case.submit(PROMPT, max_tokens=10, ignore_eos=True, stop_token_ids=(free[4],))
    assert case.answer(key) == free[: free.index(free[4]) + 1]
    ending = case.answers[key].endings[0]
    assert isinstance(ending, Finished)
    assert ending.reason is FinishReason.STOP


def test_min_tokens_holds_back_every_stop(decoder: Decoder) -> None:
    case = EngineCase(decoder)
    free = case.answer(case.submit(PROMPT, max_tokens=10, ignore_eos=True))
    key = case.submit(PROMPT, max_tokens=10, min_tokens=6, stop_token_ids=(free[1],))
    assert len(case.answer(key)) >= 6


def test_prompt_and_answer_beyond_the_context_are_refused_before_any_work(decoder: Decoder) -> None:
    case = EngineCase(decoder)
    key = case.submit([5] * 250, max_tokens=7)
    case.run()
    assert [e.code for e in case.answers[key].events if isinstance(e, Failed)] == ["context_length_exceeded"]


def test_a_full_queue_refuses_and_what_waits_is_answered(decoder: Decoder) -> None:
    """One row and three places: of a burst of seven, four are answered, whether or not a step came in between."""
    for steps in (0, 1):
        case = EngineCase(decoder, rows=1, queue_limit=3)
        keys = [case.submit(PROMPT)]
        for _ in range(steps):
            case.step()
        keys += [case.submit(PROMPT) for _ in range(6)]
        case.run()
        codes = [e.code for key in keys for e in case.answers[key].endings if isinstance(e, Failed)]
        assert codes == ["queue_full"] * 3


def test_a_deadline_ends_what_runs_and_what_waits(decoder: Decoder) -> None:
    case = EngineCase(decoder, rows=1)
    running = case.submit(PROMPT, max_tokens=200, ignore_eos=True, deadline_s=0.05)
    waiting = case.submit(PROMPT, deadline_s=0.05)
    case.run()
    for key in (running, waiting):
        assert [e.code for e in case.answers[key].endings if isinstance(e, Failed)] == ["deadline_exceeded"]


def test_more_adapters_in_flight_than_slots_are_all_answered(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, rows=6, slots=2)
    keys = [case.submit(PROMPT, a, max_tokens=30, ignore_eos=True) for a in (*tiny_adapters, *tiny_adapters)]
    case.run()
    assert all(isinstance(case.answers[key].endings[0], Finished) for key in keys)


def test_a_stream_of_requests_for_resident_adapters_does_not_starve_a_newcomer(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    """Two slots, always leased anew: the third adapter gets one once it has waited for patience_s."""
    case = EngineCase(decoder, rows=6, slots=2, patience_s=0.2)
    for adapter in tiny_adapters[:2]:
        case.answer(case.submit(PROMPT, adapter))
    newcomer = None
    for turn in range(400):
        case.submit(PROMPT, tiny_adapters[turn % 2], max_tokens=12, ignore_eos=True)
        if turn == 10:
            newcomer = case.submit(PROMPT, tiny_adapters[2])
        for _ in range(3):
            case.step()
        if newcomer is not None and case.answers[newcomer].endings:
            break
    assert newcomer is not None
    assert case.answers[newcomer].endings, "starved"
    case.run()


def test_a_leased_adapter_is_never_evicted(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, rows=4, slots=1)
    long = case.submit(PROMPT, tiny_adapters[0], max_tokens=60, ignore_eos=True)
    case.run(lambda: len(case.answers[long].ids) > 3)
    other = case.submit(PROMPT, tiny_adapters[1])
    case.run(lambda: len(case.answers[long].ids) > 40)
    assert case.answers[other].events == []
    assert case.slots.evictions == 0
    case.run()
    assert isinstance(case.answers[other].endings[0], Finished)


def test_500_first_requests_for_one_cold_adapter_load_it_once(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    loads: list[str] = []

    def read(digest: str) -> HostAdapter:
        loads.append(digest)
        return read_peft(Path(digest))

    case = EngineCase(decoder, queue_limit=600, read=read)
    for _ in range(500):
        case.submit(PROMPT, tiny_adapters[0], max_tokens=1)
    case.run()
    assert len(loads) == 1


def test_an_adapter_that_cannot_load_fails_its_own_requests_and_evicts_nobody(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    def read(digest: str) -> HostAdapter:
        if digest == "broken":
            raise AdapterLoadFailed("its bytes are gone")
        return read_peft(Path(digest))

    case = EngineCase(decoder, slots=1, read=read)
    case.answer(case.submit(PROMPT, tiny_adapters[0]))
    bad = [case.submit(PROMPT, "broken") for _ in range(3)]
    good = case.submit(PROMPT, tiny_adapters[0])
    case.run()
    assert [e.code for key in bad for e in case.answers[key].endings if isinstance(e, Failed)] == [
        "adapter_load_failed"
    ] * 3
    assert isinstance(case.answers[good].endings[0], Finished)
    assert case.slots.evictions == 0


def test_a_slow_load_holds_up_nobody_else(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    gate = threading.Event()

    def read(digest: str) -> HostAdapter:
        if digest == str(tiny_adapters[0]):
            gate.wait(30)
        return read_peft(Path(digest))

    case = EngineCase(decoder, read=read)
    slow = case.submit(PROMPT, tiny_adapters[0])
    others = [case.submit(PROMPT, tiny_adapters[1]), case.submit(PROMPT)]
    case.run(lambda: all(case.answers[key].endings for key in others))
    assert case.answers[slow].events == []
    gate.set()
    case.run()
    assert isinstance(case.answers[slow].endings[0], Finished)


def test_the_host_tier_keeps_to_its_budget(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    one = read_peft(tiny_adapters[0]).size_bytes
    case = EngineCase(decoder, slots=1, budget_bytes=int(2.5 * one))
    for adapter in (*tiny_adapters, tiny_adapters[0]):
        case.answer(case.submit(PROMPT, adapter))
        assert case.host.held_bytes <= 2.5 * one
    assert case.host.counts.loads["store"] >= 6


def test_every_id_of_the_vocabulary_can_be_a_prompt(decoder: Decoder) -> None:
    case = EngineCase(decoder, rows=8)
    for token in range(VOCAB):
        case.submit([token], max_tokens=1)
        case.step()
    case.run()
    assert all(len(a.endings) == 1 for a in case.answers.values())


def test_a_large_cache_is_resident_only_where_it_was_written() -> None:
    from psutil import Process

    from serving.engine.memory import lazy_zeros

    before = Process().memory_info().rss
    cache = lazy_zeros((64, 1 << 20), torch.bfloat16, torch.device("cpu"))
    cache[3, 5] = 1.0
    assert Process().memory_info().rss - before < 16 << 20
    assert float(cache[3].sum()) == 1.0
    assert cache.dtype is torch.bfloat16


def test_an_engine_whose_every_row_fails_does_not_call_itself_alive(decoder: Decoder) -> None:
    case = EngineCase(decoder, wrap=lambda runner: Planted(runner, "raise"))
    case.answer(case.submit(PROMPT))
    alive = case.engine.idle_s
    for _ in range(3):
        case.submit([Planted.POISON])
        case.step(seconds=1.0)
    assert case.engine.idle_s >= alive + 3.0
