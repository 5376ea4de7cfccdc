"""A frozen decoder-only base as the runner wants it, whatever its family: fused, packed projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import BaseUnsupported
from serving.engine.attention import Heads
from serving.engine.linear import FrozenLinear
from serving.engine.lora import Site
from serving.engine.ops import Activation, Norm, Ops

SITES_PER_LAYER = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. qkv and up (with a gate: gate, then up) are fused along their outputs.

    attended_norm, mixed_norm: of what attention and MLP give, before it is added (Gemma 2 and 3).
    """

    heads: Heads
    attention_norm: Norm
    qkv: FrozenLinear
    out: FrozenLinear
    mlp_norm: Norm
    up: FrozenLinear
    down: FrozenLinear
    attended_norm: Norm | None = None
    mixed_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole base. sites: four a layer, in layer order; ops: what computes between the products.

    positions: (positions, width), learned, or None; embedding_scale multiplies what is looked up; logit_cap: 0, or
    logits become cap * tanh(logits / cap).
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: FrozenLinear
    activation: Activation
    ops: Ops
    max_model_len: int
    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device
    stop_token_ids: tuple[int, ...]
    positions: Tensor | None = None
    embedding_scale: float = 1.0
    logit_cap: float = 0.0


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
