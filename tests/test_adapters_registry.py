"""The registry, on SQLite and on a real Postgres: publishing, names, aliases, the gate, races."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from adapters.errors import (
    AdapterRefused,
    BaseMissing,
    ConfigInvalid,
    Conflict,
    GateRefused,
    GenerationMismatch,
    InvalidRequest,
    ModelNotFound,
    NoChampion,
    Reason,
    RecordNotFound,
    StoreFailed,
)
from adapters.home import Home
from adapters.records import AdapterVersion, BoundBy, MoveAction, PromptFormat
from adapters.registry import Registry
from adapters.schema import HEAD, Database, metadata
from adapters.spec import parse_spec
from adapters.weights import open_weights
from tests.adapter_factory import (
    adapter_files,
    base_record,
    lora_config,
    lora_weights,
    modules,
    policy,
    report,
    write_adapter,
)
from tests.adapter_homes import fresh_schema, postgres

T = TypeVar("T")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An empty home whose registry is on SQLite, or in a fresh schema of the test run's Postgres."""
    monkeypatch.delenv("LORAPLANE_DATABASE_URL", raising=False)
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        monkeypatch.setenv("LORAPLANE_DATABASE_URL", fresh_schema(url))
    return Home.find(tmp_path / "home")


@pytest.fixture
def registry(home: Home) -> Iterator[Registry]:
    opened = Registry.open(home)
    opened.add_base(base_record())
    yield opened
    opened.close()


def publish(registry: Registry, seed: int = 0, name: str = "sum", **options: Any) -> AdapterVersion:
    return registry.publish(name, adapter_files(seed), who="tester", **options)


def promoted(registry: Registry, seed: int, name: str = "sum") -> AdapterVersion:
    """A version that went through the gate."""
    version = publish(registry, seed, name)
    registry.set_policy(name, policy(), "tester")
    summary = registry.adapter(name)
    champion = None if summary.champion is None else registry.version(name, summary.champion).digest
    registry.add_report(report(version, champion))
    registry.promote(name, version.number, who="tester")
    return version


def at_once(jobs: list[Callable[[], T]]) -> list[T | Exception]:
    """Run jobs on threads that start together; each one's value or exception."""
    barrier = threading.Barrier(len(jobs))
    results: list[T | Exception] = [RuntimeError("did not run")] * len(jobs)

    def work(index: int, job: Callable[[], T]) -> None:
        barrier.wait()
        try:
            results[index] = job()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- bases -------------------------------------------------------------------------------------------------------


def test_a_base_answers_to_base_its_name_its_aliases_and_its_digest(registry: Registry) -> None:
    base = base_record()
    for name in ("base", "tiny", "Tests/tiny-Instruct", base.digest):
        assert registry.base(name) == base


def test_adding_a_base_again_gives_the_row_that_is_there(registry: Registry) -> None:
    assert registry.add_base(base_record(note="again")) == base_record()
    assert registry.bases() == [base_record()]


def test_a_base_name_cannot_change_its_weights(registry: Registry) -> None:
    with pytest.raises(Conflict):
        registry.add_base(base_record(digest="0" * 64))


def test_a_missing_base_says_how_to_get_it(registry: Registry) -> None:
    with pytest.raises(BaseMissing, match="models pull"):
        registry.base("other")


def test_publishing_without_a_base_says_how_to_get_one(home: Home) -> None:
    opened = Registry.open(home)
    with pytest.raises(BaseMissing, match="models pull"):
        publish(opened)
    opened.close()


