"""What is decreed on versions: retired, revoked, brought back, pinned. Each decree is a row of the adapter's history.

A retired version is hidden under its own name and number. A revocation is about bytes: every version with the same
digest is refused, whatever its name. Gateways ask for the decrees several times a second and make engines follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

import sqlalchemy as sa

from adapters import schema
from adapters.alias_moves import current, log, note, rollback_target
from adapters.errors import Conflict, InvalidRequest, VersionRetired, VersionRevoked
from adapters.records import (
    CHAMPION,
    AdapterVersion,
    Fallback,
    InFlight,
    ModelId,
    MoveAction,
    Standing,
    VersionState,
)
from adapters.rows import line, text
from adapters.schema import Database
from adapters.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Decrees:
    """What engines and gateways must follow now.

    revoked: the versions whose digests nobody may be served. unwanted: digests that no version in service has any
    more, so that their bytes may go; revoked ones are among them. pinned: the versions that stay in a slot.
    """

    revoked: tuple[Standing, ...] = ()
    unwanted: frozenset[str] = frozenset()
    pinned: tuple[Standing, ...] = ()


class Standings:
    """The decrees of one tenant's registry. Every method raises StoreFailed when the database fails."""

    def __init__(self, database: Database, shelf: Shelf, tenant: str, now: Callable[[], datetime]) -> None:
        self._database, self._shelf, self._tenant, self._now = database, shelf, tenant, now

    def of(self, name: str, number: int) -> Standing:
        """What was decreed last on a version. Raises ModelNotFound."""
        with self._database.reads() as connection:
            return self._standing(connection, self._shelf.version(connection, name, number))

    def retire(self, name: str, number: int, *, who: str, reason: str = "") -> Standing:
        """Hide a version: it is refused from now on. Raises Conflict while an alias points at it, ModelNotFound."""
        with self._database.writes() as connection:
            version = self._shelf.version(connection, name, number)
            held = [a.alias for a in self._shelf.summary(connection, name).aliases if a.number == number]
            if held:
                raise Conflict(f"{name}@{held[0]} points at {version.id}; move that alias first, or revoke the version")
            now = self._standing(connection, version)
            if now.state is VersionState.REVOKED:
                raise Conflict(f"{version.id} is revoked already, which is more than retired")
            return self._decree(connection, replace(now, state=VersionState.RETIRED), MoveAction.RETIRE, who, reason)

    def revoke(
        self, name: str, number: int, *, who: str, reason: str, in_flight: InFlight = InFlight.FINISH
    ) -> Standing:
        """Refuse what a version consists of, whoever points at it. in_flight: what becomes of running answers.

        Raises InvalidRequest without a reason, ModelNotFound.
        """
        if not reason.strip():
            raise InvalidRequest(
                "revoking a version needs a reason, which is recorded and told to its callers", "reason"
            )
        with self._database.writes() as connection:
            now = self._standing(connection, self._shelf.version(connection, name, number))
            wanted = replace(now, state=VersionState.REVOKED, in_flight=in_flight)
            action = MoveAction.REVOKE_NOW if in_flight is InFlight.END else MoveAction.REVOKE
            return self._decree(connection, wanted, action, who, reason)

    def restore(self, name: str, number: int, *, who: str, reason: str) -> Standing:
        """Bring a retired or revoked version back into service. Raises InvalidRequest without a reason."""
        if not reason.strip():
            raise InvalidRequest("bringing a version back needs a reason, which is recorded", "reason")
        with self._database.writes() as connection:
            now = self._standing(connection, self._shelf.version(connection, name, number))
            wanted = replace(now, state=VersionState.LIVE, in_flight=InFlight.FINISH)
            return self._decree(connection, wanted, MoveAction.RESTORE, who, reason)

    def pin(self, name: str, number: int, on: bool, *, who: str) -> Standing:
        """Keep a version in a slot of every engine, or no longer. Raises VersionRetired, VersionRevoked."""
        with self._database.writes() as connection:
            version = self._shelf.version(connection, name, number)
            if on:
                self.refuse_withdrawn(connection, version)
            wanted = replace(self._standing(connection, version), pinned=on)
            return self._decree(connection, wanted, MoveAction.PIN if on else MoveAction.UNPIN, who, "")

    def decrees(self) -> Decrees:
        """What engines and gateways must follow now."""
        with self._database.reads() as connection:
            found = self._shelf.standings(connection)
            revoked = tuple(s for s in found if s.state is VersionState.REVOKED)
            gone = {s.digest for s in found if s.state is not VersionState.LIVE}
            wanted = self._still_wanted(connection, gone, found) if gone else frozenset()
        barred = {s.digest for s in revoked}
        return Decrees(
            revoked, frozenset((gone - wanted) | barred), tuple(s for s in found if s.pinned and s.digest not in barred)
        )

    def refuse_withdrawn(self, connection: sa.Connection, version: AdapterVersion) -> None:
        """Raise VersionRevoked or VersionRetired unless the version is in service."""
        for found in self._shelf.withdrawals(connection, version.digest):
            if found.state is VersionState.REVOKED:
                raise revoked(found, version.id)
            if found.id == version.id:
                raise VersionRetired(version.id, found.who, found.why)

    def withdrawn(self, connection: sa.Connection, name: str) -> set[int]:
        """The numbers of an adapter's versions that are not in service."""
        versions = schema.versions
        mine = sa.select(versions.c.digest).where(versions.c.tenant == self._tenant, versions.c.name == name)
        found = self._shelf.standings(connection, versions.c.digest.in_(mine))
        barred = {s.digest for s in found if s.state is VersionState.REVOKED}
        hidden = {s.number for s in found if s.state is VersionState.RETIRED and s.name == name}
        return hidden | {v.number for v in self._shelf.summary(connection, name).versions if v.digest in barred}

    def instead_of(self, connection: sa.Connection, wanted: ModelId, aside: int) -> AdapterVersion | None:
        """Who answers for an alias while version `aside` of it is set aside; see `Registry.instead_of`."""
        if wanted.number is not None:
            return None
        alias = wanted.alias or CHAMPION
        now = current(connection, self._tenant, wanted.name, alias)
        if now is None or now.fallback is not Fallback.PREVIOUS:
            return None
        withdrawn = self.withdrawn(connection, wanted.name)
        if now.number not in (aside, *withdrawn):  # a canary is set aside, or the alias moved meanwhile
            return self._shelf.version(connection, wanted.name, now.number)
        try:
            number = rollback_target(wanted.name, log(connection, self._tenant, wanted.name, alias), None, withdrawn)
        except Conflict:
            return None
        return self._shelf.version(connection, wanted.name, number)

    def _still_wanted(self, connection: sa.Connection, digests: set[str], found: list[Standing]) -> frozenset[str]:
        """Those of the digests that a version in service has too, under another name or number."""
        hidden = {(s.name, s.number) for s in found if s.state is not VersionState.LIVE}
        table = schema.versions
        query = sa.select(table.c.name, table.c.number, table.c.digest).where(
            table.c.tenant == self._tenant, table.c.digest.in_(digests)
        )
        return frozenset(row.digest for row in connection.execute(query) if (row.name, row.number) not in hidden)

    def _standing(self, connection: sa.Connection, version: AdapterVersion) -> Standing:
        table = schema.standings
        found = self._shelf.standings(connection, table.c.name == version.name, table.c.number == version.number)
        if found:
            return found[0]
        return Standing(
            name=version.name,
            number=version.number,
            digest=version.digest,
            base_digest=version.base_digest,
            state=VersionState.LIVE,
            in_flight=InFlight.FINISH,
            pinned=False,
            who=version.published_by,
            why="",
            at=version.published_at,
            tenant=self._tenant,
        )

    def _decree(
        self, connection: sa.Connection, wanted: Standing, action: MoveAction, who: str, reason: str
    ) -> Standing:
        """Write a standing and its row of history. What changes nothing is no decree: the present one is returned."""
        who, reason = line(who, "who"), text(reason, "reason")
        # What is not served is not kept ready either.
        wanted = replace(wanted, pinned=wanted.pinned and wanted.state is VersionState.LIVE)
        table = schema.standings
        where = (table.c.tenant == self._tenant, table.c.name == wanted.name, table.c.number == wanted.number)
        row = connection.execute(sa.select(table).where(*where)).mappings().one_or_none()
        values = {"state": wanted.state.value, "in_flight": wanted.in_flight.value, "pinned": wanted.pinned}
        old = {"state": VersionState.LIVE.value, "in_flight": InFlight.FINISH.value, "pinned": False}
        if values == (old if row is None else {key: row[key] for key in values}):
            return wanted
        made = replace(wanted, who=who, why=reason, at=self._now())
        changes = {**values, "who": who, "why": reason, "at": made.at}
        if row is None:
            key = {"tenant": self._tenant, "name": made.name, "number": made.number}
            connection.execute(sa.insert(table).values(**key, **changes))
        else:
            connection.execute(sa.update(table).where(*where).values(**changes))
        note(connection, self._tenant, made.name, made.number, action, who, reason, made.at)
        return made


def revoked(standing: Standing, asked: str) -> VersionRevoked:
    """The refusal of a version whose bytes were revoked, perhaps under another name than the one asked for."""
    same = "" if standing.id == asked else f"its bytes are those of {standing.id}; "
    return VersionRevoked(asked, standing.who, same + standing.why)
