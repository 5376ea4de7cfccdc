"""The engine's answers equal transformers + PEFT, that adapter alone, in float32 and greedy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from adapters.errors import BaseUnsupported
from serving.engine.lora import StackedSlots, add_reference
from serving.engine.model import Decoder, pick_device
from tests.engine_case import DEVICE, EngineCase, load_tiny, read_peft
from tests.tiny_base import VOCAB, Oracle

SEED = 20261121
# Measured: the largest difference of logits from the oracle on this base is 4e-6 (test below).
LOGIT_ERROR = 1e-5


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


@pytest.fixture(scope="module")
def oracles(tiny_base: Path, tiny_adapters: list[Path]) -> dict[Path | None, Oracle]:
    return {a: Oracle(tiny_base, a) for a in (None, *tiny_adapters)}


def expected(oracle: Oracle, prompt: list[int], ids: list[int]) -> tuple[int, int]:
    """(first position where ids differ from the oracle's, or -1; positions too close to call before it)."""
    logits = oracle.logits([*prompt, *ids])
    close = 0
    for position, token in enumerate(ids):
        row = logits[len(prompt) + position - 1]
        top = row.topk(2).values
        if float(top[0] - top[1]) <= 10 * LOGIT_ERROR:
            close += 1
        elif int(row.argmax()) != token:
            return position, close
    return -1, close


def test_mixed_batches_answer_as_each_adapter_alone(
    decoder: Decoder, oracles: dict[Path | None, Oracle], tiny_adapters: list[Path]
) -> None:
    """100 random cases: base and six adapters through three slots: evictions, chunked prefill, joins at any step."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    case = EngineCase(decoder, rows=6, slots=3, chunk=7, queue_limit=100)
    asked = []
    for _ in range(100):
        adapter = rng.choice([None, *tiny_adapters])
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 40))]
        asked.append((adapter, prompt, case.submit(prompt, adapter, max_tokens=rng.randrange(1, 24), ignore_eos=True)))
        for _ in range(rng.randrange(0, 4)):
            case.step()
    case.run()
    close = total = 0
    for adapter, prompt, key in asked:
        ids = case.answer(key)
        wrong, near = expected(oracles[adapter], prompt, ids)
        assert wrong == -1, (adapter, prompt, ids, wrong)
        close, total = close + near, total + len(ids)
    print(f"{total} tokens, {close} too close to call, {case.slots.evictions} evictions")
    assert close <= total / 1000
    assert case.slots.evictions > 5


def test_logits_of_a_mixed_batch_are_within_the_stated_error(
    decoder: Decoder, oracles: dict[Path | None, Oracle], tiny_adapters: list[Path]
) -> None:
    from serving.engine.plan import Key, RowPlan, StepPlan
    from serving.engine.request import Sampling
    from serving.engine.runner import DecoderRunner, make_slots

    runner = DecoderRunner(decoder, 7, make_slots(decoder, 6, 64))
    for number, folder in enumerate(tiny_adapters, start=1):
        runner.install(number, read_peft(folder))
    prompts = [[3 + (7 * i + 5 * j) % 200 for j in range(9 + i)] for i in range(7)]
    greedy = Sampling(max_tokens=1, temperature=0.0)
    rows = tuple(RowPlan(Key((0, i)), i, i, 0, tuple(prompt), True, greedy, 0, 0) for i, prompt in enumerate(prompts))
    logits = runner.logits(StepPlan(rows))
    worst = max(
        float((logits[i].cpu() - oracles[adapter].logits(prompts[i])[-1]).abs().max())
        for i, adapter in enumerate([None, *tiny_adapters])
    )
    print(f"largest difference {worst:.2e}")
    assert worst <= LOGIT_ERROR


def test_the_batched_update_equals_the_loop_reference(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """Over ranks, sites and popularity: distinct, uniform, zipf, identical, none."""
    slots = StackedSlots(decoder.sites, 6, decoder.dtype, decoder.device, 64)
    adapters = [read_peft(folder) for folder in tiny_adapters]
    for number, adapter in enumerate(adapters, start=1):
        slots.install(number, adapter)
    torch.manual_seed(SEED)
    for tokens in ([1, 2, 3, 4, 5, 6], [0, 3, 3, 0, 5, 1, 2], [1, 1, 1, 1, 2, 1, 0], [4] * 9, [6], [0, 0]):
        assert slots.begin(tokens) is any(tokens)
        for site, shape in enumerate(decoder.sites):
            x = torch.randn(len(tokens), shape.in_features)
            slow = torch.randn(len(tokens), sum(shape.widths))
            fast = slow.to(DEVICE)
            slots.add(site, x.to(DEVICE), fast)
            add_reference(decoder.sites, site, [adapters[t - 1] if t else None for t in tokens], x, slow)
            torch.testing.assert_close(fast.cpu(), slow, rtol=1e-4, atol=1e-4)


def test_a_slot_keeps_nothing_of_the_adapter_before(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """Rank 16 on three modules, then rank 2 on seven, then q/v only: the tails must be zero each time."""
    used = StackedSlots(decoder.sites, 1, decoder.dtype, decoder.device, 64)
    for folder in (tiny_adapters[4], tiny_adapters[2], tiny_adapters[1]):
        used.install(1, read_peft(folder))
    x = torch.randn(3, 48)
    used.begin([1, 1, 1])
    for site, shape in enumerate(decoder.sites):
        if shape.in_features == 48:
            right = torch.zeros(3, sum(shape.widths))
            left = right.to(DEVICE)
            used.add(site, x.to(DEVICE), left)
            add_reference(decoder.sites, site, [read_peft(tiny_adapters[1])] * 3, x, right)
            torch.testing.assert_close(left.cpu(), right, rtol=1e-5, atol=1e-5)


def test_a_packed_products_rows_do_not_depend_on_how_many_there_are() -> None:
    from serving.engine.linear import FrozenLinear, packs

    if not packs(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this machine packs no bfloat16 weights")
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    x = torch.randn(300, 1536).bfloat16()
    linear = FrozenLinear((torch.randn(576, 1536) * 0.05).bfloat16())
    whole = linear(x)
    assert linear(x[:0]).shape == (0, 576)  # a step that only reads a part of a prompt samples nothing
    for _ in range(300):
        count = rng.choice([1, 1, 1, 2, 3, 5, 8, 16, 17, 33, 64, 100])
        start = rng.randrange(300 - count)
        assert torch.equal(linear(x[start : start + count].contiguous()), whole[start : start + count])


def test_a_device_that_is_not_here_is_told_by_name() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(BaseUnsupported, match=f"no {missing} here"):
        pick_device(missing)
