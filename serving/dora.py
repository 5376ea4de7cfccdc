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
        if transposed:
            changed = torch.addmm(rows, a[:, first : first + len(rows)].T, b.T)
            squares += changed.double().square().sum(0)
        else:
            changed = torch.addmm(rows, b[first : first + len(rows)], a)
            squares[first : first + len(rows)] = changed.double().square().sum(1)
    found = (magnitude.double() / squares.sqrt()).float()
    if not bool(found.isfinite().all()):
        raise AdapterLoadFailed(f"DoRA's gains of {module} are not finite: a weight's norm is zero", retry_after_s=None)
    return found
