"""The options that commands share, and the door to the registry they open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from adapters.errors import InvalidRequest
from adapters.home import Home
from adapters.records import BASE_ID, ModelId, parse_model_id
from adapters.registry_door import Expected, RegistryDoor, open_door

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Where Loraplane keeps its things; default $LORAPLANE_HOME or ~/.loraplane."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", help="Work on this server's registry, such as http://127.0.0.1:8000; its key is $LORAPLANE_API_KEY."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it is kept in the history.")]

ExpectOption = Annotated[
    str, typer.Option("--expect", metavar="N|none|any", help="Move only if the alias points at this version now.")
]


@contextmanager
def opened(home: Path | None, url: str | None) -> Iterator[RegistryDoor]:
    """The registry that a command works on, closed at the end."""
    door = open_door(Home.find(home), url)
    try:
        yield door
    finally:
        door.close()


def name_of(model: str) -> str:
    """A bare adapter name, for a command about all of its versions. Raises InvalidRequest for anything else."""
    parsed = parse_model_id(model)
    if str(parsed) != parsed.name:
        raise InvalidRequest(
            f"this command is about the adapter, not about one version of it: give {parsed.name} for {model}", "name"
        )
    return _no_base(parsed.name)


def adapter_of(model: str) -> ModelId:
    """An adapter, one of its versions or one of its aliases. Raises InvalidRequest for anything else."""
    parsed = parse_model_id(model)
    _no_base(parsed.name)
    return parsed


def version_of(model: str) -> tuple[str, int]:
    """`name@3` as name and number. Raises InvalidRequest for anything else."""
    parsed = parse_model_id(model)
    if parsed.number is None:
        raise InvalidRequest(
            f"name the version, as in {parsed.name}@1 (loraplane adapters show {parsed.name})", "model"
        )
    return parsed.name, parsed.number


def _no_base(name: str) -> str:
    if name == BASE_ID:
        raise InvalidRequest(f"{name} is the base, not an adapter; loraplane models list shows the bases", "name")
    return name


def expected_of(text: str) -> Expected:
    """What --expect says. Raises InvalidRequest for anything but a version number, none or any."""
    if text == "any":
        return "any"
    if text == "none":
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise InvalidRequest(f"--expect takes a version number, none or any, not {text!r}", "expected_version")
