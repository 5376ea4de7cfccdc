"""One door to a registry, wherever it is: in this process, or behind a running server.

`open_door` chooses: the URL given wins; else the server that holds this home, which alone then writes its registry;
else the registry in the home itself. The command line knows only the door.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from adapters.canaries import Arm, CanaryLimits, CanaryReport, Split, Sticky
from adapters.errors import AdapterRefused, Reason, ServerUnreachable
from adapters.golden import GOLDEN_FILE
from adapters.home import Home
from adapters.prompts import prompt_format_from_json
from adapters.publish import CONFIG_FILE, FORMAT_FILE, WEIGHTS_FILE
from adapters.records import (
    AdapterSummary,
    AdapterVersion,
    AliasRecord,
    BaseRecord,
    Fallback,
    InFlight,
    Move,
    PromptFormat,
    Residency,
    Standing,
    Withdrawal,
)
from adapters.reports import GatePolicy, Report

if TYPE_CHECKING:
    from adapters.registry import Registry

API_KEY_VARIABLE = "LORAPLANE_API_KEY"
USER_VARIABLE = "LORAPLANE_USER"

# What an alias must point at for a move to happen: this version, no version at all, or whatever it likes.
Expected: TypeAlias = int | Literal["any"] | None


class RegistryDoor(Protocol):
    """What the command line asks of a registry. Every method raises the typed errors of `adapters.errors`."""

    @property
    def where(self) -> str:
        """The registry's place, for people: a folder or a URL."""

    def bases(self) -> Sequence[BaseRecord]: ...

    def publish(
        self,
        name: str,
        folder: Path,
        *,
        base: str | None = None,
        prompt_format: PromptFormat | None = None,
        facts: Mapping[str, object] | None = None,
        note: str = "",
    ) -> AdapterVersion:
        """Publish the PEFT adapter in `folder` as the next version of `name`; the same bytes are the same version.

        base: the base's name or digest; without it the adapter's own config or its shapes decide. prompt_format: in
        place of the folder's prompt_format.json. facts: how the adapter was made.
        """

    def adapters(self) -> Sequence[AdapterSummary]: ...

    def adapter(self, name: str) -> AdapterSummary: ...

    def set_alias(
        self, name: str, alias: str, number: int, *, reason: str = "", expected: Expected = "any"
    ) -> AliasRecord:
        """Point an alias at a version. `champion` moves by `promote` and `rollback` only."""

    def promote(
        self,
        name: str,
        number: int,
        *,
        reason: str = "",
        force: bool = False,
        expected: Expected = "any",
        warm: bool = True,
    ) -> Move:
        """Make a version the champion, if the gate allows it or `force` overrules it with a reason.

        warm: a server has the version ready first, and moves nothing when it cannot.
        """

    def rollback(self, name: str, *, reason: str, to: int | None = None) -> Move: ...

    def history(self, name: str) -> Sequence[Move]: ...

    def set_fallback(self, name: str, alias: str, fallback: Fallback, *, reason: str = "") -> AliasRecord:
        """Say who answers for an alias while its version is set aside."""

    def set_canary(
        self,
        name: str,
        number: int,
        percent: float,
        *,
        alias: str,
        sticky: Sticky,
        limits: CanaryLimits,
        reason: str = "",
        expected: Expected = "any",
    ) -> Split:
        """Let a version answer some of an alias's requests."""

    def set_shadow(
        self, name: str, number: int, percent: float, *, alias: str, reason: str = "", expected: Expected = "any"
    ) -> Split:
        """Let a version compute some of an alias's requests unseen."""

    def stop_trial(self, name: str, kind: Arm, *, alias: str, reason: str = "") -> Move:
        """End the canary or the shadow of an alias."""

    def trials(self, name: str, alias: str) -> CanaryReport:
        """What is tried beside an alias, or was last, and what came of it."""

    def compare(self, body: Mapping[str, object]) -> Mapping[str, Any]:
        """One prompt to several models of a running server: POST /v1/compare, as it is. Raises ServerUnreachable."""

    def retire(self, name: str, number: int, *, reason: str = "", deadline_s: float | None = None) -> Withdrawal:
        """Hide a version; a server also lets what runs finish within the deadline, and frees its bytes."""

    def revoke(self, name: str, number: int, *, reason: str, in_flight: InFlight) -> Withdrawal:
        """Refuse a version's bytes under every name."""

    def restore(self, name: str, number: int, *, reason: str) -> Standing:
        """Bring a retired or revoked version back."""

    def warm(self, name: str, number: int, ttl_s: float) -> Residency:
        """Have a version ready on the running server. Raises ServerUnreachable where none runs."""

    def pin(self, name: str, number: int, on: bool) -> Residency:
        """Keep a version in a slot of the running server, or no longer. Raises ServerUnreachable where none runs."""

    def pull(self, name: str, number: int, into: Path, *, original: bool = False) -> Path:
        """Write a version's files into a folder: the canonical ones, or with `original` the bytes as published."""

    def policy(self, name: str) -> GatePolicy | None: ...

    def set_policy(self, name: str, policy: GatePolicy) -> GatePolicy: ...

    def add_report(self, report: Report) -> str:
        """Store a report; returns its digest."""

    def reports(self, name: str, number: int | None = None) -> Sequence[Report]: ...

    def newest_report(self, name: str, number: int) -> Report | None:
        """The newest report about a version, with its examples; None when there is none."""

    def report(self, digest: str) -> Report:
        """One report by its digest, or by an unambiguous beginning of it."""

    def close(self) -> None: ...


