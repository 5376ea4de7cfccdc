"""W1 to W8: loads that others published figures for. One table of shapes; what is asked when follows from a seed.

A scenario has arms that are compared with each other. An arm is a plain list of requests in the end (`schedule`), the
same for the same seed, and whoever replays it (the locustfile does) decides nothing.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from loadtests.bench_home import Kind
from loadtests.profiles import zipf

QV8 = Kind(rank=8, linears=("q_proj", "v_proj"))
ALL16 = Kind()
# Every version must answer in words of its own, or an answer from the wrong one could not be told by its text.
LOUD = Kind(rank=8, spread=0.08)
FIRST_TOKEN_LIMIT_S = 6.0
HOT = 0  # the adapter that is asked ten times as often
_SHORTER = 8
_FEW = 100
_CALLERS = 240  # of open arms: fewer than a gateway takes at once, more than ever wait
_SPARE = 16  # positions


class Law(StrEnum):
    """How adapters are chosen out of n."""

    UNIFORM = "uniform"
    POWER = "power"  # floor(n * u ** (1 / parameter)): 1 is uniform, small ones ask the first few
    ZIPF = "zipf"
    CYCLE = "cycle"  # one after the other: the worst case of whatever keeps the most recent
    HOT = "hot"  # the first one `parameter` times as often as any other


@dataclass(frozen=True, slots=True)
class Popularity:
    """A law and its parameter."""

    law: Law
    parameter: float = 1.0

    def weights(self, n: int) -> list[float]:
        """How often each of n adapters is asked; only their ratios count."""
        if self.law is Law.POWER:
            edges = [(i / n) ** self.parameter for i in range(n + 1)]
            return [b - a for a, b in itertools.pairwise(edges)]
        if self.law is Law.ZIPF:
            return zipf(n, self.parameter)
        if self.law is Law.HOT:
            return [self.parameter, *[1.0] * (n - 1)]
        return [1.0] * n

    def picks(self, n: int, count: int, rng: random.Random) -> list[int]:
        """The adapters of so many requests, 0 to n - 1."""
        if self.law is Law.CYCLE:
            return [i % n for i in range(count)]
        return rng.choices(range(n), self.weights(n), k=count)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests that come whether or not the earlier ones are answered.

    share: how many a second, of those that the server completes when it is always busy. cv: coefficient of variation
    of the gaps, which follow a gamma distribution: 1 is Poisson, more are bursts.
    """

    share: float
    cv: float = 1.0

    def times(self, rate: float, count: int, rng: random.Random) -> list[float]:
        """Seconds from the start at which requests come, so many a second in the mean."""
        shape = 1 / self.cv**2
        return list(itertools.accumulate(rng.gammavariate(shape, 1 / (shape * rate)) for _ in range(count)))


