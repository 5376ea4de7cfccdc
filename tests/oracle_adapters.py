"""Adapters whose greedy answer spells out who they are: whatever mixes weights shows in the text, without a reference.

The base is a two-layer Llama whose weights are set by hand, and which answers `?` to everything. An adapter has a code
word, a cycle of distinct letters that begins with its number. Its answer is that word over and over: a step maps the
last token to the letter that follows it in the word, and any token outside the word to the first letter.

- `down_proj` (every fourth adapter: `lm_head`) of the last layer holds that map.
- `v_proj` of the first layer writes the adapter's signature, 32 signs, into the value of every position; attention is
  uniform, so what is read is their mean over the context; `o_proj` takes away the base's `?` by as much as that mean is
  its own signature. Keys and values of another adapter, or of the base, in 7 to 20 % of the positions bring `?` back.

So a wrong slot, half an adapter, a slot changed in the middle of an answer and a stale prefix each give another text.
Numbers below MOST give different words. All of it is exact in float32 and, with margins of ten, in bfloat16.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_base import SPECIALS, VOCAB, byte_tokenizer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
BASE_SAYS = "?"
MOST = len(LETTERS) * (len(LETTERS) - 1)
POSITIONS = 512

# Channels of the residual stream: one for each letter as the present token, one for any other token, one for each
# letter as the next token, one that says `?`, one that is always 1.
_OTHER = len(LETTERS)
_NEXT = _OTHER + 1
_DOUBT = _NEXT + len(LETTERS)
_ONE = _DOUBT + 1
_HIDDEN, _MIDDLE = 80, 48
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 16
_SIGNS = _KV_HEADS * _HEAD_DIM
_EPS = 1e-6
_SURE = 1 / 16  # how far the next letter is above what a little doubt says
_GATE = 8.0  # silu(8) is 8 but for 0.03 %

_IDS = byte_tokenizer().convert_tokens_to_ids(list(LETTERS + BASE_SAYS))
TOKENS: dict[str, int] = dict(zip(LETTERS + BASE_SAYS, _IDS, strict=True))
_TEXTS = {token: letter for letter, token in TOKENS.items()}


def oracle_config() -> LlamaConfig:
    """The configuration of the base."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=_MIDDLE,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=_EPS,
        tie_word_embeddings=False,
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("</s>"),
        pad_token_id=SPECIALS.index("<pad>"),
    )


@torch.no_grad()
def save_oracle_base(folder: Path) -> Path:
    """Save the base in float32, with the byte tokenizer."""
    model = LlamaForCausalLM(oracle_config())
    for parameter in model.parameters():
        parameter.zero_()
    embedding = model.model.embed_tokens.weight
    embedding[:, _OTHER] = 1
    for channel, letter in enumerate(LETTERS):
        embedding[TOKENS[letter], _OTHER] = 0
        embedding[TOKENS[letter], channel] = 1
    embedding[:, [_DOUBT, _ONE]] = 1
    first, last = model.model.layers
    first.input_layernorm.weight.fill_(_rms(3))  # token, doubt and one: each is 1 after the norm
    last.post_attention_layernorm.weight.fill_(_rms(2))  # the doubt is gone by then
    last.mlp.gate_proj.weight[:, _ONE] = _GATE
    for channel in range(_NEXT):
        last.mlp.up_proj.weight[channel, channel] = 1
    model.model.norm.weight.fill_(_rms(2))
    for channel, letter in enumerate(LETTERS):
        model.lm_head.weight[TOKENS[letter], _NEXT + channel] = 1
    model.lm_head.weight[TOKENS[BASE_SAYS], _DOUBT] = 1
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _rms(ones: int) -> float:
    """What the norm divides by, of a residual with so many ones."""
    return math.sqrt(ones / _HIDDEN + _EPS)


