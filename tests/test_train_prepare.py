"""What cannot become a version is refused before the first step, and what will disappoint is said before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.errors import BaseUnsupported
from adapters.home import Home
from adapters.records import BaseRecord
from adapters.registry import Registry
from tests.adapter_factory import base_record
from tests.train_case import TrainCase, train_case
from train import job

Prepare = Callable[..., job.Prepared]


@pytest.fixture
def case(tmp_path: Path, tiny_base: Path) -> TrainCase:
    return train_case(tmp_path, tiny_base)


@pytest.fixture
def prepare(case: TrainCase) -> Iterator[Prepare]:
    """`job.prepare` on the case's run with some settings changed."""
    door = case.door()
    yield lambda *overrides: job.prepare(case.run(*overrides), case.home, door)
    door.close()


def add_base(home: Home, base: BaseRecord) -> None:
    registry = Registry.open(home)
    registry.add_base(base)
    registry.close()


def test_a_base_that_no_runner_computes_is_refused_before_training(case: TrainCase, prepare: Prepare) -> None:
    add_base(case.home, base_record("other", family="gpt2"))
    with pytest.raises(BaseUnsupported, match="gpt2"):
        prepare("base=other")


def test_base_means_to_training_what_it_means_to_serving(tmp_path: Path, tiny_base: Path) -> None:
    """Train took a base of a well-known name, serve the first one added; now it is the first that can be served."""
    home = Home.find(tmp_path / "home")
    add_base(home, base_record("first", family="gpt2"))
    case = train_case(tmp_path, tiny_base)
    add_base(home, base_record("smollm2-135m"))
    door = case.door()
    try:
        assert job.prepare(case.run(), case.home, door).base.name == "tiny"
    finally:
        door.close()
