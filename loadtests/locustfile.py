"""Locust users that stream answers of many adapters at once and check the digest of every one.

Beside the two routes locust shows these as requests of their own, by model: TTFT and TPOT (ms), ITL (each gap between
pieces of an answer, ms) and tok/s (a rate, not a time). Run it through `python -m loadtests.run`, or by hand:

    locust -f loadtests/locustfile.py --headless -u 8 -t 30s -H http://127.0.0.1:8000
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gevent.event
import requests
from locust import HttpUser, constant, events, task
from locust.exception import StopUser

from adapters.records import parse_model_id
from loadtests.profiles import Ask, Asker, Plan, Planned, targets_of
from loadtests.sse import Answer, Problem, StreamCheck, Violation
from loadtests.truth import Truth

READ_TIMEOUT_S = 120.0
_FETCH_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one request came to. Times in ms. named: the version that answered; unfinished: the test ended first.

    asked_at: of the machine's monotonic clock; late_ms: how long after its time it was asked, since all callers were
    busy; prompt: which one of a plan; cache: the tier that the server says the adapter lay in.
    """

    model: str
    path: str
    named: str | None
    tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    gaps_ms: tuple[float, ...]
    ended_s: float
    digest_checked: bool
    violations: tuple[str, ...]
    unfinished: bool = False
    asked_at: float = 0.0
    late_ms: float = 0.0
    prompt: int = -1
    cache: str | None = None
    digest: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """When one request was made, see Sample."""

    at: float
    late_ms: float
    prompt: int


@dataclass
class Run:
    """One load test: what is asked, what came of it. Made at locust's start, written to `result` at its end.

    plan: None where callers draw what they ask; else they take its items in turn, and the test ends after the last.
    """

    seed: int
    exponent: float
    max_tokens: int
    models: list[str]
    result: str
    plan: Plan | None = None
    samples: list[Sample] = field(default_factory=list)
    users: itertools.count[int] = field(default_factory=itertools.count)
    started: float = field(default_factory=time.monotonic)
    left: collections.deque[Planned] = field(default_factory=collections.deque)
    ready: gevent.event.Event = field(default_factory=gevent.event.Event)

    def __post_init__(self) -> None:
        self.left.extend(self.plan.items if self.plan else ())

    def clock(self) -> float:
        """Seconds since the test began."""
        return time.monotonic() - self.started

    def write(self) -> None:
        """Leave the samples for whoever started the test."""
        if self.result:
            Path(self.result).write_text(json.dumps([asdict(s) for s in self.samples]), encoding="utf-8")


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]  # locust is read without types
def _arguments(parser: Any, **_: Any) -> None:
    parser.add_argument("--seed", type=int, default=0, help="Equal seeds ask the same.")
    parser.add_argument("--zipf", type=float, default=1.0, help="Exponent of the models' popularity; 0: all alike.")
    parser.add_argument("--max-tokens", type=int, default=32, help="Longest answer.")
    parser.add_argument("--models", default="", help="Comma-separated ids; default: all of GET /v1/models.")
    parser.add_argument("--plan", default="", help="File with the requests to make, in place of drawn ones.")
    parser.add_argument("--result", default="", help="File for one JSON object a request.")


