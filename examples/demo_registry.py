"""What the demo asks of the registry, and how it brings a version live: found again where an earlier demo left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo_product import GATE_REFUSES, CommandFailed, OnLine, Product, figure
from examples.demo_screen import Screen


@dataclass(frozen=True, slots=True)
class Version:
    """A version that the story speaks of. folder: of its training run; facts: how it was made."""

    name: str
    number: int
    digest: str
    facts: Mapping[str, Any]
    folder: Path

    @property
    def id(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def short(self) -> str:
        """The digest's beginning, for people."""
        return self.digest[:12]


@dataclass(frozen=True, slots=True)
class Registry:
    """The registry behind the running server."""

    product: Product
    screen: Screen

    def champion(self, name: str) -> int | None:
        """The number of the live version, or None."""
        number: int | None = self.product.get(f"/v1/adapters/{name}")["champion"]
        return number

    def early_version(self, of: Version) -> Version | None:
        """A version published before from an earlier step of the run that made `of`."""
        for raw in self.product.get(f"/v1/adapters/{of.name}")["versions"]:
            facts = raw["facts"]
            if facts.get("early") and facts.get("run_digest") == of.facts["run_digest"]:
                return Version(of.name, raw["number"], raw["digest"], facts, of.folder)
        return None

    def report_for(self, version: Version, on_line: OnLine, against: str | None = None) -> Mapping[str, Any]:
        """The report of a version on its held-out rows: found, or made now.

        against: the digest of the champion that it must be compared with; without it, that of the present champion,
        unless the version is champion itself.
        """
        summary = self.product.get(f"/v1/adapters/{version.name}")
        live = next((v["digest"] for v in summary["versions"] if v["number"] == summary["champion"]), None)
        wanted = against or live
        data = version.facts["eval_data_digest"]
        policy = self.product.find(f"/v1/adapters/{version.name}/policy")
        fits = policy is None or policy["data_digest"] == data
        if fits:
            for report in self.product.get(f"/v1/adapters/{version.name}/reports?version={version.number}")["data"]:
                bound = report["adapter_digest"] == version.digest and report["data_digest"] == data
                if bound and (version.digest == live or report["champion_digest"] == wanted):
                    self.screen.reuse(f"the report of {version.id}")
                    return dict(report)
        else:
            self.screen.say(f"the policy of {version.name} names other rows than these; it is set anew", "yellow")
        words = ["eval", "run", version.id, "--json", *([] if fits else ["--set-policy"])]
        return dict(self.product.run(*words, on_line=on_line).document["report"])

    def make_champion(self, version: Version, report: Mapping[str, Any]) -> None:
        """Promote a version through the gate, unless it is live already. Raises CommandFailed when it is refused.

        Two cases in which something else is live: an earlier demo was stopped between its flip and its roll-back,
        which is rolled back now; and a champion of another run (other packages, other settings), which may be the
        better one, so that the gate says no: that is overruled, with a reason in the history, and told.
        """
        live = self.champion(version.name)
        if live == version.number:
            self.screen.reuse(f"{version.id} is live already")
            return
        early = self.early_version(version)
        if early is not None and early.number == live and self._was_champion(version):
            reason = "demo: an earlier one was stopped before its roll-back"
            self.product.run("rollback", version.name, "--to", str(version.number), "--reason", reason, "--json")
            self.screen.say(f"rolled back to {version.id}: {reason}", "yellow")
            return
        reason = f"demo: {report['data']} {report['data_digest'][:12]}"
        try:
            self.product.run("promote", version.id, "--reason", reason, "--json")
            self.screen.say(f"promoted {version.id} through the gate")
        except CommandFailed as failure:
            policy = self.product.get(f"/v1/adapters/{version.name}/policy")
            better = figure(report, "base", policy["metric"])["low"] > policy["margin"]
            if failure.code != GATE_REFUSES or live is None or not better:
                raise
            self.screen.say(f"{failure.said}", "yellow")
            self.screen.say(f"{version.name}@{live} is of another run; {version.id} is promoted by --force", "yellow")
            overruled = f"{reason}; the champion was of another run"
            self.product.run("promote", version.id, "--force", "--reason", overruled, "--json")

    def _was_champion(self, version: Version) -> bool:
        history = self.product.get(f"/v1/adapters/{version.name}/history")["data"]
        return any(m["alias"] == "champion" and m["to_number"] == version.number for m in history)
