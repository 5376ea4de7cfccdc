"""Which adapters lie where, replica by replica: what heartbeats say, put together by adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from serving.door import EngineDoor
from serving.engine.request import Heartbeat
from serving.replica import ReplicaView
from serving.router import Router

Json = dict[str, Any]


def residency(door: EngineDoor, name_of: Callable[[str], str], limit: int) -> Json:
    """The residency document. name_of: a version id for a digest; limit: the most adapters that are told a replica."""
    return {
        "object": "residency",
        "replicas": [_replica(view, view.heartbeat, name_of, limit) for view in views_of(door) if view.heartbeat],
    }


def views_of(door: EngineDoor) -> Sequence[ReplicaView]:
    """Every replica behind a door; a lone engine is the one replica."""
    if isinstance(door, Router):
        return door.views()
    facts, beat = door.facts, door.heartbeat
    if facts is None:
        return ()
    return (ReplicaView(facts.replica, True, False, beat, door.heartbeat_age_s, 0.0, 0),)


def _replica(view: ReplicaView, beat: Heartbeat, name_of: Callable[[str], str], limit: int) -> Json:
    slots = {slot.digest: slot for slot in beat.slots}
    aside = {found.digest: found for found in beat.set_aside}
    host, pinned, warm, going = map(frozenset, (beat.host_digests, beat.pinned, beat.warm, beat.dropping))
    # In slots first, then the most recently wanted on the host.
    known = list(
        dict.fromkeys([*slots, *aside, *beat.pinned, *beat.warm, *beat.dropping, *reversed(beat.host_digests)])
    )
    adapters = []
    for digest in known[:limit]:
        slot, doubt = slots.get(digest), aside.get(digest)
        adapters.append(
            {
                "digest": digest,
                "model": name_of(digest),
                "tiers": [tier for tier, there in (("device", slot is not None), ("host", digest in host)) if there],
                "leases": 0 if slot is None else slot.leases,
                "rank": None if slot is None else slot.rank,
                "pinned": digest in pinned,
                "warm": digest in warm,
                "dropping": digest in going,
                "set_aside": None
                if doubt is None
                else {"reason": doubt.reason, "retry_after_s": round(doubt.seconds, 3), "times": doubt.times},
            }
        )
    return {
        "replica": view.name,
        "age_s": round(view.heartbeat_age_s, 3),
        "slots": {"total": beat.slots_total, "used": len(beat.slots)},
        "host": {"adapters": len(beat.host_digests), "bytes": beat.host_bytes, "bytes_limit": beat.host_bytes_limit},
        "disk": {"adapters": beat.disk_count, "bytes": beat.disk_bytes, "bytes_limit": beat.disk_bytes_limit},
        "loading": beat.loading,
        "evicted": dict(sorted(beat.evicted.items())),
        "adapters": adapters,
        "left_out": max(0, len(known) - limit),
    }