@events.init.add_listener  # type: ignore[untyped-decorator]  # locust is read without types
def _begin(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    models = [m for m in options.models.split(",") if m]
    plan = Plan.read(Path(options.plan)) if options.plan else None
    environment.load_run = run = Run(options.seed, options.zipf, options.max_tokens, models, options.result, plan)

    def begin(**_: Any) -> None:
        run.started = time.monotonic()
        run.ready.set()

    environment.events.spawning_complete.add_listener(begin)


@events.quitting.add_listener  # type: ignore[untyped-decorator]  # locust is read without types
def _end(environment: Any, **_: Any) -> None:
    environment.load_run.write()


class StreamUser(HttpUser):  # type: ignore[misc]
    """A caller that asks again as soon as it has its answer."""

    wait_time = constant(0)

    def on_start(self) -> None:
        run: Run = self.environment.load_run
        # A proxy of the environment must not come between us and the server.
        self.client.trust_env = False
        key = os.environ.get("LORAPLANE_API_KEY")
        if key:
            self.client.headers["Authorization"] = f"Bearer {key}"
        # What the registry says is asked beside locust's figures, not within them.
        self._side = requests.Session()
        self._side.trust_env = False
        self._side.headers.update({k: v for k, v in self.client.headers.items() if k == "Authorization"})
        if run.plan is not None:
            known = {parse_model_id(id_): digest for id_, digest in run.plan.digests.items()}
            digests = {(id_.name, id_.number): digest for id_, digest in known.items() if id_.number is not None}
            self._truth = Truth(self._fetch, run.plan.base_digest, digests)
            return
        models = self._fetch("/v1/models")
        targets = [t for t in targets_of(models) if not run.models or t.id in run.models]
        self._truth = Truth(self._fetch, models["data"][0]["base_digest"])
        self._asker = Asker(
            targets, seed=f"{run.seed}:{next(run.users)}", exponent=run.exponent, max_tokens=run.max_tokens
        )

    @task  # type: ignore[untyped-decorator]  # locust is read without types
    def stream(self) -> None:
        """Ask what comes next, read to the end, check, report."""
        run: Run = self.environment.load_run
        if run.plan is None:
            self._stream(self._asker.next())
            return
        run.ready.wait()
        if not run.left:
            raise StopUser
        item = run.left.popleft()
        late_s = 0.0
        if item.at_s is not None:
            gevent.sleep(max(0.0, item.at_s - run.clock()))
            late_s = max(0.0, run.clock() - item.at_s)
        self._stream(run.plan.ask(item), late_s * 1000, item.prompt)
        if len(run.samples) == len(run.plan.items):
            # From a greenlet of its own: quitting ends this user's, and would end itself with it.
            gevent.spawn(self.environment.runner.quit)

    def _stream(self, ask: Ask, late_ms: float = 0.0, prompt: int = -1) -> None:
        before = self._truth.before(ask.target)
        asked = Asked(time.monotonic(), late_ms, prompt)
        check = StreamCheck(ask.max_tokens, time.perf_counter)
        with self.client.post(
            ask.path,
            json=ask.body(),
            stream=True,
            catch_response=True,
            name=f"{ask.path} {ask.target.id}",
            timeout=(10.0, READ_TIMEOUT_S),
        ) as response:
            try:
                self._read(response, check)
            except gevent.GreenletExit:
                self._note(ask, asked, check.end(), False, (), unfinished=True)
                raise
            answer = check.end()
            violations = answer.violations
            if answer.named is not None:
                violations += tuple(self._truth.violations(ask.target, before, answer.named))
            response.request_meta["response_time"] = answer.total_s * 1000
            response.request_meta["response_length"] = len(answer.text)
            if violations:
                response.failure("; ".join(v.problem.value for v in violations))
            else:
                response.success()
            cache = response.headers.get("x-adapter-cache") if response.headers else None
        self._note(ask, asked, answer, answer.named is not None, violations, cache=cache)
        if not violations:
            self._measure(ask.target.id, answer)

    def _read(self, response: Any, check: StreamCheck) -> None:
        if not response.status_code:
            check.lost(str(response.error)[:120])  # locust's stand-in for a response that never came
            return
        if not check.opened(response.status_code, response.headers, lambda: str(response.text)):
            return
        try:
            for chunk in response.iter_content(chunk_size=None):
                check.feed(chunk)
        except requests.RequestException as error:
            check.lost(type(error).__name__)

    def _fetch(self, path: str) -> Any:
        try:
            response = self._side.get(f"{self.host}{path}", timeout=_FETCH_TIMEOUT_S)
            response.raise_for_status()
            return response.json()
        except requests.RequestException as error:
            # Without the registry's word no answer can be judged: that is a failure too, not a gap in the figures.
            told = Violation(Problem.REGISTRY_SILENT, f"{path}: {type(error).__name__}")
            run: Run = self.environment.load_run
            run.samples.append(Sample(path, path, None, 0, None, None, (), run.clock(), False, (str(told),)))
            self.environment.events.request.fire(
                request_type="GET", name="registry", response_time=0, response_length=0, exception=error, context={}
            )
            raise StopUser from error

    def _measure(self, model: str, answer: Answer) -> None:
        figures = [
            ("TTFT", answer.ttft_s, 1000.0),
            ("TPOT", answer.tpot_s, 1000.0),
            ("tok/s", answer.tokens_per_s, 1.0),
        ]
        figures += [("ITL", gap, 1000.0) for gap in answer.gaps_s]
        for kind, value, factor in figures:
            if value is not None:
                self.environment.events.request.fire(
                    request_type=kind,
                    name=model,
                    response_time=value * factor,
                    response_length=0,
                    exception=None,
                    context={},
                )

    def _note(
        self,
        ask: Ask,
        asked: Asked,
        answer: Answer,
        checked: bool,
        violations: tuple[Violation, ...],
        *,
        unfinished: bool = False,
        cache: str | None = None,
    ) -> None:
        run: Run = self.environment.load_run
        run.samples.append(
            Sample(
                model=ask.target.id,
                path=ask.path,
                named=answer.named.model if answer.named else None,
                tokens=answer.tokens,
                ttft_ms=None if answer.ttft_s is None else answer.ttft_s * 1000,
                tpot_ms=None if answer.tpot_s is None else answer.tpot_s * 1000,
                gaps_ms=tuple(round(g * 1000, 2) for g in answer.gaps_s),
                ended_s=run.clock(),
                digest_checked=checked and not unfinished,
                violations=tuple(map(str, violations)),
                unfinished=unfinished,
                asked_at=asked.at,
                late_ms=asked.late_ms,
                prompt=asked.prompt,
                cache=cache,
                digest=answer.named.digest if answer.named else None,
                text=answer.text if asked.prompt >= 0 else "",
            )
        )
