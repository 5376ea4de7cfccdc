"""A scheduler stepped by hand on a clock of its own: fake loads, a fake runner that knows what lies in each slot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serving.engine.beams import Candidate
from serving.engine.kv import RowTable
from serving.engine.limits import Limits
from serving.engine.plan import Key, Load, LoadState, Outgoing, RowPlan, Sampled, StepPlan, StepResult
from serving.engine.request import Event, Failed, Finished, LoadTimes, Sampling, Submit, Tokens
from serving.engine.scheduler import Scheduler
from serving.engine.slots import SlotTable

STEP_S = 0.02
END = 1


@dataclass
class FakeHost:
    """A host tier on the case's clock. load_s: how long a load takes, by adapter or for all; broken: what never loads;
    keeps: how many adapters it holds, the least recently wanted go first."""

    load_s: dict[str, float] = field(default_factory=dict)
    usual_s: float = 0.05
    broken: set[str] = field(default_factory=set)
    keeps: int = 10_000
    now: float = 0.0
    loads: list[str] = field(default_factory=list)
    _held: dict[str, None] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int:
        return 1000 * self.keeps

    def want(self, digest: str) -> LoadState:
        if digest in self._held:
            self._held[digest] = self._held.pop(digest)
            return LoadState(Load.READY, source="store")
        if digest in self.broken:
            return LoadState(Load.FAILED, ("adapter_load_failed", "gone"), retry_after_s=5.0)
        if digest not in self._due:
            self._since[digest] = self.now
            self._due[digest] = self.now + self.load_s.get(digest, self.usual_s)
            self.loads.append(digest)
        return LoadState(Load.LOADING, source="store")

    def bytes_of(self, digest: str) -> int:
        return 1000 if digest in self._held else 0

    def source_of(self, digest: str) -> str:
        return "host" if digest in self._held else "store"

    def loading_s(self, digest: str) -> float:
        return self.now - self._since[digest] if digest in self._due else 0.0

    def brought(self, digest: str) -> LoadTimes | None:
        return LoadTimes("store") if digest in self._held else None

    def poll(self) -> None:
        for digest in [d for d, due in self._due.items() if due <= self.now]:
            del self._due[digest]
            self._held[digest] = None
        while len(self._held) > self.keeps:
            del self._held[next(iter(self._held))]


@dataclass
class Asked:
    """One sequence, and what became of it, in steps. wrong: a step computed it with another adapter's tensors."""

    submit: Submit
    at: int
    first: int | None = None
    ended: int | None = None
    tokens: int = 0
    endings: list[Event] = field(default_factory=list)

    @property
    def code(self) -> str:
        """`done`, or the code of its failure."""
        (ending,) = self.endings
        return ending.code if isinstance(ending, Failed) else "done"