def test_bases_and_adapters_share_one_set_of_names(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(Conflict):
        registry.add_base(base_record("sum"))
    with pytest.raises(Conflict):
        publish(registry, name="tiny")


# -- publishing --------------------------------------------------------------------------------------------------


def test_a_published_version_reads_back_as_it_was_returned(registry: Registry) -> None:
    fmt = PromptFormat(prefix="Summarise: ", stops=("\n",))
    version = publish(registry, prompt_format=fmt, facts={"seed": 1, "loss": [0.5, 0.25]}, note="first")
    assert registry.version("sum", 1) == version
    assert (version.id, version.bound_by, version.rank, len(version.modules)) == ("sum@1", BoundBy.NAME, 4, 4)
    assert (version.prompt_format, version.facts, version.note) == (fmt, {"seed": 1, "loss": [0.5, 0.25]}, "first")


def test_a_manifest_leads_to_weights_and_config_that_serving_can_open(registry: Registry) -> None:
    version = publish(registry)
    manifest = registry.manifest(version.digest)
    weights = open_weights(registry.store.verify(manifest.weights))
    spec = parse_spec(registry.store.read_verified(manifest.config))
    assert tuple(weights.ranks) == version.modules
    assert spec.scale_of(version.modules[0]) == 2.0
    assert (manifest.base, spec.base_name) == (version.base_digest, "tiny")


def test_the_same_content_is_the_same_version_whatever_dressed_it(registry: Registry, tmp_path: Path) -> None:
    first = publish(registry)
    again = registry.publish("sum", {**adapter_files(), "README.md": b"# hello"}, who="somebody else", note="again")
    folder = write_adapter(tmp_path / "a", lora_dropout=0.5)
    dressed = registry.publish("sum", {p.name: p for p in folder.iterdir()}, who="tester")
    assert again == dressed == first
    assert len(registry.adapter("sum").versions) == 1


def test_publishing_again_mends_a_blob_that_has_rotted(registry: Registry) -> None:
    version = publish(registry)
    weights = registry.store.path(registry.manifest(version.digest).weights)
    weights.chmod(0o600)
    weights.write_bytes(b"rotten")
    with pytest.raises(StoreFailed, match="rotted"):
        registry.export("sum", 1, registry.store.root / "out")
    before = sorted(path for path in registry.store.root.rglob("*"))
    assert publish(registry) == version
    registry.store.verify(weights.name)
    assert sorted(path for path in registry.store.root.rglob("*")) == before


def test_another_prompt_format_is_another_version(registry: Registry) -> None:
    assert publish(registry).digest != publish(registry, prompt_format=PromptFormat(prefix="x")).digest
    assert [v.number for v in registry.adapter("sum").versions] == [2, 1]


def test_a_prompt_format_beside_the_weights_is_read(registry: Registry) -> None:
    files = {**adapter_files(), "prompt_format.json": b'{"prefix": "Name it: "}'}
    version = registry.publish("sum", files, who="tester")
    assert version.prompt_format.prefix == "Name it: "
    assert set(version.originals) == set(files)


def test_two_names_may_hold_the_same_content(registry: Registry) -> None:
    assert publish(registry, name="one").digest == publish(registry, name="two").digest


def test_exported_folders_are_canonical_or_as_published(registry: Registry, tmp_path: Path) -> None:
    version = publish(registry)
    registry.export("sum", 1, tmp_path / "canonical")
    registry.export("sum", 1, tmp_path / "original", original=True)
    config = json.loads((tmp_path / "canonical" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "tiny"
    for name, data in adapter_files().items():
        assert (tmp_path / "original" / name).read_bytes() == data
    files = {p.name: p for p in (tmp_path / "canonical").iterdir()}
    assert registry.publish("sum", files, who="tester") == version


def test_exporting_replaces_no_other_file(registry: Registry, tmp_path: Path) -> None:
    publish(registry)
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(Conflict):
        registry.export("sum", 1, tmp_path)
    registry.export("sum", 1, tmp_path / "new")
    registry.export("sum", 1, tmp_path / "new")
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


REFUSED: dict[str, tuple[dict[str, bytes], Reason]] = {
    "no config": ({"adapter_model.safetensors": lora_weights()}, Reason.MISSING_FILE),
    "no weights": ({"adapter_config.json": lora_config()}, Reason.MISSING_FILE),
    "pickled weights": ({"adapter_config.json": lora_config(), "adapter_model.bin": b"x"}, Reason.NOT_SAFETENSORS),
    "too large": ({**adapter_files(), "adapter_model.safetensors": bytes(3 << 20)}, Reason.TOO_LARGE),
    "truncated": ({**adapter_files(), "adapter_model.safetensors": lora_weights()[:-9]}, Reason.TRUNCATED),
    "lfs pointer": (
        {**adapter_files(), "adapter_model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"},
        Reason.LFS_POINTER,
    ),
    "wrong base by digest": (adapter_files(base_digest="0" * 64), Reason.WRONG_BASE),
    "wrong base by hub id": (adapter_files(base="Other/model-7b"), Reason.WRONG_BASE),
    "wrong base by shape": (
        {"adapter_config.json": lora_config(base=""), "adapter_model.safetensors": lora_weights(shapes=modules(32))},
        Reason.SHAPE,
    ),
    "nan": (
        {
            **adapter_files(),
            "adapter_model.safetensors": lora_weights()[:-4] + b"\x00\x00\xc0\x7f",
        },
        Reason.NOT_FINITE,
    ),
    "dora": (adapter_files(use_dora=True), Reason.UNSUPPORTED),
    "broken prompt format": ({**adapter_files(), "prompt_format.json": b'{"style": "jinja"}'}, Reason.PROMPT_FORMAT),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_refused_adapter_has_a_reason_and_leaves_no_trace(registry: Registry, fault: str) -> None:
    files, reason = REFUSED[fault]
    with pytest.raises(AdapterRefused) as caught:
        registry.publish("sum", files, who="tester")
    assert caught.value.reason is reason
    assert registry.adapters() == []
    assert not [path for path in registry.store.root.rglob("*") if path.is_file()]


def test_what_bound_an_adapter_to_its_base_is_kept(registry: Registry) -> None:
    assert publish(registry, 1, base="tiny").bound_by is BoundBy.DIGEST
    assert registry.publish("s", adapter_files(2, base_digest=base_record().digest), who="t").bound_by is BoundBy.DIGEST
    assert registry.publish("s", adapter_files(3, base="/mnt/x/Tiny-Instruct/"), who="t").bound_by is BoundBy.NAME
    assert registry.publish("s", adapter_files(4, base="/kaggle/input/1"), who="t").bound_by is BoundBy.SHAPE
    assert registry.publish("s", adapter_files(5, base="Other/model"), who="t", base="tiny").bound_by is BoundBy.DIGEST


def test_a_chosen_base_that_the_config_contradicts_is_refused(registry: Registry) -> None:
    registry.add_base(base_record("second"))
    with pytest.raises(AdapterRefused) as by_name:
        publish(registry, base="second")
    with pytest.raises(AdapterRefused) as by_digest:
        registry.publish("sum", adapter_files(base_digest=base_record().digest), base="second", who="t")
    assert (by_name.value.reason, by_digest.value.reason) == (Reason.WRONG_BASE, Reason.WRONG_BASE)


def test_shapes_that_fit_two_bases_bind_to_neither(registry: Registry) -> None:
    registry.add_base(base_record("second"))
    with pytest.raises(AdapterRefused, match="--base") as caught:
        registry.publish("sum", adapter_files(base=""), who="t")
    assert caught.value.reason is Reason.WRONG_BASE


@pytest.mark.parametrize("name", ["base", "latest", "UPPER", "a@1", "../x", "", "a..b"])
def test_names_that_cannot_be_asked_for_cannot_be_published(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidRequest):
        publish(registry, name=name)


@pytest.mark.parametrize(
    "fields",
    [{"who": ""}, {"who": "a\nb"}, {"note": "\x00"}, {"facts": {"x": float("nan")}}, {"facts": {"x": "y" * 70_000}}],
)
def test_texts_that_would_not_come_back_are_refused(registry: Registry, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        registry.publish("sum", adapter_files(), **{"who": "tester", **fields})


def test_concurrent_publishers_get_consecutive_numbers(registry: Registry) -> None:
    results = at_once([partial(publish, registry, seed) for seed in range(8)])
    assert sorted(r.number for r in results if isinstance(r, AdapterVersion)) == list(range(1, 9))


def test_concurrent_publishers_of_one_content_get_one_version(registry: Registry) -> None:
    results = at_once([lambda: publish(registry)] * 6)
    assert len(registry.adapter("sum").versions) == 1
    assert all(result == results[0] for result in results)


def test_two_registries_on_one_home_see_each_other(registry: Registry, home: Home) -> None:
    other = Registry.open(home)
    publish(registry, 0)
    assert publish(other, 1).number == 2
    assert [v.id for v in registry.adapter("sum").versions] == ["sum@2", "sum@1"]
    other.close()


def test_tenants_do_not_see_each_other(registry: Registry, home: Home) -> None:
    publish(registry)
    other = Registry.open(home, tenant="other")
    assert (other.adapters(), other.bases()) == ([], [])
    other.add_base(base_record())
    assert publish(other, 5).id == "sum@1"
    assert registry.version("sum", 1).digest != other.version("sum", 1).digest
    other.close()


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


# -- the tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["versions", "moves", "reports", "policies"])
@pytest.mark.parametrize("verb", ["UPDATE", "DELETE"])
def test_history_cannot_be_rewritten_in_the_database(registry: Registry, table: str, verb: str) -> None:
    promoted(registry, 0)
    statement = f"UPDATE {table} SET name = 'x'" if verb == "UPDATE" else f"DELETE FROM {table}"
    with pytest.raises(StoreFailed, match="never changed"), registry._database.writes() as connection:
        connection.exec_driver_sql(statement)
    assert registry.resolve("sum").id == "sum@1"


def test_the_migrations_make_the_tables_that_the_code_believes_in(registry: Registry) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with registry._database.reads() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, metadata) == []


def test_the_newest_migration_is_the_one_that_the_code_expects() -> None:
    from alembic.script import ScriptDirectory

    import adapters.schema

    scripts = ScriptDirectory(str(Path(adapters.schema.__file__).with_name("migrations")))
    assert scripts.get_current_head() == HEAD


def test_a_registry_of_a_newer_loraplane_is_left_alone(home: Home) -> None:
    database = Database(home.database_url)
    with database.writes() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(ConfigInvalid, match="newer"):
        Database(home.database_url)


def test_many_openers_of_a_new_home_make_one_registry(home: Home) -> None:
    results = at_once([lambda: Database(home.database_url).revision()] * 6)
    assert results == [HEAD] * 6


def test_sqlite_is_durable_and_checks_its_keys(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'r.sqlite'}")
    with database.reads() as connection:
        values = {
            p: connection.exec_driver_sql(f"PRAGMA {p}").scalar()
            for p in ("journal_mode", "synchronous", "foreign_keys")
        }
    database.close()
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_writer_that_waits_in_vain_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.schema.BUSY_TIMEOUT_S", 0.1)
    url = f"sqlite:///{tmp_path / 'r.sqlite'}"
    one, two = Database(url), Database(url)
    with one.writes(), pytest.raises(StoreFailed, match="locked"), two.writes():
        raise RuntimeError("two writers at once")
    one.close()
    two.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite:////dev/null/r.sqlite"])
def test_a_database_that_cannot_be_had_is_told_in_one_line(url: str) -> None:
    with pytest.raises((ConfigInvalid, StoreFailed)) as caught:
        Database(url)
    assert "\n" not in str(caught.value)
