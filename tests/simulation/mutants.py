"""Six bugs of other systems, planted into our parts one at a time: the simulator must find each of them.

Four are of Ray Serve's multiplex cache (2.60): it evicts before it knows that the newcomer loads, it frees what
requests still use, a cancelled load stays "loading" for ever, and one lock serialises all loads. vLLM #47724: a slot is
remembered where it should be asked for, and one user's stream goes on with another's adapter. vLLM #42125: prefixes are
kept by name, and new weights under the old name read the keys and values of the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from serving.engine.kv import Lease, RowTable, Scope
from serving.engine.plan import Key, Load, LoadState
from serving.engine.request import Event, Submit
from serving.engine.scheduler import Scheduler
from serving.engine.slots import NoSlotFree, Placement, SlotTable
from serving.loader import HostTier
from tests.simulation.registry import SimRegistry
from tests.simulation.replica import Parts


def evicts_before_it_loads(registry: SimRegistry) -> Parts:
    """A newcomer's load begins with somebody else's end, whether or not it will succeed."""
    tables: list[SlotTable] = []

    def slots(count: int) -> SlotTable:
        tables.append(SlotTable(count))
        return tables[-1]

    class Host(HostTier):
        def want(self, digest: str) -> LoadState:
            table, before = self._of(), self.loading
            state = super().want(digest)
            if self.loading > before and not table.empty:
                idle = [d for d, _, leases in table.resident() if not leases and d not in table.pinned]
                for victim in idle[:1]:
                    table.forget(victim)
            return state

        def _of(self) -> SlotTable:
            if not hasattr(self, "table"):
                self.table = tables[-1]  # a replica makes its slots just before its host tier
            return self.table

    return Parts(slots=slots, host=Host)


def frees_what_is_used(registry: SimRegistry) -> Parts:
    """Where every slot is leased, somebody's is taken."""

    class Slots(SlotTable):
        def can_have(self, digest: str, spare: Collection[str] = ()) -> bool:
            return True

        def place(self, digest: str, spare: Collection[str] = ()) -> Placement:
            try:
                return super().place(digest, spare)
            except NoSlotFree:
                victim = self._by_digest[self.resident()[0][0]]
                victim.leases, victim.pinned = 0, False
                return super().place(digest)

    return Parts(slots=Slots)


def cancelled_load_loads_for_ever(registry: SimRegistry) -> Parts:
    """Who cancels while an adapter loads takes the load along, but not the mark that it is under way."""

    class Host(HostTier):
        def want(self, digest: str) -> LoadState:
            return LoadState(Load.LOADING) if digest in self._marked() else super().want(digest)

        def cancelled(self, digest: str) -> None:
            if digest not in self.digests():
                self._marked().add(digest)

        def _marked(self) -> set[str]:
            if not hasattr(self, "marked"):
                self.marked: set[str] = set()
            return self.marked

    class Cancelling(Scheduler):
        def submit(self, key: Key, submit: Submit, now: float) -> list[Event]:
            if not hasattr(self, "loading"):
                self.loading: dict[Key, str] = {}
            if submit.adapter is not None:
                self.loading[key] = submit.adapter
            return super().submit(key, submit, now)

        def cancel(self, key: Key) -> None:
            super().cancel(key)
            digest = self.loading.get(key)
            if digest is not None and isinstance(self._loader, Host):
                self._loader.cancelled(digest)

    return Parts(host=Host, scheduler=Cancelling)


def one_lock_for_all_loads(registry: SimRegistry) -> Parts:
    """A load waits until the one before it is done, whosever that is."""

    class Host(HostTier):
        def want(self, digest: str) -> LoadState:
            if self.loading and digest not in self.digests():
                return LoadState(Load.LOADING)
            return super().want(digest)

    return Parts(host=Host)


def remembers_slots(registry: SimRegistry) -> Parts:
    """vLLM #47724: the first slot that an adapter had is taken for the one it has."""

    memos: dict[int, dict[str, int]] = {}

    class Slots(SlotTable):
        def slot_of(self, digest: str) -> int:
            return memos.setdefault(id(self), {}).setdefault(digest, super().slot_of(digest))

    return Parts(slots=Slots)


def keeps_prefixes_by_name(registry: SimRegistry) -> Parts:
    """vLLM #42125: what was computed is kept under the adapter's name, which outlives its weights."""

    def named(scope: Scope | None) -> Scope | None:
        if scope is None or scope.adapter is None:
            return scope
        return Scope(scope.salt, registry.name_of[scope.adapter])

    class Rows(RowTable):
        def acquire(self, scope: Scope | None = None, prompt: Sequence[int] = ()) -> Lease:
            return super().acquire(named(scope), prompt)

        def release(self, row: int, scope: Scope | None = None, tokens: tuple[int, ...] = ()) -> None:
            super().release(row, named(scope), tokens)

    return Parts(rows=Rows)


MUTANTS: dict[str, Callable[[SimRegistry], Parts]] = {
    mutant.__name__: mutant
    for mutant in (
        evicts_before_it_loads,
        frees_what_is_used,
        cancelled_load_loads_for_ever,
        one_lock_for_all_loads,
        remembers_slots,
        keeps_prefixes_by_name,
    )
}
