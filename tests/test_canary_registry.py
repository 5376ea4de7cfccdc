"""Canaries and shadows in the registry, on SQLite and on a real Postgres: begun, carried over, ended, counted."""

from __future__ import annotations

from itertools import pairwise

import pytest

from adapters.canaries import Arm, ArmFigures, CanaryLimits, ShadowFigures, Sticky, bucket_of
from adapters.errors import Conflict, GenerationMismatch, InvalidRequest, ModelNotFound, RecordNotFound, VersionRevoked
from adapters.records import MoveAction
from adapters.registry import Registry
from tests.registry_case import at_once, promoted, publish


@pytest.fixture
def tried(registry: Registry) -> Registry:
    """A registry with sum@1 as champion, sum@2 and sum@3 beside it."""
    promoted(registry, 0)
    publish(registry, 1)
    publish(registry, 2)
    return registry


def arm(requests: int, errors: int = 0, first_token_s: float = 0.05) -> ArmFigures:
    counts = [0] * len(ArmFigures().first_token)
    counts[bucket_of(first_token_s)] = requests - errors
    return ArmFigures(requests, errors, 10 * requests, tuple(counts))


def test_a_canary_leaves_the_alias_where_it_is_and_is_in_the_history(tried: Registry) -> None:
    split = tried.canaries.set_canary("sum", 2, 10, who="ann", reason="new data")
    assert tried.resolve("sum").number == 1
    route = tried.route("sum")
    assert (route.version.id, route.canary and route.canary.id, route.shadow) == ("sum@1", "sum@2", None)
    assert route.split == split == tried.route("sum@champion").split
    told = tried.history("sum")[0]
    assert (told.action, told.from_number, told.to_number, told.who) == (MoveAction.CANARY, 1, 1, "ann")
    assert told.why == "10 % to sum@2, sticky by user: new data"


def test_an_id_with_a_number_is_never_split(tried: Registry) -> None:
    tried.canaries.set_canary("sum", 2, 10, who="ann")
    for model in ("sum@1", "sum@2"):
        route = tried.route(model)
        assert (route.version.id, route.split, route.canary) == (model, None, None)


def test_widening_a_canary_keeps_its_id_and_another_version_does_not(tried: Registry) -> None:
    first = tried.canaries.set_canary("sum", 2, 10, who="ann").canary
    wider = tried.canaries.set_canary("sum", 2, 25, who="ann").canary
    other = tried.canaries.set_canary("sum", 3, 25, who="ann").canary
    assert first is not None
    assert wider is not None
    assert other is not None
    assert (wider.id, wider.percent) == (first.id, 25)
    assert other.id != first.id


def test_a_shadow_and_a_canary_carry_each_other_over(tried: Registry) -> None:
    canary = tried.canaries.set_canary("sum", 2, 10, who="ann", sticky=Sticky.KEY).canary
    both = tried.canaries.set_shadow("sum", 2, 5, who="ann")
    assert (both.canary, both.shadow and both.shadow.number) == (canary, 2)
    tried.canaries.stop("sum", Arm.CANARY, who="ann", reason="enough")
    left = tried.route("sum").split
    assert left is not None
    assert (left.canary, left.shadow) == (None, both.shadow)
    tried.canaries.stop("sum", Arm.SHADOW, who="ann")
    assert tried.route("sum").split is None
    with pytest.raises(RecordNotFound, match="no shadow"):
        tried.canaries.stop("sum", Arm.SHADOW, who="ann")


@pytest.mark.parametrize("move", ["promote", "force the champion", "rollback"])
def test_whatever_moves_the_alias_ends_what_is_tried_beside_it(tried: Registry, move: str) -> None:
    tried.promote("sum", 3, who="t", force=True, reason="t")
    split = tried.canaries.set_canary("sum", 2, 10, who="ann")
    if move == "rollback":
        tried.rollback("sum", who="bob")
    else:
        tried.promote("sum", 2 if move == "promote" else 3, who="bob", force=True, reason="now")
    assert tried.route("sum").split is None
    assert tried.canaries.roll_back(split, who="loraplane", reason="too late") is None
    report = tried.canaries.report("sum")
    assert report.split == split
    assert report.ended is not None
    assert report.ended.who == "bob"