@dataclass(frozen=True, slots=True)
class Arm:
    """One load. adapters: how many are asked; 0 asks the base. users: callers at the same time, of open arms at most.

    arrivals: None for callers that ask again once they are answered. merged: asks a server whose base has the adapter
    in its weights.
    """

    name: str
    adapters: int
    popularity: Popularity = Popularity(Law.UNIFORM)
    arrivals: Arrivals | None = None
    users: int = _CALLERS
    requests: int = 200
    merged: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """A row of the table. prompt, answer: fewest and most tokens. slots, rows: of a server started for it.

    prompts: how many different ones there are, so that texts can be compared; 0: no two alike. flip_every_s: publish
    and promote so often, 0: never.
    by_slots: adapters and callers are meant as multiples of the slots. anchor: the published figure beside which ours
    is printed.
    """

    id: str
    what: str
    anchor: str
    arms: tuple[Arm, ...]
    kind: Kind = ALL16
    prompt: tuple[int, int] = (50, 50)
    answer: tuple[int, int] = (32, 32)
    slots: int = 16
    rows: int = 16
    prompts: int = 0
    flip_every_s: float = 0.0
    by_slots: bool = False

    @property
    def most_adapters(self) -> int:
        """How many adapters must be published."""
        return max(arm.adapters for arm in self.arms)

    def shortened(self) -> Scenario:
        """A quick look: an eighth of the lengths and of the requests, at most a hundred adapters."""
        few = [arm for arm in self.arms if arm.adapters <= _FEW] or self.arms
        arms = tuple(
            replace(a, adapters=min(a.adapters, _FEW), requests=max(a.requests // _SHORTER, 3 * self.rows)) for a in few
        )
        low, high = (max(4, n // _SHORTER) for n in self.prompt)
        least, most = (max(4, n // _SHORTER) for n in self.answer)
        return replace(self, arms=arms, prompt=(low, high), answer=(least, most))

    def fitted(self, slots: int, positions: int) -> Scenario:
        """The same on a server with so many slots, its lengths capped to what the model holds."""
        arms = self.arms
        if self.by_slots:
            factor = slots / self.slots
            arms = tuple(
                replace(a, adapters=max(1, round(a.adapters * factor)), users=max(1, round(a.users * factor)))
                for a in arms
            )
        share = min(1.0, positions / (self.prompt[1] + self.answer[1] + _SPARE))
        low, high = (max(2, int(n * share)) for n in self.prompt)
        least, most = (max(2, int(n * share)) for n in self.answer)
        return replace(self, arms=arms, slots=slots, prompt=(low, high), answer=(least, most))


@dataclass(frozen=True, slots=True)
class Item:
    """One request. at_s: when it comes, None as soon as a caller is free. adapter: -1 the base. Tokens in counts."""

    at_s: float | None
    adapter: int
    prompt_tokens: int
    max_tokens: int
    seed: int


def schedule(scenario: Scenario, arm: Arm, *, rate: float, seed: int) -> list[Item]:
    """Everything that an arm asks. rate: requests a second that the server completes when it is always busy."""
    rng = random.Random(f"{seed}:{scenario.id}:{arm.name}")
    # Lengths and prompts are the same in every arm of a scenario: they are no part of what is compared.
    sizes = random.Random(f"{seed}:{scenario.id}")
    count = arm.requests
    at: Sequence[float | None] = [None] * count
    if arm.arrivals is not None:
        at = arm.arrivals.times(rate * arm.arrivals.share, count, rng)
    picks = arm.popularity.picks(arm.adapters, count, rng) if arm.adapters else [-1] * count
    return [
        Item(
            at_s=at[i],
            adapter=picks[i],
            prompt_tokens=sizes.randint(*scenario.prompt),
            max_tokens=sizes.randint(*scenario.answer),
            seed=i % scenario.prompts if scenario.prompts else i,
        )
        for i in range(count)
    ]


def lru_hits(picks: Sequence[int], slots: int) -> float:
    """The share of requests whose adapter is still in one of so many slots that keep the most recently asked."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for pick in picks:
        hits += pick in held
        held[pick] = None
        held.move_to_end(pick)
        if len(held) > slots:
            held.popitem(last=False)
    return hits / len(picks) if picks else 0.0


_S_LORA = "S-LoRA: 0.945 with one rank, 0.899 with mixed ones; PEFT 100 to 5: 0.28"
_UNIFORM = Popularity(Law.UNIFORM)
_ABOVE = Arrivals(1.1)  # just above saturation
_QUIET = 8  # adapters of W7 beside the hot one
_STEADY_SHARE = 0.62  # of W7 without its rush: nine callers' rates; with it 19, a third more than can be served

_ALL = (
    Scenario(
        "W1", "n adapters, uniform, Poisson arrivals just above saturation", _S_LORA,
        tuple(Arm(f"{n} adapters", n, _UNIFORM, _ABOVE) for n in (5, 100, 1000, 2000)),
        kind=QV8, prompt=(8, 512), answer=(8, 512),
    ),
    Scenario(
        "W2", "200 adapters, popularity by a power law, just above saturation", _S_LORA + "; beside it the hit ratio",
        tuple(Arm(f"alpha {a:g}", 200, Popularity(Law.POWER, a), _ABOVE) for a in (0.1, 0.3, 0.6, 1.0)),
        kind=QV8, prompt=(8, 512), answer=(8, 512),
    ),
    Scenario(
        "W3", "bursts: gamma arrivals at 0.7 of saturation, 32 adapters",
        f"S-LoRA: share of first tokens within {FIRST_TOKEN_LIMIT_S:g} s",
        tuple(Arm(f"cv {cv}", 32, _UNIFORM, Arrivals(0.7, cv)) for cv in (1, 2, 4, 6, 8)),
    ),
    Scenario(
        "W4", "32 callers, 1,024 requests, by how many adapters they share", "Punica: distinct / identical near 1",
        (
            Arm("distinct", 32, Popularity(Law.CYCLE), users=32, requests=1024),
            Arm("uniform over sqrt(n)", math.isqrt(32) + 1, _UNIFORM, users=32, requests=1024),
            Arm("zipf 1.5", 32, Popularity(Law.ZIPF, 1.5), users=32, requests=1024),
            Arm("identical", 1, users=32, requests=1024),
        ),
        slots=32, rows=32,
    ),
    Scenario(
        "W5", "a working set of twice the slots, half as many callers as slots",
        "SGLang PR #13349: median first token 39.65 ms -> 6,278 ms, 158 x",
        (
            Arm("fits", 4, Popularity(Law.CYCLE), users=4, requests=160),
            Arm("twice the slots", 16, Popularity(Law.CYCLE), users=4, requests=160),
        ),
        slots=8, by_slots=True,
    ),
    Scenario(
        "W6", "publish and promote every 2 s under load", "goal: no error, no answer of a wrong version",
        (Arm("flips", 8, _UNIFORM, users=16, requests=800),),
        kind=LOUD, slots=4, prompts=2, flip_every_s=2.0,
    ),
    Scenario(
        "W7", "one adapter at ten times the rate of eight others", "goal: p99 first token of the quiet at most 2 x",
        (
            Arm("all alike", 1 + _QUIET, _UNIFORM, Arrivals(_STEADY_SHARE), requests=270),
            Arm("one hot", 1 + _QUIET, Popularity(Law.HOT, 10.0),
                Arrivals(_STEADY_SHARE * (10 + _QUIET) / (1 + _QUIET)), requests=540),
        ),
    ),
    Scenario(
        "W8", "one adapter in the base's weights, beside them, and none", "S-LoRA: unmerged costs 11 %",
        (
            Arm("base", 0, users=16, requests=160),
            Arm("merged", 0, users=16, requests=160, merged=True),
            Arm("unmerged", 1, users=16, requests=160),
        ),
    ),
)  # fmt: skip
SCENARIOS: Mapping[str, Scenario] = {s.id: s for s in _ALL}
