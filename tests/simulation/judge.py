"""Whether a request that is over ended as it may: once, named, as the weights that it was pinned to say (C1 to C3)."""

from __future__ import annotations

from tests.simulation.plan import GOOD, LONG_S, Happened, Plan, Request
from tests.simulation.registry import SimRegistry
from tests.simulation.weights import Broken, SimStore, expected

PATIENCE_S = 0.6  # nothing that a patient world's request needs takes longer
REVOKED_S = 1.0  # within which nobody is answered from revoked weights any more


class Judge:
    """Judges the requests of one world."""

    def __init__(self, plan: Plan, registry: SimRegistry, store: SimStore, happened: Happened) -> None:
        self._plan, self._registry, self._store, self._happened = plan, registry, store, happened

    def judge(self, request: Request) -> None:
        """Raises Broken with what is wrong."""
        if request.outcome == GOOD or any(request.texts):
            self._check_answer(request)
        if request.outcome not in (GOOD, "cancelled") and not self._has_reason(request):
            raise Broken(f"{request} ended so without a reason")
        late = request.ended - request.begun
        if self._plan.patient and late > PATIENCE_S and not self._asks_for_trouble(request):
            raise Broken(f"{request} took {late:.3f} s, though nothing of its own is slow")

    def _check_answer(self, request: Request) -> None:
        digest, fragile = request.digest, False
        if digest is not None:
            fragile = self._store.contents[digest].fragile
            self._check_pin(request, digest)
        elif request.model != "base":
            raise Broken(f"{request} fell back to the base")
        right = expected(digest, fragile, request.prompt, request.count)
        for text in request.texts:
            if text != right.text if request.outcome == GOOD else not right.text.startswith(text):
                raise Broken(f"{request} should be {right}")
        if request.outcome == GOOD and right.fails:
            raise Broken(f"{request} should have failed: {right}")

    def _check_pin(self, request: Request, digest: str) -> None:
        meant = self._registry.meant(request.model, request.begun, request.pinned_at)
        if digest not in meant and not request.instead:
            raise Broken(f"{request} was pinned to what its id did not mean: {meant}")
        for withdrawn in self._registry.withdrawals:
            if withdrawn.standing.digest != digest:
                continue
            if withdrawn.at < request.begun and request.pinned_at < withdrawn.until:
                raise Broken(f"{request} was answered though its version was withdrawn at {withdrawn.at}")
            went_on = request.outcome == GOOD and request.begun < withdrawn.at < request.ended - REVOKED_S
            if withdrawn.ends_running and went_on:
                raise Broken(f"{request} went on though its version was revoked at {withdrawn.at}")

    def _served_from(self, digest: str) -> float:
        """From when on nobody may be refused an adapter because it is being dropped. Where a replica or a connection
        was lost, its drop may be called off later."""
        happened = self._happened
        return float("inf") if happened.lost else happened.restored.get(digest, float("inf"))

    def _asks_for_trouble(self, request: Request) -> bool:
        if request.model in ("base", "absent"):
            return False
        return bool(self._registry.meant(request.model, request.begun, request.ended) & self._happened.troubled)

    def _has_reason(self, request: Request) -> bool:
        """Whether something happened for which a request may end with its code."""
        if request.model == "absent":
            return request.outcome == "model_not_found"
        happened, plan = self._happened, self._plan
        name = request.model.partition("@")[0]
        meant = {v.digest for v in self._registry.names[name].versions} if name != "base" else set()
        withdrawn = {w.standing.digest for w in self._registry.withdrawals}
        reasons = {
            "adapter_numerics": bool(meant & happened.struck),
            "adapter_quarantined": bool(meant & happened.struck),
            "adapter_load_failed": bool(meant & happened.troubled) or bool(plan.odds["install"]),
            "adapter_unloaded": any(request.begun <= self._served_from(digest) for digest in meant & happened.dropped),
            "version_retired": bool(meant & withdrawn),
            "version_revoked": bool(meant & withdrawn),
            "adapter_capacity": bool(meant) and not plan.patient,
            "queue_full": not plan.patient,
            "engine_fault": bool(plan.odds["run"]),
            "engine_lost": happened.lost,
            "not_ready": happened.lost,
            "deadline_exceeded": request.deadline_s < LONG_S,
        }
        return reasons.get(request.outcome, False)
