"""Test ids A-05, F-07, F-08 and F-11 of the engine: a sequence's answer depends on nothing but itself.

At the scale said in each test; the larger ones run with `-m slow`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import structlog
import torch

from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import Key, RowPlan, Sampled, StepPlan, StepResult
from serving.engine.request import Failed, Sampling
from serving.engine.runner import DecoderRunner, Runner, make_slots
from tests.engine_case import EngineCase, load_tiny, read_peft
from tests.test_engine_parity import expected
from tests.tiny_base import VOCAB, Oracle

SEED = 20261122
GREEDY = Sampling(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
Cases = list[tuple[Path | None, list[int], Key]]


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """Hundreds of tracebacks of tensors would take minutes to print."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture(scope="module")
def oracles(tiny_base: Path, tiny_adapters: list[Path]) -> dict[Path | None, Oracle]:
    return {a: Oracle(tiny_base, a) for a in (None, *tiny_adapters)}


def storm(case: EngineCase, rng: random.Random, adapters: Sequence[Path], count: int) -> Cases:
    """So many requests at random times: an adapter's prompts begin alike; some leave half way."""
    openings = {a: [rng.randrange(3, VOCAB) for _ in range(rng.randrange(16, 50))] for a in (None, *adapters)}
    asked: Cases = []
    while len(asked) < count:
        adapter = rng.choice([None, *adapters])
        begun = openings[adapter] if rng.random() < 0.7 else []
        prompt = [*begun, *(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 30)))]
        key = case.submit(prompt, adapter, max_tokens=rng.randrange(1, 24), ignore_eos=True)
        for _ in range(rng.randrange(0, 5)):
            case.step()
        if rng.random() < 0.1 and not case.answers[key].endings:
            case.engine.cancel(key, key[1])
            case.step()
            del case.answers[key]
        else:
            asked.append((adapter, prompt, key))
    case.run()
    return asked


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_A05_a_storm_is_answered_as_each_adapter_alone_in_transformers(
    decoder: Decoder, oracles: dict[Path | None, Oracle], tiny_adapters: list[Path], count: int
) -> None:
    """Mixed batches, six adapters through three slots, evictions, cancels, chunked prefill and prefix reuse at once."""
    print(f"seed {SEED}")
    close = total = reused = evictions = 0
    for part in range(count // 100):  # a longer queue is served adapter by adapter, and evicts less
        case = EngineCase(decoder, rows=6, slots=3, chunk=7, queue_limit=100)
        for adapter, prompt, key in storm(case, random.Random(SEED + part), tiny_adapters, 100):
            ids = case.answer(key)
            wrong, near = expected(oracles[adapter], prompt, ids)
            assert wrong == -1, (part, adapter, prompt, ids, wrong)
            close, total = close + near, total + len(ids)
        reused, evictions = reused + case.scheduler.reused_tokens, evictions + case.slots.evictions
    print(f"{count} cases: {total} tokens, {close} too close to call, {evictions} evictions, {reused} tokens reused")
    assert close <= total / 1000
    assert evictions > count / 20
    assert reused > 4 * count


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_A05_a_rows_logits_do_not_depend_on_what_shares_its_step(
    decoder: Decoder, tiny_adapters: list[Path], count: int
) -> None:
    """Prompts alone and in random mixed batches of up to 16 rows; float32: within 1e-5 of the largest logit."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    runner = DecoderRunner(decoder, 16, make_slots(decoder, 6, 64))
    for number, folder in enumerate(tiny_adapters, start=1):
        runner.install(number, read_peft(folder))
    prompts = [tuple(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 24))) for _ in range(40)]

    def row(at: int, slot: int, prompt: tuple[int, ...]) -> RowPlan:
        return RowPlan(Key((0, at)), at, slot, 0, prompt, True, GREEDY, 0, 0)

    alone = {
        (slot, prompt): runner.logits(StepPlan((row(0, slot, prompt),)))[0].clone()
        for slot in range(7)
        for prompt in prompts
    }
    worst, done = 0.0, 0
    while done < count:
        chosen = [(rng.randrange(7), rng.choice(prompts)) for _ in range(rng.randint(2, 16))]
        together = runner.logits(StepPlan(tuple(row(at, *case) for at, case in enumerate(chosen))))
        for found, case in zip(together, chosen, strict=True):
            worst = max(worst, float((found - alone[case]).abs().max() / alone[case].abs().max()))
            assert int(found.argmax()) == int(alone[case].argmax())
        done += len(chosen)
    print(f"{done} rows in mixed batches, largest difference {worst:.1e} of the largest logit")
    assert worst <= 1e-5


def test_A05_in_bfloat16_a_sequence_is_bit_for_bit_the_same_in_any_company(
    tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    """200 requests in a storm against each alone: the same tokens, without a rule for ties."""
    print(f"seed {SEED}")
    decoder = load_tiny(tiny_base, torch.bfloat16)
    if decoder.device.type != "cpu":
        pytest.skip("bit for bit is claimed for the CPU's products only")

    def read(name: str) -> HostAdapter:
        return read_peft(Path(name), torch.bfloat16)

    case = EngineCase(decoder, rows=8, slots=4, chunk=16, read=read)
    asked = storm(case, random.Random(SEED), tiny_adapters, 200)
    quiet = EngineCase(decoder, rows=1, slots=1, chunk=16, read=read, prefix_reuse=False)
    for adapter, prompt, key in asked:
        ids = case.answer(key)
        assert quiet.answer(quiet.submit(prompt, adapter, max_tokens=len(ids), ignore_eos=True)) == ids


class Planted:
    """A runner that fails the rows whose prompt holds POISON: raising, or with NaN all over their caches."""

    POISON = 77

    def __init__(self, runner: Runner, mode: str) -> None:
        self._runner, self._mode = runner, mode

    def run(self, plan: StepPlan) -> StepResult:
        hit = [r for r in plan.rows if self.POISON in r.tokens]
        if hit and self._mode == "raise":
            raise RuntimeError("planted")
        result = self._runner.run(plan)
        if not hit:
            return result
        cache = self._runner._cache  # type: ignore[attr-defined]
        for tensor in (*cache._keys, *cache._values):
            tensor[[r.row for r in hit]] = float("nan")
        faults = {r.row: Sampled(fault="planted", numerics=True) for r in hit if r.sample}
        return StepResult({**result.sampled, **faults}, result.scores)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        self._runner.install(slot, adapter)

    def tidy(self, plan: StepPlan) -> None:
        self._runner.tidy(plan)

    def probe(self) -> bool:
        return self._runner.probe()


@pytest.mark.parametrize("mode", ["raise", "nan"])
@pytest.mark.usefixtures("quiet_log")
def test_F07_one_of_eight_that_faults_fails_alone(decoder: Decoder, tiny_adapters: list[Path], mode: str) -> None:
    """200 faults among seven others each; the others equal their quiet runs, though rows are reused all the time."""
    quiet = EngineCase(decoder)
    asked = [(tiny_adapters[i % 3] if i % 2 else None, [4 + i, 8, 15]) for i in range(7)]
    answers = [quiet.answer(quiet.submit(p, a, max_tokens=4, ignore_eos=True)) for a, p in asked]
    case = EngineCase(decoder, rows=8, wrap=lambda runner: Planted(runner, mode))
    for _ in range(200):
        keys = [case.submit(p, a, max_tokens=4, ignore_eos=True) for a, p in asked]
        case.step()
        bad = case.submit([3, Planted.POISON, 5])
        case.run()
        assert [e.code for e in case.answers[bad].endings if isinstance(e, Failed)] == ["engine_fault"]
        assert [case.answers[key].ids for key in keys] == answers


def sick(sound: Path) -> HostAdapter:
    """An adapter whose weights are finite, as publishing demands, and whose update is not."""
    adapter = read_peft(sound)
    return HostAdapter("sick", adapter.rank, {m: (a * 1e25, b * 1e25) for m, (a, b) in adapter.pairs.items()})


def test_F08_an_adapter_that_goes_nan_fails_its_request_and_is_set_aside_after_three(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    read = {"sick": sick(tiny_adapters[0]), **{str(a): read_peft(a) for a in tiny_adapters}}
    quiet = EngineCase(decoder)
    asked = [(tiny_adapters[i % 3] if i % 2 else None, [4 + i, 8, 15]) for i in range(6)]
    answers = [quiet.answer(quiet.submit(p, a, max_tokens=6, ignore_eos=True)) for a, p in asked]
    case = EngineCase(decoder, rows=8, slots=6, read=lambda name: read[name])
    for attempt in range(5):
        keys = [case.submit(p, a, max_tokens=6, ignore_eos=True) for a, p in asked]
        bad = case.submit([5, 6, 7], "sick", ignore_eos=True)
        case.run()
        (failure,) = case.answers[bad].endings
        assert isinstance(failure, Failed)
        assert failure.code == ("adapter_numerics" if attempt < 3 else "adapter_quarantined")
        assert [case.answers[key].ids for key in keys] == answers
    assert failure.retry_after_s is not None
    assert case.engine._snapshot().quarantined == ("sick",)
    case.time += failure.retry_after_s  # its time is over: it is asked again, and struck again at once
    again = case.submit([5, 6, 7], "sick", ignore_eos=True)
    case.run()
    assert [e.code for e in case.answers[again].endings if isinstance(e, Failed)] == ["adapter_numerics"]
    assert case.engine._snapshot().quarantined == ("sick",)


def test_F08_settings_that_leave_no_token_do_not_strike_the_adapter(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    case = EngineCase(decoder)
    nothing = tuple((token, float("-inf")) for token in range(VOCAB))
    for _ in range(5):
        key = case.submit([5, 6], tiny_adapters[0], logit_bias=nothing)
        case.run()
        assert [e.code for e in case.answers[key].endings if isinstance(e, Failed)] == ["engine_fault"]
    assert case.engine._snapshot().quarantined == ()
    assert case.answer(case.submit([5, 6], tiny_adapters[0], ignore_eos=True))


def test_F11_a_thousand_cancels_at_any_moment_free_rows_and_leases_within_two_steps(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    """1,000 cancels at random stages beside three streams that nobody disturbs; the books balance after every step."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    case = EngineCase(decoder, rows=6, slots=3, chunk=5)
    quiet = EngineCase(decoder)
    steady = [([9, 8, 7 + i], tiny_adapters[i]) for i in range(2)]
    answers = [quiet.answer(quiet.submit(p, a, max_tokens=30, ignore_eos=True)) for p, a in steady]
    keys = [case.submit(p, a, max_tokens=30, ignore_eos=True) for p, a in steady]
    for _ in range(1000):
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 20))]
        key = case.submit(prompt, rng.choice([None, *tiny_adapters[:2]]), max_tokens=30, ignore_eos=True)
        for _ in range(rng.randrange(4)):
            case.step()
            assert case.scheduler.balanced()
        case.engine.cancel(key, key[1])
        case.step()
        case.step()
        del case.answers[key]
        assert key not in case.scheduler._running
        assert key not in case.scheduler._waiting
        if all(case.answers[k].endings for k in keys):
            assert [case.answers[k].ids for k in keys] == answers
            keys = [case.submit(p, a, max_tokens=30, ignore_eos=True) for p, a in steady]
    case.run()
    assert case.rows.held == 0
    assert case.slots.leases == 0
