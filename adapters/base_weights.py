"""The frozen weights of a saved base, one module at a time and in pieces: numpy alone, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base_digest import TensorEntry, tensors
from adapters.errors import BaseUnsupported
from adapters.families import is_head
from adapters.tensor_file import TensorView

Floats = np.ndarray[Any, np.dtype[np.float32]]

_PIECE_VALUES = 1 << 20
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


class BaseWeights:
    """The weights of the base in a folder. Raises BaseUnsupported where its files are not what they should be."""

    def __init__(self, folder: Path) -> None:
        self._entries = {entry.name: entry for entry in tensors(folder)}

    def pieces(self, module: str) -> Iterator[tuple[int, Floats]]:
        """(first row, rows) of a module's weight as it lies, (rows, columns), in float32, from the first to the last.

        Of Conv1D and of embeddings a row is an input, of other modules an output. A piece has about a million values.
        """
        entry = self._entry(module)
        rows, columns = entry.shape
        at_once = max(1, _PIECE_VALUES // columns)
        for first in range(0, rows, at_once):
            yield first, _floats(_read(entry, first, min(rows, first + at_once)), entry.dtype)

    def holds(self, module: str, copy: TensorView) -> bool:
        """Whether a copy of a module's weight has the base's values, in the copy's own number format.

        A copy in fewer bits is the base as it was loaded for training: equal after the same rounding.
        """
        entry = self._entry(module)
        if copy.shape != entry.shape:
            return False
        theirs = copy.array
        for first, rows in self.pieces(module):
            if not np.array_equal(_rounded(rows, copy.dtype), theirs[first : first + len(rows)]):
                return False
        return True

    def _entry(self, module: str) -> TensorEntry:
        # A checkpoint of the bare model leaves its prefix out.
        names = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
        if is_head(module):  # tied to the embedding where it is not stored
            names += [name for name in self._entries if name.endswith(_EMBEDDINGS)]
        for name in names:
            entry = self._entries.get(name)
            if entry is None:
                continue
            if entry.dtype not in _STORED or len(entry.shape) != 2:
                raise BaseUnsupported(f"{name} of the base is {entry.dtype} {list(entry.shape)}, no matrix of floats")
            return entry
        raise BaseUnsupported(f"the base's files hold no weight of {module}")


def _read(entry: TensorEntry, first: int, end: int) -> np.ndarray[Any, np.dtype[Any]]:
    stored = np.dtype(_STORED[entry.dtype])
    columns = entry.shape[1]
    found = np.fromfile(
        entry.file, stored, (end - first) * columns, offset=entry.start + first * columns * stored.itemsize
    )
    if len(found) != (end - first) * columns:
        raise BaseUnsupported(f"{entry.file} became shorter than its header says")
    return found.reshape(-1, columns)


def _floats(values: np.ndarray[Any, np.dtype[Any]], dtype: str) -> Floats:
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)


def _rounded(values: Floats, dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """float32 in another format, to nearest, ties to even; BF16 as bit patterns, as TensorView has them."""
    if dtype == "BF16":
        bits: np.ndarray[Any, np.dtype[np.uint32]] = values.view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype("<f2" if dtype == "F16" else "<f4", copy=False)
