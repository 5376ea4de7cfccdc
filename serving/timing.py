"""Where an answer's time went, as `server-timing` tells it. Seconds in, milliseconds on the wire."""

from __future__ import annotations

from collections.abc import Mapping

from serving.engine.request import Timing

SPANS = ("queue", "fetch", "host", "device", "prefill", "decode")


def spans(timing: Timing) -> dict[str, float]:
    """A sequence's time in the engine in seconds, by span; together they are all of it.

    queue: behind other requests and other loads; fetch: its adapter was read and verified; host: laid out; device: put
    into its slot, and proven there. A sequence that came while the load was under way waited for the load's end alone,
    so what it waited is counted backwards from there.
    """
    waited, load = timing.load_s, timing.load
    host = 0.0 if load is None else min(waited, load.host_s)
    fetch = waited - host if load is None else min(waited - host, load.fetch_s)
    return {
        "queue": timing.queue_s + (waited - host - fetch),
        "fetch": fetch,
        "host": host,
        "device": timing.device_s,
        "prefill": timing.prefill_s,
        "decode": timing.decode_s,
    }


def engine_s(timing: Timing) -> float:
    """A sequence's whole time in the engine so far, in seconds."""
    return timing.queue_s + timing.load_s + timing.device_s + timing.prefill_s + timing.decode_s


def server_timing(found: Mapping[str, float], total_s: float) -> str:
    """The header: the spans, then `edge`, what was spent outside of the engine, then `total`, the sum of all."""
    edge = max(0.0, total_s - sum(found.values()))
    parts = {**found, "edge": edge, "total": sum(found.values()) + edge}
    return ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in parts.items())
