"""One engine: a thread that steps while there is work. A step: admit, plan, run, settle, emit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from serving.engine.breaker import Doubt
from serving.engine.keeping import Keeper
from serving.engine.kv import RowTable
from serving.engine.lora import HostAdapter
from serving.engine.plan import Key, Outgoing, Sampled, StepPlan, StepResult
from serving.engine.proof import Proofs
from serving.engine.request import Cancel, EngineFacts, Heartbeat, Keep, SlotState, Submit, TokenLogprob
from serving.engine.runner import Runner
from serving.engine.scheduler import Scheduler
from serving.engine.slot_probe import NoProver, Prover
from serving.engine.slots import Placement, SlotTable
from serving.loader import HostTier

_BEAT_S = 0.5
_NOTHING = HostAdapter("", 0, {})  # what an emptied slot holds: installing it frees what was there
_log = structlog.get_logger()

Sink = Callable[[Sequence[Outgoing]], None]


class Engine:
    """Runs sequences on a runner. `submit` and `cancel` may be called from any thread; events go to `sink` from the
    engine's own, in batches of one step. begin: called once in that thread, before its first step."""

    def __init__(
        self,
        facts: EngineFacts,
        runner: Runner,
        scheduler: Scheduler,
        rows: RowTable,
        slots: SlotTable,
        host: HostTier,
        sink: Sink,
        *,
        queue_limit: int,
        probe_after_s: float,
        now: Callable[[], float] = time.monotonic,
        begin: Callable[[], None] | None = None,
        prover: Prover | None = None,
    ) -> None:
        self.facts = facts
        self._runner, self._scheduler, self._rows, self._slots, self._host = runner, scheduler, rows, slots, host
        self._sink, self._now, self._begin = sink, now, begin
        self._queue_limit, self._probe_after_s = queue_limit, probe_after_s
        self._prover = prover or NoProver()
        apart = bool(facts.max_answer_len)
        self._proofs: Proofs[HostAdapter] = Proofs(self._prover.spare_rows, facts.room, apart)
        self._inbox: queue.SimpleQueue[tuple[Key, Submit | Cancel | Keep]] = queue.SimpleQueue()
        self._keeper = Keeper(
            scheduler,
            slots,
            host,
            install=self._install,
            clear=self._clear,
            unproven=self._unproven,
            known=lambda digest: self._proofs.known(digest),
        )
        self._work = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._alive_at = now()
        self._steps = 0
        self._tokens = 0
        self._ranks: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._beat = self._snapshot()

    # -- from any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def submit(self, key: Key, submit: Submit) -> None:
        """Hand a sequence in; its events, one ending among them, go to the sink."""
        self._inbox.put((key, submit))
        self._work.set()

    def cancel(self, key: Key, number: int) -> None:
        """Forget a sequence; no event of it follows once the current step is over."""
        self._inbox.put((key, Cancel(number)))
        self._work.set()

    def keep(self, key: Key, message: Keep) -> None:
        """Warm, pin, unpin or drop an adapter; its one answer goes to the sink."""
        self._inbox.put((key, message))
        self._work.set()

    def wake(self) -> None:
        """Tell the thread that something may have changed, for instance that a load is done."""
        self._work.set()

    def stop(self) -> None:
        """End all sequences with `not_ready` and stop the thread."""
        self._stopping = True
        self._work.set()
        self._thread.join(timeout=30)
        self._host.close()

    @property
    def alive(self) -> bool:
        """Whether the thread steps."""
        return self._thread.is_alive()

    @property
    def idle_s(self) -> float:
        """Seconds since a token was computed, for a client or by the idle probe."""
        return self._now() - self._alive_at

    def heartbeat(self) -> Heartbeat:
        """The engine's condition a moment ago; `idle_s` is of now, so a thread that hangs shows."""
        return msgspec.structs.replace(self._beat, idle_s=self.idle_s)

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _snapshot(self) -> Heartbeat:
        s, disk = self._scheduler, self._host.below.figures
        return Heartbeat(
            running=s.running,
            waiting=s.waiting,
            loading=self._host.loading,
            rows=self._rows.rows,
            kv_tokens_used=s.cached_tokens,
            kv_tokens_total=self._rows.rows * self.facts.max_model_len,
            slots=tuple(SlotState(digest, leases, self._ranks[digest]) for digest, _, leases in self._slots.resident()),
            slots_total=self._slots.slots,
            host_digests=self._host.digests(),
            host_bytes=self._host.held_bytes,
            host_bytes_limit=self._host.budget_bytes,
            idle_s=self.idle_s,
            steps=self._steps,
            tokens=self._tokens,
            loads=dict(self._host.counts.loads),
            load_seconds=dict(self._host.counts.seconds),
            evictions=self._slots.evictions,
            queue_limit=self._queue_limit,
            prompt_tokens=s.prompt_tokens,
            reused_tokens=s.reused_tokens,
            quarantined=s.breaker.aside(self._now()),
            set_aside=s.breaker.listed(self._now()),
            pinned=self._slots.pinned,
            warm=self._keeper.warm,
            dropping=self._keeper.dropping,
            waiting_by=s.waiting_by(),
            oldest_wait_s=s.oldest_wait_s(self._now()),
            load_histograms=self._host.counts.histograms,
            evicted={"device": self._slots.evictions, "host": self._host.evictions, "disk": disk.evictions},
            disk_count=disk.count,
            disk_bytes=disk.bytes,
            disk_bytes_limit=disk.budget_bytes,
            healed=disk.healed,
        )

    def step(self) -> bool:
        """One step; whether anything was computed."""
        now = self._now()
        out = self._take_in(now)
        out += self._scheduler.expire(now)
        self._host.poll()
        out += self._keeper.step(now)
        installs, refused = self._scheduler.admit(now)
        out += refused
        for digest, placement in installs:
            out += self._install(digest, placement)
        out += self._show_effect()
        self._mark_proven()
        golden = self._proofs.rows(self._slots.slot_of, self._scheduler.prompt_room // 2)
        plan = self._scheduler.plan(golden, self._proofs.pending, self._proofs.faulted())
        if plan.scrub or plan.copies:
            self._runner.tidy(plan)
        if plan.rows:
            result = self._compute(plan)
            done = self._now()
            good = sum(1 for s in result.sampled.values() if s.fault is None)
            if good or not result.sampled:
                self._alive_at = done  # an engine that only fails is not alive, however busy
            self._steps += 1
            self._tokens += good
            for digest in self._proofs.settle(plan, result):
                out += self._doubt(digest, Doubt.GOLDEN_MISMATCH)
            self._mark_proven()
            out += self._scheduler.settle(plan, result, done)
        if out:
            self._sink(out)
        return bool(plan.rows) or self._proofs.next_effect is not None

    def _take_in(self, now: float) -> list[Outgoing]:
        out: list[Outgoing] = []
        while True:
            try:
                key, message = self._inbox.get_nowait()
            except queue.Empty:
                return out
            if isinstance(message, Cancel):
                self._scheduler.cancel(key)
                self._keeper.forget(key)
            elif not isinstance(message, Submit):
                out += self._keeper.take(key, message, now)
            elif refusal := self._keeper.refuses(message):
                out.append((key, refusal))
            else:
                if message.adapter is not None:
                    self._host.demand.note(message.adapter)
                out += [(key, event) for event in self._scheduler.submit(key, message, now)]

    def _install(self, digest: str, placement: Placement) -> list[Outgoing]:
        self._ranks.pop(placement.evicted or "", None)
        self._sizes.pop(placement.evicted or "", None)
        self._proofs.gone(placement.evicted)
        try:
            adapter, times = self._host.take(digest)
            begun = self._now()
            self._runner.install(placement.slot, adapter)
            if times.source == "host":
                self._host.counts.count("host", self._now() - begun)
            self._ranks[digest], self._sizes[digest] = adapter.rank, adapter.size_bytes
        except Exception as error:
            _log.exception("adapter_install_failed", digest=digest, error=type(error).__name__)
            return self._scheduler.abandon(digest, f"adapter {digest[:12]} cannot be installed: {error}")
        if not self._holds(placement.slot, adapter):
            return self._doubt(digest, Doubt.SLOT_CONTENTS)
        self._proofs.installed(digest, adapter)
        return []

    def _unproven(self, digest: str) -> bool:
        return digest in self._proofs.pending

    def _mark_proven(self) -> None:
        for digest in self._proofs.proven():
            self._scheduler.proven(digest, self._now())

    def _holds(self, slot: int, adapter: HostAdapter) -> bool:
        try:
            return self._prover.applies(slot, adapter)
        except Exception as error:  # a slot that cannot be looked at does not hold it either
            _log.exception("slot_unreadable", slot=slot, error=type(error).__name__)
            return False

    def _show_effect(self) -> list[Outgoing]:
        """Prove of one adapter that it changes the output; of one, since that takes as long as a small step."""
        found = self._proofs.next_effect
        if found is None:
            return []
        digest, adapter = found
        try:
            moves = self._prover.moves(self._slots.slot_of(digest), adapter)
        except Exception as error:
            _log.exception("adapter_probe_failed", digest=digest, error=type(error).__name__)
            self._proofs.doubted(digest)
            return self._scheduler.abandon(digest, f"adapter {digest[:12]} cannot be computed: {error}")
        if not moves:
            return self._doubt(digest, Doubt.NO_EFFECT)
        self._proofs.shown(digest)
        return []

    def _doubt(self, digest: str, doubt: Doubt) -> list[Outgoing]:
        """What lies in its slot did not prove to be this adapter: nobody is answered from it. What the host holds
        is let go too, so that the next trial begins at the tier below."""
        _log.error("adapter_set_aside", digest=digest, reason=doubt.value)
        self._proofs.doubted(digest)
        self._ranks.pop(digest, None)
        self._sizes.pop(digest, None)
        wait = self._scheduler.breaker.quarantine(digest, doubt, self._now())
        out = self._scheduler.abandon(digest, doubt.value, "adapter_quarantined", wait)
        self._host.drop(digest)
        return out

    def _clear(self, digest: str) -> int:
        """Empty the slot of an adapter nobody uses; how many bytes its tensors had there alone."""
        size = self._sizes.pop(digest, 0)
        if self.facts.device == "cpu" and self._host.laid_out(digest):
            size = 0  # such a slot reads what the host holds, where it lies
        self._ranks.pop(digest, None)
        self._proofs.gone(digest)
        self._runner.install(self._slots.slot_of(digest), _NOTHING)
        self._slots.forget(digest)
        return size

    def _compute(self, plan: StepPlan) -> StepResult:
        try:
            return self._runner.run(plan)
        except Exception:
            # Positions are written, not appended, so a step may be computed again: alone, each row shows its own fault.
            _log.exception("step_failed", rows=len(plan.rows))
            return self._alone(plan)

    def _alone(self, plan: StepPlan) -> StepResult:
        sampled: dict[int, Sampled] = {}
        scores: dict[int, tuple[TokenLogprob, ...]] = {}
        for row in plan.rows:
            try:
                result = self._runner.run(StepPlan((row,)))
                sampled.update(result.sampled)
                scores.update(result.scores)
            except Exception as error:
                _log.exception("row_failed", error=type(error).__name__)
                sampled[row.row] = Sampled(fault="The engine could not compute this request.")
        return StepResult(sampled, scores)

    def _run(self) -> None:
        beat_at = self._now()
        try:
            if self._begin is not None:
                self._begin()
            while not self._stopping:
                self._work.clear()
                computed = self.step()
                if not computed or self._now() - beat_at >= _BEAT_S:
                    self._beat, beat_at = self._snapshot(), self._now()
                if computed:
                    continue
                if self._scheduler.idle() and self.idle_s >= self._probe_after_s and self._runner.probe():
                    self._alive_at = self._now()
                # Waiting sequences have deadlines; an idle engine has its probe.
                self._work.wait(timeout=1.0 if self._scheduler.idle() and self._keeper.idle else 0.05)
        except Exception:
            _log.exception("engine_thread_died")
        finally:
            self._sink(self._scheduler.fail_all("not_ready", "The engine stops; send the request again."))
