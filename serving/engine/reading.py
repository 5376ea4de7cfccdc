"""Reads a saved base through transformers and lays it out for the runner: one reader for each shape of decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import BaseUnsupported
from adapters.families import check_family
from serving.engine.attention import Heads
from serving.engine.linear import FrozenLinear
from serving.engine.lora import Site
from serving.engine.model import Decoder, Layer
from serving.engine.ops import Activation, Norm, pick_ops

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
_GATED = {
    "silu": Activation.GATED_SILU,
    "gelu_pytorch_tanh": Activation.GATED_TANH_GELU,
    "gelu_tanh": Activation.GATED_TANH_GELU,
}
_GPT2_SITES = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device, max_model_len: int) -> Decoder:
    """The base in a folder, for contexts of `max_model_len`.

    Raises BaseUnsupported for a family, activation or rotary variant that the runner does not compute.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    check_family(str(model.config.model_type))
    reader = _gpt2 if model.config.model_type == "gpt2" else _llama_like
    return reader(_Source(model, device), max_model_len)


class _Source:
    """A transformers model taken apart: what was packed is released, so that the base is never held twice."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.config: Any = model.config
        self.device = device
        self.rotary = getattr(model.base_model, "rotary_emb", None)
        self._state: dict[str, Tensor] = {k: v.detach() for k, v in model.state_dict().items()}
        embedding = self.take(next(k for k in self._state if k.endswith(("embed_tokens.weight", "wte.weight"))))
        self.embedding = embedding
        self.dtype = embedding.dtype
        self.head = embedding if self.config.tie_word_embeddings else self.take("lm_head.weight")

    def take(self, name: str) -> Tensor:
        """A tensor, once, on the device. Raises BaseUnsupported when the base lacks it."""
        found = self._state.pop(name, None)
        if found is None:
            raise BaseUnsupported(f"the base has no tensor {name!r}")
        return found.to(self.device)

    def maybe(self, name: str) -> Tensor | None:
        """A tensor that not every base of the family has."""
        return self.take(name) if name in self._state else None

    def fused(self, prefix: str, names: Sequence[str], transposed: bool = False) -> tuple[FrozenLinear, Site]:
        """Linears that read the same input as one, and their site. transposed: GPT-2's Conv1D, (in, out)."""
        weights = [self.take(f"{prefix}{n}.weight") for n in names]
        if transposed:
            weights = [w.T for w in weights]
        biases = [b for n in names if (b := self.maybe(f"{prefix}{n}.bias")) is not None]
        linear = FrozenLinear(torch.cat(weights), torch.cat(biases) if biases else None)
        site = Site(tuple(prefix + n for n in names), linear.in_features, tuple(w.shape[0] for w in weights))
        return linear, site

    def stop_token_ids(self) -> tuple[int, ...]:
        eos = self.config.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)


@dataclass(frozen=True, slots=True)
class _Rotary:
    """cos and sin of all positions, for each kind of layer."""

    tables: Mapping[str, tuple[Tensor, Tensor]]

    def of(self, kind: str) -> tuple[Tensor, Tensor]:
        return self.tables.get(kind) or self.tables[""]


def _rotary(source: _Source, kinds: Sequence[str], length: int) -> _Rotary:
    rope: Any = source.rotary
    types = rope.rope_type if isinstance(rope.rope_type, dict) else {"": rope.rope_type}
    if "dynamic" in types.values():
        raise BaseUnsupported("dynamic rotary scaling changes with length and is not served")
    for kind, name in types.items():
        parameters = source.config.rope_parameters[kind] if kind else source.config.rope_parameters
        if name == "longrope" and length > (most := int(parameters["original_max_position_embeddings"])):
            # A longer text rotates all of its positions otherwise: one table holds for both sides of that length only.
            raise BaseUnsupported(
                f"longrope scaling changes for contexts of more than {most} tokens, which are not served; "
                f"serve with --max-model-len {most} or less"
            )
    positions = torch.arange(length)[None]
    tables = {}
    for kind in set(kinds) if isinstance(rope.rope_type, dict) else ("",):
        cos, sin = rope(torch.zeros(1, dtype=torch.float32), positions, *([kind] if kind else []))
        tables[kind] = (cos[0].to(source.device, source.dtype), sin[0].to(source.device, source.dtype))
    return _Rotary(tables)


