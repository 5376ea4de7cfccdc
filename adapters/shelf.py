"""What lies in the tables, as one tenant sees it: reads within the caller's transaction."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import sqlalchemy as sa

from adapters import schema
from adapters.errors import BaseMissing, ModelNotFound, NoChampion
from adapters.families import FAMILIES
from adapters.records import (
    BASE_ID,
    CHAMPION,
    AdapterSummary,
    AdapterVersion,
    AliasRecord,
    BaseRecord,
    ModelId,
    Standing,
    VersionState,
)
from adapters.rows import alias_of, base_of, standing_of, version_of

_NEAREST = 3
_LISTED = 10


class Shelf:
    """Reads of one tenant's rows. It keeps nothing; every method sees what the connection sees."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant
        table, versions = schema.standings, schema.versions
        same = [table.c[key] == versions.c[key] for key in ("tenant", "name", "number")]
        self._standings_query = (
            sa.select(table, versions.c.digest, versions.c.base_digest)
            .join(versions, sa.and_(*same))
            .where(table.c.tenant == tenant)
            .order_by(table.c.name, table.c.number)
        )
        self._withdrawals_query = self._standings_query.where(
            versions.c.digest == sa.bindparam("wanted"), table.c.state != VersionState.LIVE.value
        )

    def bases(self, connection: sa.Connection) -> list[BaseRecord]:
        """All bases in the order they came."""
        table = schema.bases
        query = sa.select(table).where(table.c.tenant == self._tenant).order_by(table.c.id)
        return [base_of(row) for row in connection.execute(query).mappings()]

    def adapter_exists(self, connection: sa.Connection, name: str) -> bool:
        """Whether anything was ever published under this name."""
        table = schema.adapters
        query = sa.select(table.c.name).where(table.c.tenant == self._tenant, table.c.name == name)
        return connection.scalar(query) is not None

    def require_adapter(self, connection: sa.Connection, name: str) -> None:
        """Raise ModelNotFound unless the adapter exists."""
        if not self.adapter_exists(connection, name):
            raise self._no_such(connection, name, name)

    def last_number(self, connection: sa.Connection, name: str) -> int:
        """The highest version number of an adapter; 0 when it has none."""
        table = schema.versions
        query = sa.select(sa.func.max(table.c.number)).where(table.c.tenant == self._tenant, table.c.name == name)
        return int(connection.scalar(query) or 0)

    def version_by_digest(self, connection: sa.Connection, name: str, digest: str) -> AdapterVersion | None:
        """The version of this adapter with this content, or None."""
        table = schema.versions
        return self._one_version(connection, table.c.name == name, table.c.digest == digest)

    def version(self, connection: sa.Connection, name: str, number: int) -> AdapterVersion:
        """One version. Raises ModelNotFound with what there is instead."""
        table = schema.versions
        found = self._one_version(connection, table.c.name == name, table.c.number == number)
        if found is not None:
            return found
        known = self.summaries(connection, name)
        if not known:
            raise self._no_such(connection, name, f"{name}@{number}")
        raise ModelNotFound(f"{name}@{number}", [v.id for v in known[0].versions[:_LISTED]])

    def resolve(self, connection: sa.Connection, wanted: ModelId) -> AdapterVersion:
        """The version that an id means now. Raises ModelNotFound or NoChampion."""
        if wanted.number is not None:
            return self.version(connection, wanted.name, wanted.number)
        alias = wanted.alias or CHAMPION
        pointer, table = schema.aliases, schema.versions
        target = (
            sa.select(pointer.c.number)
            .where(pointer.c.tenant == self._tenant, pointer.c.name == wanted.name, pointer.c.alias == alias)
            .scalar_subquery()
        )
        found = self._one_version(connection, table.c.name == wanted.name, table.c.number == target)
        if found is not None:
            return found
        known = self.summaries(connection, wanted.name)
        if not known:
            raise self._no_such(connection, wanted.name, str(wanted))
        ids = [version.id for version in known[0].versions[:_LISTED]]
        if alias == CHAMPION:
            raise NoChampion(wanted.name, ids)
        raise ModelNotFound(str(wanted), [*(f"{wanted.name}@{a.alias}" for a in known[0].aliases), *ids][:_LISTED])

    def summary(self, connection: sa.Connection, name: str) -> AdapterSummary:
        """One adapter. Raises ModelNotFound with the nearest names."""
        known = self.summaries(connection, name)
        if not known:
            raise self._no_such(connection, name, name)
        return known[0]

    def summaries(self, connection: sa.Connection, name: str | None = None) -> list[AdapterSummary]:
        """All adapters by name, or the one of this name if it exists."""
        versions: dict[str, list[AdapterVersion]] = {}
        aliases: dict[str, list[AliasRecord]] = {}
        for row in self._rows(connection, schema.versions, name, schema.versions.c.number.desc()):
            versions.setdefault(row["name"], []).append(version_of(row))
        for row in self._rows(connection, schema.aliases, name, schema.aliases.c.alias):
            aliases.setdefault(row["name"], []).append(alias_of(row))
        standings: dict[str, list[Standing]] = {}
        for standing in self.standings(connection, *([] if name is None else [schema.versions.c.name == name])):
            standings.setdefault(standing.name, []).append(standing)
        return [
            AdapterSummary(n, tuple(versions[n]), tuple(aliases.get(n, ())), tuple(standings.get(n, ())))
            for n in sorted(versions)
        ]

    def standings(self, connection: sa.Connection, *where: sa.ColumnElement[bool]) -> list[Standing]:
        """What was decreed on versions, by name and number; `where` narrows the versions."""
        return [standing_of(row) for row in connection.execute(self._standings_query.where(*where)).mappings()]

    def withdrawals(self, connection: sa.Connection, digest: str) -> list[Standing]:
        """What keeps versions of this digest out of service. Asked for by every request."""
        found = connection.execute(self._withdrawals_query, {"wanted": digest}).mappings()
        return [standing_of(row) for row in found]

    def _rows(
        self, connection: sa.Connection, table: sa.Table, name: str | None, order: sa.ColumnElement[object]
    ) -> Sequence[sa.RowMapping]:
        query = sa.select(table).where(table.c.tenant == self._tenant).order_by(order)
        if name is not None:
            query = query.where(table.c.name == name)
        return connection.execute(query).mappings().all()

    def _one_version(self, connection: sa.Connection, *where: sa.ColumnElement[bool]) -> AdapterVersion | None:
        query = sa.select(schema.versions).where(schema.versions.c.tenant == self._tenant, *where)
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else version_of(row)

    def _no_such(self, connection: sa.Connection, name: str, asked: str) -> ModelNotFound:
        """Nothing answers to the name: say which names are near."""
        table = schema.adapters
        names = list(connection.scalars(sa.select(table.c.name).where(table.c.tenant == self._tenant)))
        names += [BASE_ID, *(base.name for base in self.bases(connection))]
        return ModelNotFound(asked, difflib.get_close_matches(name, names, n=_NEAREST, cutoff=0.5))


def chosen_base(bases: Sequence[BaseRecord], which: str) -> BaseRecord:
    """The base of this name, alias or digest; `base` is the first that a runner computes, else the first.

    bases: in the order they came. Raises BaseMissing, which says how to get one.
    """
    if not bases:
        raise BaseMissing("no base is here yet; fetch one: loraplane models pull smollm2-135m")
    if which == BASE_ID:
        return next((base for base in bases if base.family in FAMILIES), bases[0])
    found = next((base for base in bases if which in (base.name, base.digest, *base.aliases)), None)
    if found is None:
        raise BaseMissing(
            f"no base {which[:200]!r} is here, only {', '.join(base.name for base in bases)}; "
            f"fetch it: loraplane models pull {which[:200]}"
        )
    return found
