"""/metrics by replica: which are there, what each does, what was sent to it. The sums are in `serving/metrics.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine.request import Heartbeat
from serving.replica import ReplicaView

Figure = Callable[[Heartbeat], float]
_GAUGES: Final[tuple[tuple[str, str, Figure], ...]] = (
    ("engine_replica_running", "Sequences that compute.", lambda beat: beat.running),
    ("engine_replica_waiting", "Sequences that wait.", lambda beat: beat.waiting),
    ("engine_replica_rows", "Rows of the batch.", lambda beat: beat.rows),
    ("engine_replica_slots", "Device slots.", lambda beat: beat.slots_total),
    ("engine_replica_adapters_device", "Adapters in device slots.", lambda beat: len(beat.slots)),
    ("engine_replica_adapters_host", "Adapters in host memory.", lambda beat: len(beat.host_digests)),
    ("engine_replica_loading", "Adapters being loaded.", lambda beat: beat.loading),
    ("engine_replica_leases", "Leases on adapters.", lambda beat: sum(slot.leases for slot in beat.slots)),
    ("engine_replica_idle_seconds", "Since a token was produced or a probe passed.", lambda beat: beat.idle_s),
)
_COUNTERS: Final[tuple[tuple[str, str, Figure], ...]] = (
    ("engine_replica_steps", "Engine steps.", lambda beat: beat.steps),
    ("engine_replica_tokens", "Tokens produced.", lambda beat: beat.tokens),
    ("engine_replica_evictions", "Adapters evicted from slots.", lambda beat: beat.evictions),
)


class ReplicaCollector(Collector):
    """Every replica that the router knows, read at each scrape; a replica's series end with it."""

    def __init__(self, look: Callable[[], Sequence[ReplicaView]]) -> None:
        self._look = look

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: there may be no replica yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        views = self._look()
        connected = sum(view.connected and not view.leaving for view in views)
        yield GaugeMetricFamily("engine_replicas", "Replicas that take sequences.", value=connected)
        yield self._gauge("engine_replica_connected", "1 while it is.", views, lambda v: int(v.connected))
        yield self._gauge("engine_replica_leaving", "1 while it only finishes.", views, lambda v: int(v.leaving))
        yield self._gauge("engine_replica_load", "Sequences a row, as routing sees it.", views, lambda v: v.load)
        heard = [(v, v.heartbeat) for v in views if v.heartbeat is not None]
        ages = [v for v, _ in heard]
        text = "Since its last heartbeat."
        yield self._gauge("engine_replica_heartbeat_age_seconds", text, ages, lambda v: v.heartbeat_age_s)
        sent = CounterMetricFamily("engine_replica_sequences", "Sequences sent there.", labels=("replica",))
        for view in views:
            sent.add_metric((view.name,), view.sent)
        yield sent
        for name, text, figure in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=("replica",))
            for view, beat in heard:
                gauge.add_metric((view.name,), figure(beat))
            yield gauge
        for name, text, figure in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=("replica",))
            for view, beat in heard:
                counter.add_metric((view.name,), figure(beat))
            yield counter

    def _gauge(
        self, name: str, text: str, views: Sequence[ReplicaView], figure: Callable[[ReplicaView], float]
    ) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=("replica",))
        for view in views:
            gauge.add_metric((view.name,), figure(view))
        return gauge
