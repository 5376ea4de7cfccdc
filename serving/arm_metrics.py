"""/metrics by arm: what the requests of a canary and of its champion came to, while the canary runs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from serving.answers import Ended
from serving.tally import is_fault

_LABELS = ("adapter", "arm")
# Few: there is a series for each, of every adapter that is tried and of both arms.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


class ArmMetrics:
    """The arms' families in a registry. Requests that took no arm are counted nowhere here."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "adapter_arm_requests", "Requests that took an arm of a canary.", _LABELS, registry=registry
        )
        self._errors = Counter(
            "adapter_arm_errors", "Of these, those that speak against the version.", _LABELS, registry=registry
        )
        self._first_token = Histogram(
            "adapter_arm_first_token_seconds", "Time to first token.", _LABELS, buckets=_FIRST_TOKEN, registry=registry
        )
        self._whole = Histogram(
            "adapter_arm_request_seconds", "Whole requests, complete ones.", _LABELS, buckets=_WHOLE, registry=registry
        )

    def ended(self, record: Ended, adapter: str) -> None:
        """A request is over. adapter: its label."""
        if record.taken is None:
            return
        arm = record.taken.arm.value
        self._requests.labels(adapter, arm).inc()
        self._errors.labels(adapter, arm).inc(is_fault(record.outcome, record.total_s))
        if record.first_token_s is not None:
            self._first_token.labels(adapter, arm).observe(record.first_token_s)
        if record.outcome == "complete":
            self._whole.labels(adapter, arm).observe(record.total_s)