def test_history_stays_a_chain_through_trials_and_rollback_knows_no_canary(tried: Registry) -> None:
    tried.promote("sum", 3, who="t", force=True, reason="t")
    split = tried.canaries.set_canary("sum", 2, 10, who="ann")
    tried.canaries.roll_back(split, who="loraplane", reason="errors: 9 of 10")
    assert tried.rollback("sum", who="t").to_number == 1
    moves = tried.history("sum")
    assert [m.generation for m in moves] == list(range(len(moves), 0, -1))
    assert all(later.from_number == earlier.to_number for later, earlier in pairwise(moves))
    assert moves[1].why == "sum@2 is tried no longer: errors: 9 of 10"


def test_of_many_who_roll_back_at_once_one_does(tried: Registry) -> None:
    split = tried.canaries.set_canary("sum", 2, 10, who="ann")
    moves = at_once([lambda: tried.canaries.roll_back(split, who="loraplane", reason="errors")] * 4)
    assert sorted(m is not None for m in moves) == [False, False, False, True]
    assert [m.action for m in tried.history("sum")].count(MoveAction.CANARY_ROLLBACK) == 1


def test_a_canary_begins_only_where_the_caller_believes_the_alias_to_be(tried: Registry) -> None:
    with pytest.raises(GenerationMismatch):
        tried.canaries.set_canary("sum", 2, 10, who="ann", expected_version=3)
    assert tried.route("sum").split is None


@pytest.mark.parametrize("percent", [0, -1, 50.1, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(tried: Registry, percent: float) -> None:
    with pytest.raises(InvalidRequest, match="percent"):
        tried.canaries.set_canary("sum", 2, percent, who="ann")


def test_what_cannot_be_tried_is_refused_by_name(tried: Registry) -> None:
    canaries = tried.canaries
    with pytest.raises(Conflict, match="already"):
        canaries.set_canary("sum", 1, 10, who="ann")
    with pytest.raises(ModelNotFound):
        canaries.set_shadow("sum", 9, 10, who="ann")
    with pytest.raises(RecordNotFound, match="no alias"):
        canaries.set_canary("sum", 2, 10, who="ann", alias="prod")
    with pytest.raises(InvalidRequest, match="min_agreement"):
        canaries.set_canary("sum", 2, 10, who="ann", limits=CanaryLimits(min_agreement=1.5))
    with pytest.raises(RecordNotFound, match="never had"):
        canaries.report("sum")
    assert tried.history("sum")[0].action is MoveAction.PROMOTE


def test_figures_of_several_gateways_add_up_and_a_gateways_own_replace_each_other(tried: Registry) -> None:
    split = tried.canaries.set_canary("sum", 2, 10, who="ann")
    split = tried.canaries.set_shadow("sum", 2, 10, who="ann")
    assert split.canary is not None
    assert split.shadow is not None
    for gateway, seen in (("one", 10), ("one", 20), ("two", 7)):
        tried.canaries.add_figures(
            gateway,
            {
                (split.canary.id, Arm.CHAMPION): arm(seen),
                (split.canary.id, Arm.CANARY): arm(seen, errors=1),
                (split.shadow.id, Arm.SHADOW): ShadowFigures(seen, 1, 0, 10 * seen, 9 * seen, -0.5 * seen),
            },
        )
    report = tried.canaries.report("sum")
    assert report == tried.canaries.running()[0]
    assert (report.champion.requests, report.canary.requests, report.canary.errors) == (27, 27, 2)
    assert (report.shadow.shadows, report.shadow.agreement, report.shadow.dropped) == (27, 0.9, 2)
    assert report.shadow.mean_gap == pytest.approx(-0.05)
    assert report.champion.first_token_p95_s == pytest.approx(0.05, rel=0.25)


def test_a_withdrawn_version_is_tried_no_longer_and_cannot_be(tried: Registry) -> None:
    tried.canaries.set_canary("sum", 2, 10, who="ann")
    tried.standings.revoke("sum", 2, who="bob", reason="leaks names")
    route = tried.route("sum")
    assert (route.version.id, route.canary) == ("sum@1", None)
    with pytest.raises(VersionRevoked):
        tried.canaries.set_shadow("sum", 2, 10, who="ann")
