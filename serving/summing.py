"""Many heartbeats as one: what all replicas of a server are together, and counters that outlive the replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from serving.engine.request import Heartbeat, SetAsideState, SlotState

Figure = int | float | dict[str, object] | tuple[object, ...]

# They only grow: a replica that is gone has still done what it did.
COUNTERS = (
    "steps",
    "tokens",
    "loads",
    "load_seconds",
    "evictions",
    "prompt_tokens",
    "reused_tokens",
    "load_histograms",
    "evicted",
    "healed",
)
# Replicas of one machine see one folder.
_SHARED = frozenset({"disk_count", "disk_bytes", "disk_bytes_limit"})
# Promises hold where all replicas keep them: who looks for one that was lost must see that it is.
_EVERYWHERE = frozenset({"pinned", "warm"})


def together(beats: Sequence[Heartbeat], gone: Iterable[Heartbeat] = ()) -> Heartbeat | None:
    """All replicas as one engine; None without any. gone: last words of replicas whose counters still count.

    Numbers add up, but idle_s is that of the liveliest and other times are the longest; an adapter that lies in
    several slots is told once, with all its leases, and one that is set aside where it is so for longest; pinned and
    warm is what every replica has pinned and warm.
    """
    if not beats:
        return None
    told = [msgspec.structs.asdict(beat) for beat in beats]
    past = [msgspec.structs.asdict(beat) for beat in gone]
    fields = {
        name: _one(name, [t[name] for t in told] + [p[name] for p in past if name in COUNTERS]) for name in told[0]
    }
    return Heartbeat(**fields)  # type: ignore[arg-type]


def last_words(beats: Iterable[Heartbeat]) -> Heartbeat | None:
    """Heartbeats of replicas that are gone, as one: for their counters alone."""
    return together(list(beats))


def _one(name: str, values: Sequence[Figure]) -> Figure:
    first = values[0]
    if name == "idle_s":
        return min(v for v in values if isinstance(v, float | int))
    if name in _SHARED:
        return max(v for v in values if isinstance(v, int))
    if isinstance(first, tuple):
        tuples = [v for v in values if isinstance(v, tuple)]
        if name in _EVERYWHERE:
            return tuple(item for item in first if all(item in others for others in tuples))
        return _union(tuples)
    return _add(values)


def _union(values: Sequence[tuple[object, ...]]) -> tuple[object, ...]:
    slots: dict[str, SlotState] = {}
    aside: dict[str, SetAsideState] = {}
    others: dict[object, None] = {}
    for item in (item for value in values for item in value):
        if isinstance(item, SlotState):
            leases = slots[item.digest].leases if item.digest in slots else 0
            slots[item.digest] = msgspec.structs.replace(item, leases=item.leases + leases)
        elif isinstance(item, SetAsideState):
            known = aside.setdefault(item.digest, item)
            aside[item.digest] = max(known, item, key=lambda state: (state.seconds, state.times))
        else:
            others[item] = None
    return (*slots.values(), *aside.values(), *others)


def _add(values: Sequence[Figure]) -> Figure:
    """Numbers and counts add up, key by key and place by place; a float that stands alone is a time: the longest."""
    first = values[0]
    if isinstance(first, Mapping):
        maps = [v for v in values if isinstance(v, Mapping)]
        names = dict.fromkeys(name for m in maps for name in m)
        return {name: _counts([m[name] for m in maps if name in m]) for name in names}
    if isinstance(first, float):
        return max(v for v in values if isinstance(v, float | int))
    return sum(v for v in values if isinstance(v, int))


def _counts(values: Sequence[object]) -> object:
    if isinstance(values[0], tuple | list):
        rows = [v for v in values if isinstance(v, tuple | list)]
        return tuple(sum(row[at] for row in rows if at < len(row)) for at in range(max(map(len, rows))))
    return sum(v for v in values if isinstance(v, int | float))
