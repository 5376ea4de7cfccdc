"""Rows of the tables as the records of `adapters.records`, and back; and what a caller may have written into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from adapters.errors import InvalidRequest
from adapters.prompts import prompt_format_from_json, prompt_format_to_json
from adapters.records import (
    AdapterVersion,
    AliasRecord,
    BaseRecord,
    BoundBy,
    Fallback,
    InFlight,
    Move,
    MoveAction,
    Standing,
    VersionState,
)
from adapters.strict_json import canonical

MAX_FACTS_BYTES = 64 << 10
MAX_LINE = 200
MAX_TEXT = 4000

Row = sa.RowMapping | Mapping[str, Any]


def base_of(row: Row) -> BaseRecord:
    """The base of a row of `bases`."""
    return BaseRecord(
        name=row["name"],
        digest=row["digest"],
        family=row["family"],
        folder=row["folder"],
        modules={module: (shape[0], shape[1]) for module, shape in row["modules"].items()},
        max_positions=row["max_positions"],
        vocab_size=row["vocab_size"],
        parameters=row["parameters"],
        source=row["source"],
        created_at=row["created_at"],
        aliases=tuple(row["aliases"]),
        note=row["note"],
        tenant=row["tenant"],
    )


def base_row(base: BaseRecord) -> dict[str, Any]:
    """The row of a base, without its id."""
    return {
        "kind": "base",
        "tenant": base.tenant,
        "name": base.name,
        "digest": base.digest,
        "family": base.family,
        "folder": base.folder,
        "modules": {module: list(shape) for module, shape in base.modules.items()},
        "max_positions": base.max_positions,
        "vocab_size": base.vocab_size,
        "parameters": base.parameters,
        "source": base.source,
        "aliases": list(base.aliases),
        "note": base.note,
        "created_at": base.created_at,
    }


def version_of(row: Row) -> AdapterVersion:
    """The version of a row of `versions`."""
    return AdapterVersion(
        name=row["name"],
        number=row["number"],
        digest=row["digest"],
        base_digest=row["base_digest"],
        bound_by=BoundBy(row["bound_by"]),
        rank=row["rank"],
        modules=tuple(row["modules"]),
        size_bytes=row["size_bytes"],
        prompt_format=prompt_format_from_json(row["prompt_format"]),
        originals=row["originals"],
        facts=row["facts"],
        published_by=row["published_by"],
        published_at=row["published_at"],
        note=row["note"],
        tenant=row["tenant"],
    )


def version_row(version: AdapterVersion, config: str, weights: str) -> dict[str, Any]:
    """The row of a version; config and weights are the digests of its canonical blobs."""
    return {
        "kind": "adapter",
        "tenant": version.tenant,
        "name": version.name,
        "number": version.number,
        "digest": version.digest,
        "base_digest": version.base_digest,
        "bound_by": version.bound_by.value,
        "config": config,
        "weights": weights,
        "rank": version.rank,
        "modules": list(version.modules),
        "size_bytes": version.size_bytes,
        "prompt_format": prompt_format_to_json(version.prompt_format),
        "originals": dict(version.originals),
        "facts": dict(version.facts),
        "published_by": version.published_by,
        "published_at": version.published_at,
        "note": version.note,
    }


def alias_of(row: Row) -> AliasRecord:
    """The alias of a row of `aliases`."""
    return AliasRecord(
        name=row["name"],
        alias=row["alias"],
        number=row["number"],
        generation=row["generation"],
        moved_at=row["moved_at"],
        tenant=row["tenant"],
        fallback=Fallback(row["fallback"]),
    )


def standing_of(row: Row) -> Standing:
    """The standing of a row of `standings` joined with its version."""
    return Standing(
        name=row["name"],
        number=row["number"],
        digest=row["digest"],
        base_digest=row["base_digest"],
        state=VersionState(row["state"]),
        in_flight=InFlight(row["in_flight"]),
        pinned=row["pinned"],
        who=row["who"],
        why=row["why"],
        at=row["at"],
        tenant=row["tenant"],
    )


def move_of(row: Row) -> Move:
    """The move of a row of `moves`."""
    return Move(
        name=row["name"],
        alias=row["alias"],
        action=MoveAction(row["action"]),
        from_number=row["from_number"],
        to_number=row["to_number"],
        generation=row["generation"],
        who=row["who"],
        why=row["why"],
        report=row["report"],
        at=row["at"],
        tenant=row["tenant"],
    )


def move_row(move: Move) -> dict[str, Any]:
    """The row of a move, without its id."""
    return {
        "tenant": move.tenant,
        "name": move.name,
        "alias": move.alias,
        "action": move.action.value,
        "from_number": move.from_number,
        "to_number": move.to_number,
        "generation": move.generation,
        "who": move.who,
        "why": move.why,
        "report": move.report,
        "at": move.at,
    }


def line(value: str, what: str) -> str:
    """A caller's one-line text, such as who acts. Raises InvalidRequest when it is empty, long or not printable."""
    if not value.strip() or len(value) > MAX_LINE or not value.isprintable():
        raise InvalidRequest(f"{what} must be one printable line of 1 to {MAX_LINE} characters", what)
    return value


def text(value: str, what: str) -> str:
    """A caller's note or reason, which may be empty. Raises InvalidRequest when it is long or holds control codes."""
    if len(value) > MAX_TEXT or not value.replace("\n", "").replace("\t", "").isprintable():
        raise InvalidRequest(f"{what} must be printable text of at most {MAX_TEXT} characters", what)
    return value


def checked_facts(facts: Mapping[str, object]) -> dict[str, object]:
    """Facts as they will come back: plain JSON. Raises InvalidRequest when they are not, or too many."""
    try:
        data = canonical(dict(facts))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"facts must be plain JSON: {error}", "facts") from None
    if len(data) > MAX_FACTS_BYTES:
        raise InvalidRequest(f"facts have {len(data)} bytes of JSON; at most {MAX_FACTS_BYTES} are kept", "facts")
    kept: dict[str, object] = json.loads(data)
    return kept
