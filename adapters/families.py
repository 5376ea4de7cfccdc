"""Which base families a runner of ours computes, and which of their modules an adapter may change.

Known without torch, so that a wrong base or adapter is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.errors import BaseUnsupported
from adapters.records import BaseRecord

DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2"})
ENCODER_DECODERS = frozenset({"t5", "bart"})
FAMILIES = DECODERS | ENCODER_DECODERS
# Their linear modules are Conv1D, whose weight lies as (in, out); PEFT calls that fan_in_fan_out.
TRANSPOSED = frozenset({"gpt2"})

_HEAD = "lm_head"
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "shared", "embed_positions", "relative_attention_bias"})
_LLAMA_LIKE = ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
# family -> its token embedding, and a module that reads what the embedding gives.
_EMBEDDING_OF: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(DECODERS - {"gpt2"}, _LLAMA_LIKE),
    "gpt2": ("transformer.wte", "transformer.h.0.attn.c_attn"),
}


def decoder_start(start: int | None, forced: int | None) -> tuple[int, ...]:
    """What the decoder of an encoder-decoder is fed before an answer: the base's start, and what every generation must
    begin with (BART-large-CNN), if there is such a token; neither is part of the answer.

    Raises BaseUnsupported when the base names no start.
    """
    if start is None:
        raise BaseUnsupported("the base does not say with which token its decoder starts")
    return (start,) if forced is None else (start, forced)


def check_family(family: str) -> None:
    """Raises BaseUnsupported when no runner of ours computes this family."""
    if family not in FAMILIES:
        served = ", ".join(sorted(FAMILIES))
        raise BaseUnsupported(f"no runner computes bases of the {family!r} family; served are: {served}")


def adaptable(base: BaseRecord) -> dict[str, tuple[int, int]]:
    """Every module that an adapter may change: path -> (out, in).

    The linear ones, and of a decoder-only base its token embedding, which leads from the vocabulary to the width, and
    its head, which leads back.
    """
    modules = dict(base.modules)
    embedding, reader = _EMBEDDING_OF.get(base.family, ("", ""))
    if reader in modules:
        width = modules[reader][1]
        modules |= {embedding: (width, base.vocab_size), _HEAD: (base.vocab_size, width)}
    return modules


def is_embedding(module: str) -> bool:
    """Whether a module's name is one that embeddings have."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether a module's name is that of an output head."""
    return module.rpartition(".")[2] == _HEAD


def is_end(module: str) -> bool:
    """Whether it is an embedding or an output head."""
    return is_embedding(module) or is_head(module)


def lies_transposed(family: str, module: str) -> bool:
    """Whether the module's weight lies as (in, out) in a saved base: Conv1D, and every embedding."""
    return is_embedding(module) or (family in TRANSPOSED and not is_head(module))
