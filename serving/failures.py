"""An engine's failures as the typed errors that clients are told."""

from __future__ import annotations

from adapters.errors import (
    AdapterCapacity,
    AdapterLoadFailed,
    AdapterNumerics,
    AdapterQuarantined,
    AdapterUnloaded,
    Cancelled,
    DeadlineExceeded,
    DeadlineUnreachable,
    EngineFault,
    EngineLost,
    InvalidRequest,
    LoraplaneError,
    NotReady,
    QueueFull,
    SlotsPinned,
)
from serving.engine.admission import ALL_PINNED
from serving.engine.breaker import Doubt
from serving.engine.request import Failed

FAULT = "The engine failed on this request."
_DOUBTS: dict[str, str] = {
    Doubt.NUMERICS: "it gave no finite numbers, again and again",
    Doubt.SLOT_CONTENTS: "what lies in its slot is not what was put there",
    Doubt.NO_EFFECT: "from its slot it changes nothing, and the base would answer under its name",
    Doubt.GOLDEN_MISMATCH: "it does not answer its golden rows as it did when it was made",
}
# What a busy or a stopping server says in the course of its work; all else is logged as it came.
PLAIN = frozenset({QueueFull.code, AdapterCapacity.code, NotReady.code, DeadlineExceeded.code, Cancelled.code})


def engine_error(failed: Failed, model: str) -> LoraplaneError:
    """The typed error of an engine's failure.

    Messages are our own, whatever the engine wrote: its text may name paths and internals, and belongs in the log.
    """
    hint = failed.retry_after_s
    match failed.code:
        case QueueFull.code:
            return QueueFull("The engine's queue is full; try again in a moment.", hint or 1.0)
        case AdapterCapacity.code if failed.message == ALL_PINNED:
            why = (
                f"Every adapter slot is pinned to others, so {model} has none; unpin one (loraplane unpin NAME@N), or "
                f"serve with more of them (--slots)."
            )
            return SlotsPinned(why, hint or 1.0)
        case AdapterCapacity.code:
            return AdapterCapacity("Every adapter slot is in use; try again in a moment.", hint or 1.0)
        case NotReady.code:
            return NotReady("The engine or the server stops, or starts anew; send the request again.", hint or 2.0)
        case EngineLost.code:
            return EngineLost("The engine was lost while it worked on this request.", hint or 2.0)
        case AdapterLoadFailed.code:
            return AdapterLoadFailed(f"{model} could not be loaded.", hint)
        case AdapterNumerics.code:
            return AdapterNumerics(f"{model} gives no finite numbers for this prompt.", None)
        case AdapterQuarantined.code:
            reason = failed.message if failed.message in _DOUBTS else Doubt.NUMERICS.value
            return AdapterQuarantined(
                f"{model} is set aside ({reason}): {_DOUBTS[reason]}; try again later, or ask another version.",
                hint,
                reason,
            )
        case AdapterUnloaded.code:
            return AdapterUnloaded(f"{model} was taken out of service; ask again, or ask another version.", hint)
        case DeadlineExceeded.code if hint is not None:
            why = "The server could not begin this request before its deadline; try again later, or give it more time."
            return DeadlineUnreachable(why, hint)
        case DeadlineExceeded.code:
            return DeadlineExceeded("The request was not complete before its deadline.")
        case Cancelled.code:
            return Cancelled("The request was cancelled.")
        case InvalidRequest.code | "context_length_exceeded":
            return InvalidRequest("The engine refuses this request's size or settings.")
        case _:
            return EngineFault(FAULT, hint)
