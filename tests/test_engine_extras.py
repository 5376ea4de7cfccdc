"""Embeddings, heads and gains of adapters: on the rows that have them, and on no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from serving.engine.extras import Extras, gain_reference
from serving.engine.lora import End, HostAdapter, Site
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, make_slots
from tests.engine_case import DEVICE, EngineCase, load_tiny, read_peft
from tests.test_engine_families import variants
from tests.tiny_base import ALL_LINEAR, VOCAB, Oracle, save_adapter

SITES = (Site(("a", "b"), 8, (5, 3)), Site(("c",), 8, (4,)), Site(("d", "e", "f"), 8, (2, 2, 2)))
GREEDY = Sampling(max_tokens=1, temperature=0.0)
SEED = 20261122
LOGIT_ERROR = 2e-5
SLOTS: dict[str, list[int]] = {
    "distinct": [1, 2, 3, 4, 5, 6],
    "identical": [3] * 7,
    "mixed with rows that have none": [0, 3, 3, 0, 1, 9, 2, 0],
    "a prompt between others": [2, 1, 1, 1, 1, 1, 0, 4],
}


def gains_of(slot: int) -> dict[str, Tensor]:
    """Slot 1: a. 2: a and c. 3: b, c, e. The others by their number alone; 9 has none."""
    torch.manual_seed(slot)
    width = {m: w for s in SITES for m, w in zip(s.modules, s.widths, strict=True)}
    chosen = {1: "a", 2: "ac", 3: "bce", 4: "abcdef", 5: "f", 6: "d", 9: ""}[slot]
    return {m: 1 + 0.5 * torch.randn(width[m]) for m in chosen}


def adapter_of(slot: int) -> HostAdapter:
    return HostAdapter(str(slot), 1, {}, gains_of(slot))


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("popularity", SLOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_equal_the_loop_reference(popularity: str, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    biases = [torch.randn(sum(s.widths), dtype=dtype, device=DEVICE) if biased else None for s in SITES]
    extras = Extras(SITES, biases, DEVICE)
    for slot in (9, 1, 2, 3, 4, 5, 6):  # the tables grow at the first
        extras.install(slot, adapter_of(slot))
    slots = SLOTS[popularity]
    extras.begin(slots)
    for site, (at, bias) in enumerate(zip(SITES, biases, strict=True)):
        y = torch.randn(len(slots), sum(at.widths), dtype=dtype, device=DEVICE)
        gains = []
        for slot in slots:
            own = gains_of(slot) if slot else {}
            parts = [own.get(m, torch.ones(w)) for m, w in zip(at.modules, at.widths, strict=True)]
            gains.append(torch.cat(parts) if own else None)
        right = y.float().cpu()
        gain_reference(None if bias is None else bias.float().cpu(), gains, right)
        untouched = [t for t, gain in enumerate(gains) if gain is None]
        before = y.clone()
        extras.gain(site, y)
        torch.testing.assert_close(y.cpu(), right.to(dtype), rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
        assert torch.equal(y[untouched], before[untouched])


def test_a_step_without_such_rows_computes_nothing() -> None:
    extras = Extras(SITES, [None] * 3, DEVICE)
    extras.install(1, adapter_of(4))
    extras.begin([0, 0, 2, 2])
    assert not extras.active
    extras.begin([0, 1])
    assert extras.active


def test_a_slot_forgets_what_was_in_it() -> None:
    extras = Extras(SITES, [None] * 3, DEVICE)
    end = End(torch.ones(7, 2), torch.ones(2, 3))
    extras.install(1, replace(adapter_of(4), embedding=end, head=End(torch.ones(2, 3), torch.ones(2, 7))))
    extras.install(1, adapter_of(1))  # gains of module a, and nothing else
    extras.begin([1])
    y, c, x = (t.to(DEVICE) for t in (torch.ones(1, 8), torch.ones(1, 4), torch.zeros(1, 3)))
    extras.gain(0, y)
    extras.gain(1, c)
    extras.embed(x, torch.tensor([4], device=DEVICE))
    y, c, x = y.cpu(), c.cpu(), x.cpu()
    assert not torch.equal(y[:, :5], torch.ones(1, 5))
    assert torch.equal(y[:, 5:], torch.ones(1, 3))
    assert torch.equal(c, torch.ones(1, 4))
    assert torch.equal(x, torch.zeros(1, 3))
    logits = torch.zeros(1, 7, device=DEVICE)
    extras.head(torch.ones(1, 3, device=DEVICE), logits, [1])
    assert torch.equal(logits.cpu(), torch.zeros(1, 7))
    extras.install(1, HostAdapter("plain", 1, {}))
    assert extras.size_bytes == 0


def test_bytes_of_everything_are_counted() -> None:
    end = End(torch.ones(7, 2), torch.ones(2, 3), torch.ones(3))
    whole = HostAdapter("x", 2, {"a": (torch.ones(2, 8), torch.ones(2, 5))}, {"a": torch.ones(5)}, end, end)
    assert whole.size_bytes == 4 * (16 + 10 + 5 + 2 * (14 + 6 + 3))
    extras = Extras(SITES, [None] * 3, DEVICE)
    extras.install(1, whole)
    assert extras.size_bytes == 4 * (8 + 2 * (14 + 6 + 3))  # of gains, the whole row of their site


Spoil = Callable[[HostAdapter], HostAdapter]
ENDS: dict[str, Spoil] = {
    "embedding": lambda a: replace(a, embedding=_spoilt(a.embedding)),
    "head": lambda a: replace(a, head=_spoilt(a.head)),
    "gains": lambda a: replace(a, gains={m: g * float("nan") for m, g in a.gains.items()}),
    "gain of the head": lambda a: replace(a, head=a.head and replace(a.head, gain=torch.full_like(a.head.b[0], 1e38))),
}


def _spoilt(end: End | None) -> End:
    assert end is not None
    return replace(end, b=end.b * float("inf"))


@pytest.fixture(scope="module")
def everything(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all linears, the embedding and the (tied) head, with DoRA."""
    folder = tmp_path_factory.mktemp("everything")
    return save_adapter(tiny_base, folder, 9, targets=(*ALL_LINEAR, "embed_tokens", "lm_head"), dora=True)


