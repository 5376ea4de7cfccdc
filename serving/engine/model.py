"""The frozen base as the runner wants it: fused, packed projections of a Llama-family decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import BaseUnsupported
from serving.engine.attention import Heads
from serving.engine.families import check_family
from serving.engine.linear import FrozenLinear
from serving.engine.lora import Site
from serving.engine.ops import Norm, Ops, pick_ops

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
SITES_PER_LAYER = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. qkv and gate_up are fused along their outputs."""

    heads: Heads
    attention_norm: Norm
    qkv: FrozenLinear
    out: FrozenLinear
    mlp_norm: Norm
    gate_up: FrozenLinear
    down: FrozenLinear


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole base. sites: four a layer, in layer order; ops: what computes between the products."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: FrozenLinear
    ops: Ops
    max_model_len: int
    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device
    stop_token_ids: tuple[int, ...]


def pick_device(name: str) -> torch.device:
    """The device of a setting. Raises BaseUnsupported when it is not here."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BaseUnsupported(
            f"there is no {device} here that torch can use; serve with --device cpu, or install a CUDA build of torch"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for a setting; `auto` is bfloat16 where the machine computes in it, else float32."""
    if name != "auto":
        found = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)
        if found is None:
            raise BaseUnsupported(f"dtype {name!r} is not served; use auto, float32 or bfloat16")
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without native bfloat16 products oneDNN emulates them, slower than float32.
    cpu = torch.backends.cpu.get_cpu_capability()
    native = torch.cpu._is_avx512_bf16_supported() if "AVX512" in cpu else False
    return torch.bfloat16 if native else torch.float32


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device, max_model_len: int) -> Decoder:
    """Read a saved base through transformers and lay it out for the runner.

    Raises BaseUnsupported for a family, activation or rotary variant that this runner does not compute.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    config = model.config
    check_family(str(config.model_type))
    if config.hidden_act != "silu":
        raise BaseUnsupported(f"activation {config.hidden_act!r} is not served; the Llama family uses silu")
    rope = LlamaRotaryEmbedding(config)
    if rope.rope_type == "dynamic":
        raise BaseUnsupported("dynamic rotary scaling changes with length and is not served")
    positions = torch.arange(max_model_len)[None]
    cos, sin = rope(torch.zeros(1, dtype=torch.float32), positions)
    state: dict[str, Tensor] = {k: v.to(device) for k, v in model.state_dict().items()}
    del model
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    heads = Heads(
        heads=int(config.num_attention_heads),
        kv=int(config.num_key_value_heads),
        dim=head_dim,
        cos=cos[0].to(device=device, dtype=dtype),
        sin=sin[0].to(device=device, dtype=dtype),
        scale=head_dim**-0.5,
    )
    eps = float(config.rms_norm_eps)
    layers, sites = [], []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layers.append(_layer(state, prefix, heads, eps))
        sites += [_site(state, prefix, names) for names in (_ATTENTION, _OUTPUT, _GATE_UP, _DOWN)]
        for name in [k for k in state if k.startswith(prefix)]:
            del state[name]  # packed by now: do not hold the base twice
    embedding = state["model.embed_tokens.weight"]
    eos = config.eos_token_id
    return Decoder(
        embedding=embedding,
        layers=tuple(layers),
        norm=Norm(state["model.norm.weight"], eps),
        head=FrozenLinear(embedding if config.tie_word_embeddings else state["lm_head.weight"]),
        ops=pick_ops(dtype, device),
        max_model_len=max_model_len,
        sites=tuple(sites),
        dtype=dtype,
        device=device,
        stop_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _fused(state: Mapping[str, Tensor], prefix: str, names: tuple[str, ...]) -> FrozenLinear:
    weights = [state[f"{prefix}{n}.weight"] for n in names]
    biases = [state[f"{prefix}{n}.bias"] for n in names if f"{prefix}{n}.bias" in state]
    return FrozenLinear(torch.cat(weights), torch.cat(biases) if biases else None)


def _layer(state: Mapping[str, Tensor], prefix: str, heads: Heads, eps: float) -> Layer:
    return Layer(
        heads=heads,
        attention_norm=Norm(state[f"{prefix}input_layernorm.weight"], eps),
        qkv=_fused(state, prefix, _ATTENTION),
        out=_fused(state, prefix, _OUTPUT),
        mlp_norm=Norm(state[f"{prefix}post_attention_layernorm.weight"], eps),
        gate_up=_fused(state, prefix, _GATE_UP),
        down=_fused(state, prefix, _DOWN),
    )


def _site(state: Mapping[str, Tensor], prefix: str, names: tuple[str, ...]) -> Site:
    shapes = [state[f"{prefix}{n}.weight"].shape for n in names]
    return Site(tuple(prefix + n for n in names), int(shapes[0][1]), tuple(int(s[0]) for s in shapes))
