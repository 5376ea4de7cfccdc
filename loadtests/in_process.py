"""The closed loop on an engine of this process: the same scheduler and runner as served, no HTTP, no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loadtests.bench_home import Furnished
from loadtests.bench_shell import BenchFailed
from loadtests.closed_loop import CLIENTS, Answered, Ask, Clients, Round
from serving.engine.build import build_engine
from serving.engine.config import EngineConfig
from serving.engine.plan import Key, Outgoing
from serving.engine.request import Failed, Sampling, Submit, Tokens

_DEADLINE_S = 600.0


@dataclass(slots=True)
class _Running:
    client: int
    ask: Ask
    begun: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0


class EngineSide:
    """An engine that serves requests without an edge. digests: of the adapters, the first is target 1.

    The engine's own thread takes the events and asks anew, so that nothing but the engine computes.
    """

    def __init__(self, name: str, config: EngineConfig, digests: Sequence[str]) -> None:
        self.name = name
        self._digests = (None, *digests)
        self._done = threading.Event()
        self._running: dict[Key, _Running] = {}
        self._asks: list[Iterator[Ask]] = []
        self._answers: list[Answered] = []
        self._failure: str | None = None
        self._numbers = 0
        self._engine = build_engine(config, self._sink)
        self._engine.start()

    def drive(self, clients: Clients) -> Round:
        """See Side."""
        self._done.clear()
        self._asks = [iter(asks) for asks in clients]
        self._answers, self._failure = [], None
        first = [(client, next(asks)) for client, asks in enumerate(self._asks)]
        keys = [self._take(client, ask) for client, ask in first]
        for key in keys:
            self._submit(key)
        if not self._done.wait(_DEADLINE_S):
            raise BenchFailed(f"{self.name}: no end within {_DEADLINE_S:g} s")
        if self._failure is not None:
            raise BenchFailed(f"{self.name}: {self._failure}")
        return Round(tuple(self._answers))

    def warm(self) -> None:
        """Compute a few tokens."""
        self.drive([[Ask(0, "", (0, 1, 2), 4)]])

    def pause(self) -> None:
        """See Side. An engine without requests computes one token now and then, to see that it can."""

    def resume(self) -> None:
        """See Side."""

    def stop(self) -> None:
        """End the engine's thread."""
        self._engine.stop()

    def _take(self, client: int, ask: Ask) -> Key:
        self._numbers += 1
        key = Key((0, self._numbers))
        self._running[key] = _Running(client, ask, time.perf_counter())
        return key

    def _submit(self, key: Key) -> None:
        ask = self._running[key].ask
        sampling = Sampling(max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.submit(key, Submit(key[1], ask.ids, sampling, adapter=self._digests[ask.target]))

    def _sink(self, events: Sequence[Outgoing]) -> None:
        now = time.perf_counter()
        for key, event in events:
            running = self._running.get(key)
            if running is None:
                continue
            if isinstance(event, Tokens):
                running.pieces.append(now)
                running.tokens += len(event.ids)
                continue
            del self._running[key]
            if isinstance(event, Failed):
                self._failure = f"{event.code}: {event.message}"
                self._running.clear()
                self._done.set()
                return
            self._answers.append(
                Answered(running.begun, tuple(running.pieces), now, running.tokens, len(running.ask.ids))
            )
            following = next(self._asks[running.client], None)
            if following is not None:
                self._submit(self._take(running.client, following))
            elif not self._running:
                self._done.set()


def engine_config(home: Furnished, *, threads: int, rows: int = CLIENTS, max_model_len: int = 2048) -> EngineConfig:
    """The engine that `loraplane serve` would run on this home, with so many threads."""
    base = home.base
    return EngineConfig(
        base_folder=str(home.folder),
        base_name=base.name,
        base_digest=base.digest,
        family=base.family,
        modules=dict(base.modules),
        blobs=str(home.home.blobs),
        threads=threads,
        max_model_len=min(max_model_len, base.max_positions),
        max_rows=rows,
        slots=max(1, len(home.versions)),
    )
