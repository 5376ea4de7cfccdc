"""Keeps what this gateway counts of canaries, and ends one that breaks its limits. Each gateway does so, one wins."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

import structlog

from adapters.canaries import CanaryReport, Figures, Split
from adapters.errors import LoraplaneError
from adapters.records import Move, MoveAction
from serving.tally import Tally

WHO = "loraplane"  # who rolled back, in the history
_PERIOD_S = 1.0
_WARM_S, _WARM_EVERY_S = 60.0, 10.0

log = structlog.get_logger(__name__)


class Trials(Protocol):
    """The registry's side of canaries (adapters.canary_shelf.Canaries)."""

    def add_figures(self, gateway: str, figures: Figures) -> None: ...
    def running(self) -> Sequence[CanaryReport]: ...
    def roll_back(self, split: Split, *, who: str, reason: str) -> Move | None: ...


Warm: TypeAlias = Callable[[str, int, float], Awaitable[object]]


class CanaryKeeper:
    """warm: makes a version ready for so many seconds. moved: hears of each roll-back, for metrics.

    gateway: tells this process's figures from others'; a restarted one counts anew under another name.
    """

    def __init__(
        self,
        trials: Trials,
        tally: Tally,
        gateway: str = "",
        warm: Warm | None = None,
        moved: Callable[[str], None] = lambda action: None,
    ) -> None:
        self._trials, self._tally, self._warm = trials, tally, warm
        self._gateway = gateway or secrets.token_hex(8)
        self._moved = moved
        self.rolled_back = 0

    async def tick(self) -> None:
        """Keep what came since the last call, and roll back what is at fault. Raises StoreFailed."""
        figures = self._tally.changed()
        if not figures:
            return
        try:
            await asyncio.to_thread(self._trials.add_figures, self._gateway, figures)
        except BaseException:
            self._tally.again(figures)
            raise
        running = await asyncio.to_thread(self._trials.running)
        for report in running:
            if report.fault is not None:
                await self._roll_back(report.split, report.fault)
        trials = [trial for r in running for trial in (r.split.canary, r.split.shadow) if trial is not None]
        self._tally.forget({trial.id for trial in trials})

    async def _roll_back(self, split: Split, fault: str) -> None:
        if await asyncio.to_thread(lambda: self._trials.roll_back(split, who=WHO, reason=fault)) is not None:
            self.rolled_back += 1
            self._moved(MoveAction.CANARY_ROLLBACK.value)
            number = 0 if split.canary is None else split.canary.number
            log.warning("canary_rolled_back", adapter=split.name, alias=split.alias, version=number, fault=fault)

    async def keep_warm(self) -> None:
        """Have what is tried lie ready: a shadow runs only beside a slot that holds its adapter, and a canary's first
        requests should not wait for its load. Raises StoreFailed."""
        if self._warm is None:
            return
        for report in await asyncio.to_thread(self._trials.running):
            tried = [trial.number for trial in (report.split.canary, report.split.shadow) if trial is not None]
            for number in dict.fromkeys(tried):
                try:
                    await self._warm(report.split.name, number, _WARM_S)
                except LoraplaneError as error:
                    log.debug("trial_not_warm", adapter=report.split.name, version=number, error=str(error))

    async def run(self) -> None:
        """Tick once a second, and keep warm beside it, until cancelled. A registry that fails is asked again."""
        await asyncio.gather(_again(self.tick, _PERIOD_S), _again(self.keep_warm, _WARM_EVERY_S))


async def _again(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except LoraplaneError as error:
            log.warning("canaries_not_kept", error=str(error))
