"""What a seed decides before anything happens, and what is remembered of what did."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from tests.simulation.replica import Size

LONG_S = 30.0
GOOD = "complete"


@dataclass(frozen=True, slots=True)
class Plan:
    """One world's figures. patient: nothing goes wrong but that one adapter's read hangs, and no other request may wait
    for it. odds: of each kind of accident, each time that it could happen."""

    seed: int
    size: Size
    patient: bool
    replicas: int
    names: int
    requests: int
    operations: int
    length_s: float
    odds: dict[str, float]

    @classmethod
    def draw(cls, seed: int) -> Plan:
        """A plan for every seed."""
        rng = random.Random(f"plan {seed}")
        patient = rng.random() < 0.2
        size = Size(
            rows=rng.randint(1, 6),
            slots=rng.randint(1, 4),
            host_bytes=rng.randint(150, 700),
            disk_bytes=rng.choice((0, 300, 3000)),
            workers=rng.randint(1, 3),
            queue_limit=rng.choice((2, 8, 40)),
            prefill_chunk=rng.choice((8, 24, 64)),
            patience_s=rng.choice((0.05, 0.5)),
            negative_cache_s=0.5,
        )
        worst = {"install": 0.1, "run": 0.02, "nan": 0.03, "rot": 0.3}
        odds = {kind: rng.choice((0.0, 0.0, odd)) for kind, odd in worst.items()}
        if patient:
            size = replace(size, rows=6, slots=8, host_bytes=2000, workers=2, queue_limit=40)
            odds = dict.fromkeys(odds, 0.0)
        return cls(
            seed=seed,
            size=size,
            patient=patient,
            replicas=rng.choice((1, 1, 2)),
            names=rng.randint(2, 5),
            requests=rng.randint(8, 24),
            operations=rng.randint(2, 14),
            length_s=rng.choice((0.5, 2.0, 5.0)),
            odds=odds,
        )


@dataclass
class Request:
    """One client's request, and what came of it. Times are the world's, in seconds."""

    number: int
    model: str
    prompt: tuple[int, ...]
    count: int
    n: int = 1
    deadline_s: float = LONG_S
    tenant: str = "a"
    cancel_after_s: float | None = None
    begun: float = 0.0
    pinned_at: float = float("inf")
    ended: float = 0.0
    digest: str | None = None
    instead: bool = False
    texts: list[str] = field(default_factory=list)
    outcome: str = ""

    @classmethod
    def draw(cls, number: int, model: str, rng: random.Random, patient: bool) -> Request:
        """A request for a model. Prompts begin alike, so that prefixes are reused."""
        stem = [rng.choice((97, 98))] * rng.choice((0, 17, 30))
        return cls(
            number=number,
            model=model,
            prompt=(*stem, *(rng.randrange(97, 123) for _ in range(rng.randint(1, 8)))),
            count=rng.randint(1, 7),
            n=2 if rng.random() < 0.15 else 1,
            deadline_s=LONG_S if patient or rng.random() < 0.85 else rng.choice((0.01, 0.1, 1.0)),
            tenant=rng.choice(("a", "b")),
            cancel_after_s=rng.choice((0.0, 0.003, 0.02, 0.3)) if rng.random() < 0.25 else None,
        )


@dataclass
class Happened:
    """What a request may give as its reason. lost: a replica or a connection was; the others are digests: whose loads
    may have failed, whose numbers were not finite, and who was taken out of service; restored: since when, where
    nobody else did that."""

    lost: bool = False
    troubled: set[str] = field(default_factory=set)
    struck: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    restored: dict[str, float] = field(default_factory=dict)
