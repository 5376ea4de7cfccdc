"""/metrics of adapters by tier: where they lie, what loading them took, what was evicted, what is set aside and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from serving.engine.breaker import Doubt
from serving.engine.request import LOAD_BUCKETS_S, Heartbeat


def adapter_metrics(beat: Heartbeat) -> Iterable[Metric]:
    """Families of a heartbeat. Their labels are tiers, sources and reasons: as many series as there are of these."""
    resident = GaugeMetricFamily("adapter_resident", "Adapters by tier.", labels=("tier",))
    held = {"device": len(beat.slots), "host": len(beat.host_digests), "disk": beat.disk_count}
    for tier, count in held.items():
        resident.add_metric((tier,), count)
    yield resident
    yield GaugeMetricFamily("adapter_leases", "Leases on adapters.", value=sum(slot.leases for slot in beat.slots))
    yield GaugeMetricFamily("adapter_pinned", "Adapters that stay in their slots.", value=len(beat.pinned))
    yield GaugeMetricFamily("adapter_warm", "Adapters that stay on the host for a while.", value=len(beat.warm))
    yield GaugeMetricFamily("adapter_disk_bytes", "Bytes of adapters on disk.", value=beat.disk_bytes)
    yield CounterMetricFamily("adapter_healed", "Damaged files on disk that were made anew.", value=beat.healed)
    yield GaugeMetricFamily("adapter_quarantined", "Adapters that are set aside.", value=len(beat.quarantined))
    doubts = GaugeMetricFamily("adapter_set_aside", "Adapters set aside or on trial, by reason.", labels=("reason",))
    for doubt in Doubt:
        doubts.add_metric((doubt.value,), sum(found.reason == doubt.value for found in beat.set_aside))
    yield doubts
    yield CounterMetricFamily("adapter_evictions", "Adapters evicted from slots.", value=beat.evictions)
    evicted = CounterMetricFamily("adapter_tier_evictions", "Adapters evicted, by tier.", labels=("tier",))
    for tier, count in sorted(beat.evicted.items()):
        evicted.add_metric((tier,), count)
    yield evicted
    loads = CounterMetricFamily("adapter_loads", "Adapter loads by source.", labels=("source",))
    for source, count in sorted(beat.loads.items()):
        loads.add_metric((source,), count)
    yield loads
    seconds = HistogramMetricFamily("adapter_load_seconds", "What a load took, by source.", labels=("source",))
    for source, counts in sorted(beat.load_histograms.items()):
        seconds.add_metric((source,), _buckets(counts), beat.load_seconds.get(source, 0.0))
    yield seconds


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """A heartbeat's histogram as Prometheus reads it: cumulative, the bound of everything last."""
    bounds = [*map(str, LOAD_BUCKETS_S), "+Inf"]
    return [(bound, float(count)) for bound, count in zip(bounds, counts, strict=False)]
