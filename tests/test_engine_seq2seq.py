"""Encoder-decoder bases: rows with different inputs, adapters and progress share a batch and answer as each alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

from adapters.base_digest import tensors
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.request import Sampling
from serving.engine.runner import make_slots
from serving.engine.seq2seq import EncoderDecoder, load_encoder_decoder
from serving.engine.seq2seq_runner import Seq2SeqRunner
from tests.engine_case import DEVICE, read_peft
from tests.tiny_base import save_adapter as save_peft
from tests.tiny_base import save_random_seq2seq

SEED = 20261122
# Of the largest logit. Float32 T5 on such weights is itself up to 2e-5 from float64.
LOGIT_ERROR = 5e-5
VOCAB = 100
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
BASES: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5Config(**T5),
    "t5, gated, own head (FLAN)": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: BartConfig(**BART),
    "bart, scaled embedding": lambda: BartConfig(**BART, scale_embedding=True, activation_function="relu"),
}


@pytest.fixture(scope="module", params=sorted(BASES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("seq2seq")
    saved = save_random_seq2seq(BASES[request.param](), folder / "base", seed=5)
    t5 = request.param.startswith("t5")
    everything = (
        ["q", "k", "v", "o", "wo", "wi", "wi_0", "wi_1"]
        if t5
        else ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    )
    targets = [["q", "v"] if t5 else ["q_proj", "v_proj"], everything]
    adapters = [save_adapter(saved, folder / f"a{i}", i, t) for i, t in enumerate(targets)]
    return saved, [*adapters, save_adapter(saved, folder / "dora", 5, everything, dora=True)]


def save_adapter(base: Path, folder: Path, seed: int, targets: list[str], *, dora: bool = False) -> Path:
    """An adapter on those of the targets that this base has."""
    gated = "wi_0.weight" in {name.rpartition("DenseReluDense.")[2] for name in tensor_names(base)}
    there = [t for t in targets if t not in (("wi",) if gated else ("wi_0", "wi_1"))]
    return save_peft(base, folder, seed, rank=4 + seed, targets=there, dora=dora, seq2seq=True)


def tensor_names(base: Path) -> list[str]:
    return [entry.name for entry in tensors(base)]


class Oracle:
    """transformers + PEFT alone, float32: logits of every decoder position."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
        self.model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    @torch.inference_mode()
    def logits(self, prompt: list[int], decoded: list[int]) -> torch.Tensor:
        found: torch.Tensor = self.model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoded])
        ).logits
        return found[0]


def runner_of(base: Path, adapters: list[Path], rows: int, dtype: torch.dtype) -> tuple[Seq2SeqRunner, EncoderDecoder]:
    loaded = load_encoder_decoder(base, dtype, DEVICE, 96)
    runner = Seq2SeqRunner(loaded, rows, make_slots(loaded, len(adapters), 64))
    for number, folder in enumerate(adapters, start=1):
        runner.install(number, read_peft(folder, dtype))
    return runner, loaded


def test_rows_that_join_and_leave_answer_as_each_adapter_alone(base: tuple[Path, list[Path]]) -> None:
    """24 requests of 1 to 60 input tokens through 5 rows, base and three adapters, 1 to 30 tokens each, every logit."""
    folder, adapters = base
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    runner, loaded = runner_of(folder, adapters, 5, torch.float32)
    oracles = [Oracle(folder, None), *(Oracle(folder, a) for a in adapters)]
    greedy = Sampling(max_tokens=99, temperature=0.0, ignore_eos=True)
    waiting = [
        (rng.randrange(4), [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 60))], rng.randint(1, 30))
        for _ in range(24)
    ]
    running: dict[int, tuple[int, list[int], int, list[int]]] = {}
    worst, done = 0.0, 0
    while waiting or running:
        for row in set(range(5)) - set(running):
            if waiting and rng.random() < 0.7:
                slot, prompt, count = waiting.pop()
                running[row] = (slot, prompt, count, [])
        plan = [
            RowPlan(
                Key((0, row)), row, slot, 0 if not ids else len(prompt) + len(ids) - 1, () if ids else tuple(prompt),
                True, greedy, 0, len(ids),
            )
            for row, (slot, prompt, _, ids) in sorted(running.items(), key=lambda item: not item[1][3])
        ]  # fmt: skip
        if not plan:
            continue
        logits = _recorded(runner, StepPlan(tuple(plan)))
        for row_plan, row_logits in zip(plan, logits, strict=True):
            slot, prompt, count, ids = running[row_plan.row]
            exact = oracles[slot].logits(prompt, [*loaded.start_token_ids, *ids])[-1]
            worst = max(worst, float((row_logits.cpu() - exact).abs().max() / exact.abs().max().clamp(min=1)))
            ids.append(int(row_logits.argmax()))
            if len(ids) == count:
                del running[row_plan.row]
                done += 1
    print(f"largest difference {worst:.2e}")
    assert done == 24
    assert worst <= LOGIT_ERROR


def _recorded(runner: Seq2SeqRunner, plan: StepPlan) -> torch.Tensor:
    """The logits of a step that is also sampled."""
    kept: list[torch.Tensor] = []
    compute = runner.logits

    def logits(step: StepPlan) -> torch.Tensor:
        kept.append(compute(step))
        return kept[-1]

    runner.logits = logits  # type: ignore[method-assign]
    try:
        runner.run(plan)
    finally:
        runner.logits = compute  # type: ignore[method-assign]
    return kept[0]


def test_in_bfloat16_a_row_is_bit_for_bit_independent_of_its_batch(base: tuple[Path, list[Path]]) -> None:
    folder, adapters = base
    rng = random.Random(SEED)
    greedy = Sampling(max_tokens=9, temperature=0.0)
    asked = [(i % 4, tuple(rng.randrange(3, VOCAB) for _ in range(5 + 11 * i))) for i in range(6)]
    together, _ = runner_of(folder, adapters, 6, torch.bfloat16)
    alone, _ = runner_of(folder, adapters, 6, torch.bfloat16)

    def row(number: int, at: int, prompt: tuple[int, ...], slot: int) -> RowPlan:
        return RowPlan(Key((0, at)), at, slot or NO_SLOT, 0, prompt, True, greedy, 0, 0)

    mixed = together.logits(StepPlan(tuple(row(i, i, p, s) for i, (s, p) in enumerate(asked))))
    for i, (slot, prompt) in enumerate(asked):
        single = alone.logits(StepPlan((row(0, 0, prompt, slot),)))
        assert torch.equal(single[0], mixed[i]), i
