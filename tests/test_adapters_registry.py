"""The registry, on SQLite and on a real Postgres: bases, publishing, and the tables below."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import (
    AdapterRefused,
    BaseMissing,
    ConfigInvalid,
    Conflict,
    InvalidRequest,
    Reason,
    StoreFailed,
)
from adapters.home import Home
from adapters.records import AdapterVersion, BoundBy, PromptFormat
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
    write_adapter,
)
from tests.registry_case import at_once, promoted, publish

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
    "targets that leave tensors out": (adapter_files(target_modules=["v_proj"]), Reason.CONFIG_FIELD),
    "layers that leave tensors out": (adapter_files(layers_to_transform=[7]), Reason.CONFIG_FIELD),
    "excluded modules with tensors": (adapter_files(exclude_modules=["q_proj"]), Reason.CONFIG_FIELD),
    "wrong base by a hub id of one word": (adapter_files(base="gpt2"), Reason.WRONG_BASE),
    "wrong base by name, with weights larger than any here": (
        {**adapter_files(base="meta-llama/Llama-3.2-1B"), "adapter_model.safetensors": bytes(3 << 20)},
        Reason.WRONG_BASE,
    ),
    "wrong base by digest, with weights larger than any here": (
        {**adapter_files(base_digest="0" * 64), "adapter_model.safetensors": bytes(3 << 20)},
        Reason.WRONG_BASE,
    ),
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
    "dora without magnitudes": (adapter_files(use_dora=True), Reason.TENSOR_SET),
    "biases": (adapter_files(lora_bias=True), Reason.UNSUPPORTED),
    "whole layers": (adapter_files(modules_to_save=["lm_head"]), Reason.UNSUPPORTED),
    "parameters of experts": (adapter_files(target_parameters=["mlp.experts.down_proj"]), Reason.UNSUPPORTED),
    "transposed layers of a base that has none": (adapter_files(fan_in_fan_out=True), Reason.CONFIG_FIELD),
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


def test_weights_that_an_embedding_makes_too_large_say_how_to_leave_it_out(registry: Registry) -> None:
    """PEFT may save the whole embedding beside a LoRA on other modules; the size alone told nobody what to do."""
    files = adapter_files()
    with pytest.raises(AdapterRefused, match="save with save_embedding_layers=False") as caught:
        registry.publish("sum", {**files, "adapter_model.safetensors": bytes(3 << 20)}, who="t")
    assert caught.value.reason is Reason.TOO_LARGE


def test_weights_are_held_against_the_limit_of_the_base_that_their_config_names(registry: Registry) -> None:
    registry.add_base(base_record("wide", modules=modules(hidden=4096)))
    with pytest.raises(AdapterRefused) as caught:
        registry.publish("sum", {**adapter_files(), "adapter_model.safetensors": bytes(3 << 20)}, who="t")
    assert caught.value.reason is Reason.TOO_LARGE


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
