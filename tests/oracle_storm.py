"""A storm of requests over oracle adapters through few slots, on a real engine: every answer is checked by its text.

Store, host tier, scheduler, slots and the torch runner are the product's own, the registry too: names are resolved as
the gateway resolves them, while versions are published, champions flipped and rolled back, requests cancelled, blobs
damaged and mended, and the engine killed and replaced.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapters.bases import open_base, pull
from adapters.errors import ModelNotFound
from adapters.families import adaptable
from adapters.home import Home
from adapters.records import AdapterVersion
from adapters.registry import Registry
from serving.engine.build import build_engine
from serving.engine.config import EngineConfig
from serving.engine.engine import Engine
from serving.engine.plan import Key, Outgoing
from serving.engine.request import Failed, Finished, Heartbeat, Sampling, Submit, Tokens
from tests.oracle_adapters import BASE_SAYS, TOKENS, OracleAdapter, save_oracle_base

ADAPTERS = 200
_MAX_LEN = 256


@dataclass
class Shelf:
    """A registry with the oracle base, and which oracle every digest is."""

    registry: Registry
    config: EngineConfig
    base: str
    oracles: dict[str, OracleAdapter] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def open(cls, folder: Path, **config: object) -> Shelf:
        """An empty registry in a folder; config: fields of EngineConfig in place of the storm's."""
        home = Home.find(folder / "home")
        registry = Registry.open(home)
        record = pull(str(save_oracle_base(folder / "oracle-base")), home, registry, lambda line: None)
        fields: dict[str, object] = {
            "base_folder": str(open_base(home, record)),
            "base_name": record.name,
            "base_digest": record.digest,
            "family": record.family,
            "modules": adaptable(record),
            "blobs": str(home.blobs),
            "threads": 1,
            "max_model_len": _MAX_LEN,
            "max_rows": 64,
            "slots": 8,
            "host_bytes": 600_000,  # of about 5,000,000 for two hundred
            "queue_limit": 512,
            "load_workers": 4,
            "negative_cache_s": 0.2,
        }
        return cls(registry, EngineConfig(**{**fields, **config}), record.name)  # type: ignore[arg-type]

    def publish(self, name: str) -> AdapterVersion:
        """The next oracle as the next version of a name; its first version becomes champion at once."""
        oracle = OracleAdapter(next(self._numbers))
        version = self.registry.publish(name, oracle.files(self.base), base=self.base, who="storm")
        self.oracles[version.digest] = oracle
        self.numbers.setdefault(name, []).append(version.number)
        if version.number == 1:
            self.flip(name, 1)
        return version

    def flip(self, name: str, number: int) -> None:
        """Make a version the champion, whatever the gate would say."""
        self.registry.promote(name, number, who="storm", force=True, reason="storm")

    def damage(self, version: AdapterVersion) -> None:
        """Let a byte of its weights rot."""
        blob = self.registry.store.path(self.registry.manifest(version.digest).weights)
        data = bytearray(blob.read_bytes())
        data[-5] ^= 0x40
        blob.chmod(0o600)
        blob.write_bytes(data)

    def mend(self, version: AdapterVersion) -> None:
        """Publish the same files again."""
        files = self.oracles[version.digest].files(self.base)
        self.registry.publish(version.name, files, base=self.base, who="storm")


@dataclass
class Asked:
    """A request under way. digest: what it was pinned to, None the base; wanted: the one right answer."""

    digest: str | None
    wanted: list[int]
    cancel_after: int | None
    ids: list[int] = field(default_factory=list)
    over: bool = False


