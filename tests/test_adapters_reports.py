"""What is no possible report and no possible policy is refused by name, whoever brings it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from adapters import schema
from adapters.errors import InvalidRequest, RecordNotFound, RunInvalid
from adapters.registry import Registry
from adapters.reports import PairedDifference, Report, Role, SystemScores, check_policy, check_report
from adapters.runs import check_run
from tests.adapter_factory import policy, report
from tests.registry_case import publish

VERSION = SimpleNamespace(name="sum", number=2, digest="a" * 64, base_digest="b" * 64)
CHAMPION = "c" * 64
GOOD = report(VERSION, CHAMPION)


def with_system(**changed: Any) -> Report:
    """The good report with something changed in what it says of the candidate."""
    systems = (replace(s, **changed) if s.role is Role.CANDIDATE else s for s in GOOD.systems)
    return replace(GOOD, systems=tuple(systems))


def with_difference(**changed: Any) -> Report:
    """The good report with something changed in its first difference."""
    return replace(GOOD, differences=(replace(GOOD.differences[0], **changed), *GOOD.differences[1:]))


def with_example(**changed: Any) -> Report:
    """The good report with something changed in its first example."""
    return replace(GOOD, examples=({**GOOD.examples[0], **changed}, *GOOD.examples[1:]))


def test_a_report_as_evaluations_write_it_is_fine() -> None:
    check_report(GOOD)
    check_report(report(VERSION, n=1))


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (with_system(scores={"rouge1": 7.5}), "rouge1"),
        (with_system(scores={"rouge1": math.nan}), "rouge1"),
        (with_system(scores={"rouge1": 0.9}), "scores"),  # not what the examples say
        (with_system(scores={"rouge1": 0.5, "rouge2": 0.5}), "examples"),
        (with_system(digest="d" * 64), "systems"),
        (with_system(empty_rate=1.5), "empty_rate"),
        (with_system(length_ratio=-1), "length_ratio"),
        (with_system(length_ratio=math.inf), "length_ratio"),
        (with_system(length_ratio=10**400), "length_ratio"),
        (with_difference(low=0.5, high=0.4), "differences"),
        (with_difference(mean=2, high=3), "mean"),
        (with_difference(mean=0.06), "differences"),  # not the difference of the means
        (with_difference(n=9), "differences"),
        (with_difference(against=Role.CANDIDATE), "differences"),
        (with_difference(metric="rouge2"), "differences"),
        (with_example(scores={}), "examples"),
        (with_example(prompt=3), "examples"),
        (with_example(scores={r: {"rouge1": True} for r in ("base", "champion", "candidate")}), "examples"),
        (replace(GOOD, n=1000), "examples"),
        (replace(GOOD, examples=()), "examples"),
        (replace(GOOD, n=0, examples=()), "n"),
        (replace(GOOD, champion_digest=None), "systems"),
        (replace(GOOD, systems=GOOD.systems * 2), "systems"),
        (replace(GOOD, differences=GOOD.differences * 2), "differences"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused_by_its_field(bad: Report, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_report(bad)
    assert field in (refusal.value.param or "")


def test_the_registry_keeps_no_report_that_was_made_up(registry: Registry) -> None:
    """Scores of 7.5, an interval that ends before it begins and n = 1000 without an example passed the gate once."""
    version = publish(registry)
    registry.set_policy("sum", policy(), "t")
    made_up = replace(
        report(version),
        n=1000,
        examples=(),
        systems=(SystemScores(Role.CANDIDATE, "sum@1", version.digest, {"rouge1": 7.5}, 1.0, 0.0),),
        differences=(PairedDifference(Role.BASE, "rouge1", 4.5, 5.0, 4.0, 1000),),
    )
    with pytest.raises(InvalidRequest):
        registry.add_report(made_up)
    assert registry.reports("sum") == []


BAD_POLICIES: list[dict[str, Any]] = [
    {"min_n": 0},
    {"min_n": 10**8},
    {"margin": -5.0},
    {"margin": math.nan},
    {"tolerance": -0.1},
    {"tolerance": math.inf},
    {"max_empty_rate": 7.0},
    {"length_ratio": (0.0, math.inf)},
    {"length_ratio": (2.0, 1.0)},
    {"length_ratio": (-1.0, 1.0)},
    {"metric": "bleu"},
    {"data_digest": "abc"},
]


@pytest.mark.parametrize("change", BAD_POLICIES)
def test_a_policy_out_of_range_is_refused_by_its_field_at_every_door(
    registry: Registry, change: dict[str, Any]
) -> None:
    field = next(iter(change))
    with pytest.raises(InvalidRequest) as refusal:
        check_policy(policy(**change))
    assert refusal.value.param == field
    publish(registry)
    with pytest.raises(InvalidRequest):
        registry.set_policy("sum", policy(**change), "t")
    assert registry.policy("sum") is None


@pytest.mark.parametrize("change", [{"length_ratio": [2, 1]}, {"length_ratio": [0, 1e9]}, {"min_n": 10**8}])
def test_a_run_whose_gate_no_registry_takes_is_refused_before_it_is_trained(change: dict[str, Any]) -> None:
    with pytest.raises(RunInvalid, match=next(iter(change))):
        check_run({"name": "sum", "data": {"source": "x.jsonl"}, "gate": change}, "run.yaml")


def test_a_report_is_found_by_the_beginning_of_its_digest_unless_several_begin_so(registry: Registry) -> None:
    version = publish(registry)
    digest = registry.add_report(report(version))
    assert registry.report(digest[:12]) == registry.report(digest)
    for wrong in (digest[:7], "", "%" * 12, "_" * 12, digest + "0"):
        with pytest.raises(RecordNotFound):
            registry.report(wrong)
    other = digest[:12] + "0" * 52
    with registry._database.writes() as connection:
        row = connection.execute(sa.select(schema.reports)).mappings().one()
        connection.execute(sa.insert(schema.reports).values(**{**row, "id": row["id"] + 1, "digest": other}))
    with pytest.raises(InvalidRequest, match="several reports begin with"):
        registry.report(digest[:12])
    assert registry.report(digest).digest == digest
