"""Options of `loraplane serve` that nobody can mean are refused before anything starts, and odd ones are told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.cli import run
from adapters.errors import ConfigInvalid
from serving.config import load_settings
from serving.limits import LONGEST_DRAIN_S
from serving.scaling import remark, scaling


@pytest.mark.parametrize("drain", ["-1", "-1000000000000", "86401", "1000000000000", "1e12", "nan", "inf", "-inf", "x"])
def test_a_drain_time_that_nobody_means_is_an_error_of_usage(
    drain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thirty thousand years were taken as they came: so long a server that is told to stop waits for a stream."""
    assert run(["serve", f"--drain={drain}", "--home", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "error[usage]" in said
    assert "--drain" in said


@pytest.mark.parametrize("name", ["drain_s", "request_deadline_s", "warm_deadline_s", "retire_drain_s"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_times_of_the_environment_are_finite_and_not_negative(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"LORAPLANE_{name.upper()}", value)
    with pytest.raises(ConfigInvalid, match=name):
        load_settings()


def test_a_day_of_draining_is_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [load_settings(drain_s=seconds).drain_s for seconds in (0, LONGEST_DRAIN_S)] == [0, 86_400]
    with pytest.raises(ConfigInvalid, match="drain_s"):
        load_settings(drain_s=LONGEST_DRAIN_S + 1)


def test_fewest_replicas_alone_are_a_fixed_number_and_the_operator_is_told_so() -> None:
    """It reads like autoscaling from five up, and is five for ever."""
    assert remark(5, None, scaling(None, 5, None)).startswith("5 engines, whatever the load: ")
    assert "--max-replicas" in remark(1, None, scaling(None, 1, None))
    for given in ((None, None, None), (2, None, None), (None, 1, 4), (None, 5, 5), (5, 2, None)):
        assert remark(given[1], given[2], scaling(*given)) == "", given