class LocalDoor:
    """The registry in this process. Moves and publications are recorded as `who`."""

    def __init__(self, registry: Registry, home: Home, who: str) -> None:
        self.registry = registry
        self._home = home
        self._who = who

    @property
    def where(self) -> str:
        return str(self._home.root)

    def bases(self) -> Sequence[BaseRecord]:
        return self.registry.bases()

    def publish(
        self,
        name: str,
        folder: Path,
        *,
        base: str | None = None,
        prompt_format: PromptFormat | None = None,
        facts: Mapping[str, object] | None = None,
        note: str = "",
    ) -> AdapterVersion:
        files = adapter_files(folder)
        return self.registry.publish(
            name,
            files,
            base=base,
            prompt_format=prompt_format or folder_format(files),
            facts=facts or {},
            who=self._who,
            note=note,
        )

    def adapters(self) -> Sequence[AdapterSummary]:
        return self.registry.adapters()

    def adapter(self, name: str) -> AdapterSummary:
        return self.registry.adapter(name)

    def set_alias(
        self, name: str, alias: str, number: int, *, reason: str = "", expected: Expected = "any"
    ) -> AliasRecord:
        return self.registry.set_alias(name, alias, number, who=self._who, reason=reason, expected_version=expected)

    def promote(
        self,
        name: str,
        number: int,
        *,
        reason: str = "",
        force: bool = False,
        expected: Expected = "any",
        warm: bool = True,
    ) -> Move:
        return self.registry.promote(name, number, who=self._who, reason=reason, force=force, expected_version=expected)

    def rollback(self, name: str, *, reason: str, to: int | None = None) -> Move:
        return self.registry.rollback(name, who=self._who, reason=reason, to=to)

    def history(self, name: str) -> Sequence[Move]:
        return self.registry.history(name)

    def set_fallback(self, name: str, alias: str, fallback: Fallback, *, reason: str = "") -> AliasRecord:
        return self.registry.set_fallback(name, alias, fallback, who=self._who, reason=reason)

    def set_canary(
        self,
        name: str,
        number: int,
        percent: float,
        *,
        alias: str,
        sticky: Sticky,
        limits: CanaryLimits,
        reason: str = "",
        expected: Expected = "any",
    ) -> Split:
        return self.registry.canaries.set_canary(
            name,
            number,
            percent,
            who=self._who,
            alias=alias,
            sticky=sticky,
            limits=limits,
            reason=reason,
            expected_version=expected,
        )

    def set_shadow(
        self, name: str, number: int, percent: float, *, alias: str, reason: str = "", expected: Expected = "any"
    ) -> Split:
        return self.registry.canaries.set_shadow(
            name, number, percent, who=self._who, alias=alias, reason=reason, expected_version=expected
        )

    def stop_trial(self, name: str, kind: Arm, *, alias: str, reason: str = "") -> Move:
        return self.registry.canaries.stop(name, kind, who=self._who, alias=alias, reason=reason)

    def trials(self, name: str, alias: str) -> CanaryReport:
        return self.registry.canaries.report(name, alias)

    def compare(self, body: Mapping[str, object]) -> Mapping[str, Any]:
        raise self._no_server("compare")

    def retire(self, name: str, number: int, *, reason: str = "", deadline_s: float | None = None) -> Withdrawal:
        return Withdrawal(self.registry.standings.retire(name, number, who=self._who, reason=reason), None)

    def revoke(self, name: str, number: int, *, reason: str, in_flight: InFlight) -> Withdrawal:
        standings = self.registry.standings
        return Withdrawal(standings.revoke(name, number, who=self._who, reason=reason, in_flight=in_flight), None)

    def restore(self, name: str, number: int, *, reason: str) -> Standing:
        return self.registry.standings.restore(name, number, who=self._who, reason=reason)

    def warm(self, name: str, number: int, ttl_s: float) -> Residency:
        raise self._no_server("warm")

    def pin(self, name: str, number: int, on: bool) -> Residency:
        raise self._no_server("pin" if on else "unpin")

    def _no_server(self, what: str) -> ServerUnreachable:
        return ServerUnreachable(
            f"no server holds {self.where}, and {what} is about a running one; start it (loraplane serve), or name one "
            f"with --url"
        )

    def pull(self, name: str, number: int, into: Path, *, original: bool = False) -> Path:
        self.registry.export(name, number, into, original=original)
        return into

    def policy(self, name: str) -> GatePolicy | None:
        return self.registry.policy(name)

    def set_policy(self, name: str, policy: GatePolicy) -> GatePolicy:
        self.registry.set_policy(name, policy, self._who)
        return policy

    def add_report(self, report: Report) -> str:
        return self.registry.add_report(report)

    def reports(self, name: str, number: int | None = None) -> Sequence[Report]:
        return self.registry.reports(name, number)

    def newest_report(self, name: str, number: int) -> Report | None:
        return next(iter(self.registry.reports(name, number)), None)

    def report(self, digest: str) -> Report:
        return self.registry.report(digest)

    def close(self) -> None:
        self.registry.close()


