"""A registry that is a dictionary, and remembers at what time every alias meant what and who was out of service."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from adapters.alias_moves import ANY, Expected, Promotable
from adapters.canaries import Route
from adapters.errors import Conflict, GenerationMismatch, ModelNotFound, NoChampion, VersionRetired, VersionRevoked
from adapters.records import (
    CHAMPION,
    AdapterVersion,
    BoundBy,
    InFlight,
    Move,
    MoveAction,
    PromptFormat,
    Standing,
    VersionState,
    parse_model_id,
)
from adapters.standings import Decrees
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
class SimWithdrawal:
    """A version out of service, from `at` to `until`, in seconds."""

    standing: Standing
    at: float
    until: float = float("inf")

    @property
    def ends_running(self) -> bool:
        """Whether answers that run are ended."""
        return self.standing.state is VersionState.REVOKED and self.standing.in_flight is InFlight.END


@dataclass
class SimStandings:
    """What operators decree. See Standings."""

    registry: SimRegistry
    pinned: dict[str, Standing] = field(default_factory=dict)

    def retire(self, name: str, number: int, *, who: str, reason: str = "") -> Standing:
        """See Standings."""
        if self.registry.names[name].moves[-1][1] == number:
            raise Conflict("an alias points at it")
        return self._withdraw(name, number, VersionState.RETIRED, InFlight.FINISH)

    def revoke(self, name: str, number: int, *, who: str, reason: str, in_flight: InFlight) -> Standing:
        """See Standings."""
        return self._withdraw(name, number, VersionState.REVOKED, in_flight)

    def _withdraw(self, name: str, number: int, state: VersionState, in_flight: InFlight) -> Standing:
        standing = self._standing(name, number, state, in_flight, pinned=False)
        self.pinned.pop(standing.digest, None)
        self.registry.withdrawals.append(SimWithdrawal(standing, self.registry.now()))
        return standing

    def restore(self, name: str, number: int, *, who: str, reason: str) -> Standing:
        """See Standings."""
        for withdrawn in self.registry.withdrawals:
            if (withdrawn.standing.name, withdrawn.standing.number) == (name, number):
                withdrawn.until = min(withdrawn.until, self.registry.now())
        return self._standing(name, number, VersionState.LIVE, InFlight.FINISH, pinned=False)

    def heal(self) -> None:
        """Everything is in service again, and nothing is pinned."""
        self.pinned.clear()
        for withdrawn in self.registry.withdrawals:
            withdrawn.until = min(withdrawn.until, self.registry.now())

    def pin(self, name: str, number: int, on: bool, *, who: str) -> Standing:
        """See Standings."""
        standing = self._standing(name, number, VersionState.LIVE, InFlight.FINISH, pinned=on)
        if on:
            self.pinned[standing.digest] = standing
        else:
            self.pinned.pop(standing.digest, None)
        return standing

    def decrees(self) -> Decrees:
        """See Standings."""
        now = [w.standing for w in self.registry.withdrawals if w.until > self.registry.now()]
        revoked = tuple(s for s in now if s.state is VersionState.REVOKED)
        return Decrees(revoked, frozenset(s.digest for s in now), tuple(self.pinned.values()))

    def _standing(self, name: str, number: int, state: VersionState, in_flight: InFlight, *, pinned: bool) -> Standing:
        version = self.registry.version(name, number)
        return Standing(name, number, version.digest, BASE.digest, state, in_flight, pinned, "sim", "", _AT)


@dataclass
class SimRegistry:
    """What gateways and operators ask of a registry. now: seconds."""

    now: Callable[[], float]
    names: dict[str, SimName] = field(default_factory=dict)
    name_of: dict[str, str] = field(default_factory=dict)
    withdrawals: list[SimWithdrawal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.standings = SimStandings(self)

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
            held.moves.append((self.now(), 1))
        return version

    def version(self, name: str, number: int) -> AdapterVersion:
        """See Registry."""
        held = self.names.get(name)
        if held is None or number > len(held.versions):
            raise ModelNotFound(f"{name}@{number}", [])
        return held.versions[number - 1]

    def may_promote(
        self, name: str, number: int, *, force: bool = False, expected_version: Expected = ANY
    ) -> Promotable:
        """See Registry."""
        version, moves = self.version(name, number), self.names[name].moves
        now = moves[-1][1]
        self._refuse_withdrawn(version)
        if expected_version != ANY and expected_version != now:
            raise GenerationMismatch(name, CHAMPION, expected_version, now)
        return Promotable(version, self.version(name, now), len(moves))

    def promote(
        self,
        name: str,
        number: int,
        *,
        who: str,
        reason: str = "",
        force: bool = False,
        expected_version: Expected = ANY,
        expected_generation: int | None = None,
    ) -> Move:
        """See Registry."""
        found = self.may_promote(name, number, expected_version=expected_version)
        if expected_generation not in (None, found.generation):
            raise GenerationMismatch(name, CHAMPION, expected_generation, found.generation, moved=True)
        return self._move(name, number, MoveAction.FORCED)

    def rollback(
        self, name: str, *, who: str, reason: str = "", to: int | None = None, expected_version: Expected = ANY
    ) -> Move:
        """See Registry."""
        moves = self.names[name].moves
        before = [number for _, number in moves if number != moves[-1][1]]
        if not before:
            raise Conflict("there is no earlier champion")
        self._refuse_withdrawn(self.version(name, before[-1]))
        return self._move(name, before[-1], MoveAction.ROLLBACK)

    def _move(self, name: str, number: int, action: MoveAction) -> Move:
        moves = self.names[name].moves
        before = moves[-1][1]
        moves.append((self.now(), number))
        return Move(name, CHAMPION, action, before, number, len(moves), "sim", "", None, _AT)

    def route(self, model: str) -> Route:
        """See Versions."""
        wanted = parse_model_id(model)
        held = self.names.get(wanted.name)
        if held is not None and wanted.number is None and not held.moves:
            raise NoChampion(wanted.name, [])
        number = wanted.number or (held.moves[-1][1] if held is not None else 0)
        version = self.version(wanted.name, number)
        self._refuse_withdrawn(version)
        return Route(version)

    def instead_of(self, model: str, aside: int) -> AdapterVersion | None:
        """See Versions."""
        wanted = parse_model_id(model)
        held = self.names.get(wanted.name)
        if held is None or wanted.number is not None or not held.falls_back:
            return None
        before = [number for _, number in held.moves if number != aside]
        found = held.versions[before[-1] - 1] if before else None
        gone = {w.standing.digest for w in self.withdrawals if w.until > self.now()}
        return None if found is None or found.digest in gone else found

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

    def _refuse_withdrawn(self, version: AdapterVersion) -> None:
        for withdrawn in self.withdrawals:
            if withdrawn.standing.digest == version.digest and withdrawn.until > self.now():
                revoked = withdrawn.standing.state is VersionState.REVOKED
                raise (VersionRevoked if revoked else VersionRetired)(version.id, "sim", "")
