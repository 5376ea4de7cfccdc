"""What a decoder does between its products: norms and gates, by a kernel where there is one, else by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.kernels.load import cpu_kernels

_LANES = 16


class Activation(StrEnum):
    """What lies between a layer's two MLP products. The gated forms take (T, 2n), the others (T, n)."""

    GATED_SILU = "gated silu"
    GATED_TANH_GELU = "gated tanh gelu"
    TANH_GELU = "tanh gelu"
    GELU = "gelu"
    RELU = "relu"


_PLAIN: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.TANH_GELU: partial(F.gelu, approximate="tanh"),
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
}


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation of rows. offset: added to the weight (Gemma: 1). bias: makes it LayerNorm in place of RMSNorm."""

    weight: Tensor
    eps: float
    offset: float = 0.0
    bias: Tensor | None = None


class Ops:
    """Row-wise operations of one base. kernels: `torch.ops.loraplane`, or None for torch alone."""

    def __init__(self, kernels: Any | None) -> None:
        self.kernels = kernels

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """(T, n) -> (T, n). x keeps its values."""
        if self._fits(norm):
            found: Tensor = self.kernels.add_rms_norm(x, None, norm.weight, norm.eps, norm.offset)  # type: ignore[union-attr]
            return found
        return _norm(x, norm)

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        """x += y in place, then its norm: (T, n) -> (T, n)."""
        if self._fits(norm):
            found: Tensor = self.kernels.add_rms_norm(x, y, norm.weight, norm.eps, norm.offset)  # type: ignore[union-attr]
            return found
        return _norm(x.add_(y), norm)

    def maybe_norm(self, x: Tensor, norm: Norm | None) -> Tensor:
        """The norm where there is one."""
        return x if norm is None else self.norm(x, norm)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """(T, 2n) -> (T, n) for a gated activation, act(gate) * up; (T, n) -> (T, n) otherwise."""
        if activation in _PLAIN:
            return _PLAIN[activation](x)
        tanh_gelu = activation is Activation.GATED_TANH_GELU
        if self.kernels is not None and x.shape[1] % (2 * _LANES) == 0:
            found: Tensor = self.kernels.gated(x, tanh_gelu)
            return found
        gate, up = x.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") if tanh_gelu else F.silu(gate)) * up

    def _fits(self, norm: Norm) -> bool:
        return self.kernels is not None and norm.bias is None and norm.weight.shape[0] % _LANES == 0


def pick_ops(dtype: torch.dtype, device: torch.device) -> Ops:
    """Kernels for bfloat16 on a CPU that has them; torch for everything else."""
    return Ops(cpu_kernels() if dtype is torch.bfloat16 and device.type == "cpu" else None)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.bias is not None:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if norm.offset == 0.0:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    # 1 + weight in bfloat16 would lose most of the weight.
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float() + norm.offset, norm.eps).to(x.dtype)
