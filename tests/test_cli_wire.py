"""Records survive the way through JSON, times keep their zone, and foreign JSON is refused by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from adapter_factory import base_record, report

from adapters import wire
from adapters.errors import InvalidRequest
from adapters.records import (
    AdapterSummary,
    AdapterVersion,
    AliasRecord,
    BoundBy,
    GenerationDefaults,
    Move,
    MoveAction,
    PromptFormat,
)
from adapters.reports import Decision, GatePolicy, Verdict

AT = datetime(2026, 3, 4, 5, 6, 7, 890000, tzinfo=UTC)
FORMAT = PromptFormat("text", "", "In: ", "\nOut:", ("\n",), GenerationDefaults(max_tokens=32))
VERSION = AdapterVersion(
    name="summarize",
    number=3,
    digest="d" * 64,
    base_digest="b" * 64,
    bound_by=BoundBy.NAME,
    rank=8,
    modules=("model.layers.0.self_attn.q_proj",),
    size_bytes=1234,
    prompt_format=FORMAT,
    originals={"adapter_config.json": "c" * 64},
    facts={"seed": 1, "data": {"name": "docstrings"}},
    published_by="ann",
    published_at=AT,
    note="first",
)
ALIAS = AliasRecord("summarize", "champion", 3, 2, AT)
MOVE = Move("summarize", "champion", MoveAction.FORCED, None, 3, 1, "ann", "because", None, AT)


@pytest.mark.parametrize(
    ("record", "write", "read", "kind"),
    [
        (base_record(), wire.base_to_json, wire.base_from_json, "base"),
        (VERSION, wire.version_to_json, wire.version_from_json, "adapter.version"),
        (ALIAS, wire.alias_to_json, wire.alias_from_json, "adapter.alias"),
        (
            AdapterSummary("summarize", (VERSION,), (ALIAS,)),
            wire.summary_to_json,
            wire.summary_from_json,
            "adapter",
        ),
        (MOVE, wire.move_to_json, wire.move_from_json, "adapter.move"),
        (GatePolicy("e" * 64, 64, margin=0.01), wire.policy_to_json, wire.policy_from_json, "adapter.policy"),
        (Decision(Verdict.FAIL, ("n is 3",)), wire.decision_to_json, wire.decision_from_json, "adapter.decision"),
        (report(VERSION), wire.report_to_json, wire.report_from_wire, "adapter.report"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_record_comes_back_from_its_json(
    record: object, write: Callable[[Any], Any], read: Callable[[object], Any], kind: str
) -> None:
    sent = json.loads(json.dumps(write(record), allow_nan=False))
    assert sent["object"] == kind
    back = read({**sent, "a_key_of_a_newer_server": 1})
    assert back == record
    assert type(back) is type(record)


def test_times_go_out_in_utc_whatever_zone_they_came_in() -> None:
    elsewhere = AT.astimezone(timezone(timedelta(hours=9)))
    assert wire.plain(elsewhere) == wire.plain(AT) == "2026-03-04T05:06:07.890000Z"
    assert wire.plain(AT.replace(tzinfo=None)) == "2026-03-04T05:06:07.890000Z"


def test_report_listing_leaves_the_examples_out_and_keeps_the_digest() -> None:
    whole = report(VERSION)
    summary = wire.report_summary_to_json(whole)
    assert (summary["id"], summary["examples"]) == (whole.digest, [])


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({}, "name"),
        ([], "BaseRecord"),
        ({**wire.base_to_json(base_record()), "vocab_size": "many"}, "vocab_size"),
        ({**wire.base_to_json(base_record()), "modules": {"q_proj": [1, 2, 3]}}, "modules.q_proj"),
    ],
)
def test_foreign_json_is_refused_by_the_field_that_is_wrong(raw: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.base_from_json(raw)
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)


@pytest.mark.parametrize("raw", [[], {}, {"systems": 1}, {**wire.report_to_json(report(VERSION)), "systems": [{}]}])
def test_foreign_report_is_refused(raw: object) -> None:
    with pytest.raises(InvalidRequest):
        wire.report_from_wire(raw)


def test_list_without_data_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="list"):
        wire.page_items({"object": "list"})
