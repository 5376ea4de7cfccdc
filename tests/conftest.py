"""Shared fixtures: the tiny base and adapters for it, made once a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.home import Home
from adapters.registry import Registry
from tests.adapter_factory import base_record
from tests.adapter_homes import fresh_schema, postgres

# Before torch is imported by any test: two threads that spin on a busy machine are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device cuda` runs the engine's tests on a card."""
    parser.addoption("--device", default="cpu", help="device of the engine's tests: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = str(config.getoption("--device"))
    if device != "cpu":
        _check_card(device)
    else:
        # Read when the CUDA kernels are imported: without a card they run under Triton's interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["LORAPLANE_TEST_DEVICE"] = device


def _check_card(device: str) -> None:
    """Raises UsageError unless torch can use this device."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(f"--device {device}: torch cannot use it here ({reason}); try --device cpu") from None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that computes with more threads leaves none to those after it, which were sixty times slower by them."""
    yield
    if "torch" in sys.modules:
        import torch

        if torch.get_num_threads() != 1 and os.environ["OMP_NUM_THREADS"] == "1":
            torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_base import save_tiny_base

    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six adapters of different ranks, targets, scales: [all r4, q/v r8, rsLoRA r2, patterns, r16, all r4 again]."""
    from tests.tiny_base import save_adapter

    root = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(tiny_base, root / "a", 1),
        save_adapter(tiny_base, root / "b", 2, rank=8, targets=("q_proj", "v_proj")),
        save_adapter(tiny_base, root / "c", 3, rank=2, rslora=True),
        save_adapter(tiny_base, root / "d", 4, rank=4, rank_pattern={"down_proj": 6, "q_proj": 1}),
        save_adapter(tiny_base, root / "e", 5, rank=16, alpha=4, targets=("gate_proj", "o_proj", "k_proj")),
        save_adapter(tiny_base, root / "f", 6),
    ]


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
