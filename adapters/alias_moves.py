"""How aliases move: by compare-and-set, each move with its row of history, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, Literal, TypeAlias

import sqlalchemy as sa

from adapters import schema
from adapters.errors import Conflict, GenerationMismatch, RecordNotFound
from adapters.records import AdapterVersion, AliasRecord, Fallback, Move, MoveAction
from adapters.rows import alias_of, move_of, move_row

# What an alias must point at for a move to happen: this version, no version at all (None), or whatever it likes.
Expected: TypeAlias = int | Literal["any"] | None
ANY: Final[Literal["any"]] = "any"
OF_THE_VERSION: Final = ""  # in place of an alias, in rows of history that are about a version itself


@dataclass(frozen=True, slots=True)
class Order:
    """A move that somebody asks for."""

    name: str
    alias: str
    action: MoveAction
    to_number: int
    who: str
    why: str
    report: str | None = None


@dataclass(frozen=True, slots=True)
class Promotable:
    """A promotion that may be made. champion: the one that there is; generation: of its alias, 0 without one."""

    version: AdapterVersion
    champion: AdapterVersion | None
    generation: int


def current(connection: sa.Connection, tenant: str, name: str, alias: str) -> AliasRecord | None:
    """Where an alias points now, or None."""
    table = schema.aliases
    query = sa.select(table).where(table.c.tenant == tenant, table.c.name == name, table.c.alias == alias)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else alias_of(row)


def expect(name: str, alias: str, now: AliasRecord | None, expected: Expected, generation: int | None = None) -> None:
    """Raise GenerationMismatch unless the alias points where the caller believes.

    generation: the one that it must still have, 0 where it pointed nowhere; None: whichever. It tells a flip away and
    back from none, which the version alone does not.
    """
    actual = None if now is None else now.number
    if expected not in (ANY, actual):
        raise GenerationMismatch(name, alias, expected, actual)
    if generation not in (None, generation_of(now)):
        raise GenerationMismatch(name, alias, actual, actual, moved=True)


def generation_of(now: AliasRecord | None) -> int:
    """How often an alias was moved or a trial on it began or ended; 0 for one that points nowhere."""
    return 0 if now is None else now.generation


def move(connection: sa.Connection, tenant: str, order: Order, at: datetime) -> Move:
    """Move an alias and write the history row.

    Pointing it where it points already changes nothing and is no move: the move that brought it there is returned. A
    forced move is written down even so, for its reason.
    """
    now = current(connection, tenant, order.name, order.alias)
    if now is not None and now.number == order.to_number and order.action is not MoveAction.FORCED:
        return next(m for m in log(connection, tenant, order.name, order.alias) if m.generation == now.generation)
    made = Move(
        name=order.name,
        alias=order.alias,
        action=order.action,
        from_number=None if now is None else now.number,
        to_number=order.to_number,
        generation=1 if now is None else now.generation + 1,
        who=order.who,
        why=order.why,
        report=order.report,
        at=at,
        tenant=tenant,
    )
    values = {"number": made.to_number, "generation": made.generation, "moved_at": at}
    table = schema.aliases
    if now is None:
        connection.execute(sa.insert(table).values(tenant=tenant, name=order.name, alias=order.alias, **values))
    else:
        where = (table.c.tenant == tenant, table.c.name == order.name, table.c.alias == order.alias)
        connection.execute(sa.update(table).where(*where).values(**values))
    connection.execute(sa.insert(schema.moves).values(**move_row(made)))
    return made


def mark(connection: sa.Connection, tenant: str, order: Order, at: datetime) -> Move:
    """Write a row of history, and count the alias one generation on, without moving it: a trial begins or ends.

    Raises RecordNotFound when the alias points nowhere.
    """
    now = current(connection, tenant, order.name, order.alias)
    if now is None:
        raise RecordNotFound(f"{order.name} has no alias {order.alias!r}; point it at a version first")
    made = Move(
        name=order.name,
        alias=order.alias,
        action=order.action,
        from_number=now.number,
        to_number=now.number,
        generation=now.generation + 1,
        who=order.who,
        why=order.why,
        report=None,
        at=at,
        tenant=tenant,
    )
    table = schema.aliases
    where = (table.c.tenant == tenant, table.c.name == order.name, table.c.alias == order.alias)
    connection.execute(sa.update(table).where(*where).values(generation=made.generation, moved_at=at))
    connection.execute(sa.insert(schema.moves).values(**move_row(made)))
    return made


def log(connection: sa.Connection, tenant: str, name: str, alias: str | None = None) -> list[Move]:
    """The moves of an adapter's aliases, or of one of them, newest first."""
    table = schema.moves
    query = sa.select(table).where(table.c.tenant == tenant, table.c.name == name).order_by(table.c.id.desc())
    if alias is not None:
        query = query.where(table.c.alias == alias)
    return [move_of(row) for row in connection.execute(query).mappings()]


def note(
    connection: sa.Connection, tenant: str, name: str, number: int, action: MoveAction, who: str, why: str, at: datetime
) -> None:
    """Write a row of history that is about a version itself: no alias moves, and no alias counts on."""
    table = schema.moves
    past = sa.select(sa.func.max(table.c.generation)).where(
        table.c.tenant == tenant, table.c.name == name, table.c.alias == OF_THE_VERSION
    )
    row = Move(
        name=name,
        alias=OF_THE_VERSION,
        action=action,
        from_number=None,
        to_number=number,
        generation=int(connection.scalar(past) or 0) + 1,
        who=who,
        why=why,
        report=None,
        at=at,
        tenant=tenant,
    )
    connection.execute(sa.insert(table).values(**move_row(row)))


def set_fallback(
    connection: sa.Connection, tenant: str, now: AliasRecord, fallback: Fallback, who: str, why: str, at: datetime
) -> AliasRecord:
    """Say who answers for an alias while its version is set aside, with a row of history."""
    if now.fallback is fallback:
        return now
    table = schema.aliases
    where = (table.c.tenant == tenant, table.c.name == now.name, table.c.alias == now.alias)
    connection.execute(sa.update(table).where(*where).values(fallback=fallback.value))
    told = f"{now.alias} falls back to {fallback.value}"
    why = f"{told}: {why}" if why.strip() else told
    note(connection, tenant, now.name, now.number, MoveAction.FALLBACK, who, why, at)
    return replace(now, fallback=fallback)


def rollback_target(
    name: str, champions: Sequence[Move], to: int | None, withdrawn: Container[int] = frozenset()
) -> int:
    """The version that a rollback goes back to. champions: the champion's moves, newest first.

    Without `to`: the champion before the present one, where versions that were rolled back no longer count, so two
    rollbacks go two champions back; nor do those in withdrawn, which nobody is served. With `to`: that version, if it
    ever was champion. Raises Conflict otherwise.
    """
    line: list[int] = []
    for past in reversed(champions):
        if past.action is MoveAction.ROLLBACK and past.to_number in line:
            del line[line.index(past.to_number) + 1 :]
        else:
            # A version that comes back stands at its new place only, so the one before it is always another.
            line = [number for number in line if number != past.to_number] + [past.to_number]
    if to is not None:
        if all(past.to_number != to for past in champions):
            # Or a rollback would be a way round the gate.
            raise Conflict(f"{name}@{to} never was champion; promote it instead")
        return to
    earlier = [number for number in line[:-1] if number not in withdrawn]
    if not earlier:
        raise Conflict(f"{name} has no earlier champion to go back to; name a version to promote instead")
    return earlier[-1]
