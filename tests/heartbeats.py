"""Heartbeats as engines send them, for whoever decides by them."""

from __future__ import annotations

import msgspec

from serving.engine.request import Heartbeat


def beat(**changes: object) -> Heartbeat:
    plain = Heartbeat(
        running=0,
        waiting=0,
        loading=0,
        rows=8,
        kv_tokens_used=0,
        kv_tokens_total=100,
        slots=(),
        slots_total=2,
        host_digests=(),
        host_bytes=0,
        host_bytes_limit=1000,
        idle_s=0.1,
        steps=0,
        tokens=0,
        loads={},
        load_seconds={},
        evictions=0,
        queue_limit=16,
    )
    return msgspec.structs.replace(plain, **changes)
