"""Keeps what this gateway counts of canaries, and ends one that breaks its limits. Each gateway does so, one wins."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Protocol

import structlog

from adapters.canaries import CanaryReport, Figures, Split
from adapters.errors import LoraplaneError
from adapters.records import Move
from serving.tally import Tally

WHO = "loraplane"  # who rolled back, in the history
_PERIOD_S = 1.0

log = structlog.get_logger(__name__)


class Trials(Protocol):
    """The registry's side of canaries (adapters.canary_shelf.Canaries)."""

    def add_figures(self, gateway: str, figures: Figures) -> None: ...
    def running(self) -> Sequence[CanaryReport]: ...
    def roll_back(self, split: Split, *, who: str, reason: str) -> Move | None: ...


class CanaryKeeper:
    """gateway: tells this process's figures from others'; a restarted one counts anew under another name."""

    def __init__(self, trials: Trials, tally: Tally, gateway: str = "") -> None:
        self._trials, self._tally = trials, tally
        self._gateway = gateway or secrets.token_hex(8)
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
            number = 0 if split.canary is None else split.canary.number
            log.warning("canary_rolled_back", adapter=split.name, alias=split.alias, version=number, fault=fault)

    async def run(self) -> None:
        """Tick once a second until cancelled. A registry that fails is asked again the next time."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await self.tick()
            except LoraplaneError as error:
                log.warning("canary_figures_not_kept", error=str(error))
