"""A registry that is a dictionary, and remembers at what time every alias meant what."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from adapters.canaries import Route
from adapters.errors import ModelNotFound, NoChampion
from adapters.records import AdapterVersion, BoundBy, PromptFormat, parse_model_id
from tests.adapter_factory import base_record

BASE = base_record("sim")
_AT = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class SimName:
    """An adapter: its versions, and since when its champion is which. falls_back: to the version before, where the
    champion is set aside."""

    versions: list[AdapterVersion] = field(default_factory=list)
    moves: list[tuple[float, int]] = field(default_factory=list)
    falls_back: bool = False


@dataclass
class SimRegistry:
    """What a gateway asks of a registry, and what an operator does to it. now: seconds."""

    now: Callable[[], float]
    names: dict[str, SimName] = field(default_factory=dict)
    name_of: dict[str, str] = field(default_factory=dict)

    def publish(self, name: str) -> AdapterVersion:
        """The next version of a name; the first is its champion at once."""
        held = self.names.setdefault(name, SimName())
        number = len(held.versions) + 1
        digest = hashlib.sha256(f"{name}@{number}".encode()).hexdigest()
        version = AdapterVersion(
            name=name,
            number=number,
            digest=digest,
            base_digest=BASE.digest,
            bound_by=BoundBy.DIGEST,
            rank=4,
            modules=(),
            size_bytes=100,
            prompt_format=PromptFormat(),
            originals={},
            facts={},
            published_by="sim",
            published_at=_AT,
        )
        held.versions.append(version)
        self.name_of[digest] = name
        if number == 1:
            self.flip(name, 1)
        return version

    def flip(self, name: str, number: int) -> None:
        """Make a version the champion."""
        self.names[name].moves.append((self.now(), number))

    def route(self, model: str) -> Route:
        """See Versions."""
        return Route(self._resolve(model))

    def _resolve(self, model_id: str) -> AdapterVersion:
        wanted = parse_model_id(model_id)
        held = self.names.get(wanted.name)
        if held is None:
            raise ModelNotFound(model_id, [])
        if wanted.number is not None:
            if wanted.number > len(held.versions):
                raise ModelNotFound(model_id, [])
            return held.versions[wanted.number - 1]
        if not held.moves:
            raise NoChampion(wanted.name, [])
        return held.versions[held.moves[-1][1] - 1]

    def instead_of(self, model: str, aside: int) -> AdapterVersion | None:
        """See Versions."""
        wanted = parse_model_id(model)
        held = self.names.get(wanted.name)
        if held is None or wanted.number is not None or not held.falls_back:
            return None
        before = [number for _, number in held.moves if number != aside]
        return held.versions[before[-1] - 1] if before else None

    def meant(self, model_id: str, since: float, until: float) -> set[str]:
        """The digests that an id named at some time in between."""
        wanted = parse_model_id(model_id)
        held = self.names[wanted.name]
        if wanted.number is not None:
            return {held.versions[wanted.number - 1].digest}
        ends = [at for at, _ in held.moves[1:]] + [float("inf")]
        return {
            held.versions[number - 1].digest
            for (at, number), end in zip(held.moves, ends, strict=True)
            if at <= until and end >= since
        }
