"""Adapters without tensors: what they answer, where they come from, and an engine's runner that computes with them.

The runner keeps what a device would keep: the content of every slot, and for every position of every cache row which
token was computed there under which weights. The next token depends on all of it, so that a wrong slot, a stale prefix
or a row of somebody else's shows in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adapters.errors import RecordNotFound, StoreFailed
from serving.engine.lora import HostAdapter
from serving.engine.plan import NO_SLOT, Key, Sampled, StepPlan, StepResult
from serving.engine.request import Submit
from tests.fakes import EOS

NOT_A_NUMBER = -1
_FIRST = ord("a")
_MASK = (1 << 61) - 1


def after(state: int, token: int, weights: int) -> int:
    """What the context comes to when a token is computed under these weights (0: the base)."""
    return state if state == NOT_A_NUMBER else hash((state, token, weights)) & _MASK


def chosen(state: int) -> int:
    """The greedy token after this context: a letter, or now and then the end."""
    return EOS if state % 23 == 0 else _FIRST + state % 26


def number(digest: str | None) -> int:
    """A digest as the weights it stands for."""
    return 0 if digest is None else int(digest[:15], 16)


@dataclass(frozen=True, slots=True)
class Expected:
    """The one right answer. fails: the adapter's numbers are not finite after this text."""

    text: str
    fails: bool


def expected(digest: str | None, fragile: bool, prompt: tuple[int, ...], count: int) -> Expected:
    """What these weights, alone, answer to a prompt."""
    weights, state, text = number(digest), 0, ""
    for token in prompt:
        state = after(state, token, weights)
    while True:
        if fragile and breaks(state):
            return Expected(text, True)
        token = chosen(state)
        if token == EOS:
            return Expected(text, False)
        text += chr(token)
        if len(text) == count:
            return Expected(text, False)
        state = after(state, token, weights)


def breaks(state: int) -> bool:
    """Whether a fragile adapter's numbers are infinite after this context."""
    return state % 13 == 0


class SimAdapter(HostAdapter):
    """An adapter whose bytes are only counted."""

    @property
    def size_bytes(self) -> int:
        return size_of(self.digest)


def size_of(digest: str) -> int:
    """From 40 to 100."""
    return 40 + 4 * int(digest[0], 16)


@dataclass
class Content:
    """One adapter in the store, and what is wrong with it there."""

    digest: str
    fragile: bool = False
    rotten: bool = False
    stuck: bool = False
    slow_s: float = 0.0
    fails: int = 0


@dataclass
class SimStore:
    """What was published, for all engines."""

    contents: dict[str, Content] = field(default_factory=dict)

    def fetch(self, digest: str) -> str:
        """See StoreTier."""
        content = self.contents.get(digest)
        if content is None:
            raise RecordNotFound(f"no blob {digest} is stored")
        if content.fails:
            content.fails -= 1
            raise StoreFailed("the store does not answer")
        if content.rotten:
            raise StoreFailed(f"the blob {digest} has rotted", retry_after_s=None)
        return digest

    def build(self, fetched: str) -> HostAdapter:
        """See StoreTier."""
        return SimAdapter(fetched, 4, {})


@dataclass
class SimDisk:
    """One machine's disk. rots: whether a file that is read is found damaged, deleted, and made anew from the store."""

    budget_bytes: int
    rots: Callable[[], bool]
    healed: int = 0
    evictions: int = 0
    _files: dict[str, HostAdapter] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self._files)

    @property
    def bytes(self) -> int:
        return sum(adapter.size_bytes for adapter in self._files.values())

    def get(self, digest: str) -> HostAdapter | None:
        """See DiskTier."""
        if digest in self._files and self.rots():
            self.healed += 1
            self.drop(digest)
        return self._files.get(digest)

    def put(self, adapter: HostAdapter, cost_s: float) -> None:
        """See DiskTier."""
        self._files[adapter.digest] = adapter
        while self.bytes > self.budget_bytes:
            del self._files[next(iter(self._files))]
            self.evictions += 1

    def drop(self, digest: str) -> int:
        """See DiskTier."""
        adapter = self._files.pop(digest, None)
        return 0 if adapter is None else adapter.size_bytes

    def bytes_of(self, digest: str) -> int:
        """See DiskTier."""
        return self._files[digest].size_bytes if digest in self._files else 0


class Broken(Exception):
    """An invariant does not hold."""


class SimRunner:
    """A runner with slots and rows, and no numbers. asked: what was submitted, by key; faults: told before each step
    and each installation, they may raise."""

    def __init__(self, store: SimStore, asked: Mapping[Key, Submit], fault: Callable[[str], bool]) -> None:
        self._store, self._asked, self._fault = store, asked, fault
        self.slots: dict[int, str] = {}
        self._rows: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}
        self.struck: set[str] = set()
        self.broken: Broken | None = None

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Runner. An adapter without digest empties the slot."""
        if not adapter.digest:
            self.slots.pop(slot, None)
            return
        if self._fault("install"):
            self.slots.pop(slot, None)
            raise RuntimeError("the device refused the copy")
        self.slots[slot] = adapter.digest

    def tidy(self, plan: StepPlan) -> None:
        """See Runner."""
        for row in plan.scrub:
            self._rows[row] = []
        for source, target, length in plan.copies:
            if len(self._rows.get(source, [])) < length:
                raise self._broken(f"row {source} holds fewer than the {length} positions that row {target} is to have")
            self._rows[target] = self._rows[source][:length]

    def probe(self) -> bool:
        """See Runner."""
        return True

    def run(self, plan: StepPlan) -> StepResult:
        """See Runner."""
        if self._fault("run"):
            raise RuntimeError("the step failed")
        sampled: dict[int, Sampled] = {}
        for row in plan.rows:
            owner = self._asked[row.key].adapter
            held = None if row.slot == NO_SLOT else self.slots.get(row.slot, "nothing")
            if held != owner:
                raise self._broken(f"{row.key} leases {_short(owner)}, its row is computed with {_short(held)}")
            states = self._rows.setdefault(row.row, [])
            if len(states) < row.start:
                raise self._broken(
                    f"{row.key} starts at {row.start} in row {row.row}, of which {len(states)} are computed"
                )
            del states[row.start :]
            if states and states[-1] == NOT_A_NUMBER:
                raise self._broken(f"{row.key} goes on from numbers of another that are not finite, in row {row.row}")
            for token in row.tokens or (self._last[row.row],):
                states.append(after(states[-1] if states else 0, token, number(held)))
            if row.sample:
                sampled[row.row] = self._sample(row.key, row.row, held, states)
        return StepResult(sampled)

    def _broken(self, what: str) -> Broken:
        # An engine answers an exception of its runner by failing the row: kept, so that it does not go unseen.
        self.broken = Broken(what)
        return self.broken

    def _sample(self, key: Key, row: int, digest: str | None, states: list[int]) -> Sampled:
        content = None if digest is None else self._store.contents.get(digest)
        if content is not None and self._fault("nan"):
            states[-1] = NOT_A_NUMBER
        if states[-1] == NOT_A_NUMBER or (content is not None and content.fragile and breaks(states[-1])):
            states[-1] = NOT_A_NUMBER
            self.struck.add(digest or "")
            return Sampled(fault="not finite", numerics=True)
        self._last[row] = chosen(states[-1])
        return Sampled(self._last[row])


def _short(digest: str | None) -> str:
    return "the base" if digest is None else digest[:8]