def open_door(home: Home, url: str | None = None, key: str | None = None) -> RegistryDoor:
    """The door to the registry at `url`, else of the server that holds the home, else of the home itself.

    key: the API key; by default of the environment (LORAPLANE_API_KEY). Who acts locally is LORAPLANE_USER or the
    user of the operating system; a server records the caller that it knows.
    """
    note = None if url else home.server()
    address = url or (note.url if note else None)
    if address is not None:
        # Imported here: most commands are local and need no HTTP client.
        from adapters.http_door import HttpDoor

        return HttpDoor(address, key or os.environ.get(API_KEY_VARIABLE), who=whoami())
    # Imported here: SQLAlchemy costs a third of a second, and a remote registry does not need it.
    from adapters.registry import Registry

    return LocalDoor(Registry.open(home), home, whoami())


def whoami() -> str:
    """Who acts, as the history records it: $LORAPLANE_USER, or the user of the operating system."""
    named = os.environ.get(USER_VARIABLE, "").strip()
    if named:
        return named
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user id has no name
        return f"uid {os.getuid()}"


def adapter_files(folder: Path) -> dict[str, Path]:
    """The files of a PEFT folder that make a version. Raises AdapterRefused when one is missing or pickled."""
    if not folder.is_dir():
        raise AdapterRefused(Reason.MISSING_FILE, f"{folder} is not a folder; give the folder that PEFT saved")
    if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterRefused(
            Reason.NOT_SAFETENSORS,
            f"{folder} holds pickled weights (adapter_model.bin), which are not read; save the adapter again with "
            f"model.save_pretrained(..., safe_serialization=True)",
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterRefused(Reason.MISSING_FILE, f"{folder} has no {name}; give the folder that PEFT saved")
    known = (CONFIG_FILE, WEIGHTS_FILE, FORMAT_FILE, GOLDEN_FILE)
    return {name: folder / name for name in known if (folder / name).is_file()}


def folder_format(files: Mapping[str, Path]) -> PromptFormat | None:
    """The prompt format that lies beside the weights, or None. Raises AdapterRefused(prompt_format)."""
    path = files.get(FORMAT_FILE)
    return None if path is None else read_format(path)


def read_format(path: Path) -> PromptFormat:
    """A prompt format from a JSON file. Raises AdapterRefused(prompt_format)."""
    try:
        return prompt_format_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise AdapterRefused(Reason.PROMPT_FORMAT, f"{path} cannot be read as JSON: {error}") from error
