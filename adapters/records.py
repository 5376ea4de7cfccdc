"""What the registry remembers, as frozen records. No behaviour beyond parsing ids and saying one's own name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from adapters.errors import InvalidRequest

DEFAULT_TENANT = "default"
CHAMPION = "champion"
BASE_ID = "base"
RESERVED_NAMES = frozenset({BASE_ID, "latest"})
ROUTE_NAMES = frozenset({"residency"})  # GET /v1/adapters/{name} of such an adapter would be another page

_NAME = r"[a-z0-9](?:[._-]?[a-z0-9]){0,62}"
_ALIAS = r"[a-z][a-z0-9_-]{0,31}"
_MODEL_ID = re.compile(rf"({_NAME})(?:@(?:([1-9][0-9]{{0,8}})|({_ALIAS})))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelId:
    """A parsed model id: `name`, `name@3` or `name@champion`. At most one of number and alias is set."""

    name: str
    number: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = self.number if self.number is not None else self.alias
        return self.name if selector is None else f"{self.name}@{selector}"


def parse_model_id(text: str) -> ModelId:
    """Parse the wire's `model`. Raises InvalidRequest (param `model`) when the grammar does not match."""
    match = _MODEL_ID.fullmatch(text)
    if match is None:
        raise InvalidRequest(
            f"{text[:80]!r} is not a model id; use name, name@3 or name@alias, lower case, at most 63 characters "
            f"of a-z 0-9 . _ -, each separator between two letters or digits.",
            "model",
        )
    name, number, alias = match.groups()
    return ModelId(name, int(number) if number else None, alias)


def check_adapter_name(name: str) -> str:
    """The name if it may be published. Raises InvalidRequest otherwise."""
    parsed = parse_model_id(name)
    if parsed.number is not None or parsed.alias is not None:
        raise InvalidRequest(f"{name!r} names a version; publish under a bare name.", "name")
    if name in RESERVED_NAMES | ROUTE_NAMES:
        raise InvalidRequest(f"{name!r} is reserved; choose another name.", "name")
    return name


def check_alias(alias: str) -> str:
    """The alias if it is well formed. Raises InvalidRequest otherwise; `latest` is reserved."""
    if re.fullmatch(_ALIAS, alias, re.ASCII) is None or alias in RESERVED_NAMES:
        raise InvalidRequest(f"{alias!r} is not an alias; use a letter, then at most 31 of a-z 0-9 _ -.", "alias")
    return alias


class BoundBy(StrEnum):
    """What proved that an adapter belongs to its base."""

    DIGEST = "digest"
    NAME = "name"
    SHAPE = "shape"


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """A frozen model on this machine.

    digest: SHA-256 hex of architecture section 1. modules: linear module path -> (out, in) features.
    folder: the saved model, relative to the home. names: what it answers to beside `base`; the first is its own.
    """

    name: str
    digest: str
    family: str
    folder: str
    modules: Mapping[str, tuple[int, int]]
    max_positions: int
    vocab_size: int
    parameters: int
    source: str
    created_at: datetime
    aliases: tuple[str, ...] = ()
    note: str = ""
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a version suggests when a request leaves a field out. None means: the server's own default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How an adapter's prompts were rendered in training: declarative, no template language.

    style `chat` renders messages with the base's chat template; `text` writes prefix + content + suffix.
    system: used when the messages bring no system text of their own. prefix and suffix wrap the content of the last
    user message. stops: strings that end the answer.
    """

    style: str = "chat"
    system: str = ""
    prefix: str = ""
    suffix: str = ""
    stops: tuple[str, ...] = ()
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An immutable numbered artefact of an adapter.

    digest: SHA-256 of its manifest blob, which names the canonical weights, config and prompt format.
    originals: file name -> SHA-256 of the bytes as published. facts: how it was made (run, data, seed ...).
    """

    name: str
    number: int
    digest: str
    base_digest: str
    bound_by: BoundBy
    rank: int
    modules: tuple[str, ...]
    size_bytes: int
    prompt_format: PromptFormat
    originals: Mapping[str, str]
    facts: Mapping[str, object]
    published_by: str
    published_at: datetime
    note: str = ""
    tenant: str = DEFAULT_TENANT

    @property
    def id(self) -> str:
        """`name@3`: what an answer's `model` says."""
        return f"{self.name}@{self.number}"


