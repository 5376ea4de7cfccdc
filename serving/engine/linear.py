"""A frozen linear layer, packed once for the machine it runs on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.kernels.load import cpu_kernels

# Rows for which oneDNN lays out the packed weight; one pack serves all batch sizes.
_PACK_ROWS = 16
_COLUMNS = 48  # of a block in products.cpp


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN can pack weights here: bfloat16 on a CPU whose torch has its (private) operators.

    float32 is not packed: it was slower at one row.
    """
    return (
        dtype is torch.bfloat16
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def products(dtype: torch.dtype, device: torch.device, in_features: int) -> Any | None:
    """The kernels, where their product is the one to take. With AMX oneDNN's is faster: it has the tiles, ours not."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or in_features % 2 or torch.cpu._is_amx_tile_supported():
        return None
    return cpu_kernels()


class FrozenLinear:
    """x @ weight.T + bias. weight: (out, in); it is released once packed. bias: (out,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        weight = weight.detach().contiguous()
        self._kernels = products(weight.dtype, weight.device, self.in_features)
        self._packed = self._kernels is None and packs(weight.dtype, weight.device)
        if self._kernels is not None:
            self._weight, self._sums = in_blocks(weight), _padded(self.bias, self.out_features)
        elif self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        else:
            self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        y: Tensor
        if self._kernels is not None:
            y = self._kernels.product(x.contiguous(), self._weight, self._sums, self.out_features)
            return y
        if self._packed:
            # A lone row goes another way through oneDNN and rounds differently; two rows go the way of all other
            # counts, and a row's result then does not depend on its batch.
            rows = x.expand(2, -1).contiguous() if x.shape[0] == 1 else x
            y = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")
            return y[: x.shape[0]]
        return F.linear(x, self._weight, self.bias)


def in_blocks(weight: Tensor) -> Tensor:
    """(out, in) -> (blocks, in / 2, 48, 2): pairs of inputs side by side for 48 outputs; zeros behind the last one."""
    blocks = -(-weight.shape[0] // _COLUMNS)
    padded = F.pad(weight, (0, 0, 0, blocks * _COLUMNS - weight.shape[0]))
    return padded.reshape(blocks, _COLUMNS, -1, 2).transpose(1, 2).contiguous()


def _padded(bias: Tensor | None, out_features: int) -> Tensor:
    """What the sums of a block begin with, float32."""
    sums = torch.zeros(-(-out_features // _COLUMNS) * _COLUMNS)
    if bias is not None:
        sums[:out_features] = bias
    return sums
