"""A tiny Llama base written file by file with numpy, so that its bytes depend on no library's version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB, HIDDEN, MIDDLE, HEADS, KV_HEADS, LAYERS = 16, 8, 12, 2, 1, 2
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, t in enumerate(("<s>", "</s>"))
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<s>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate("abcdefghijkl")}, "ab": 14, "cd": 15},
        "merges": [["a", "b"], ["c", "d"]],
    },
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": TEMPLATE,
}


def weights() -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of the model: exact small fractions, so no random generator's stream is part of the golden."""
    return {name: _ramp(i, shape) for i, (name, shape) in enumerate(_shapes())}


def write_base(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    shards: int = 1,
) -> Path:
    """Write the base, with whole parts replaced where given; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER if tokenizer is None else tokenizer))
    chosen = TOKENIZER_CONFIG if tokenizer_config is None else tokenizer_config
    (folder / "tokenizer_config.json").write_text(json.dumps(chosen))
    all_tensors = weights() if tensors is None else tensors
    names = sorted(all_tensors)
    if shards == 1:
        save_file(all_tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: all_tensors[n] for n in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    head = HIDDEN // HEADS
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.self_attn.q_proj.weight", (HEADS * head, HIDDEN)
        yield f"{at}.self_attn.k_proj.weight", (KV_HEADS * head, HIDDEN)
        yield f"{at}.self_attn.v_proj.weight", (KV_HEADS * head, HIDDEN)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HEADS * head)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{at}.mlp.gate_proj.weight", (MIDDLE, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (MIDDLE, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, MIDDLE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def _ramp(salt: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape))
    return ((np.arange(count) * 7 + salt * 13) % 33 - 16).astype(np.float32).reshape(shape) / 64
