"""DoRA's gains: what an adapter's magnitudes mean beside this base's own weights, computed once, when it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.base_weights import BaseWeights
from adapters.errors import AdapterLoadFailed


def gain(base: BaseWeights, module: str, transposed: bool, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """(out,) m / |W + B A|, the norm over each output's inputs (Liu et al. 2024, eq. 5), all in float32.

    a: (r, in), b: (out, r) with the scale folded in, magnitude: (out,). transposed: W lies as (in, out) in the base's
    files, of which one piece at a time is in memory. Raises AdapterLoadFailed where a norm is zero or no number.
    """
    squares = torch.zeros(len(b), dtype=torch.float64)
    for first, piece in base.pieces(module):
        rows = torch.from_numpy(piece)
        end = first + len(rows)
        if transposed:
            squares += rows.addmm_(a[:, first:end].T, b.T).square_().sum(0)
        else:
            squares[first:end] = rows.addmm_(b[first:end], a).square_().sum(1).double()
    found = (magnitude.double() / squares.sqrt()).float()
    if not bool(found.isfinite().all()):
        raise AdapterLoadFailed(f"DoRA's gains of {module} are not finite: a weight's norm is zero", retry_after_s=None)
    return found
