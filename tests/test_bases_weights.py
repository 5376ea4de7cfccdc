"""The base's own weights, read in pieces: as torch reads them, under the names that checkpoints use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_factory import CONFIG, weights, write_base
from safetensors.torch import load_file, save_file
from transformers import BartConfig, GPT2Config, T5Config

from adapters import base_weights
from adapters.base_weights import BaseWeights
from adapters.bases import describe
from adapters.errors import BaseUnsupported
from adapters.families import adaptable
from adapters.tensor_file import TensorView
from tests.test_engine_families import GPT2
from tests.test_engine_seq2seq import BART, T5
from tests.tiny_base import save_random, save_random_seq2seq

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Q = "model.layers.0.self_attn.q_proj"


def saved(folder: Path, dtype: torch.dtype, seed: int = 0) -> tuple[Path, torch.Tensor]:
    """A folder with one weight of many magnitudes, and that weight."""
    torch.manual_seed(seed)
    folder.mkdir()
    weight = (torch.randn(37, 11) * 10.0 ** torch.randint(-6, 4, (37, 11))).to(dtype)
    save_file({f"{Q}.weight": weight}, folder / "model.safetensors")
    return folder, weight


def view(weight: torch.Tensor, dtype: str) -> TensorView:
    raw = weight.contiguous().view(torch.uint8).numpy().tobytes()
    return TensorView(dtype, tuple(weight.shape), memoryview(raw))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_are_the_weight_in_float32(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_weights, "_PIECE_VALUES", 50)
    folder, weight = saved(tmp_path / "base", DTYPES[dtype])
    pieces = list(BaseWeights(folder).pieces(Q))
    assert [first for first, _ in pieces] == list(range(0, 37, 4))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in pieces]), weight.float().numpy())


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("copied", DTYPES)
def test_a_copy_is_the_bases_when_it_is_what_torch_makes_of_the_base(tmp_path: Path, kept: str, copied: str) -> None:
    folder, weight = saved(tmp_path / "base", DTYPES[kept])
    base, copy = BaseWeights(folder), weight.to(DTYPES[copied])
    assert base.holds(Q, view(copy, copied))
    bits = copy.view(torch.int32 if copied == "F32" else torch.int16).clone()
    bits[36, 10] += 1
    assert not base.holds(Q, view(bits, copied))
    assert not base.holds(Q, view(copy[1:], copied))


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
def test_bases_without_linear_layers_of_llama_have_shapes_too(tmp_path: Path, kind: str) -> None:
    config: Any = {"gpt2": lambda: GPT2Config(**GPT2), "t5": lambda: T5Config(**T5), "bart": lambda: BartConfig(**BART)}
    folder = (save_random if kind == "gpt2" else save_random_seq2seq)(config[kind](), tmp_path / "base", 1)
    modules = adaptable(describe(folder, name="x", source="t", kept_in="x"))
    some = {
        "gpt2": {"transformer.h.0.attn.c_attn": (192, 64), "transformer.h.2.mlp.c_proj": (64, 256),
                 "transformer.wte": (64, 259), "lm_head": (259, 64)},
        "t5": {"decoder.block.2.layer.1.EncDecAttention.k": (64, 48),
               "encoder.block.0.layer.1.DenseReluDense.wi": (80, 48)},
        "bart": {"model.decoder.layers.1.encoder_attn.out_proj": (48, 48), "model.encoder.layers.0.fc1": (80, 48)},
    }[kind]  # fmt: skip
    assert {m: modules[m] for m in some} == some
    assert len(modules) == {"gpt2": 3 * 4 + 2, "t5": 2 * 6 + 3 * 10, "bart": 2 * 6 + 2 * 10}[kind]


def test_a_checkpoint_of_the_bare_model_is_read_without_its_prefix(tmp_path: Path) -> None:
    folder = save_random(GPT2Config(**GPT2), tmp_path / "base", 1)
    whole = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.h.0.mlp.c_fc" in describe(folder, name="x", source="t", kept_in="x").modules
    rows = np.concatenate([rows for _, rows in BaseWeights(folder).pieces("transformer.h.0.mlp.c_fc")])
    assert rows.shape == (64, 256)
    # Its head is the embedding.
    assert BaseWeights(folder).holds("lm_head", view(bare["wte.weight"], "F32"))
    assert BaseWeights(folder).holds("transformer.wte", view(bare["wte.weight"], "F32"))


def test_a_head_of_its_own_is_not_the_embedding(tmp_path: Path) -> None:
    base = BaseWeights(write_base(tmp_path))
    head = torch.from_numpy(weights()["lm_head.weight"])
    assert CONFIG["tie_word_embeddings"] is False
    assert base.holds("lm_head", view(head, "F32"))
    assert not base.holds("lm_head", view(torch.from_numpy(weights()["model.embed_tokens.weight"]), "F32"))


def test_a_module_that_the_files_lack_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseUnsupported, match=r"no weight of model\.layers\.9"):
        next(BaseWeights(write_base(tmp_path)).pieces("model.layers.9.mlp.up_proj"))
