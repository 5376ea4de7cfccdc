"""G3: what it costs that two thousand adapters are registered and asked alike, and not five."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.records import BaseRecord
from adapters.screen import note
from loadtests.bench_home import Furnished, Kind, add_adapters
from loadtests.closed_loop import CLIENTS, Ask, Prompter, Round
from loadtests.stage import metrics, value
from loadtests.swap_side import Size, hits, served

FEW = 5


@dataclass(frozen=True, slots=True)
class Traffic:
    """What steps had to move besides the base. distinct: adapters that a full step uses, in the mean; loads: from
    below the host a step; installs: into slots a step."""

    distinct: float
    loads: float = 0.0
    installs: float = 0.0

    def bytes_a_step(self, base_bytes: int, adapter_bytes: int) -> float:
        """Bytes that a step reads and writes at least: an install reads and writes its adapter, so does a load."""
        return base_bytes + adapter_bytes * (self.distinct + 2 * self.installs + 2 * self.loads)


@dataclass(frozen=True, slots=True)
class Many:
    """Throughput with many adapters against a few of them. allowed: their ratio if bytes alone decided."""

    kind: str
    adapters: int
    few_tok_s: float
    many_tok_s: float
    allowed: float
    hit_ratio: float | None
    host_share: float

    @property
    def ratio(self) -> float:
        """Many to few."""
        return self.many_tok_s / self.few_tok_s

    @property
    def of_allowed(self) -> float:
        """The share of what the bytes allow."""
        return self.ratio / self.allowed


def base_bytes(base: BaseRecord) -> int:
    """Bytes that a decode step reads of the base's linears in bfloat16, its head among them."""
    linears = sum(outputs * inputs for outputs, inputs in base.modules.values())
    width = min(inputs for _, inputs in base.modules.values())
    return 2 * (linears + base.vocab_size * width)


def distinct_in_step(clients: Sequence[Sequence[Ask]]) -> float:
    """Adapters that are in flight at once, in the mean: clients with answers of one length go in step."""
    return statistics.fmean(len({asks[k].target for asks in clients}) for k in range(len(clients[0])))


def uniform(prompter: Prompter, adapters: int, requests: int, rng: random.Random) -> list[list[Ask]]:
    """So many requests of each client, each for any of the adapters."""
    return [[prompter.ask(rng.randint(1, adapters)) for _ in range(requests)] for _ in range(CLIENTS)]


def many_against_few(
    home: Furnished, prompter: Prompter, kind: Kind, adapters: int, size: Size, log: Path, threads: int | None
) -> Many:
    """Measure both in turns on one server, after every adapter was asked once."""
    name = f"rank {kind.rank} on {'/'.join(kind.linears) or 'all linears'}"
    versions = add_adapters(home, f"many{kind.rank}", adapters, kind)
    rng = random.Random(0)
    rounds: dict[int, list[Round]] = {FEW: [], adapters: []}
    traffic: dict[int, list[Traffic]] = {FEW: [], adapters: []}
    host_share = 0.0
    with served(home, versions, log, threads, "--slots", str(CLIENTS)) as side:
        note(f"{name}: asking each of {adapters} once")
        once = [prompter.ask(target, prompt_tokens=8, max_tokens=1) for target in range(1, adapters + 1)]
        side.drive([once[i::CLIENTS] for i in range(CLIENTS)])
        for turn in range(size.rounds + 1):
            for count in (FEW, adapters):
                note(f"{name}: {count} adapters, {f'round {turn} of {size.rounds}' if turn else 'warm-up'}")
                clients = uniform(prompter, count, size.requests if turn else 1, rng)
                before = metrics(side.url)
                done = side.drive(clients)
                after = metrics(side.url)
                host_share = max(host_share, host_used(after))
                if turn:
                    rounds[count].append(done)
                    traffic[count].append(traffic_between(before, after, distinct_in_step(clients)))
    rates = {count: statistics.median(r.tokens_per_s for r in done) for count, done in rounds.items()}
    needs = {
        count: statistics.median(t.bytes_a_step(base_bytes(home.base), kind.size_bytes(home.base.modules)) for t in ts)
        for count, ts in traffic.items()
    }
    return Many(
        kind=name,
        adapters=adapters,
        few_tok_s=round(rates[FEW], 1),
        many_tok_s=round(rates[adapters], 1),
        allowed=round(needs[FEW] / needs[adapters], 4),
        hit_ratio=hits([a for r in rounds[adapters] for a in r.answers]),
        host_share=round(host_share, 4),
    )


def host_used(found: Mapping[tuple[str, ...], float]) -> float:
    """The share of its budget that the host tier takes. Raises BenchFailed when the server does not tell."""
    return value(found, "adapter_host_bytes") / value(found, "engine_limit", "host_bytes")


def traffic_between(
    before: Mapping[tuple[str, ...], float], after: Mapping[tuple[str, ...], float], distinct: float
) -> Traffic:
    """What was moved a step between two looks at /metrics."""

    def grown(name: str, *skip: str) -> float:
        keys = [k for k in after if k[0] == name and not set(skip) & set(k[1:])]
        return sum(after[k] - before.get(k, 0.0) for k in keys)

    steps = max(1.0, grown("engine_steps_total"))
    loads = grown("adapter_loads_total", "failed", "host", "device")
    return Traffic(distinct, loads / steps, grown("adapter_evictions_total", "host", "disk") / steps)
