"""Which base `loraplane serve` takes, and that a refused one leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_factory import adapter_files, base_record
from base_factory import CONFIG, write_base

from adapters.bases import pull
from adapters.errors import BaseMissing, BaseUnsupported
from adapters.home import Home
from adapters.records import BaseRecord
from adapters.registry import Registry
from serving.server import socket_folder
from serving.start import find_base


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.find(tmp_path / "home")


@pytest.fixture
def registry(home: Home) -> Iterator[Registry]:
    opened = Registry.open(home)
    yield opened
    opened.close()


def _pull(folder: Path, home: Home, registry: Registry) -> BaseRecord:
    return pull(str(folder), home, registry, lambda _: None)


def _other_family(folder: Path) -> Path:
    return write_base(folder, config={**CONFIG, "model_type": "granite", "architectures": ["GraniteForCausalLM"]})


def test_folder_of_a_family_that_no_runner_computes_does_not_become_the_default_base(
    home: Home, registry: Registry, tmp_path: Path
) -> None:
    """The refusal came after the pull: the home's first base was then one that every later `serve` refused."""
    with pytest.raises(BaseUnsupported, match="granite"):
        find_base(str(_other_family(tmp_path / "granite")), home, registry)
    assert registry.bases() == []
    assert not home.bases.exists()


def test_config_that_hides_its_family_does_not_get_past_the_shelf(
    home: Home, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id has no folder to look into: what it turns out to be is asked again before it becomes a row."""
    folder = _other_family(tmp_path / "granite")
    monkeypatch.setattr("adapters.bases.download_hub", lambda hub_id, patterns: folder)
    with pytest.raises(BaseUnsupported, match="granite"):
        find_base("owner/model", home, registry)
    assert registry.bases() == []


def test_base_means_the_first_base_that_can_be_served(home: Home, registry: Registry, tmp_path: Path) -> None:
    _pull(_other_family(tmp_path / "granite"), home, registry)
    with pytest.raises(BaseUnsupported):
        find_base("base", home, registry)
    served = _pull(write_base(tmp_path / "tiny"), home, registry)
    assert find_base("base", home, registry) == (served, home.root / served.folder)


def test_base_is_a_name_even_beside_a_folder_called_so(
    home: Home, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseMissing, match="models pull"):
        find_base("base", home, registry)


def test_publishing_for_base_means_the_base_that_is_served(registry: Registry) -> None:
    registry.add_base(base_record("first"))
    second = registry.add_base(base_record("second"))
    registry.mean_by_base(second)
    assert registry.base() == second
    files = adapter_files(base="Tests/second-Instruct")
    assert registry.publish("sum", files, base="base", who="t").base_digest == second.digest


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="lp-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_socket_folders_of_killed_servers_are_swept_and_those_of_living_ones_stay(short: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = short / f"loraplane-{int(gone.stdout)}-abc"
    living, foreign = short / f"loraplane-{os.getppid()}-abc", short / "loraplane-demo-xyz"
    for folder in (dead, living, foreign):
        folder.mkdir()
        (folder / "socket").touch()
    with socket_folder() as mine:
        assert mine.parent == short
        assert mine.stat().st_mode & 0o077 == 0
        assert sorted(short.iterdir()) == sorted([living, foreign, mine])
    assert sorted(short.iterdir()) == sorted([living, foreign])
