"""An engine on the tiny base, stepped by hand: no thread, no clock but the test's."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters.base_digest import read_json
from adapters.spec import parse_spec
from adapters.weights import open_weights
from serving.engine.engine import Engine
from serving.engine.kv import RowTable
from serving.engine.limits import Limits
from serving.engine.lora import HostAdapter, Slots
from serving.engine.model import Decoder
from serving.engine.plan import Key, Outgoing
from serving.engine.reading import load_decoder
from serving.engine.request import EngineFacts, Event, Failed, Finished, Keep, Moved, Sampling, Submit, Tokens, Told
from serving.engine.runner import DecoderRunner, Runner, make_slots
from serving.engine.scheduler import Scheduler
from serving.engine.seq2seq import EncoderDecoder
from serving.engine.seq2seq_runner import Seq2SeqRunner
from serving.engine.slot_probe import slot_probe
from serving.engine.slots import SlotTable
from serving.loader import HostTier
from serving.store_tier import host_adapter

MAX_LEN = 256
DEVICE = torch.device(os.environ.get("LORAPLANE_TEST_DEVICE", "cpu"))


def read_peft(folder: Path, dtype: torch.dtype = torch.float32) -> HostAdapter:
    """A PEFT folder as the loader would bring it; its path is its digest here."""
    spec = parse_spec((folder / "adapter_config.json").read_bytes())
    base = Path(spec.base_name)
    family = str(read_json(base / "config.json")["model_type"])
    return host_adapter(str(folder), open_weights(folder / "adapter_model.safetensors"), spec, dtype, base, family)


@dataclass
class Answer:
    """What came back for one sequence."""

    ids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def endings(self) -> list[Event]:
        return [e for e in self.events if isinstance(e, Finished | Failed)]


class EngineCase:
    """Submit, step, look. Every `run` ends by checking the engine's books."""

    def __init__(
        self,
        base: Decoder | EncoderDecoder,
        *,
        rows: int = 8,
        slots: int = 4,
        chunk: int = 16,
        queue_limit: int = 64,
        max_rank: int = 64,
        read: Callable[[str], HostAdapter] | None = None,
        budget_bytes: int = 1 << 30,
        wrap: Callable[[Runner], Runner] = lambda runner: runner,
        patience_s: float = 2.0,
        prefix_reuse: bool = True,
        spare: int = 3,
        device_slots: Slots | None = None,
    ) -> None:
        self.time = 0.0
        self.answers: dict[Key, Answer] = {}
        self.told: dict[Key, Told | None] = {}
        self._numbers: Iterator[int] = itertools.count(1)
        self._woken = threading.Event()
        self.rows, self.slots = RowTable(rows), SlotTable(slots)
        self.host = HostTier(
            read or (lambda digest: read_peft(Path(digest))),
            budget_bytes=budget_bytes,
            workers=2,
            negative_cache_s=5.0,
            wake=self._woken.set,
            now=self.now,
        )
        length, answer, forced = MAX_LEN, 0, 0
        if isinstance(base, EncoderDecoder):
            length, answer, forced = base.max_input, base.max_answer, base.forced_tokens
        limits = Limits(
            length, queue_limit, chunk, 4 * chunk, patience_s, answer, prefix_reuse=prefix_reuse, forced_tokens=forced
        )
        self.scheduler = Scheduler(limits, self.rows, self.slots, self.host, frozenset(base.stop_token_ids))
        device_slots = device_slots or make_slots(base, slots, max_rank)
        runner = (
            Seq2SeqRunner(base, rows, device_slots, spare)
            if isinstance(base, EncoderDecoder)
            else DecoderRunner(base, rows, device_slots, spare=spare)
        )
        self.runner = wrap(runner)
        facts = EngineFacts(
            "tiny", "0" * 64, "llama", length, rows, slots, max_rank, "float32", "cpu", (2,), max_answer_len=answer
        )
        self.engine = Engine(
            facts,
            self.runner,
            self.scheduler,
            self.rows,
            self.slots,
            self.host,
            self._take,
            queue_limit=queue_limit,
            probe_after_s=5.0,
            now=self.now,
            prover=slot_probe(base, device_slots, runner.logits, rows, spare),
        )

    def now(self) -> float:
        return self.time

    def _take(self, outgoing: Sequence[Outgoing]) -> None:
        for key, event in outgoing:
            if key in self.told or isinstance(event, Moved):
                self.told[key] = event
                continue
            answer = self.answers[key]
            answer.events.append(event)
            if isinstance(event, Tokens):
                answer.ids.extend(event.ids)

    def submit(
        self,
        prompt: Sequence[int],
        adapter: Path | str | None = None,
        *,
        choice: int = 0,
        deadline_s: float = 600.0,
        **sampling: object,
    ) -> Key:
        key = Key((0, next(self._numbers)))
        self.answers[key] = Answer()
        settings = Sampling(**{"max_tokens": 8, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
        name = None if adapter is None else str(adapter)
        self.engine.submit(key, Submit(key[1], tuple(prompt), settings, name, choice, deadline_s))
        return key

    def keep(self, make: Callable[[int], Keep]) -> Key:
        """Send Warm, Pin, Unpin or Drop with a number of its own; `told` has the answer once it came."""
        key = Key((0, next(self._numbers)))
        self.told[key] = None
        self.engine.keep(key, make(key[1]))
        return key

    def step(self, seconds: float = 0.01) -> bool:
        """One step, after which so much time has passed on the test's clock."""
        computed = self.engine.step()
        self.time += seconds
        return computed

    def run(self, until: Callable[[], bool] | None = None, limit_s: float = 60.0) -> None:
        """Step until all has ended (or `until`). Loads run on real threads, so a step may find nothing to do."""
        done = until or (lambda: all(a.endings for a in self.answers.values()))
        give_up = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > give_up:
                raise AssertionError(f"not done after {limit_s} s")
            self._woken.clear()
            if not self.step() and not done():
                self._woken.wait(0.05)  # a load is under way: the test's clock must not race ahead of it
        assert self.scheduler.balanced()

    def answer(self, key: Key) -> list[int]:
        """The tokens of a sequence that ended well."""
        self.run(lambda: bool(self.answers[key].endings))
        assert isinstance(self.answers[key].endings[0], Finished), self.answers[key].endings
        return self.answers[key].ids


def load_tiny(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The tiny base, laid out for the runner."""
    return load_decoder(folder, dtype, DEVICE, MAX_LEN)
