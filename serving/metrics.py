"""Everything that /metrics shows: names that dashboards made for vLLM read, our own `adapter_*`, and every limit."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.records import MoveAction
from serving.adapter_metrics import adapter_metrics
from serving.answers import Ended
from serving.arm_metrics import ArmMetrics
from serving.engine.request import BASE_LANE, OTHER_LANES, EngineFacts, Heartbeat

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_NAMED_ADAPTERS = 200
MAX_REMEMBERED = 4096
OTHER = "other"

# The bucket bounds that vLLM's dashboards and load tools expect.
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_CHOICES = (1, 2, 5, 10, 20)
_FIRST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 86400.0)
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to a limit: the bounds for token counts."""
    found: list[int] = []
    power = 1
    while power <= limit:
        found += [power * m for m in (1, 2, 5) if power * m <= limit]
        power *= 10
    return tuple(found)


@dataclass(frozen=True, slots=True)
class EngineView:
    """The engine as a scrape sees it: nothing of it while none is connected. inflight: requests in the gateway."""

    facts: EngineFacts | None
    heartbeat: Heartbeat | None
    heartbeat_age_s: float
    inflight: int


class Metrics:
    """One registry of its own, so that two apps in one process do not meet.

    model_name: the base's name, the label of the `vllm:` family. look: the engine now; name_of: a version id for a
    digest; limits: every configured figure by name. Implements serving.answers.Observer.
    """

    def __init__(
        self,
        model_name: str,
        *,
        look: Callable[[], EngineView],
        name_of: Callable[[str], str] = lambda digest: digest[:12],
        limits: Mapping[str, float] | None = None,
        max_tokens: int = 8192,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._adapters: set[str] = set()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(model_name, look, name_of))
        tokens = one_two_five(max_tokens)
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", _TTFT)
        self._gap = self._histogram("vllm:inter_token_latency_seconds", "Time between tokens.", _PER_TOKEN)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token of a request.", _PER_TOKEN
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Whole requests.", _LATENCY)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Time in WAITING.", _LATENCY)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Time in PREFILL.", _LATENCY)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "Time in DECODE.", _LATENCY)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Time in the engine.", _LATENCY)
        self._request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens a request.", tokens)
        self._request_answer = self._histogram("vllm:request_generation_tokens", "New tokens a request.", tokens)
        self._request_n = self._histogram("vllm:request_params_n", "The n of a request.", _CHOICES)
        self._request_max = self._histogram("vllm:request_params_max_tokens", "The max_tokens of a request.", tokens)
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens.", "model_name").labels(model_name)
        self._answer = self._counter("vllm:generation_tokens", "New tokens.", "model_name").labels(model_name)
        self._success = self._counter(
            "vllm:request_success", "Finished sequences by reason.", "model_name", "finished_reason"
        )
        for reason in ("stop", "length"):
            self._success.labels(model_name, reason)
        self._requests = self._counter("adapter_requests", "Requests that reached an adapter.", "adapter", "outcome")
        self._arms = ArmMetrics(self.registry)
        self._refusals = self._counter("adapter_refusals", "Requests refused or failed, by error code.", "code")
        self._first_answer = Histogram(
            "adapter_publish_to_first_answer_seconds", "From a version's publication to the first token of its first "
            "answer here, of versions published since this gateway started.", buckets=_FIRST, registry=self.registry,
        )  # fmt: skip
        self._started, self._now = now(), now
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._publishes = self._counter("adapter_publishes", "Versions published over HTTP.")
        self._moves = self._counter("adapter_moves", "Alias moves and decrees over HTTP, by action.", "action")
        for action in MoveAction:
            self._moves.labels(action.value)
        self._http = self._counter("gateway_http_requests", "HTTP requests.", "route", "method", "status")
        self._http_seconds = Histogram(
            "gateway_http_request_seconds", "HTTP requests, to their last byte.", ["route"], buckets=_HTTP,
            registry=self.registry,
        )  # fmt: skip
        limit = Gauge("loraplane_limit", "Configured limits: bytes, seconds or counts.", ["name"],
                      registry=self.registry)  # fmt: skip
        for name, value in (limits or {}).items():
            limit.labels(name).set(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self._model)

    def tokens_came(self, gap_s: float) -> None:
        """A sequence got new tokens, gap_s after those before."""
        self._gap.observe(gap_s)

    def ended(self, record: Ended) -> None:
        """A request that reached the engine is over."""
        weights = record.weights
        adapter = self._label(weights.adapter or "base")
        self._requests.labels(adapter, record.outcome).inc()
        self._arms.ended(record, adapter)
        self._prompt.inc(record.usage.prompt_tokens)
        self._answer.inc(record.usage.completion_tokens)
        for reason in record.finish_reasons:
            self._success.labels(self._model, reason).inc()
        if record.first_token_s is not None:
            self._ttft.observe(record.first_token_s)
            self._note_first(record, record.first_token_s)
        if record.outcome != "complete":
            return
        self._e2e.observe(record.total_s)
        self._request_prompt.observe(record.usage.prompt_tokens)
        self._request_answer.observe(record.usage.completion_tokens)
        self._request_n.observe(record.n)
        self._request_max.observe(record.max_tokens)
        # Choices run side by side: the mean answer counts, not their sum.
        later = record.usage.completion_tokens / max(1, len(record.finish_reasons)) - 1
        if later > 0 and record.first_token_s is not None:
            self._per_token.observe((record.total_s - record.first_token_s) / later)
        if record.timing is not None:
            timing = record.timing
            self._queue.observe(timing.queue_s)
            self._prefill.observe(timing.prefill_s)
            self._decode.observe(timing.decode_s)
            self._inference.observe(timing.prefill_s + timing.decode_s)

    def _note_first(self, record: Ended, first_token_s: float) -> None:
        """A version's first answer here. Of one that was published before this gateway started nobody knows whether
        this is the first."""
        digest, published_at = record.weights.digest, record.weights.published_at
        if digest is None or published_at is None or published_at < self._started or digest in self._answered:
            return
        self._answered[digest] = None
        if len(self._answered) > MAX_REMEMBERED:
            self._answered.popitem(last=False)
        self._first_answer.observe(max(0.0, self._now() - record.total_s + first_token_s - published_at))

    def refused(self, code: str) -> None:
        """A request came to an error; `code` is one of the error tree's."""
        self._refusals.labels(code).inc()

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request is over. status 0: the client left before there was one."""
        known = method if method in _METHODS else OTHER
        self._http.labels(route, known, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def published(self) -> None:
        """A version was published over HTTP."""
        self._publishes.inc()

    def moved(self, action: str) -> None:
        """An alias was moved over HTTP."""
        self._moves.labels(action).inc()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def _label(self, adapter: str) -> str:
        """The adapter's name, or `other` beyond the first few hundred: names are the clients' to make."""
        if adapter not in self._adapters:
            if len(self._adapters) >= MAX_NAMED_ADAPTERS:
                return OTHER
            self._adapters.add(adapter)
        return adapter


_NO_ADAPTERS = frozenset({BASE_LANE, OTHER_LANES})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class _EngineCollector(Collector):
    """What the engine's last heartbeat says, read at each scrape."""

    def __init__(self, model: str, look: Callable[[], EngineView], name_of: Callable[[str], str]) -> None:
        self._model, self._look, self._name_of = model, look, name_of
        self._running: tuple[str, str] | None = None
        self._changed_at = 0.0

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: an engine may not be there yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        view = self._look()
        beat, facts = view.heartbeat, view.facts
        yield self._gauge("gateway_requests_inflight", "Requests in this gateway.", view.inflight)
        connected = beat is not None and facts is not None
        yield self._gauge("gateway_engine_connected", "1 while an engine is connected.", int(connected))
        if beat is None or facts is None:
            return
        age = view.heartbeat_age_s
        yield self._gauge("gateway_engine_heartbeat_age_seconds", "Since the engine's last heartbeat.", age)
        yield self._gauge("vllm:num_requests_running", "Sequences that compute.", beat.running, model=True)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait.", beat.waiting, model=True)
        used = beat.kv_tokens_used / beat.kv_tokens_total if beat.kv_tokens_total else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used, model=True)
        yield self._cache_info(beat)
        yield from self._adapters(beat, facts)
        yield from self._own(beat, facts)

    def _adapters(self, beat: Heartbeat, facts: EngineFacts) -> Iterable[Metric]:
        running = sorted(self._name_of(s.digest) for s in beat.slots if s.leases)
        names = ",".join(running)
        waiting = ",".join(sorted(self._lane(who) for who in beat.waiting_by if who not in _NO_ADAPTERS))
        if (names, waiting) != self._running:
            self._running, self._changed_at = (names, waiting), time.time()
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running adapters; the value is the unix time of their last change.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        info.add_metric((str(facts.slots), names, waiting), self._changed_at)
        yield info
        pinned = frozenset(beat.pinned)
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded", "1 for each resident adapter.", labels=("adapter_name", "level", "pinned")
        )
        for slot in beat.slots[:MAX_NAMED_ADAPTERS]:
            loaded.add_metric((self._name_of(slot.digest), "gpu", str(slot.digest in pinned).lower()), 1)
        for digest in beat.host_digests[:MAX_NAMED_ADAPTERS]:
            loaded.add_metric((self._name_of(digest), "cpu", "false"), 1)
        yield loaded
        yield self._gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters in device slots.", len(beat.slots))
        yield self._gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", len(beat.host_digests))

    def _own(self, beat: Heartbeat, facts: EngineFacts) -> Iterable[Metric]:
        yield from adapter_metrics(beat)
        yield self._gauge("adapter_slots", "Device slots.", beat.slots_total)
        yield self._gauge("adapter_loading", "Adapters being loaded.", beat.loading)
        waiting = GaugeMetricFamily("adapter_waiting", "Sequences that wait, by adapter.", labels=("adapter",))
        for who, count in sorted(beat.waiting_by.items()):
            waiting.add_metric((self._lane(who),), count)
        yield waiting
        yield self._gauge("engine_oldest_wait_seconds", "Of the sequence that waits longest.", beat.oldest_wait_s)
        yield self._gauge("adapter_host_bytes", "Bytes of adapters in host memory.", beat.host_bytes)
        yield self._gauge("engine_rows", "Rows of the batch.", beat.rows)
        yield self._gauge("engine_idle_seconds", "Since a token was produced or a probe passed.", beat.idle_s)
        limits = GaugeMetricFamily("engine_limit", "Limits of the engine.", labels=("name",))
        for name, value in {
            "rows": facts.max_rows,
            "slots": facts.slots,
            "rank": facts.max_rank,
            "model_len": facts.max_model_len,
            "kv_tokens": beat.kv_tokens_total,
            "queue": beat.queue_limit,
            "host_bytes": beat.host_bytes_limit,
            "disk_bytes": beat.disk_bytes_limit,
        }.items():
            limits.add_metric((name,), value)
        yield limits
        yield CounterMetricFamily("vllm:prefix_cache_queries", "Tokens of prompts begun.", value=beat.prompt_tokens)
        text = "Prompt tokens that lay in the cache already."
        yield CounterMetricFamily("vllm:prefix_cache_hits", text, value=beat.reused_tokens)
        yield CounterMetricFamily("engine_steps", "Engine steps.", value=beat.steps)
        yield CounterMetricFamily("engine_tokens", "Tokens produced.", value=beat.tokens)

    def _lane(self, who: str) -> str:
        return who if who in _NO_ADAPTERS else self._name_of(who)

    def _cache_info(self, beat: Heartbeat) -> Metric:
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=("block_size", "num_gpu_blocks"))
        info.add_metric(("1", str(beat.kv_tokens_total)), 1)
        return info

    def _gauge(self, name: str, text: str, value: float, *, model: bool = False) -> Metric:
        if not model:
            return GaugeMetricFamily(name, text, value=value)
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family
