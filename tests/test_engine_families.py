"""Each decoder family, as transformers + PEFT compute it: greedy tokens in mixed batches, and logits in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from adapters.errors import BaseUnsupported
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.reading import load_decoder
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, make_slots
from tests.engine_case import DEVICE, load_tiny, read_peft
from tests.tiny_base import VOCAB, Oracle, save_adapter, save_random

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama, long rope, biases": lambda: LlamaConfig(
        **COMMON,
        attention_bias=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "llama, tied head": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral, window of 20": lambda: MistralConfig(**COMMON, sliding_window=20),
    "mistral, no window": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen2, some layers slide": lambda: Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3, own head width": lambda: Qwen3Config(**COMMON, head_dim=32),
    "gemma": lambda: GemmaConfig(**COMMON, head_dim=32),
    "gemma2": lambda: Gemma2Config(**COMMON, head_dim=32, sliding_window=20, query_pre_attn_scalar=24),
    "gemma3": lambda: Gemma3TextConfig(**COMMON, head_dim=32, sliding_window=20, query_pre_attn_scalar=24),
    "gpt2": lambda: GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
LOGIT_ERROR = 1e-4


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("family")
    base = save_random(FAMILIES[request.param](), folder / "base", seed=3)
    return base, [
        save_adapter(base, folder / f"a{n}", seed=n, **adapter)
        for n, adapter in enumerate(variants(conv=request.param == "gpt2"))
    ]


def variants(*, conv: bool) -> list[dict[str, Any]]:
    """Adapters that share a batch: different ranks, targets, patterns and scales, the ends, and DoRA of all that."""
    embedding, first, others = (
        ("wte", "c_attn", ("c_proj", "c_fc"))
        if conv
        else ("embed_tokens", "q_proj", ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    )
    return [
        {"rank": 3, "targets": (first,), "fan_in_fan_out": conv},
        {"rank": 8, "targets": others, "rslora": True},
        {"rank": 4, "targets": (first, *others), "rank_pattern": {first: 9}, "alpha_pattern": {others[0]: 3}},
        {"rank": 5, "targets": (embedding, first)},
        {"rank": 2, "targets": ("lm_head",)},
        {"rank": 6, "targets": (first, others[1]), "dora": True},
        {"rank": 4, "targets": (first, *others, embedding, "lm_head"), "dora": True, "rslora": True},
    ]


def test_prefill_and_decoding_equal_transformers_and_peft(family: tuple[Path, list[Path]]) -> None:
    """Eight rows, base and seven adapters, prompts of 29 to 50 tokens in two chunks, then 12 greedy tokens each."""
    base, adapters = family
    decoder = load_tiny(base)
    rows = 1 + len(adapters)
    runner = DecoderRunner(decoder, rows, make_slots(decoder, len(adapters), 64))
    oracles = [Oracle(base, None), *(Oracle(base, a) for a in adapters)]
    for number, folder in enumerate(adapters, start=1):
        runner.install(number, read_peft(folder))
    greedy = Sampling(max_tokens=99, temperature=0.0, ignore_eos=True)
    prompts = [[3 + (11 * i + 5 * j * j) % 250 for j in range(50 - 3 * i)] for i in range(rows)]
    slots = [NO_SLOT, *range(1, rows)]

    def plan(row: int, start: int, tokens: list[int]) -> RowPlan:
        return RowPlan(Key((0, row)), row, slots[row], start, tuple(tokens), True, greedy, 0, 0)

    runner.run(StepPlan(tuple(plan(i, 0, p[:17]) for i, p in enumerate(prompts))))
    logits = runner.logits(StepPlan(tuple(plan(i, 17, p[17:]) for i, p in enumerate(prompts))))
    ids = [[int(row.argmax())] for row in logits]
    worst = max(float((logits[i].cpu() - o.logits(prompts[i])[-1]).abs().max()) for i, o in enumerate(oracles))
    for step in range(12):
        fed = [plan(i, len(p) + step, ids[i][-1:]) for i, p in enumerate(prompts)]
        logits = runner.logits(StepPlan(tuple(fed)))
        for i, oracle in enumerate(oracles):
            exact = oracle.logits(prompts[i] + ids[i])[-1]
            worst = max(worst, float((logits[i].cpu() - exact).abs().max()))
            ids[i].append(int(logits[i].argmax()))
    print(f"largest difference {worst:.2e}")
    assert worst <= LOGIT_ERROR
    assert len({tuple(i) for i in ids}) == rows


def test_a_rotary_scaling_that_changes_with_length_is_served_as_far_as_it_does_not(tmp_path: Path) -> None:
    """Beyond its first length longrope turns every position otherwise; short prompts got the long ones' answers."""
    half = COMMON["hidden_size"] // COMMON["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * half, "long_factor": [4.0 + i for i in range(half)],
    }  # fmt: skip
    base = save_random(LlamaConfig(**COMMON, rope_parameters=rope), tmp_path / "base", seed=3)
    with pytest.raises(BaseUnsupported, match="--max-model-len 64"):
        load_decoder(base, torch.float32, DEVICE, 65)
    decoder = load_decoder(base, torch.float32, DEVICE, 64)
    runner = DecoderRunner(decoder, 1, make_slots(decoder, 1, 64))
    prompt = tuple(3 + 7 * i % 250 for i in range(64))
    row = RowPlan(Key((0, 0)), 0, NO_SLOT, 0, prompt, True, Sampling(max_tokens=1, temperature=0.0), 0, 0)
    (logits,) = runner.logits(StepPlan((row,)))
    assert float((logits.cpu() - Oracle(base, None).logits(prompt)[-1]).abs().max()) <= LOGIT_ERROR


def test_bfloat16_on_this_machine_is_as_near_as_transformers_own(family: tuple[Path, list[Path]]) -> None:
    """The kernels, where there are some: mean logit error over a prompt's end, ours and transformers'."""
    from transformers import AutoModelForCausalLM

    base, _ = family
    decoder = load_tiny(base, torch.bfloat16)
    runner = DecoderRunner(decoder, 8, make_slots(decoder, 1, 64))
    greedy = Sampling(max_tokens=1, temperature=0.0)
    prompts = [tuple(3 + (11 * i + 5 * j * j) % 250 for j in range(20 + i)) for i in range(8)]
    rows = tuple(RowPlan(Key((0, i)), i, NO_SLOT, 0, p, True, greedy, 0, 0) for i, p in enumerate(prompts))
    ours = runner.logits(StepPlan(rows)).float().cpu()
    oracle = Oracle(base, None)
    exact = torch.stack([oracle.logits(list(p))[-1] for p in prompts])
    theirs_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        theirs = torch.stack([theirs_model(input_ids=torch.tensor([p])).logits[0, -1].float() for p in prompts])
    mine, other = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    print(f"ours {mine:.4f}, theirs {other:.4f}")
    assert mine <= 1.5 * other
