"""Golden rows as part of a version: checked at publish, kept with it, given back by a pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRefused, Reason
from adapters.golden import GoldenRow, golden_to_json, read_golden
from adapters.home import Home
from adapters.publish import Files
from adapters.registry import Registry
from adapters.registry_door import adapter_files as files_of
from tests.adapter_factory import adapter_files, base_record

ROW = {"prompt": [1, 2, 3], "expected": [4, 5], "tolerance": 0.5}


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    registry = Registry.open(Home.find(tmp_path / "home"))
    registry.add_base(base_record("tiny"))
    yield registry
    registry.close()


def with_rows(*rows: object, seed: int = 0) -> Files:
    return {**adapter_files(seed), "golden_rows.json": json.dumps(rows).encode()}


def test_golden_rows_are_part_of_what_the_digest_names(registry: Registry) -> None:
    plain = registry.publish("summarize", adapter_files(0), who="test")
    golden = registry.publish("summarize", with_rows(ROW), who="test")
    assert golden.digest != plain.digest
    assert registry.manifest(golden.digest).golden == (GoldenRow((1, 2, 3), (4, 5), 0.5),)
    assert (golden.facts["golden_rows"], "golden_rows" in plain.facts) == (1, False)


def test_a_version_without_rows_keeps_the_digest_that_it_had(registry: Registry) -> None:
    version = registry.publish("summarize", with_rows(), who="test")
    assert version.digest == registry.publish("summarize", adapter_files(0), who="test").digest
    assert b"golden" not in registry.manifest(version.digest).canonical()


def test_a_pulled_folder_publishes_as_the_same_version_rows_and_all(registry: Registry, tmp_path: Path) -> None:
    version = registry.publish("summarize", with_rows(ROW), who="test")
    folder = registry.export("summarize", version.number, tmp_path / "out")
    assert registry.publish("summarize", files_of(folder), who="test").number == version.number


@pytest.mark.parametrize(
    "rows",
    [
        [ROW, ROW, ROW, ROW],
        [{**ROW, "extra": 1}],
        [{"prompt": [1], "expected": [2]}],
        [{**ROW, "prompt": []}],
        [{**ROW, "prompt": [1] * 257}],
        [{**ROW, "expected": [320]}],  # the vocabulary has 320
        [{**ROW, "expected": [-1]}],
        [{**ROW, "expected": [True]}],
        [{**ROW, "expected": "45"}],
        [{**ROW, "tolerance": -0.1}],
        [{**ROW, "tolerance": True}],
        [{**ROW, "tolerance": 99}],
        [{**ROW, "prompt": [1] * 250, "expected": [1] * 7}],  # 256 positions
        [[1], [2], 0.5],
    ],
)
def test_rubbish_for_golden_rows_is_refused_by_name(registry: Registry, rows: list[object]) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        registry.publish("summarize", with_rows(*rows), who="test")
    assert refusal.value.reason is Reason.GOLDEN_ROWS
    assert "golden_rows.json" in str(refusal.value)


@pytest.mark.parametrize("data", [b"{}", b"nope", b"\xff", b'[{"tolerance": NaN}]', b"[" * 5000, b" " * (65 << 10)])
def test_bytes_that_are_no_rows_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        read_golden(data)
    assert refusal.value.reason is Reason.GOLDEN_ROWS


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        ({"prompt": [1] * 250, "expected": [1] * 30}, True),  # 256 positions for the one, and 256 for the other
        ({"prompt": [1] * 41, "expected": [1]}, False),
        ({"prompt": [1], "expected": [1] * 32}, False),
        ({"prompt": [1], "expected": [320]}, False),
        ({"prompt": [320], "expected": [1]}, False),
    ],
)
def test_an_encoder_decoder_has_positions_for_prompt_and_answer_each(
    tmp_path: Path, row: dict[str, list[int]], fits: bool
) -> None:
    registry = Registry.open(Home.find(tmp_path / "home"))
    registry.add_base(base_record("tiny", family="bart", max_positions=256 if fits else 31))
    rows = with_rows({**row, "tolerance": 0.5})
    if fits:
        assert registry.publish("summarize", rows, who="test").facts["golden_rows"] == 1
    else:
        with pytest.raises(AdapterRefused) as refusal:
            registry.publish("summarize", rows, who="test")
        assert refusal.value.reason is Reason.GOLDEN_ROWS
    registry.close()


def test_a_base_without_positions_takes_rows_of_any_length(tmp_path: Path) -> None:
    """T5 counts distances."""
    registry = Registry.open(Home.find(tmp_path / "home"))
    registry.add_base(base_record("tiny", family="t5", max_positions=0))
    rows = with_rows({"prompt": [1] * 256, "expected": [1] * 32, "tolerance": 0.5})
    assert registry.publish("summarize", rows, who="test").facts["golden_rows"] == 1
    registry.close()


def test_rows_read_back_as_they_were_written() -> None:
    rows = (GoldenRow((7,), (8, 9), 0.25), GoldenRow((1, 2), (3,), 0.0))
    assert read_golden(json.dumps(golden_to_json(rows)).encode()) == rows
