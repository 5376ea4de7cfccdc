"""The registry, on SQLite and on a real Postgres: names, aliases, the gate, rollback, races, reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import (
    Conflict,
    GateRefused,
    GenerationMismatch,
    InvalidRequest,
    ModelNotFound,
    NoChampion,
    RecordNotFound,
)
from adapters.home import Home
from adapters.records import MoveAction
from adapters.registry import Registry
from adapters.schema import metadata
from tests.adapter_factory import (
    base_record,
    policy,
    report,
)
from tests.registry_case import at_once, promoted, publish

# -- names to versions -------------------------------------------------------------------------------------------


def test_a_bare_name_means_its_champion(registry: Registry) -> None:
    version = promoted(registry, 0)
    publish(registry, 1)
    assert registry.resolve("sum") == registry.resolve("sum@champion") == registry.resolve("sum@1") == version


def test_a_name_without_champion_lists_its_versions(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(NoChampion, match="sum@1"):
        registry.resolve("sum")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("sun", ("sum",)), ("tiby", ("tiny",)), ("sum@7", ("sum@1",)), ("sum@prod", ("sum@1",)), ("q9", ())],
)
def test_an_unknown_model_names_what_is_near(registry: Registry, asked: str, nearest: tuple[str, ...]) -> None:
    publish(registry)
    with pytest.raises(ModelNotFound) as caught:
        registry.resolve(asked)
    assert (caught.value.model, caught.value.nearest) == (asked, nearest)


def test_every_verb_on_an_unknown_adapter_says_so(registry: Registry) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: registry.adapter("x"),
        lambda: registry.history("x"),
        lambda: registry.version("x", 1),
        lambda: registry.promote("x", 1, who="t"),
        lambda: registry.rollback("x", who="t"),
        lambda: registry.set_alias("x", "a", 1, who="t"),
        lambda: registry.set_policy("x", policy(), "t"),
    ]
    for verb in verbs:
        with pytest.raises(ModelNotFound):
            verb()


def test_a_manifest_that_is_none_is_not_found(registry: Registry) -> None:
    publish(registry)
    other = registry.store.put(b"{}")
    for digest in (other, "0" * 64):
        with pytest.raises(RecordNotFound):
            registry.manifest(digest)


# -- aliases and the gate ----------------------------------------------------------------------------------------


def test_an_alias_moves_by_compare_and_set(registry: Registry) -> None:
    publish(registry, 0)
    publish(registry, 1)
    with pytest.raises(GenerationMismatch):
        registry.set_alias("sum", "canary", 1, who="t", expected_version=2)
    assert registry.set_alias("sum", "canary", 1, who="t", expected_version=None).generation == 1
    with pytest.raises(GenerationMismatch):
        registry.set_alias("sum", "canary", 2, who="t", expected_version=None)
    assert registry.set_alias("sum", "canary", 2, who="t", reason="try", expected_version=1).generation == 2
    assert registry.resolve("sum@canary").number == 2
    assert [(m.from_number, m.to_number, m.action, m.why) for m in registry.history("sum")] == [
        (1, 2, MoveAction.SET, "try"),
        (None, 1, MoveAction.SET, ""),
    ]


def test_pointing_an_alias_where_it_points_is_no_move(registry: Registry) -> None:
    publish(registry)
    first = registry.set_alias("sum", "canary", 1, who="t")
    assert registry.set_alias("sum", "canary", 1, who="another") == first
    assert len(registry.history("sum")) == 1


def test_an_alias_cannot_point_at_nothing(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(ModelNotFound):
        registry.set_alias("sum", "canary", 9, who="t")
    with registry._database.writes() as connection, pytest.raises(sa.exc.IntegrityError):
        connection.execute(
            sa.insert(metadata.tables["aliases"]).values(
                tenant="default", name="sum", alias="canary", number=9, generation=1, moved_at=base_record().created_at
            )
        )


def test_the_champion_is_moved_by_promotion_only(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(Conflict, match="promote"):
        registry.set_alias("sum", "champion", 1, who="t")


def test_promotion_needs_a_policy_and_a_passing_report(registry: Registry) -> None:
    version = publish(registry)
    with pytest.raises(GateRefused, match="no gate policy"):
        registry.promote("sum", 1, who="t")
    registry.set_policy("sum", policy(), "t")
    with pytest.raises(GateRefused, match="no report"):
        registry.promote("sum", 1, who="t")
    registry.add_report(report(version, data_digest="f" * 64))
    with pytest.raises(GateRefused, match="no report"):
        registry.promote("sum", 1, who="t")
    registry.add_report(report(version, low=-0.1))
    with pytest.raises(GateRefused, match="rouge1 over the base"):
        registry.promote("sum", 1, who="t")
    digest = registry.add_report(report(version))
    move = registry.promote("sum", 1, who="ann", reason="better")
    assert (move.action, move.report, move.from_number, move.who) == (MoveAction.PROMOTE, digest, None, "ann")
    assert registry.adapter("sum").champion == 1


def test_the_newest_report_counts(registry: Registry) -> None:
    version = publish(registry)
    registry.set_policy("sum", policy(), "t")
    registry.add_report(report(version))
    registry.add_report(report(version, low=-0.1))
    with pytest.raises(GateRefused):
        registry.promote("sum", 1, who="t")


def test_a_challenger_is_judged_against_the_present_champion(registry: Registry) -> None:
    one = promoted(registry, 0)
    two = publish(registry, 1)
    registry.add_report(report(two))
    with pytest.raises(GateRefused, match="no champion"):
        registry.promote("sum", 2, who="t")
    registry.add_report(report(two, one.digest))
    assert registry.promote("sum", 2, who="t").from_number == 1


def test_a_report_is_stale_once_the_champion_changes(registry: Registry) -> None:
    one, two, three = promoted(registry, 0), publish(registry, 1), publish(registry, 2)
    for version in (two, three):
        registry.add_report(report(version, one.digest))
    registry.promote("sum", 2, who="t")
    with pytest.raises(GateRefused, match="now"):
        registry.promote("sum", 3, who="t")


def test_force_overrules_the_gate_with_a_recorded_reason(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(InvalidRequest):
        registry.promote("sum", 1, who="t", force=True, reason="  ")
    move = registry.promote("sum", 1, who="ann", force=True, reason="demo tonight")
    assert (move.action, move.why, move.report) == (MoveAction.FORCED, "demo tonight", None)
    assert registry.history("sum") == [move]


def test_promoting_the_champion_again_changes_nothing(registry: Registry) -> None:
    promoted(registry, 0)
    assert registry.promote("sum", 1, who="another") == registry.history("sum")[0]
    assert len(registry.history("sum")) == 1


def test_two_promoters_race_and_exactly_one_wins_each_generation(registry: Registry, home: Home) -> None:
    """R-07 at reduced scale: 10 rounds (the full figure is 1,000); the history stays a chain."""
    other = Registry.open(home)
    publish(registry, 0)
    registry.promote("sum", 1, who="t", force=True, reason="start")
    for round_ in range(10):
        now = registry.adapter("sum").champion
        pair = [publish(registry, 2 * round_ + i + 1).number for i in range(2)]
        ask: dict[str, Any] = {"who": "t", "force": True, "reason": "race", "expected_version": now}
        results = at_once([partial(r.promote, "sum", n, **ask) for r, n in zip((registry, other), pair, strict=True)])
        assert sorted(type(result).__name__ for result in results) == ["GenerationMismatch", "Move"]
    chain = list(reversed(registry.history("sum")))
    assert [m.generation for m in chain] == list(range(1, 12))
    assert all(after.from_number == before.to_number for before, after in pairwise(chain))
    other.close()


def test_rollback_goes_back_one_champion_at_a_time(registry: Registry) -> None:
    for seed in range(3):
        promoted(registry, seed)
    assert registry.rollback("sum", who="t", reason="worse").to_number == 2
    assert registry.rollback("sum", who="t").to_number == 1
    with pytest.raises(Conflict, match="no earlier champion"):
        registry.rollback("sum", who="t")
    assert [(m.action, m.to_number) for m in registry.history("sum")[:2]] == [
        (MoveAction.ROLLBACK, 1),
        (MoveAction.ROLLBACK, 2),
    ]


def test_rollback_names_a_former_champion_and_no_other(registry: Registry) -> None:
    for seed in range(3):
        promoted(registry, seed)
    publish(registry, 9)
    assert registry.rollback("sum", who="t", to=1).to_number == 1
    assert registry.rollback("sum", who="t", to=3).to_number == 3
    with pytest.raises(Conflict, match="never was champion"):
        registry.rollback("sum", who="t", to=4)


def test_rollback_without_any_promotion_is_a_conflict(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(Conflict):
        registry.rollback("sum", who="t")


# -- reports and policies ----------------------------------------------------------------------------------------


def test_a_report_reads_back_and_is_kept_once(registry: Registry) -> None:
    version = publish(registry)
    found = report(version)
    digest = registry.add_report(found)
    assert registry.add_report(found) == digest == found.digest
    assert registry.report(digest).canonical() == found.canonical()
    assert [r.digest for r in registry.reports("sum")] == [r.digest for r in registry.reports("sum", 1)] == [digest]
    assert registry.reports("sum", 2) == []


@pytest.mark.parametrize("change", [{"adapter_digest": "0" * 64}, {"base_digest": "0" * 64}])
def test_a_report_about_other_weights_is_refused(registry: Registry, change: dict[str, Any]) -> None:
    version = publish(registry)
    with pytest.raises(Conflict):
        registry.add_report(report(version, **change))


def test_a_report_about_no_version_or_with_nan_is_refused(registry: Registry) -> None:
    version = publish(registry)
    with pytest.raises(ModelNotFound):
        registry.add_report(replace(report(version), number=9))
    with pytest.raises(InvalidRequest):
        registry.add_report(report(version, low=float("nan")))
    with pytest.raises(RecordNotFound):
        registry.report("0" * 64)


def test_the_last_policy_holds(registry: Registry) -> None:
    publish(registry)
    assert registry.policy("sum") is None
    registry.set_policy("sum", policy(min_n=10), "t")
    registry.set_policy("sum", policy(min_n=20, length_ratio=(0.5, 2.0)), "t")
    assert registry.policy("sum") == policy(min_n=20, length_ratio=(0.5, 2.0))
    with pytest.raises(InvalidRequest):
        registry.set_policy("sum", policy(min_n=0), "t")


# -- what was looked at and what is moved ------------------------------------------------------------------------


def test_a_flip_away_and_back_is_seen_by_its_generation(registry: Registry) -> None:
    """The version alone says that nothing happened; whoever moved the alias twice has decided otherwise."""
    for seed in range(3):
        publish(registry, seed)
    force: dict[str, Any] = {"who": "t", "force": True, "reason": "t"}
    nowhere = registry.may_promote("sum", 2, force=True)
    assert (nowhere.champion, nowhere.generation) == (None, 0)
    registry.promote("sum", 1, **force)
    with pytest.raises(GenerationMismatch):
        registry.promote("sum", 2, **force, expected_generation=nowhere.generation)
    seen = registry.may_promote("sum", 2, force=True)
    registry.promote("sum", 3, **force)
    registry.rollback("sum", who="t")
    assert registry.resolve("sum").number == 1
    with pytest.raises(GenerationMismatch, match="version 1 again, or still, but it moved"):
        registry.promote("sum", 2, **force, expected_version=1, expected_generation=seen.generation)
    with pytest.raises(GenerationMismatch, match="moved"):
        registry.canaries.set_canary("sum", 2, 10, who="t", expected_generation=seen.generation)
    assert registry.resolve("sum").number == 1
    now = registry.may_promote("sum", 2, force=True)
    assert registry.promote("sum", 2, **force, expected_generation=now.generation).generation == now.generation + 1


def test_of_promotions_that_looked_at_one_generation_one_wins(registry: Registry, home: Home) -> None:
    for seed in range(3):
        publish(registry, seed)
    force: dict[str, Any] = {"who": "t", "force": True, "reason": "t"}
    registry.promote("sum", 1, **force)
    other = Registry.open(home)
    jobs = [partial(r.promote, "sum", n, **force, expected_generation=1) for r in (registry, other) for n in (2, 3)]
    found = at_once(jobs)
    assert sorted(type(each).__name__ for each in found) == ["GenerationMismatch"] * 3 + ["Move"]
    assert len(registry.history("sum")) == 2
    other.close()