class Storm:
    """Keeps so many requests in flight. `wrong` tells what should not have been, `outcomes` how requests ended."""

    def __init__(self, shelf: Shelf, seed: int, *, names: int = 50, in_flight: int = 160) -> None:
        self.shelf, self.rng, self._in_flight = shelf, random.Random(seed), in_flight
        self.names = [f"oracle-{at}" for at in range(names)]
        self._weights = [1 / (at + 1) for at in range(names)]
        self._sick: list[AdapterVersion] = []
        self.outcomes: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._asked: dict[Key, Asked] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._room = threading.Semaphore(in_flight)
        self._generation = 0
        self.engine = self._new_engine()

    # -- the engine ---------------------------------------------------------------------------------------------

    def _new_engine(self) -> Engine:
        self._generation += 1
        generation = self._generation
        engine = build_engine(self.shelf.config, lambda outgoing: self._hear(generation, outgoing))
        engine.start()
        return engine

    def kill_engine(self) -> None:
        """The replica dies: nothing more is heard of it, what it worked on is lost, and another takes its place."""
        with self._lock:
            self._generation += 1
            for key in [key for key, asked in self._asked.items() if not asked.over]:
                self._end(key, Failed(key[1], "engine_lost", ""))
        self.happened["kills"] += 1
        self._retire()
        self.engine = self._new_engine()

    def _retire(self) -> Heartbeat:
        """Stop the engine; its last condition, whose counters are added to the storm's."""
        beat = self.engine.heartbeat()
        self.happened["evictions"] += beat.evictions
        self.happened["loads"] += sum(count for source, count in beat.loads.items() if source != "failed")
        self.happened["reused tokens"] += beat.reused_tokens
        self.engine.stop()
        return beat

    def _hear(self, generation: int, outgoing: Sequence[Outgoing]) -> None:
        with self._lock:
            if generation != self._generation:
                return
            for key, event in outgoing:
                asked = self._asked[key]
                if asked.over:  # a step may still run when its request is cancelled, but nothing ends twice
                    self._check(asked.cancel_after is not None, f"{key}: {event} after the end")
                elif isinstance(event, Tokens):
                    asked.ids += event.ids
                    if asked.cancel_after is not None and len(asked.ids) >= asked.cancel_after:
                        self._cancel(key)
                elif isinstance(event, Finished | Failed):
                    self._end(key, event)

    def _cancel(self, key: Key) -> None:
        self.engine.cancel(key, key[1])
        self._over(key, "cancelled")

    def _end(self, key: Key, event: Finished | Failed) -> None:
        asked = self._asked[key]
        if isinstance(event, Finished):
            self._check(len(asked.ids) == len(asked.wanted), f"{key}: ended after {asked.ids} of {asked.wanted}")
        self._over(key, event.code if isinstance(event, Failed) else "complete")

    def _over(self, key: Key, outcome: str) -> None:
        asked = self._asked[key]
        asked.over = True
        self._check(asked.ids == asked.wanted[: len(asked.ids)], f"{key}, {asked.digest}: {asked.ids}, {asked.wanted}")
        self.outcomes[outcome] += 1
        self._room.release()

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    # -- the requests -------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Resolve a name, once, and submit."""
        rng = self.rng
        model = self._model()
        try:
            digest = None if model == "base" else self.shelf.registry.resolve(model).digest
        except ModelNotFound:
            self.outcomes["not found"] += 1
            return
        # Prompts begin alike, so that prefixes are reused between requests of one adapter and must not be of two.
        stem = [(7 * at) % 60 + 70 for at in range(rng.choice((0, 20, 40)))]
        prompt = [*stem, *(rng.randrange(3, 259) for _ in range(rng.randint(1, 12)))]
        count = rng.randint(5, 9)
        oracle = None if digest is None else self.shelf.oracles[digest]
        wanted = [TOKENS[BASE_SAYS]] * count if oracle is None else oracle.spell(prompt, count)
        key = Key((0, next(self._numbers)))
        early = rng.randrange(count) if rng.random() < 0.06 else None
        submit = Submit(
            key[1],
            tuple(prompt),
            Sampling(max_tokens=count, temperature=0.0, ignore_eos=True),
            digest,
            salt=rng.choice(("a", "b")),
        )
        self._room.acquire()
        with self._lock:
            self._asked[key] = Asked(digest, wanted, early)
            self.engine.submit(key, submit)
            if early == 0:
                self._cancel(key)

    def _model(self) -> str:
        rng = self.rng
        dice = rng.random()
        if dice < 0.03:
            return "base"
        if dice < 0.05:
            return f"absent-{rng.randrange(1000)}"
        name = rng.choices(self.names, self._weights)[0]
        if dice < 0.6:
            return name
        return f"{name}@{rng.choice(self.shelf.numbers[name])}"

    # -- what happens meanwhile ---------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Publish, flip, damage or mend something."""
        rng, shelf = self.rng, self.shelf
        name = rng.choices(self.names, self._weights)[0]
        dice = rng.random()
        if dice < 0.3 and len(shelf.oracles) < ADAPTERS:
            shelf.publish(rng.choice(self.names))
            self.happened["publishes"] += 1
        elif dice < 0.85:
            shelf.flip(name, rng.choice(shelf.numbers[name]))
            self.happened["flips"] += 1
        elif self._sick:
            shelf.mend(self._sick.pop())
            self.happened["mended"] += 1
        else:
            self._sick.append(shelf.registry.resolve(name))
            shelf.damage(self._sick[-1])
            self.happened["damaged"] += 1

    def run(self, total: int, *, disturb_every: int = 40, kill_every: int = 0) -> Heartbeat:
        """Ask so many times, disturbing on the way; when all has ended, the engine's condition before its stop."""
        for number in range(1, total + 1):
            self.ask()
            if number % disturb_every == 0:
                self.disturb()
            if kill_every and number % kill_every == 0:
                self.kill_engine()
        self._wait_empty(60.0)
        return self._retire()

    def _wait_empty(self, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        for _ in range(self._in_flight):
            if not self._room.acquire(timeout=max(0.01, give_up - time.monotonic())):
                raise AssertionError(f"requests have not ended within {seconds} s: {self.engine.heartbeat()}")
        # Cancels are acted upon in the next step, and the condition is taken when nothing is computed.
        beat = self.engine.heartbeat()
        while (beat.running or beat.waiting) and time.monotonic() < give_up:
            time.sleep(0.05)
            beat = self.engine.heartbeat()
