"""Canaries and shadows as the registry keeps them: begun and ended in the alias's history, counted by each gateway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from adapters import schema
from adapters.alias_moves import ANY, Expected, Order, current, expect, log, mark
from adapters.canaries import (
    MOST_CANARY_PERCENT,
    MOST_SHADOW_PERCENT,
    Arm,
    ArmFigures,
    Canary,
    CanaryLimits,
    CanaryReport,
    Figures,
    Route,
    Shadow,
    ShadowFigures,
    Split,
    Sticky,
    check_limits,
    check_percent,
    judged,
    sum_arms,
    sum_shadows,
    trial_id,
)
from adapters.errors import Conflict, InvalidRequest, RecordNotFound
from adapters.records import CHAMPION, AdapterVersion, AliasRecord, ModelId, Move, MoveAction, check_alias
from adapters.rows import line, text
from adapters.schema import Database
from adapters.shelf import Shelf
from adapters.standings import Standings


class Canaries:
    """One tenant's trials. Every method raises ModelNotFound for an adapter or version that is not there."""

    def __init__(self, database: Database, standings: Standings, tenant: str, now: Callable[[], datetime]) -> None:
        self._database, self._standings, self._tenant, self._now = database, standings, tenant, now
        self._shelf = Shelf(tenant)

    def set_canary(
        self,
        name: str,
        number: int,
        percent: float,
        *,
        who: str,
        alias: str = CHAMPION,
        sticky: Sticky = Sticky.USER,
        limits: CanaryLimits | None = None,
        reason: str = "",
        expected_version: Expected = ANY,
        expected_generation: int | None = None,
    ) -> Split:
        """Let a version answer `percent` of an alias's requests. A canary of the same version keeps its id, and so
        those who have it already; another one is replaced. A shadow goes on.
        expected_generation: which the alias must still have.

        Raises InvalidRequest, Conflict, GenerationMismatch, or RecordNotFound for an alias that points nowhere.
        """
        limits = check_limits(limits or CanaryLimits())
        check_percent(percent, MOST_CANARY_PERCENT)
        why = _why(f"{percent:g} % to {name}@{number}, sticky by {sticky.value}", reason)
        order = Order(name, check_alias(alias), MoveAction.CANARY, number, line(who, "who"), why)
        with self._database.writes() as connection:
            now, before = self._begin(connection, name, alias, number, expected_version, expected_generation)
            old = None if before is None else before.canary
            trial = trial_id(self._tenant, name, alias, now.generation + 1, Arm.CANARY)
            if old is not None and (old.number, old.sticky) == (number, sticky):
                trial = old.id
            canary = Canary(trial, number, percent, sticky, limits)
            return self._write(connection, order, canary, None if before is None else before.shadow)

    def may_set_canary(
        self, name: str, number: int, *, alias: str = CHAMPION, expected_version: Expected = ANY
    ) -> tuple[AdapterVersion, AliasRecord, bool]:
        """The version that `set_canary` would begin with now, the alias, and whether it is the canary there already;
        nothing is written.

        Raises as `set_canary` does.
        """
        with self._database.reads() as connection:
            now, before = self._begin(connection, name, check_alias(alias), number, expected_version)
            old = None if before is None else before.canary
            return self._shelf.version(connection, name, number), now, old is not None and old.number == number

    def set_shadow(
        self,
        name: str,
        number: int,
        percent: float,
        *,
        who: str,
        alias: str = CHAMPION,
        reason: str = "",
        expected_version: Expected = ANY,
    ) -> Split:
        """Let a version compute `percent` of an alias's requests unseen, beside the live answer. A canary goes on.

        Raises as `set_canary` does.
        """
        check_percent(percent, MOST_SHADOW_PERCENT)
        why = _why(f"{percent:g} % beside the answer by {name}@{number}", reason)
        order = Order(name, check_alias(alias), MoveAction.SHADOW, number, line(who, "who"), why)
        with self._database.writes() as connection:
            now, before = self._begin(connection, name, alias, number, expected_version)
            old = None if before is None else before.shadow
            trial = trial_id(self._tenant, name, alias, now.generation + 1, Arm.SHADOW)
            shadow = Shadow(old.id if old is not None and old.number == number else trial, number, percent)
            return self._write(connection, order, None if before is None else before.canary, shadow)

    def stop(self, name: str, kind: Arm, *, who: str, alias: str = CHAMPION, reason: str = "") -> Move:
        """End the canary, or the shadow, of an alias; the other goes on. Raises RecordNotFound when there is none."""
        action = MoveAction.SHADOW_STOP if kind is Arm.SHADOW else MoveAction.CANARY_STOP
        who, reason = line(who, "who"), text(reason, "reason")
        with self._database.writes() as connection:
            self._shelf.require_adapter(connection, name)
            split = self._live(connection, name, check_alias(alias))
            trial = None if split is None else split.shadow if kind is Arm.SHADOW else split.canary
            if split is None or trial is None:
                raise RecordNotFound(
                    f"{name}@{alias} has no {kind.value} now; loraplane history {name} tells of old ones"
                )
            return self._end(connection, split, Order(name, alias, action, trial.number, who, reason))

    def roll_back(self, split: Split, *, who: str, reason: str) -> Move | None:
        """End a canary for a fault of its own, if it still is what runs; None when the alias moved or the canary was
        changed meanwhile: whoever did that has decided."""
        if split.canary is None:
            return None
        order = Order(
            split.name,
            split.alias,
            MoveAction.CANARY_ROLLBACK,
            split.canary.number,
            line(who, "who"),
            text(reason, "reason"),
        )
        with self._database.writes() as connection:
            live = self._live(connection, split.name, split.alias)
            if live is None or live.generation != split.generation:
                return None
            return self._end(connection, live, order)

    def report(self, name: str, alias: str = CHAMPION) -> CanaryReport:
        """The trials of an alias that run, or the last ones that did, with their figures over all gateways.

        Raises RecordNotFound when there never was any.
        """
        with self._database.reads() as connection:
            self._shelf.require_adapter(connection, name)
            splits = self._splits(connection, name, check_alias(alias))
            if not splits:
                raise RecordNotFound(
                    f"{name}@{alias} never had a canary or a shadow; begin one: "
                    f"loraplane canary {name} --to N --percent 10"
                )
            split = splits[0]
            later = [m for m in log(connection, self._tenant, name, alias) if m.generation > split.generation]
            arms = self._arms(connection, split)
        return CanaryReport(split, *arms, judged(split, *arms), later[-1] if later else None)

    def running(self) -> list[CanaryReport]:
        """Every split that holds now, with its figures."""
        table, pointer = schema.splits, schema.aliases
        same = sa.and_(*(table.c[k] == pointer.c[k] for k in ("tenant", "name", "alias", "generation")))
        query = sa.select(table).join(pointer, same).where(table.c.tenant == self._tenant).order_by(table.c.id)
        with self._database.reads() as connection:
            splits = [_split_of(row) for row in connection.execute(query).mappings()]
            told = [(split, self._arms(connection, split)) for split in splits]
        return [CanaryReport(split, *arms, judged(split, *arms)) for split, arms in told]

    def route(self, connection: sa.Connection, wanted: ModelId) -> Route:
        """Where a model id leads now. An id with a number leads to that version alone; what was withdrawn is not tried.

        Raises VersionRetired or VersionRevoked for a version that is not served.
        """
        version = self._shelf.resolve(connection, wanted)
        self._standings.refuse_withdrawn(connection, version)
        split = None if wanted.number is not None else self._live(connection, wanted.name, wanted.alias or CHAMPION)
        if split is None:
            return Route(version)
        barred = self._standings.withdrawn(connection, split.name)
        canary, shadow = (
            None if t is None or t.number in barred else self._shelf.version(connection, split.name, t.number)
            for t in (split.canary, split.shadow)
        )
        return Route(version, split, canary, shadow)

    def add_figures(self, gateway: str, figures: Figures) -> None:
        """Keep what one gateway has counted since its start, in place of what it said before."""
        table, at = schema.figures, self._now()
        with self._database.writes() as connection:
            for (trial, arm), counted in figures.items():
                key = {"tenant": self._tenant, "trial": trial, "arm": arm.value, "gateway": gateway}
                values = {"counts": asdict(counted), "at": at}
                where = [table.c[name] == value for name, value in key.items()]
                if not connection.execute(sa.update(table).where(*where).values(**values)).rowcount:
                    connection.execute(sa.insert(table).values(**key, **values))

    # -- inside a transaction ------------------------------------------------------------------------------------

    def _begin(
        self,
        connection: sa.Connection,
        name: str,
        alias: str,
        number: int,
        expected_version: Expected,
        expected_generation: int | None = None,
    ) -> tuple[AliasRecord, Split | None]:
        """The alias and what runs on it, when the version may be tried beside it."""
        version = self._shelf.version(connection, name, number)
        self._standings.refuse_withdrawn(connection, version)
        now = current(connection, self._tenant, name, alias)
        if now is None:
            raise RecordNotFound(f"{name} has no alias {alias!r} to try a version beside; promote one first")
        expect(name, alias, now, expected_version, expected_generation)
        if now.number == number:
            raise Conflict(f"{name}@{alias} is {version.id} already; try another version beside it")
        if self._shelf.version(connection, name, now.number).base_digest != version.base_digest:
            raise InvalidRequest(f"{version.id} is for another base than {name}@{alias}", "version")
        return now, self._live(connection, name, alias)

    def _write(self, connection: sa.Connection, order: Order, canary: Canary | None, shadow: Shadow | None) -> Split:
        """Mark the history and keep what is tried from that generation on."""
        made = mark(connection, self._tenant, order, self._now())
        split = Split(order.name, order.alias, made.to_number, made.generation, canary, shadow, made.at, self._tenant)
        if canary is not None or shadow is not None:
            connection.execute(sa.insert(schema.splits).values(**_split_row(split)))
        return split

    def _end(self, connection: sa.Connection, split: Split, order: Order) -> Move:
        shadow = order.action is MoveAction.SHADOW_STOP
        why = _why(f"{split.name}@{order.to_number} is tried no longer", order.why)
        rest = replace(split, shadow=None) if shadow else replace(split, canary=None)
        made = self._write(connection, replace(order, why=why), rest.canary, rest.shadow)
        return next(
            m for m in log(connection, self._tenant, order.name, order.alias) if m.generation == made.generation
        )

    def _live(self, connection: sa.Connection, name: str, alias: str) -> Split | None:
        """What is tried beside an alias now: what was begun with its present generation."""
        now = current(connection, self._tenant, name, alias)
        return None if now is None else next(iter(self._splits(connection, name, alias, now.generation)), None)

    def _splits(self, connection: sa.Connection, name: str, alias: str, generation: int | None = None) -> list[Split]:
        table = schema.splits
        query = sa.select(table).where(table.c.tenant == self._tenant, table.c.name == name, table.c.alias == alias)
        if generation is not None:
            query = query.where(table.c.generation == generation)
        rows = connection.execute(query.order_by(table.c.generation.desc()).limit(1)).mappings()
        return [_split_of(row) for row in rows]

    def _arms(self, connection: sa.Connection, split: Split) -> tuple[ArmFigures, ArmFigures, ShadowFigures]:
        canary = "" if split.canary is None else split.canary.id
        shadow = "" if split.shadow is None else split.shadow.id
        return (
            sum_arms(ArmFigures(**c) for c in self._counted(connection, canary, Arm.CHAMPION)),
            sum_arms(ArmFigures(**c) for c in self._counted(connection, canary, Arm.CANARY)),
            sum_shadows(ShadowFigures(**c) for c in self._counted(connection, shadow, Arm.SHADOW)),
        )

    def _counted(self, connection: sa.Connection, trial: str, arm: Arm) -> list[dict[str, Any]]:
        table = schema.figures
        where = (table.c.tenant == self._tenant, table.c.trial == trial, table.c.arm == arm.value)
        return list(connection.scalars(sa.select(table.c.counts).where(*where)))


def _why(what: str, reason: str) -> str:
    reason = text(reason, "reason").strip()
    return f"{what}: {reason}" if reason else what


def _split_of(row: sa.RowMapping) -> Split:
    canary, shadow = row["settings"]["canary"], row["settings"]["shadow"]
    if canary is not None:
        canary = Canary(**{**canary, "sticky": Sticky(canary["sticky"]), "limits": CanaryLimits(**canary["limits"])})
    return Split(
        name=row["name"],
        alias=row["alias"],
        number=row["number"],
        generation=row["generation"],
        canary=canary,
        shadow=None if shadow is None else Shadow(**shadow),
        at=row["at"],
        tenant=row["tenant"],
    )


def _split_row(split: Split) -> dict[str, Any]:
    canary, shadow = split.canary, split.shadow
    return {
        "tenant": split.tenant,
        "name": split.name,
        "alias": split.alias,
        "generation": split.generation,
        "number": split.number,
        "canary_number": None if canary is None else canary.number,
        "shadow_number": None if shadow is None else shadow.number,
        "settings": {
            "canary": None if canary is None else asdict(canary),
            "shadow": None if shadow is None else asdict(shadow),
        },
        "at": split.at,
    }
