"""Random interleavings over one engine's rows, computed by a runner whose tokens depend on all that lies in the cache.

What stands at a position of a row is a number made of who wrote it (tenant and adapter), the token, and the number
before it, as keys and values of a transformer depend on all positions before. A token that is drawn depends on the last
number that was read. So whoever starts behind a prefix of another tenant, adapter, version or text, or one position too
late, says something else than alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from serving.engine.kv import RowTable
from serving.engine.plan import Key, RowPlan, Sampled, StepPlan, StepResult
from serving.engine.request import Failed, Finished, Sampling, Submit, Tokens
from serving.engine.scheduler import Limits, Scheduler
from serving.engine.slots import SlotTable
from tests.scheduler_case import FakeHost

VOCABULARY = 1000
ROT = -1
TENANTS = ("", "t1", "t2")
# Two versions of two adapters, and the base.
ADAPTERS = (None, "a@1", "a@2", "b@1", "b@2")
_MODULUS = (1 << 61) - 1


def mixed(tenant: str, adapter: str | None, token: int, before: int) -> int:
    """What stands at a position."""
    return hash((TENANTS.index(tenant), ADAPTERS.index(adapter), token, before)) % _MODULUS


def drawn(at: int) -> int:
    """The token that follows what stands at the last position."""
    return at % VOCABULARY


@dataclass(frozen=True, slots=True)
class Asked:
    """One sequence of an interleaving."""

    tenant: str
    adapter: str | None
    prompt: tuple[int, ...]
    max_tokens: int

    def alone(self) -> list[int]:
        """Its answer by itself, computed without any engine."""
        at, said = 0, []
        for token in self.prompt:
            at = mixed(self.tenant, self.adapter, token, at)
        for _ in range(self.max_tokens):
            said.append(drawn(at))
            at = mixed(self.tenant, self.adapter, said[-1], at)
        return said


@dataclass
class CacheRunner:
    """Computes steps over `rows` rows; what it reads is only what lies there. rng: rows whose step goes wrong."""

    rows: int
    asked: dict[Key, Asked]
    rng: random.Random
    faults: float = 0.0
    slots: dict[int, str | None] = field(default_factory=lambda: {0: None})

    def __post_init__(self) -> None:
        self._cache: list[list[int]] = [[] for _ in range(self.rows)]
        self._last = [0] * self.rows

    def tidy(self, plan: StepPlan) -> None:
        """Scrub rows, then copy prefixes."""
        for row in plan.scrub:
            self._cache[row] = []
        for source, target, length in plan.copies:
            self._cache[target][:length] = self._cache[source][:length]

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult({row.row: found for row in plan.rows if (found := self._row(row)) is not None})

    def _row(self, row: RowPlan) -> Sampled | None:
        tenant, cells = self.asked[row.key].tenant, self._cache[row.row]
        if self.rng.random() < self.faults:
            cells[row.start :] = [ROT] * row.length
            return Sampled(fault="planted")
        # Positions that nobody wrote are read as they are: a prefix that is too short shows.
        cells.extend([ROT] * (row.start - len(cells)))
        before = cells[row.start - 1] if row.start else 0
        for at, token in enumerate(row.tokens or (self._last[row.row],), row.start):
            before = mixed(tenant, self.slots[row.slot], token, before)
            cells[at : at + 1] = [before]
        if not row.sample:
            return None
        self._last[row.row] = drawn(before)
        return Sampled(self._last[row.row])


@dataclass(frozen=True, slots=True)
class Outcome:
    """wrong: sequences that did not say what they say alone. reused: prompt tokens that were not computed."""

    wrong: list[Asked]
    reused: int
    answered: int


def interleave(seed: int, *, reuse: bool) -> Outcome:
    """One interleaving: sequences of shared openings that come, wait, are cancelled and fail in each other's way."""
    rng = random.Random(seed)
    rows, slots = RowTable(rng.randint(1, 4)), SlotTable(rng.randint(1, 3))
    host = FakeHost(usual_s=rng.choice([0.0, 0.0, 0.05]))
    chunk = rng.choice([8, 17, 64])
    limits = Limits(512, 1000, chunk, rng.choice([1, 4]) * chunk, prefix_reuse=reuse)
    scheduler = Scheduler(limits, rows, slots, host, frozenset())
    asked: dict[Key, Asked] = {}
    said: dict[Key, list[int]] = {}
    ended: dict[Key, bool] = {}
    runner = CacheRunner(rows.rows, asked, random.Random(seed + 1), faults=rng.choice([0.0, 0.0, 0.03]))
    openings = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([16, 20, 40]))) for _ in range(2)]
    tenants, adapters = rng.sample(TENANTS, 2), rng.sample(ADAPTERS, 3)
    left, now, number = rng.randint(3, 6), 0.0, 0
    while left or not scheduler.idle():
        while left and rng.random() < 0.5:
            left, number = left - 1, number + 1
            prompt = rng.choice(openings)
            if asked and rng.random() < 0.3:  # a conversation that goes on
                earlier = rng.choice(list(asked))
                prompt = (*asked[earlier].prompt, *said[earlier])
            prompt = (*prompt[: rng.choice([len(prompt), 17])], *(rng.randrange(9) for _ in range(rng.randrange(4))))
            key = Key((0, number))
            asked[key] = Asked(rng.choice(tenants), rng.choice(adapters), prompt, rng.randint(1, 4))
            said[key] = []
            one = asked[key]
            settings = Sampling(max_tokens=one.max_tokens, ignore_eos=True)
            scheduler.submit(key, Submit(number, one.prompt, settings, one.adapter, salt=one.tenant), now)
        running = [key for key in asked if key not in ended]
        if running and rng.random() < 0.03:
            gone = rng.choice(running)
            scheduler.cancel(gone)
            ended[gone] = False
        host.now = now
        host.poll()
        installs, endings = scheduler.admit(now)
        for digest, placement in installs:
            runner.slots[placement.slot] = digest
        plan = scheduler.plan()
        runner.tidy(plan)
        now += 0.02
        for key, event in endings + scheduler.settle(plan, runner.run(plan), now):
            if isinstance(event, Tokens):
                said[key] += event.ids
            elif isinstance(event, Finished | Failed):
                ended[key] = isinstance(event, Finished)
    if not scheduler.balanced() or rows.held:
        raise AssertionError("the books do not agree")
    done = [key for key, well in ended.items() if well]
    return Outcome([asked[key] for key in done if said[key] != asked[key].alone()], scheduler.reused_tokens, len(done))