def _llama_like(source: _Source, max_model_len: int) -> Decoder:
    """Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3: RMSNorm, rotary positions, a gated MLP."""
    config = source.config
    activation = _GATED.get(str(getattr(config, "hidden_activation", None) or config.hidden_act))
    if activation is None:
        raise BaseUnsupported(f"activation {config.hidden_act!r} is not served for this family")
    gemma = str(config.model_type).startswith("gemma")
    offset, eps, count = float(gemma), float(config.rms_norm_eps), int(config.num_hidden_layers)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    kinds = list(getattr(config, "layer_types", None) or [""] * count)
    rotary = _rotary(source, kinds, max_model_len)
    layers, sites = [], []

    def norm(name: str) -> Norm:
        return Norm(source.take(name), eps, offset)

    for index, kind in enumerate(kinds):
        prefix = f"model.layers.{index}."
        cos, sin = rotary.of(kind)
        heads = Heads(
            heads=int(config.num_attention_heads),
            kv=int(config.num_key_value_heads),
            dim=dim,
            cos=cos,
            sin=sin,
            scale=float(getattr(config, "query_pre_attn_scalar", dim)) ** -0.5,
            window=_window(config, kind),
            softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
            q_norm=source.maybe(f"{prefix}self_attn.q_norm.weight"),
            k_norm=source.maybe(f"{prefix}self_attn.k_norm.weight"),
            norm_eps=eps,
            norm_offset=offset,
        )
        (qkv, at_qkv), (out, at_out), (up, at_up), (down, at_down) = (
            source.fused(prefix, names) for names in (_ATTENTION, _OUTPUT, _GATE_UP, _DOWN)
        )
        sites += [at_qkv, at_out, at_up, at_down]
        attention_norm = norm(f"{prefix}input_layernorm.weight")
        after = norm(f"{prefix}post_attention_layernorm.weight")
        # Gemma 2 and 3 norm what attention and MLP give as well; the same name then means another place.
        before = source.maybe(f"{prefix}pre_feedforward_layernorm.weight")
        mixed = source.maybe(f"{prefix}post_feedforward_layernorm.weight")
        layers.append(
            Layer(
                heads=heads,
                attention_norm=attention_norm,
                qkv=qkv,
                out=out,
                up=up,
                down=down,
                mlp_norm=after if before is None else Norm(before, eps, offset),
                attended_norm=None if before is None else after,
                mixed_norm=None if mixed is None else Norm(mixed, eps, offset),
            )
        )
    return Decoder(
        embedding=source.embedding,
        layers=tuple(layers),
        norm=norm("model.norm.weight"),
        head=FrozenLinear(source.head),
        activation=activation,
        ops=pick_ops(source.dtype, source.device),
        max_model_len=max_model_len,
        sites=tuple(sites),
        dtype=source.dtype,
        device=source.device,
        stop_token_ids=source.stop_token_ids(),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _window(config: Any, kind: str) -> int:
    """How many positions a layer sees, 0 for all. A list of layer kinds, where there is one, says which slide."""
    size = getattr(config, "sliding_window", None)
    slides = kind == "sliding_attention" if kind else getattr(config, "use_sliding_window", True)
    return int(size) if size and slides else 0


def _gpt2(source: _Source, max_model_len: int) -> Decoder:
    """GPT-2: LayerNorm with biases, learned positions, transposed Conv1D weights, q/k/v in one module."""
    config = source.config
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise BaseUnsupported(f"activation {config.activation_function!r} is not served for this family")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise BaseUnsupported("this GPT-2 scales attention in a way that is not served")
    eps, dim = float(config.layer_norm_epsilon), int(config.n_embd // config.n_head)
    nothing = torch.zeros(max_model_len, 0, dtype=source.dtype, device=source.device)
    heads = Heads(int(config.n_head), int(config.n_head), dim, nothing, nothing, dim**-0.5)

    def norm(name: str) -> Norm:
        return Norm(source.take(f"{name}.weight"), eps, 0.0, source.take(f"{name}.bias"))

    layers, sites = [], []
    for index in range(config.n_layer):
        prefix = f"transformer.h.{index}."
        (qkv, at_qkv), (out, at_out), (up, at_up), (down, at_down) = (
            source.fused(prefix, names, transposed=True) for names in _GPT2_SITES
        )
        sites += [at_qkv, at_out, at_up, at_down]
        layers.append(Layer(heads, norm(f"{prefix}ln_1"), qkv, out, norm(f"{prefix}ln_2"), up, down))
    return Decoder(
        embedding=source.embedding,
        layers=tuple(layers),
        norm=norm("transformer.ln_f"),
        head=FrozenLinear(source.head),
        activation=Activation.TANH_GELU,
        ops=pick_ops(source.dtype, source.device),
        max_model_len=max_model_len,
        sites=tuple(sites),
        dtype=source.dtype,
        device=source.device,
        stop_token_ids=source.stop_token_ids(),
        positions=source.take("transformer.wpe.weight"),
    )