class Fallback(StrEnum):
    """Who answers for an alias while the engine has set its version aside."""

    REFUSE = "503"  # nobody
    PREVIOUS = "previous"  # the version that the alias pointed at before; the answer names it


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """A movable pointer. generation counts its moves, and what else its history tells; it only grows."""

    name: str
    alias: str
    number: int
    generation: int
    moved_at: datetime
    tenant: str = DEFAULT_TENANT
    fallback: Fallback = Fallback.REFUSE


class MoveAction(StrEnum):
    """What a row of the history tells of: an alias moved, or what else was decreed."""

    PROMOTE = "promote"
    FORCED = "forced"
    ROLLBACK = "rollback"
    SET = "set"
    CANARY = "canary"
    CANARY_STOP = "canary_stop"
    CANARY_ROLLBACK = "canary_rollback"
    SHADOW = "shadow"
    SHADOW_STOP = "shadow_stop"
    FALLBACK = "fallback"
    RETIRE = "retire"
    REVOKE = "revoke"
    REVOKE_NOW = "revoke_now"  # and what was running was ended
    RESTORE = "restore"
    PIN = "pin"
    UNPIN = "unpin"


class VersionState(StrEnum):
    """Whether a version is served."""

    LIVE = "live"
    RETIRED = "retired"  # this version of this name is not
    REVOKED = "revoked"  # what it consists of is not, under any name


class InFlight(StrEnum):
    """What becomes of running answers when their version is revoked."""

    FINISH = "finish"
    END = "end"


@dataclass(frozen=True, slots=True)
class Standing:
    """What was decreed last on a version, by whom and why; a version without a decree is live and not pinned.

    in_flight says something of a revoked version alone. pinned: every engine keeps it in a slot.
    """

    name: str
    number: int
    digest: str
    base_digest: str
    state: VersionState
    in_flight: InFlight
    pinned: bool
    who: str
    why: str
    at: datetime
    tenant: str = DEFAULT_TENANT

    @property
    def id(self) -> str:
        """`name@3`."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Residency:
    """Where a version's tensors lie in a running engine, as its last answer said.

    tier: device, host or gone. size_bytes: of the tensors; when they are gone, what that freed on all tiers.
    """

    model: str
    digest: str
    tier: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A version taken out of service: what was decreed, and what that freed. None: nothing yet, for answers still run,
    no engine can say, or another version in service has the same bytes."""

    standing: Standing
    residency: Residency | None


@dataclass(frozen=True, slots=True)
class Move:
    """One row of an adapter's history: who moved which alias from where to where, when, why, on which report.

    A row with the empty alias is about the version `to_number` itself.
    """

    name: str
    alias: str
    action: MoveAction
    from_number: int | None
    to_number: int
    generation: int
    who: str
    why: str
    report: str | None
    at: datetime
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One adapter in a listing: its versions, newest first, and where its aliases point."""

    name: str
    versions: tuple[AdapterVersion, ...]
    aliases: tuple[AliasRecord, ...]
    standings: tuple[Standing, ...] = ()

    @property
    def champion(self) -> int | None:
        """The promoted version's number, or None."""
        return next((a.number for a in self.aliases if a.alias == CHAMPION), None)

    @property
    def withdrawn(self) -> Mapping[int, VersionState]:
        """The versions that are not served, and why not."""
        return {s.number: s.state for s in self.standings if s.state is not VersionState.LIVE}

    def standing_of(self, number: int) -> str:
        """A version's standing in a word: live, pinned, retired or revoked."""
        found = next((s for s in self.standings if s.number == number), None)
        return "live" if found is None else "pinned" if found.pinned else found.state.value