class SchedulerCase:
    """Submit, step, look. After every step the books must balance, and nobody may have been held up for nothing."""

    def __init__(
        self,
        *,
        rows: int = 8,
        slots: int = 4,
        queue_limit: int = 1000,
        patience_s: float = 2.0,
        chunk: int = 64,
        beams: bool = False,
        host: FakeHost | None = None,
    ) -> None:
        self.host = host or FakeHost()
        self.rows, self.slots = RowTable(rows), SlotTable(slots)
        limits = Limits(512, queue_limit, chunk, 4 * chunk, patience_s, max_answer_len=512 if beams else 0)
        self.scheduler = Scheduler(limits, self.rows, self.slots, self.host, frozenset({END}))
        self.steps = 0
        self.asked: dict[Key, Asked] = {}
        self.installs = 0
        self.busy_rows = 0
        self.wrong: list[Key] = []
        self._slots: dict[int, str | None] = {0: None}
        self._numbers: Iterator[int] = itertools.count(1)

    @property
    def now(self) -> float:
        return self.steps * STEP_S

    def submit(
        self,
        adapter: str | None = None,
        *,
        tenant: str = "",
        prompt: int = 4,
        tokens: int = 8,
        beams: int = 1,
        deadline_s: float = 600.0,
    ) -> Key:
        self.host.now = self.now
        key = Key((0, next(self._numbers)))
        sampling = Sampling(max_tokens=tokens, num_beams=beams, ignore_eos=True)
        submit = Submit(key[1], (7,) * prompt, sampling, adapter, deadline_s=deadline_s, salt=tenant, reuse=False)
        self.asked[key] = Asked(submit, self.steps)
        self._tell([(key, event) for event in self.scheduler.submit(key, submit, self.now)])
        return key

    def cancel(self, key: Key) -> None:
        self.scheduler.cancel(key)
        self.asked.pop(key, None)

    def step(self) -> StepPlan:
        """One step, as the engine makes it."""
        self.host.now = self.now
        self._tell(self.scheduler.expire(self.now))
        self.host.poll()
        installs, refused = self.scheduler.admit(self.now)
        self._tell(refused)
        for digest, placement in installs:
            self.installs += 1
            assert self.host.bytes_of(digest), "placed without its tensors at hand"
            self._slots[placement.slot] = digest
        self.check_nobody_idles()
        plan = self.scheduler.plan()
        self.busy_rows += len(plan.rows)
        result = StepResult({row.row: self._sampled(row) for row in plan.rows if row.sample})
        for row in plan.rows:
            if row.key in self.asked and self._slots[row.slot] != self.asked[row.key].submit.adapter:
                self.wrong.append(row.key)
        self.steps += 1
        self._tell(self.scheduler.settle(plan, result, self.now))
        assert self.scheduler.balanced()
        return plan

    def run(self, most: int = 100_000) -> None:
        """Step until all has ended, in so many steps at most."""
        for _ in range(most):
            if self.scheduler.idle():
                assert self.rows.free == self.rows.rows
                assert self.slots.leases == 0
                return
            self.step()
        raise AssertionError(f"{self.scheduler.waiting} wait and {self.scheduler.running} run after {most} steps")

    def check_nobody_idles(self) -> None:
        """Work conservation: a free row and somebody who could run do not stand side by side, save where rows gather
        for a search or a slot drains for an adapter that has waited long enough."""
        admission = self.scheduler._admission
        lanes = sorted(admission.queue.lanes(), key=admission.queue.rank)
        awaited = {lane.scope.adapter or "" for lane in lanes if lane.ready}
        for lane in lanes:
            adapter = lane.scope.adapter
            ready = adapter is None or self.slots.holds(adapter) or self.host.bytes_of(adapter)
            if not self.rows.free or not ready:
                continue
            spare = admission._before(lane) if admission._patient(lane, self.now) else awaited
            spare -= set(admission._drains)
            if adapter is not None and (adapter in admission._drains or not self.slots.can_have(adapter, spare)):
                continue
            assert lane.head.width > self.rows.free, f"{lane.scope} could run"
            return

    def _sampled(self, row: RowPlan) -> Sampled:
        return Sampled(9, candidates=tuple(Candidate(10 + i, -1.0 - i) for i in range(row.candidates)))

    def _tell(self, outgoing: list[Outgoing]) -> None:
        for key, event in outgoing:
            asked = self.asked[key]
            if isinstance(event, Tokens):
                asked.tokens += len(event.ids)
                asked.first = self.steps if asked.first is None else asked.first
            elif isinstance(event, Finished | Failed):
                assert not asked.endings, "two endings"
                asked.endings.append(event)
                asked.ended = self.steps


def percentile(figures: Sequence[int], share: float) -> int:
    return sorted(figures)[int(share * (len(figures) - 1))]


def retry_after(asked: Asked) -> float:
    (ending,) = asked.endings
    assert isinstance(ending, Failed)
    assert ending.retry_after_s is not None
    return ending.retry_after_s
