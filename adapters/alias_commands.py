"""The commands that move an alias and tell where it has been: promote, rollback, history."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.errors import InvalidRequest
from adapters.options import (
    ExpectOption,
    HomeOption,
    JsonOption,
    ReasonOption,
    UrlOption,
    expected_of,
    name_of,
    opened,
    version_of,
)
from adapters.records import CHAMPION, Move
from adapters.registry_door import RegistryDoor
from adapters.screen import say, show_json, show_table, when
from adapters.wire import move_to_json, page

# What the history says of a move that nobody gave a reason for.
_PROMOTED = "promoted through the gate"
_ROLLED_BACK = "rolled back"


def promote(
    model: Annotated[str, typer.Argument(metavar="NAME@N", help="The version to make champion.")],
    force: Annotated[bool, typer.Option("--force", help="Overrule the gate; needs --reason, and is recorded.")] = False,
    reason: ReasonOption = "",
    expect: ExpectOption = "any",
    warm: Annotated[
        bool, typer.Option("--warm/--no-warm", help="Have the running server load the version before the alias moves.")
    ] = True,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion: requests for the bare name get it from now on.

    The adapter's gate policy must pass. A running server loads the version first, and moves nothing when it cannot.
    Running requests keep the version they began with; the version before stays loaded for a while.

    Example: loraplane promote summarize@3 --reason "better on names"
    """
    name, number = version_of(model)
    if force and not reason.strip():
        raise InvalidRequest("--force needs --reason TEXT; it is kept in the history", "reason")
    expected = expected_of(expect)
    with opened(home, url) as door:
        before = _generation(door, name)
        move = door.promote(name, number, reason=reason or _PROMOTED, force=force, expected=expected, warm=warm)
    _tell(move, before, as_json)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    reason: ReasonOption = "",
    to: Annotated[
        int | None, typer.Option("--to", min=1, help="The version to go back to; else the one before.")
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the previous champion back, or an earlier one. No gate stands in the way.

    Example: loraplane rollback summarize --reason "cuts sentences short"
    """
    name_of(name)
    with opened(home, url) as door:
        before = _generation(door, name)
        move = door.rollback(name, reason=reason or _ROLLED_BACK, to=to)
    _tell(move, before, as_json)


def history(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every move of the adapter's aliases, and what was decreed on its versions: when, who, from where to where, why.

    Example: loraplane history summarize --json
    """
    name_of(name)
    with opened(home, url) as door:
        moves = door.history(name)
    if as_json:
        show_json(page(map(move_to_json, moves)))
        return
    show_table(
        ("WHEN", "WHO", "ALIAS", "ACTION", "FROM", "TO", "REPORT", "WHY"),
        [
            (
                when(m.at),
                m.who,
                m.alias or "-",
                m.action.value,
                "-" if m.from_number is None else str(m.from_number),
                str(m.to_number),
                (m.report or "-")[:12],
                m.why or "-",
            )
            for m in moves
        ],
        empty=f"no alias of {name} has moved yet",
    )


def _generation(door: RegistryDoor, name: str) -> int | None:
    """How often the champion has moved; None when none is."""
    return next((a.generation for a in door.adapter(name).aliases if a.alias == CHAMPION), None)


def _tell(move: Move, before: int | None, as_json: bool) -> None:
    """The move that was asked for; what changed nothing brings the older move that made it so."""
    if as_json:
        show_json(move_to_json(move))
        return
    if move.generation == before:
        say(
            f"{move.name}@{move.alias} is {move.name}@{move.to_number} already, nothing changed "
            f"({move.action.value} by {move.who} at {when(move.at)})"
        )
        return
    was = "nothing" if move.from_number is None else f"{move.name}@{move.from_number}"
    say(f"{move.name}@{move.alias} is {move.name}@{move.to_number} now, was {was} ({move.action.value} by {move.who})")
