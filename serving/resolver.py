"""From the model id of a request to the very weights that will answer it, once (contract C3)."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from adapters.canaries import Route
from adapters.errors import InvalidRequest, ModelNotFound, VersionWithdrawn
from adapters.records import BASE_ID, AdapterVersion, BaseRecord, PromptFormat
from serving.arms import Beside, Lot, Taken, draw

_MAX_REMEMBERED = 4096
_MAX_SHOWN = 100
_MAX_NAME = 63


@dataclass(frozen=True, slots=True)
class Weights:
    """What answers a request: a base, and the version on top of it if there is one (contract C2).

    instead_of: the version that was asked for, when it is set aside and this one answers by the alias's policy.
    published_at: when the version was, in unix seconds.
    """

    model: str
    base_digest: str
    adapter: str | None = None
    version: int | None = None
    digest: str | None = None
    instead_of: str | None = None
    published_at: float | None = None

    @property
    def fingerprint(self) -> str:
        """Stable name of this combination of weights, for `system_fingerprint`."""
        return "fp_" + hashlib.sha256(f"{self.base_digest}:{self.digest or ''}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Target:
    """Weights, and how a prompt for them is rendered.

    taken: the arm of a canary that this is; beside: what computes the same request unseen.
    """

    weights: Weights
    prompt_format: PromptFormat
    taken: Taken | None = None
    beside: Beside | None = None


class Versions(Protocol):
    """What serving a request asks of a registry."""

    def route(self, model: str) -> Route: ...
    def instead_of(self, model: str, aside: int) -> AdapterVersion | None: ...


class Resolver:
    """Resolves model ids for one served base. It keeps no aliases: a flip counts from the next request on."""

    def __init__(self, versions: Versions, base: BaseRecord) -> None:
        self._versions = versions
        self.base = base
        self._base_names = frozenset({BASE_ID, base.name, *base.aliases})
        self._base_target = Target(Weights(BASE_ID, base.digest), PromptFormat())
        self._seen: OrderedDict[str, AdapterVersion] = OrderedDict()

    def is_base(self, model: str) -> bool:
        """Whether this id names the base."""
        return model in self._base_names

    async def resolve(self, model: str, lot: Lot | None = None) -> Target:
        """The weights behind a model id. Raises ModelNotFound or NoChampion.

        lot: what a request is drawn by where a canary runs; without one, canaries and shadows are left aside. A version
        made for another base does not exist here.
        """
        if self.is_base(model):
            return self._base_target
        route = await asyncio.to_thread(self._route, model)
        if lot is None:
            return self._target(route.version)
        version, taken, beside = draw(route, lot)
        return replace(self._target(version), taken=taken, beside=beside)

    async def instead_of(self, model: str, aside: Weights) -> Target | None:
        """Who answers for this id while the engine has the version it means set aside, by the alias's own policy.

        None: nobody. The target says in whose place it answers.
        """
        if self.is_base(model) or aside.version is None:
            return None
        version = await asyncio.to_thread(self._versions.instead_of, model, aside.version)
        if version is None or version.digest == aside.digest or version.base_digest != self.base.digest:
            return None
        return self._target(version, aside.model)

    def _target(self, version: AdapterVersion, instead_of: str | None = None) -> Target:
        self.remember(version)
        weights = Weights(
            version.id,
            version.base_digest,
            version.name,
            version.number,
            version.digest,
            instead_of,
            version.published_at.timestamp(),
        )
        return Target(weights, version.prompt_format)

    def version(self, model: str) -> AdapterVersion:
        """The adapter version behind a model id, asked of the registry (blocking). Raises as `resolve` does."""
        return self._route(model).version

    def _route(self, model: str) -> Route:
        try:
            route = self._versions.route(model)
        except InvalidRequest:
            # What is no id cannot name anything either: clients look for a 404 here.
            raise ModelNotFound(model[:_MAX_SHOWN], self._meant_by(model)) from None
        if route.version.base_digest != self.base.digest:
            raise ModelNotFound(model[:_MAX_SHOWN])
        return route

    def _meant_by(self, model: str) -> Sequence[str]:
        """Ids near a text that is none: near what it would be in lower case, with separators where they may stand."""
        name, _, selector = model[:_MAX_SHOWN].strip().lower().partition("@")
        name = re.sub(r"[^a-z0-9._-]+", "-", name)
        name = re.sub(r"[._-]*([._-])", r"\1", name).strip("._-")[:_MAX_NAME].rstrip("._-")
        for wanted in ([f"{name}@{selector}"] if selector else []) + [name]:
            try:
                found = self._versions.route(wanted).version
            except ModelNotFound as error:
                return error.nearest
            except (InvalidRequest, VersionWithdrawn):
                continue
            return [wanted] if found.base_digest == self.base.digest else []
        return []

    def name_of(self, digest: str) -> str:
        """The version id last seen with this digest, or the digest's beginning: a label for metrics."""
        seen = self._seen.get(digest)
        return digest[:12] if seen is None else seen.id

    def size_of(self, digest: str) -> int | None:
        """The bytes of the version last seen with this digest; None when none was."""
        seen = self._seen.get(digest)
        return None if seen is None else seen.size_bytes

    def remember(self, version: AdapterVersion) -> None:
        """Have this version's digest shown by its id."""
        self._seen[version.digest] = version
        self._seen.move_to_end(version.digest)
        if len(self._seen) > _MAX_REMEMBERED:
            self._seen.popitem(last=False)
