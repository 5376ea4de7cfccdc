"""Golden rows: a few inputs of a version with the tokens it answered when it was made, replayed where it is loaded.

They say whether what lies in a slot is that version at all, not whether it is good: reports say that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import AdapterRefused, Reason
from adapters.strict_json import canonical, read_strict

GOLDEN_FILE = "golden_rows.json"
MAX_GOLDEN_BYTES = 64 << 10
MAX_ROWS = 3
MAX_PROMPT = 256
MAX_EXPECTED = 32
MAX_TOLERANCE = 10.0
_KEYS = {"prompt", "expected", "tolerance"}


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """An input and the greedy answer to it, as token ids of the base.

    tolerance: by how many nats an expected token may be less likely than the likeliest one, for another machine rounds
    differently than the one that wrote the row.
    """

    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    tolerance: float


def golden_to_json(rows: Sequence[GoldenRow]) -> list[dict[str, Any]]:
    """Rows as plain JSON values: what is stored and digested."""
    return [{"prompt": list(row.prompt), "expected": list(row.expected), "tolerance": row.tolerance} for row in rows]


def golden_file(rows: Sequence[GoldenRow]) -> dict[str, bytes]:
    """The file that holds rows, by its name; no file for no rows. So a pulled folder publishes as what it was."""
    return {GOLDEN_FILE: canonical(golden_to_json(rows))} if rows else {}


def golden_from_json(raw: object) -> tuple[GoldenRow, ...]:
    """Rows from foreign JSON; what is absent is no rows. Raises AdapterRefused(golden_rows)."""
    if not isinstance(raw, list) or len(raw) > MAX_ROWS:
        raise _bad(f"they must be a list of at most {MAX_ROWS} rows")
    return tuple(_row(item) for item in raw)


def read_golden(data: bytes) -> tuple[GoldenRow, ...]:
    """Rows from the bytes of a golden_rows.json. Raises AdapterRefused(golden_rows)."""
    if len(data) > MAX_GOLDEN_BYTES:
        raise _bad(f"{GOLDEN_FILE} has more than {MAX_GOLDEN_BYTES} bytes")
    try:
        return golden_from_json(read_strict(data))
    except ValueError as error:
        raise _bad(str(error)) from None


def check_golden(rows: Sequence[GoldenRow], *, vocab_size: int, max_positions: int, apart: bool) -> None:
    """Whether rows can be replayed on a base. max_positions 0: no bound.

    apart: whether it reads a prompt and writes its answer in places of their own, as an encoder-decoder does. Raises
    AdapterRefused(golden_rows).
    """
    for row in rows:
        if max(*row.prompt, *row.expected) >= vocab_size:
            raise _bad(f"a token id is not of this base's vocabulary, which has {vocab_size}")
        lengths = len(row.prompt), len(row.expected)
        if max_positions and (max(lengths) if apart else sum(lengths)) > max_positions:
            raise _bad(f"a row is longer than this base's {max_positions} positions")


def _row(raw: object) -> GoldenRow:
    if not isinstance(raw, dict) or set(raw) != _KEYS:
        raise _bad(f"a row has the keys {', '.join(sorted(_KEYS))}, and no others")
    tolerance = raw["tolerance"]
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not math.isfinite(tolerance):
        raise _bad("tolerance must be a number")
    if not 0 <= tolerance <= MAX_TOLERANCE:
        raise _bad(f"tolerance must lie between 0 and {MAX_TOLERANCE:g}")
    prompt, expected = _ids(raw["prompt"], "prompt", MAX_PROMPT), _ids(raw["expected"], "expected", MAX_EXPECTED)
    return GoldenRow(prompt, expected, float(tolerance))


def _ids(raw: object, name: str, most: int) -> tuple[int, ...]:
    if not isinstance(raw, list) or not 1 <= len(raw) <= most:
        raise _bad(f"{name} must be a list of 1 to {most} token ids")
    # A JSON true is an int to Python.
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in raw):
        raise _bad(f"{name} must hold token ids, whole numbers from 0")
    return tuple(raw)


def _bad(why: str) -> AdapterRefused:
    return AdapterRefused(
        Reason.GOLDEN_ROWS, f"the golden rows are not valid: {why}; mend {GOLDEN_FILE}, or leave it out"
    )
