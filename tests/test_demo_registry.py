"""The demo finds again what an earlier one left, also where that one was stopped at a bad moment."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from examples.demo_product import GATE_REFUSES, CommandFailed, OnLine, Product, Told
from examples.demo_registry import Registry, Version
from examples.demo_screen import Screen

DATA = "d" * 64
GOOD = Version("s", 1, "a" * 64, {"run_digest": "r", "eval_data_digest": DATA}, Path())


def version(number: int, digest: str, **facts: object) -> dict[str, Any]:
    return {"number": number, "digest": digest, "facts": facts}


def report(adapter: str, champion: str | None, *, data: str = DATA, low: float = 0.1) -> dict[str, Any]:
    difference = {"against": "base", "metric": "rouge1", "mean": low + 0.1, "low": low, "high": low + 0.2, "n": 64}
    return {
        "adapter": "s", "number": 1, "adapter_digest": adapter, "champion_digest": champion, "data": "rows",
        "data_digest": data, "differences": [difference], "created_at": "then",
    }  # fmt: skip


class FakeProduct:
    """A registry with one adapter, `s`; commands are written down, and `promote` says no if told to."""

    def __init__(self, champion: int | None = None, refuses: bool = False) -> None:
        self.champion, self.refuses = champion, refuses
        self.versions = [version(1, "a" * 64, run_digest="r")]
        self.reports: list[dict[str, Any]] = []
        self.policy: dict[str, Any] | None = {"data_digest": DATA, "metric": "rouge1", "margin": 0.0}
        self.history: list[dict[str, Any]] = []
        self.ran: list[str] = []

    def get(self, path: str) -> Any:
        if path.endswith("/history"):
            return {"data": self.history}
        if "/reports?" in path:
            return {"data": self.reports}
        if path.endswith("/policy"):
            return self.policy
        return {"champion": self.champion, "versions": self.versions}

    find = get

    def run(self, *words: str, on_line: OnLine = lambda _: None) -> Told:
        self.ran.append(" ".join(w for w in words if w != "--json"))
        if words[0] == "promote" and self.refuses and "--force" not in words:
            raise CommandFailed(words, GATE_REFUSES, "error[gate_refused]: no")
        if words[0] == "eval":
            return Told(('{"report": {"made": "now"}}',))
        return Told(("{}",))


def registry(product: FakeProduct) -> Registry:
    return Registry(cast(Product, product), Screen(Console(file=io.StringIO())))


def quiet(_: str) -> None:
    pass


def test_a_first_version_is_promoted_through_the_gate() -> None:
    product = FakeProduct()
    registry(product).make_champion(GOOD, report("a" * 64, None))
    assert product.ran == [f"promote s@1 --reason demo: rows {DATA[:12]}"]


def test_a_live_version_is_not_promoted_again() -> None:
    product = FakeProduct(champion=1)
    registry(product).make_champion(GOOD, report("a" * 64, None))
    assert product.ran == []


def test_a_demo_stopped_between_flip_and_roll_back_is_rolled_back() -> None:
    product = FakeProduct(champion=3)
    product.versions.append(version(3, "c" * 64, run_digest="r", early=True))
    product.history = [{"alias": "champion", "to_number": 1}, {"alias": "champion", "to_number": 3}]
    registry(product).make_champion(GOOD, report("a" * 64, "c" * 64))
    assert len(product.ran) == 1
    assert product.ran[0].startswith("rollback s --to 1 --reason")


def test_the_refusal_of_a_first_version_is_not_overruled() -> None:
    product = FakeProduct(refuses=True)
    with pytest.raises(CommandFailed):
        registry(product).make_champion(GOOD, report("a" * 64, None))


def test_a_champion_of_another_run_is_overruled_only_by_a_version_that_beats_the_base() -> None:
    product = FakeProduct(champion=2, refuses=True)
    with pytest.raises(CommandFailed):
        registry(product).make_champion(GOOD, report("a" * 64, "b" * 64, low=-0.01))
    assert not any("--force" in line for line in product.ran)
    registry(product).make_champion(GOOD, report("a" * 64, "b" * 64, low=0.01))
    assert "--force" in product.ran[-1]


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (report("f" * 64, None), "of other weights"),
        (report("a" * 64, None, data="e" * 64), "on other rows"),
        (report("a" * 64, "b" * 64), "against another champion"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_report_that_speaks_of_something_else_is_made_anew(kept: dict[str, Any], why: str) -> None:
    product = FakeProduct()
    product.reports = [kept]
    assert registry(product).report_for(GOOD, quiet) == {"made": "now"}, why
    assert product.ran == ["eval run s@1"]


def test_a_report_that_fits_is_found_again() -> None:
    product = FakeProduct()
    product.reports = [report("f" * 64, None), report("a" * 64, None)]
    assert registry(product).report_for(GOOD, quiet)["adapter_digest"] == "a" * 64
    assert product.ran == []


def test_a_policy_on_other_rows_is_set_anew() -> None:
    product = FakeProduct()
    product.policy = {"data_digest": "e" * 64}
    registry(product).report_for(GOOD, quiet)
    assert product.ran == ["eval run s@1 --set-policy"]