def rows_of(slots: list[int], prompts: list[list[int]]) -> StepPlan:
    return StepPlan(
        tuple(
            RowPlan(Key((0, i)), i, slot, 0, tuple(prompt), True, GREEDY, 0, 0)
            for i, (slot, prompt) in enumerate(zip(slots, prompts, strict=True))
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ENDS)
def test_what_is_no_number_in_one_adapter_reaches_no_other_row(
    tiny_base: Path, everything: Path, part: str, dtype: torch.dtype
) -> None:
    decoder = load_tiny(tiny_base, dtype)
    sound = read_peft(everything, dtype)
    prompts = [[3 + (7 * i + 5 * j) % 200 for j in range(9 + i)] for i in range(4)]
    slots = [NO_SLOT, 1, 2, 1]

    def logits(second: HostAdapter) -> Tensor:
        runner = DecoderRunner(decoder, 4, make_slots(decoder, 2, 64))
        runner.install(1, sound)
        runner.install(2, second)
        return runner.logits(rows_of(slots, prompts))

    right, spoilt = logits(sound), logits(ENDS[part](sound))
    others = [i for i, slot in enumerate(slots) if slot != 2]
    assert not torch.equal(right[2], spoilt[2])
    assert torch.equal(right[others], spoilt[others])


def test_bfloat16_is_as_near_as_pefts_own(tiny_base: Path, everything: Path) -> None:
    """The kernels, where there are some: mean logit error against float32 over a prompt's end, ours and PEFT's."""
    decoder = load_tiny(tiny_base, torch.bfloat16)
    runner = DecoderRunner(decoder, 8, make_slots(decoder, 2, 64))
    runner.install(2, read_peft(everything, torch.bfloat16))
    prompts = [[3 + (11 * i + 5 * j * j) % 250 for j in range(20 + i)] for i in range(8)]
    ours = runner.logits(rows_of([2] * 8, prompts)).float().cpu()

    @torch.inference_mode()
    def theirs(**dtype: Any) -> Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, everything).to(**dtype).eval()
        return torch.stack([model(input_ids=torch.tensor([p])).logits[0, -1].float() for p in prompts])

    exact, other = theirs(dtype=torch.float32), theirs(dtype=torch.bfloat16)
    mine, its = (ours - exact).abs().mean(), (other - exact).abs().mean()
    print(f"ours {mine:.4f}, theirs {its:.4f}")
    assert mine <= 1.5 * its


def test_sequences_of_all_kinds_of_adapters_answer_as_each_alone(tiny_base: Path, tmp_path: Path) -> None:
    """60 random cases through three slots: evictions replace extras by others and by none; chunks, joins, prefixes."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    adapters = [save_adapter(tiny_base, tmp_path / str(n), n, **kind) for n, kind in enumerate(variants(conv=False))]
    oracles = {a: Oracle(tiny_base, a) for a in (None, *adapters)}
    case = EngineCase(load_tiny(tiny_base), rows=5, slots=3, chunk=7)
    asked = []
    for _ in range(60):
        adapter = rng.choice([None, *adapters])
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 30))]
        asked.append((adapter, prompt, case.submit(prompt, adapter, max_tokens=rng.randrange(1, 16), ignore_eos=True)))
        for _ in range(rng.randrange(0, 4)):
            case.step()
    case.run()
    close = total = 0
    for adapter, prompt, key in asked:
        ids = case.answer(key)
        logits = oracles[adapter].logits([*prompt, *ids])[len(prompt) - 1 : -1]
        for row, token in zip(logits, ids, strict=True):
            top = row.topk(2).values
            near = float(top[0] - top[1]) <= 10 * LOGIT_ERROR
            close, total = close + near, total + 1
            assert near or int(row.argmax()) == token, (adapter, prompt, ids)
    print(f"{total} tokens, {close} too close to call, {case.slots.evictions} evictions")
    assert close <= total / 1000
    assert case.slots.evictions > 5


def test_an_adapter_of_the_head_alone_shares_kernels_with_one_of_linears(
    tiny_base: Path, everything: Path, tmp_path: Path
) -> None:
    """In bfloat16, where the machine has kernels: it has nothing at any site, and its neighbours' rows stay theirs."""
    decoder = load_tiny(tiny_base, torch.bfloat16)
    runner = DecoderRunner(decoder, 3, make_slots(decoder, 2, 64))
    prompts = [[3 + (11 * i + 5 * j * j) % 250 for j in range(20 + i)] for i in range(3)]
    runner.install(1, read_peft(everything, torch.bfloat16))
    before = runner.logits(rows_of([NO_SLOT, 1, NO_SLOT], prompts))
    runner.install(2, read_peft(save_adapter(tiny_base, tmp_path, 3, targets=("lm_head",)), torch.bfloat16))
    after = runner.logits(rows_of([NO_SLOT, 1, 2], prompts))
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])
