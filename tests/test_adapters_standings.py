"""What is decreed on versions, on SQLite and on Postgres: retired, revoked, restored, pinned; each in the history."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest

from adapters.alias_moves import OF_THE_VERSION
from adapters.errors import (
    Conflict,
    GateRefused,
    GenerationMismatch,
    InvalidRequest,
    ModelNotFound,
    RecordNotFound,
    VersionRetired,
    VersionRevoked,
    VersionWithdrawn,
)
from adapters.home import Home
from adapters.records import Fallback, InFlight, MoveAction, Standing, VersionState
from adapters.registry import Registry
from adapters.schema import metadata
from tests.adapter_factory import policy
from tests.registry_case import at_once, publish


def forced(registry: Registry, *numbers: int, name: str = "sum") -> None:
    for number in numbers:
        registry.promote(name, number, who="t", force=True, reason="test")


@pytest.fixture
def three(registry: Registry) -> Registry:
    """sum@1, sum@2 and sum@3, each promoted in turn."""
    for seed in range(3):
        publish(registry, seed)
    forced(registry, 1, 2, 3)
    return registry


def test_a_retired_version_is_refused_with_who_and_why_and_others_are_not(three: Registry) -> None:
    three.standings.retire("sum", 1, who="ann", reason="two champions ago")
    with pytest.raises(VersionRetired, match=r"sum@1 was retired by ann: two champions ago\."):
        three.resolve("sum@1")
    assert [three.resolve(model).number for model in ("sum", "sum@2")] == [3, 2]
    assert three.adapter("sum").withdrawn == {1: VersionState.RETIRED}


def test_a_version_that_an_alias_points_at_is_not_retired(three: Registry) -> None:
    with pytest.raises(Conflict, match="sum@champion points at sum@3"):
        three.standings.retire("sum", 3, who="t")
    assert three.resolve("sum").number == 3


def test_a_revoked_version_is_refused_wherever_an_alias_points_at_it(three: Registry) -> None:
    three.standings.revoke("sum", 3, who="ann", reason="leaked data")
    for model in ("sum", "sum@3", "sum@champion"):
        with pytest.raises(VersionRevoked, match=r"sum@3 was revoked by ann: leaked data\."):
            three.resolve(model)


def test_a_revocation_is_about_the_bytes_whatever_they_are_called(three: Registry) -> None:
    """A stranger who publishes revoked bytes under a name of his own does not get them served."""
    publish(three, 2, name="other")
    three.standings.revoke("sum", 3, who="ann", reason="leaked data")
    with pytest.raises(VersionRevoked, match=r"other@1 was revoked by ann: its bytes are those of sum@3; leaked data"):
        three.resolve("other@1")
    publish(three, 2, name="third")
    with pytest.raises(VersionRevoked):
        forced(three, 1, name="third")


def test_what_is_withdrawn_cannot_be_promoted_rolled_back_to_or_given_an_alias(three: Registry) -> None:
    three.standings.revoke("sum", 1, who="t", reason="bad")
    three.standings.retire("sum", 2, who="t")
    for number, refusal in ((1, VersionRevoked), (2, VersionRetired)):
        with pytest.raises(refusal):
            forced(three, number)
        with pytest.raises(refusal):
            three.rollback("sum", who="t", to=number)
        with pytest.raises(refusal):
            three.set_alias("sum", "canary", number, who="t")
        with pytest.raises(refusal):
            three.standings.pin("sum", number, True, who="t")
    assert three.resolve("sum").number == 3


def test_a_rollback_passes_over_what_is_withdrawn(three: Registry) -> None:
    three.standings.revoke("sum", 2, who="t", reason="bad")
    assert three.rollback("sum", who="t").to_number == 1


def test_a_revoked_champion_is_left_by_a_rollback(three: Registry) -> None:
    three.standings.revoke("sum", 3, who="t", reason="bad")
    assert three.rollback("sum", who="t").to_number == 2
    assert three.resolve("sum").number == 2


def test_a_restored_version_is_served_again(three: Registry) -> None:
    three.standings.revoke("sum", 3, who="t", reason="bad", in_flight=InFlight.END)
    with pytest.raises(InvalidRequest):
        three.standings.restore("sum", 3, who="t", reason=" ")
    three.standings.restore("sum", 3, who="ann", reason="the wrong one")
    assert three.resolve("sum").number == 3
    assert three.standings.decrees().unwanted == frozenset()


def test_a_revocation_needs_a_reason(three: Registry) -> None:
    with pytest.raises(InvalidRequest, match="reason"):
        three.standings.revoke("sum", 3, who="t", reason="  ")
    assert three.resolve("sum").number == 3


def test_decrees_are_rows_of_the_history_in_one_chain(three: Registry) -> None:
    three.standings.pin("sum", 2, True, who="ann")
    three.standings.retire("sum", 2, who="bob", reason="old")
    three.standings.revoke("sum", 1, who="ann", reason="bad", in_flight=InFlight.END)
    three.standings.revoke("sum", 1, who="ann", reason="bad", in_flight=InFlight.FINISH)
    three.standings.restore("sum", 1, who="ann", reason="good")
    three.set_fallback("sum", "champion", Fallback.PREVIOUS, who="ann", reason="be kind")
    rows = [m for m in reversed(three.history("sum")) if m.alias == OF_THE_VERSION]
    assert [(m.action.value, m.to_number, m.who, m.why) for m in rows] == [
        ("pin", 2, "ann", ""),
        ("retire", 2, "bob", "old"),
        ("revoke_now", 1, "ann", "bad"),
        ("revoke", 1, "ann", "bad"),
        ("restore", 1, "ann", "good"),
        ("fallback", 3, "ann", "champion falls back to previous: be kind"),
    ]
    assert all(after.generation == before.generation + 1 for before, after in pairwise(rows))
    champion = next(a for a in three.adapter("sum").aliases if a.alias == "champion")
    assert (champion.generation, champion.fallback) == (3, Fallback.PREVIOUS)  # no decree counts as a move


def test_a_decree_that_changes_nothing_is_none(three: Registry) -> None:
    before = three.history("sum")
    three.standings.restore("sum", 1, who="t", reason="it never left")
    three.standings.pin("sum", 1, False, who="t")
    first = three.standings.retire("sum", 1, who="ann", reason="old")
    again = three.standings.retire("sum", 1, who="bob", reason="again")
    assert (again.who, again.why, again.at) == (first.who, first.why, first.at)
    assert len(three.history("sum")) == len(before) + 1


def test_decrees_say_what_engines_hold_too_much_or_too_little_of(three: Registry) -> None:
    one, two, three_ = (three.version("sum", n) for n in (1, 2, 3))
    publish(three, 0, name="twin")  # the bytes of sum@1, in service under another name
    three.standings.retire("sum", 1, who="t")
    three.standings.retire("sum", 2, who="t")
    three.standings.pin("sum", 3, True, who="t")
    decrees = three.standings.decrees()
    assert decrees.unwanted == {two.digest}
    assert [s.digest for s in decrees.pinned] == [three_.digest]
    three.standings.revoke("sum", 1, who="t", reason="bad")
    assert three.standings.decrees().unwanted == {one.digest, two.digest}


def test_what_leaves_service_is_no_longer_pinned(three: Registry) -> None:
    three.standings.pin("sum", 2, True, who="t")
    assert three.standings.retire("sum", 2, who="t").pinned is False
    assert three.standings.decrees().pinned == ()


def test_a_pin_does_not_hold_what_is_revoked_under_another_name(three: Registry) -> None:
    """Else a gateway would pin and drop the same bytes for ever."""
    publish(three, 2, name="twin")
    three.standings.pin("twin", 1, True, who="t")
    three.standings.revoke("sum", 3, who="t", reason="bad")
    decrees = three.standings.decrees()
    assert decrees.pinned == ()
    assert decrees.unwanted == {three.version("sum", 3).digest}


def test_decrees_on_what_is_not_there_say_so(three: Registry) -> None:
    s = three.standings
    verbs: list[Callable[[], object]] = [
        lambda: s.retire("sum", 9, who="t"),
        lambda: s.revoke("sum", 9, who="t", reason="r"),
        lambda: s.restore("none", 1, who="t", reason="r"),
        lambda: s.pin("sum", 9, True, who="t"),
    ]
    for verb in verbs:
        with pytest.raises(ModelNotFound):
            verb()
    with pytest.raises(RecordNotFound):
        three.set_fallback("sum", "nowhere", Fallback.PREVIOUS, who="t")


def test_the_version_before_answers_for_an_alias_that_was_told_so(three: Registry) -> None:
    assert three.instead_of("sum", 3) is None
    three.set_fallback("sum", "champion", Fallback.PREVIOUS, who="t")
    instead = three.instead_of("sum", 3)
    assert instead is not None
    assert instead.number == 2
    assert three.instead_of("sum@3", 3) is None, "who names a version gets that version or none"
    canary = three.instead_of("sum", 1)
    assert canary is not None
    assert canary.number == 3, "of a canary that is set aside, the alias's own version answers"
    three.standings.revoke("sum", 2, who="t", reason="bad")
    instead = three.instead_of("sum", 3)
    assert instead is not None
    assert instead.number == 1


def test_a_promotion_is_judged_before_anything_is_loaded(three: Registry) -> None:
    three.set_policy("sum", policy(), "t")
    with pytest.raises(GateRefused):
        three.may_promote("sum", 1)
    with pytest.raises(GenerationMismatch):
        three.may_promote("sum", 1, force=True, expected_version=2)
    found = three.may_promote("sum", 1, force=True)
    assert found.champion is not None
    assert (found.version.number, found.champion.number, found.generation) == (1, 3, 3)
    assert three.resolve("sum").number == 3


def test_another_process_sees_a_decree_at_once(three: Registry, home: Home) -> None:
    other = Registry.open(home)
    assert other.resolve("sum").number == 3
    three.standings.revoke("sum", 3, who="t", reason="bad")
    with pytest.raises(VersionRevoked):
        other.resolve("sum")
    other.close()


def test_decrees_that_race_keep_one_chain(three: Registry, home: Home) -> None:
    other = Registry.open(home)
    jobs: list[Callable[[], Standing]] = [
        partial(r.standings.pin, "sum", n, True, who="t") for r in (three, other) for n in (1, 2, 3)
    ]
    assert not [found for found in at_once(jobs) if isinstance(found, Exception)]
    rows = [m for m in three.history("sum") if m.alias == OF_THE_VERSION]
    assert sorted((m.generation, m.action) for m in rows) == [(n, MoveAction.PIN) for n in (1, 2, 3)]
    other.close()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_was_decreed_a_version_is_served_or_refused_as_the_decrees_say(registry: Registry, seed: int) -> None:
    """Random decrees on two names that share bytes, against the rules in six lines; seeds are the parameters."""
    rng = random.Random(seed)
    states: dict[tuple[str, int], VersionState] = {}
    digests = {(n, v.number): v.digest for n in "ab" for v in (publish(registry, s, name=n) for s in (0, 1, 2))}
    for name in "ab":
        forced(registry, 1, name=name)
    for step in range(40):
        name, number = rng.choice("ab"), rng.randint(1, 3)
        verbs: list[tuple[VersionState | None, Callable[[], object]]] = [
            (VersionState.RETIRED, partial(registry.standings.retire, name, number, who="t")),
            (VersionState.REVOKED, partial(registry.standings.revoke, name, number, who="t", reason="r")),
            (VersionState.LIVE, partial(registry.standings.restore, name, number, who="t", reason="r")),
            (None, partial(registry.standings.pin, name, number, rng.random() < 0.5, who="t")),
            (None, partial(forced, registry, number, name=name)),
            (None, partial(registry.rollback, name, who="t")),
        ]
        state, verb = rng.choice(verbs)
        try:
            verb()
        except (Conflict, VersionWithdrawn):
            state = None
        states[name, number] = state or states.get((name, number), VersionState.LIVE)
        barred = {digests[key] for key, state in states.items() if state is VersionState.REVOKED}
        refused = {
            key for key, digest in digests.items() if digest in barred or states.get(key) is VersionState.RETIRED
        }
        for key, digest in digests.items():
            assert served(registry, f"{key[0]}@{key[1]}") == (None if key in refused else digest), f"step {step}"
        for name in "ab":
            champion = registry.adapter(name).champion
            assert champion is not None
            assert served(registry, name) == (None if (name, champion) in refused else digests[name, champion])
        decrees = registry.standings.decrees()
        wanted = {digest for key, digest in digests.items() if key not in refused}
        assert decrees.unwanted == set(digests.values()) - wanted, f"step {step}"
        assert not {s.digest for s in decrees.pinned} & decrees.unwanted


def served(registry: Registry, model: str) -> str | None:
    """The digest that a model id is answered with, None when it is withdrawn."""
    try:
        return registry.resolve(model).digest
    except VersionWithdrawn:
        return None


def test_a_home_of_the_version_before_is_brought_up_to_date(three: Registry, home: Home) -> None:
    """What a registry of the first migration holds is all there afterwards, with the careful answer for its aliases."""
    first = {"bases", "adapters", "versions", "aliases", "moves", "reports", "policies"}
    with three._database.writes() as connection:
        for table in reversed(metadata.sorted_tables):
            if table.name not in first:
                connection.exec_driver_sql(f"DROP TABLE {table.name}")
        connection.exec_driver_sql("ALTER TABLE aliases DROP COLUMN fallback")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    later = Registry.open(home)
    assert later.resolve("sum").number == 3
    assert [a.fallback for a in later.adapter("sum").aliases] == [Fallback.REFUSE]
    assert len(later.history("sum")) == 3
    later.standings.revoke("sum", 3, who="t", reason="bad")
    assert later.rollback("sum", who="t").to_number == 2
    later.close()
