"""Which weights a request must have been answered with, as the registry itself tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loadtests.profiles import Target
from loadtests.sse import Named, Problem, Violation


@dataclass(frozen=True, slots=True)
class Before:
    """What an alias pointed at before the request was sent. generation: of the alias; -1 for what does not move."""

    number: int | None = None
    generation: int = -1


class Truth:
    """Judges the weights that answers name. `get` fetches a path of the server as JSON.

    A pinned version's digest is read once: versions are immutable. A moving id is looked up before each request; only
    when the answer names another version is the history asked what the alias was meanwhile. digests: of versions that
    the caller knows already, from their publisher.
    """

    def __init__(
        self, get: Callable[[str], Any], base_digest: str, digests: Mapping[tuple[str, int], str] | None = None
    ) -> None:
        self._get, self._base_digest = get, base_digest
        self._digests = dict(digests or {})
        self.checked = 0

    def before(self, target: Target) -> Before:
        """Look at the alias just before the request is sent."""
        if target.name is None or target.alias is None:
            return Before()
        summary = self._summary(target.name)
        alias = next((a for a in summary["aliases"] if a["alias"] == target.alias), None)
        return Before() if alias is None else Before(alias["number"], alias["generation"])

    def violations(self, target: Target, before: Before, named: Named) -> list[Violation]:
        """What is wrong with the weights named in answer to a request for `target`; nothing, if all is well."""
        self.checked += 1
        found = []
        if named.base_digest != self._base_digest:
            found.append(Violation(Problem.WRONG_BASE, f"{named.base_digest[:12]}, not {self._base_digest[:12]}"))
        if target.name is None:
            if named.adapter is not None or named.digest is not None:
                found.append(Violation(Problem.WRONG_MODEL, f"asked the base, got {named.model}"))
            return found
        if named.adapter != target.name or named.version is None or named.model != f"{target.name}@{named.version}":
            found.append(Violation(Problem.WRONG_MODEL, f"asked {target.id}, got {named.model}"))
            return found
        if target.number is not None and named.version != target.number:
            found.append(Violation(Problem.WRONG_MODEL, f"asked {target.id}, got version {named.version}"))
        if target.alias is not None and named.version not in self._meant(target, before, named.version):
            found.append(
                Violation(Problem.STALE_ALIAS, f"{target.id} was version {before.number}, answered {named.version}")
            )
        expected = self._digest(target.name, named.version)
        if named.digest != expected:
            found.append(
                Violation(Problem.WRONG_DIGEST, f"{named.model} is {str(expected)[:12]}, got {str(named.digest)[:12]}")
            )
        return found

    def _meant(self, target: Target, before: Before, answered: int) -> set[int | None]:
        """The versions that the alias pointed at while the request ran."""
        meant: set[int | None] = {before.number}
        if answered not in meant:
            history = self._get(f"/v1/adapters/{target.name}/history")["data"]
            meant |= {
                m["to_number"] for m in history if m["alias"] == target.alias and m["generation"] > before.generation
            }
        return meant

    def _digest(self, name: str, number: int) -> str | None:
        if (name, number) not in self._digests:
            self._summary(name)
        return self._digests.get((name, number))

    def _summary(self, name: str) -> Any:
        summary = self._get(f"/v1/adapters/{name}")
        self._digests |= {(name, v["number"]): v["digest"] for v in summary["versions"]}
        return summary
