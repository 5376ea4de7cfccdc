"""What is kept and what must go, by digest: adapters that were warmed for a while, pinned to a slot, or dropped.

All of it happens in the engine's thread between two steps. A wish is answered once, by Moved or by Failed; what it
waits for (a load, a slot, the end of running sequences) is looked at again before each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serving.engine.admission import ALL_PINNED
from serving.engine.breaker import Doubt
from serving.engine.plan import Key, Load, Outgoing
from serving.engine.request import Drop, Failed, Keep, LoadTimes, Moved, Pin, Submit, Undrop, Unpin, Warm
from serving.engine.scheduler import Scheduler
from serving.engine.slots import NoSlotFree, Placement, SlotTable
from serving.loader import HostTier

MAX_WISHES = 4096
LONGEST_TTL_S = 7 * 86400.0
MOST_TRIALS = 3
UNLOADED = "adapter_unloaded"

Install = Callable[[str, Placement], list[Outgoing]]
Clear = Callable[[str], int]


@dataclass(slots=True)
class _Wish:
    """A Warm or Pin that waits. until: when a pin gives up waiting for a slot; placed: how often it was given one."""

    key: Key
    message: Warm | Pin
    until: float
    placed: int = 0


@dataclass(slots=True)
class _Going:
    """A digest on its way out. keys: who asked."""

    until: float
    keys: list[Key] = field(default_factory=list)


class Keeper:
    """Warm, pinned and going adapters of one engine. install: put what was placed into its slot, as the engine does;
    clear: empty the slot of an adapter nobody uses, and say how many bytes that freed; unproven: whether what lies in
    its slot has yet to prove to be this adapter: nobody is told that it is there before; known: whether an adapter has
    proven itself before."""

    def __init__(
        self,
        scheduler: Scheduler,
        slots: SlotTable,
        host: HostTier,
        *,
        install: Install,
        clear: Clear,
        unproven: Callable[[str], bool] = lambda digest: False,
        known: Callable[[str], bool] = lambda digest: True,
    ) -> None:
        self._scheduler, self._slots, self._host = scheduler, slots, host
        self._install, self._clear, self._unproven = install, clear, unproven
        self._known = known
        self._wishes: dict[Key, _Wish] = {}
        self._warm: dict[str, float] = {}
        self._going: dict[str, _Going] = {}

    @property
    def warm(self) -> tuple[str, ...]:
        """What stays on the host for a while yet."""
        return tuple(self._warm)

    @property
    def dropping(self) -> tuple[str, ...]:
        """What goes once nobody uses it."""
        return tuple(self._going)

    @property
    def idle(self) -> bool:
        """Nothing waits for a load, a slot, or an end."""
        return not self._wishes and not self._going

    def refuses(self, submit: Submit) -> Failed | None:
        """The refusal of a sequence whose adapter goes; None for all others."""
        return self._unloaded(submit.id, submit.adapter) if submit.adapter in self._going else None

    def take(self, key: Key, message: Keep, now: float) -> list[Outgoing]:
        """Take a message in; what can be answered at once is."""
        digest, number = message.digest, message.id
        if isinstance(message, Unpin):
            self._slots.unpin(digest)
            return [*self._overtaken(digest), (key, self._where(number, digest))]
        if isinstance(message, Drop):
            self._slots.unpin(digest)
            self._host.release(digest)
            self._warm.pop(digest, None)
            going = self._going.setdefault(digest, _Going(now + message.deadline_s))
            going.until = min(going.until, now + message.deadline_s)
            going.keys.append(key)
            return []
        if isinstance(message, Undrop):
            called_off = self._going.pop(digest, None)
            keys = [*(called_off.keys if called_off is not None else ()), key]
            return [(each, self._where(each[1], digest)) for each in keys]
        if digest in self._going:
            return [(key, self._unloaded(number, digest))]
        if len(self._wishes) >= MAX_WISHES:
            full = f"{MAX_WISHES} adapters are waited for already."
            return [(key, Failed(number, "adapter_capacity", full, retry_after_s=1.0))]
        until = now + message.deadline_s if isinstance(message, Pin) else float("inf")
        self._wishes[key] = _Wish(key, message, until)
        return []

    def _overtaken(self, digest: str) -> list[Outgoing]:
        """Pins of an adapter that still wait when it is unpinned: fulfilled later they would hold for ever."""
        overtaken = [w for w in self._wishes.values() if isinstance(w.message, Pin) and w.message.digest == digest]
        for wish in overtaken:
            del self._wishes[wish.key]
        why = "It was unpinned while it waited for its slot."
        return [(wish.key, Failed(wish.message.id, "cancelled", why)) for wish in overtaken]

    def forget(self, key: Key) -> None:
        """Nobody waits for this answer any more. Warm and pinned adapters stay what they are."""
        self._wishes.pop(key, None)
        for going in self._going.values():
            if key in going.keys:
                going.keys.remove(key)

    def step(self, now: float) -> list[Outgoing]:
        """Do what can be done before the next step; the answers."""
        for digest in [d for d, until in self._warm.items() if now >= until]:
            del self._warm[digest]
            self._host.release(digest)
        out: list[Outgoing] = []
        for wish in list(self._wishes.values()):
            done = self._try(wish, now)
            if done:
                self._wishes.pop(wish.key, None)
                out += done
        for digest, going in list(self._going.items()):
            out += self._end(digest, going, now)
        return out

    def _try(self, wish: _Wish, now: float) -> list[Outgoing]:
        message, digest = wish.message, wish.message.digest
        number = message.id
        if digest in self._going:
            return [(wish.key, self._unloaded(number, digest))]
        if refusal := self._set_aside(number, digest, now):
            return [(wish.key, refusal)]
        on_device = self._slots.holds(digest)
        if self._slots.barred(digest):
            return [(wish.key, Failed(number, "adapter_capacity", ALL_PINNED, retry_after_s=1.0))]
        if on_device and self._unproven(digest):
            return []
        if on_device and isinstance(message, Pin):
            self._slots.pin(digest)
            return [(wish.key, self._where(number, digest))]
        state = self._host.want(digest)
        if state.load is Load.FAILED:
            return [(wish.key, Failed(number, *state.failure, retry_after_s=state.retry_after_s))]
        if state.load is Load.LOADING:
            return []
        if isinstance(message, Warm):
            if not self._host.keep(digest):
                full = "What is warm already takes the host's whole budget for adapters."
                return [(wish.key, Failed(number, "adapter_capacity", full, retry_after_s=5.0))]
            self._warm[digest] = max(self._warm.get(digest, 0.0), now + min(message.ttl_s, LONGEST_TTL_S))
            if on_device or not self._may_place(wish, message):
                return [(wish.key, self._where(number, digest, state.times))]
        try:
            placement = self._slots.place(digest)
        except NoSlotFree:
            if now < wish.until:
                return []
            full = "Every slot is leased or pinned."
            return [(wish.key, Failed(number, "adapter_capacity", full, retry_after_s=1.0))]
        wish.placed += 1
        failures = self._install(digest, placement)
        if not self._slots.holds(digest):  # its installation failed, and the slot was emptied
            failed = Failed(number, "adapter_load_failed", f"adapter {digest[:12]} cannot be installed")
            return [*failures, (wish.key, self._set_aside(number, digest, now) or failed)]
        if self._unproven(digest):
            return failures
        if isinstance(message, Pin):
            self._slots.pin(digest)
        return [(wish.key, self._where(number, digest, state.times))]

    def _may_place(self, wish: _Wish, message: Warm) -> bool:
        """Whether what is warmed goes to a slot: an empty one, or, to prove itself, one that nobody uses."""
        # Where it loses its slot to others each time before it is proven, it is warm without.
        prove = message.prove and wish.placed < MOST_TRIALS and not self._known(message.digest)
        return bool(self._slots.empty) or (prove and self._slots.can_have(message.digest))

    def _set_aside(self, number: int, digest: str, now: float) -> Failed | None:
        wait_s = self._scheduler.breaker.aside_s(digest, now)
        if not wait_s:
            return None
        doubt = self._scheduler.breaker.doubt(digest) or Doubt.NUMERICS
        return Failed(number, "adapter_quarantined", doubt.value, retry_after_s=wait_s)

    def _end(self, digest: str, going: _Going, now: float) -> list[Outgoing]:
        out: list[Outgoing] = []
        if now >= going.until:
            out += self._scheduler.dismiss(digest, UNLOADED, f"Adapter {digest[:12]} was taken out of service.")
        if self._scheduler.uses(digest):
            return out
        freed = self._clear(digest) if self._slots.holds(digest) else 0
        freed += self._host.drop(digest)
        del self._going[digest]
        return out + [(key, Moved(key[1], digest, "gone", freed)) for key in going.keys]

    def _where(self, number: int, digest: str, load: LoadTimes | None = None) -> Moved:
        size = self._host.bytes_of(digest)
        if self._slots.holds(digest):
            return Moved(number, digest, "device", size, load)
        return Moved(number, digest, "host" if size else "gone", size, load)

    def _unloaded(self, number: int, digest: str | None) -> Failed:
        return Failed(number, UNLOADED, f"Adapter {(digest or '')[:12]} is being taken out of service.", 2.0)
