"""What cannot become a version is refused before the first step, and what will disappoint is said before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters import cli
from adapters.errors import BaseUnsupported, RunInvalid
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
    add_base(case.home, base_record("other", family="phi3"))
    with pytest.raises(BaseUnsupported, match="phi3"):
        prepare("base=other")


def test_base_means_to_training_what_it_means_to_serving(tmp_path: Path, tiny_base: Path) -> None:
    """Train took a base of a well-known name, serve the first one added; now it is the first that can be served."""
    home = Home.find(tmp_path / "home")
    add_base(home, base_record("first", family="phi3"))
    case = train_case(tmp_path, tiny_base)
    add_base(home, base_record("smollm2-135m"))
    door = case.door()
    try:
        assert job.prepare(case.run(), case.home, door).base.name == "tiny"
    finally:
        door.close()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("name=tiny", "name: a base is called 'tiny'"),
        ("lora.targets=[q_proj, norm]", "lora.targets: 'norm' is no module that can be served; .*v_proj"),
        ("lora.targets=[q_proj, v_porj]", "lora.targets: 'v_porj'"),
        ("lora.r=128", "rank 128; slots hold at most 64"),
        ("lora.alpha=1000", "scaled by 250"),
        ("max_length=4096", "512 positions"),
        ('note="bell \\a"', "note must be printable"),
        ("optim.max_steps=1", r"optim\.warmup: the run has a single step"),
    ],
)
def test_what_publishing_would_refuse_is_refused_before_training(prepare: Prepare, override: str, told: str) -> None:
    """All of these were trained to their end, and refused then."""
    with pytest.raises(RunInvalid, match=told):
        prepare(override)


def test_what_publishing_takes_is_prepared(prepare: Prepare) -> None:
    targets = ("lora.targets=[self_attn.q_proj]", "lora.targets=[embed_tokens, lm_head]")
    for fine in ("lora.r=64", "lora.alpha=256", *targets, "note=one\\ntwo"):
        prepare(fine)
    assert len(prepare("optim.max_steps=1", "optim.warmup=0").plan.batches) == 1


def test_a_gate_that_can_never_decide_is_told_before_training(prepare: Prepare) -> None:
    assert prepare().cautions == ()
    (few,) = prepare("gate.min_n=64", "data.eval_limit=64").cautions
    assert "gate.min_n is 64" in few
    assert "larger data.holdout" in few
    (cut,) = prepare("gate.min_n=9", "data.eval_limit=8").cautions
    assert "raise data.eval_limit (now 8), or lower gate.min_n to at most 8" in cut
    assert prepare("gate=null", "data.eval_limit=1").cautions == ()


def test_a_warm_up_that_never_ends_is_told(prepare: Prepare) -> None:
    (told,) = prepare("optim.warmup=1000").cautions
    assert "optim.warmup is 1000 of" in told


def test_a_dry_run_shows_what_will_disappoint(case: TrainCase, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", str(case.run_file), "--home", str(case.home.root), "--dry-run", "--set", "gate.min_n=999"]
    assert cli.run(line) == 0
    assert capsys.readouterr().err.count("the gate can never decide") == 1
    assert cli.run([*line, "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"]
    assert "gate.min_n is 999" in warning


def test_an_early_ctrl_c_ends_with_a_word(
    case: TrainCase, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "prepare", pressed)
    assert cli.run(["train", str(case.run_file), "--home", str(case.home.root)]) == 130
    assert "error[interrupted]: stopped" in capsys.readouterr().err.splitlines()
