"""A frozen linear layer, packed once for the machine it runs on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows for which oneDNN lays out the packed weight; one pack serves all batch sizes.
_PACK_ROWS = 16


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights can be packed here: bfloat16 on a CPU whose torch has oneDNN's (private) operators.

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


class FrozenLinear:
    """x @ weight.T + bias. weight: (out, in); it is released once packed. bias: (out,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self._packed = packs(weight.dtype, weight.device)
        weight = weight.detach().contiguous()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        if self._packed:
            # A lone row goes another way through oneDNN and rounds differently; two rows go the way of all other
            # counts, and a row's result then does not depend on its batch.
            rows = x.expand(2, -1).contiguous() if x.shape[0] == 1 else x
            y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")
            return y[: x.shape[0]]
        return F.linear(x, self._weight, self.bias)