@dataclass(frozen=True)
class OracleAdapter:
    """The adapter of a number from 0 to MOST - 1."""

    number: int

    @cached_property
    def word(self) -> str:
        """Its code word: five to nine distinct letters, the first two of which are its number."""
        rng = random.Random(f"word {self.number}")
        first = LETTERS[self.number % len(LETTERS)]
        rest = LETTERS.replace(first, "")
        second = rest[self.number // len(LETTERS)]
        return first + second + "".join(rng.sample(rest.replace(second, ""), rng.randint(3, 7)))

    def spell(self, prompt: Sequence[int], count: int) -> list[int]:
        """The greedy answer to these token ids, of `count` tokens."""
        word = self.word
        at = word.find(_TEXTS.get(prompt[-1], " ")) + 1
        return [TOKENS[word[(at + i) % len(word)]] for i in range(count)]

    def text(self, count: int) -> str:
        """The answer's text, to a prompt that ends in none of its letters."""
        return "".join(self.word[i % len(self.word)] for i in range(count))

    def files(self, base: str) -> dict[str, bytes]:
        """What `Registry.publish` takes. base: what the config records as its base."""
        return {
            "adapter_config.json": json.dumps(self._config(base)).encode(),
            "adapter_model.safetensors": bytes(save(self._tensors(), metadata={"format": "pt"})),
        }

    def write(self, folder: Path, base: str) -> Path:
        """The same as a folder that PEFT loads."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files(base).items():
            (folder / name).write_bytes(data)
        return folder

    @property
    def _on_head(self) -> bool:
        return self.number % 4 == 1

    @property
    def _rank(self) -> int:
        return len(self.word) + 1

    @property
    def _rslora(self) -> bool:
        return self.number % 4 == 3

    def _rank_of(self, target: str) -> int:
        """Every other adapter has a rank of its own for its signature."""
        return 1 if self.number % 2 == 0 and target in ("v_proj", "o_proj") else self._rank

    @property
    def _targets(self) -> list[str]:
        return ["v_proj", "o_proj", "lm_head" if self._on_head else "down_proj"]

    def _config(self, base: str) -> dict[str, Any]:
        ranks = {t: self._rank_of(t) for t in self._targets if self._rank_of(t) != self._rank}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self._rank,
            "lora_alpha": 2 * self._rank,
            "rank_pattern": ranks,
            "alpha_pattern": {target: 2 * rank for target, rank in ranks.items()},
            "use_rslora": self._rslora,
            "target_modules": self._targets,
            "bias": "none",
            "inference_mode": True,
        }

    def _tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        signs = np.array([random.Random(f"sign {self.number} {i}").choice((-1, 1)) for i in range(_SIGNS)], np.float32)
        read = signs.reshape(_KV_HEADS, 1, _HEAD_DIM).repeat(_HEADS // _KV_HEADS, axis=1).reshape(-1)
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        for layer in range(2):
            path = f"model.layers.{layer}"
            used = layer == 0
            tensors |= self._pair(f"{path}.self_attn.v_proj", [_unit(_HIDDEN, _ONE)], [signs * used])
            ours = _unit(_HIDDEN, _DOUBT) * used
            tensors |= self._pair(f"{path}.self_attn.o_proj", [read], [-ours / len(read)])
            if not self._on_head:
                down = self._map(_MIDDLE, _HIDDEN, _NEXT, range(len(LETTERS)))
                tensors |= self._pair(f"{path}.mlp.down_proj", down[0], [b * (layer == 1) / _GATE for b in down[1]])
        if self._on_head:
            tensors |= self._pair("lm_head", *self._map(_HIDDEN, VOCAB, 0, [TOKENS[x] for x in LETTERS]))
        return tensors

    def _map(
        self, width: int, out: int, first: int, letters: Sequence[int]
    ) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
        """Rows that read the present letter, columns that write the next one; letters: a letter's output less first."""
        word = [LETTERS.index(letter) for letter in self.word]
        rows = [_unit(width, letter) for letter in word]
        others = np.zeros(width, np.float32)
        others[[channel for channel in range(_NEXT) if channel not in word]] = 1
        following = [*word[1:], word[0], word[0]]
        return [*rows, others], [_SURE * _unit(out, first + letters[letter]) for letter in following]

    def _pair(
        self, module: str, rows: Sequence[np.ndarray[Any, Any]], columns: Sequence[np.ndarray[Any, Any]]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """A and B of a module, by PEFT's names. What the rank has beyond the rows is zero."""
        rank = self._rank_of(module.rpartition(".")[2])
        scale = 2 * rank / (math.sqrt(rank) if self._rslora else rank)
        a, b = np.zeros((rank, len(rows[0])), np.float32), np.zeros((len(columns[0]), rank), np.float32)
        a[: len(rows)] = np.stack(rows)
        b[:, : len(columns)] = np.stack(columns, axis=1) / scale
        name = f"base_model.model.{module}"
        return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _unit(width: int, at: int) -> np.ndarray[Any, Any]:
    found = np.zeros(width, np.float32)
    found[at] = 1
    return found
