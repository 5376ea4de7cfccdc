"""JSON from strangers and JSON for digests: one strict reader, one canonical writer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn


def read_strict(data: bytes) -> object:
    """The value of a JSON text.

    Raises ValueError, saying why, on bytes that are not UTF-8, a key given twice in one object (at any level), NaN and
    Infinity (also as an overflowing literal such as 1e999), lone surrogates, and nesting beyond what can be read.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
        # A lone surrogate parses, and then fails far from here, in a database or a terminal.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    return value


def canonical(value: object) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, ASCII, no NaN. Raises TypeError or ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it gives the key {twice[:60]!r} twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:20]}, which no float can hold")
    return value


def shown(value: object, limit: int = 60) -> str:
    """A foreign value for a message: its JSON, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
