"""Where the time went: the spans of `server-timing`, on every kind of answer, add up to the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.request import LoadTimes, Timing
from serving.timing import SPANS, engine_s, server_timing, spans
from tests.http_case import Case, make_case

_seconds = st.floats(0, 1e4)


def read(header: str) -> dict[str, float]:
    """Spans in milliseconds."""
    return {name: float(rest.removeprefix("dur=")) for name, _, rest in (p.partition(";") for p in header.split(", "))}


@given(
    st.builds(
        Timing,
        queue_s=_seconds,
        load_s=_seconds,
        device_s=_seconds,
        prefill_s=_seconds,
        decode_s=_seconds,
        load=st.none() | st.builds(LoadTimes, queue_s=_seconds, fetch_s=_seconds, host_s=_seconds),
    )
)
def test_spans_are_never_negative_and_add_up_to_the_sequences_time(timing: Timing) -> None:
    found = spans(timing)
    assert tuple(found) == SPANS
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(engine_s(timing))


def test_who_comes_while_a_load_is_under_way_is_charged_with_its_end_alone() -> None:
    load = LoadTimes("store", queue_s=1.0, fetch_s=2.0, host_s=0.5)
    assert spans(Timing(load_s=3.5, load=load)) | {"queue": 1.0, "fetch": 2.0, "host": 0.5} == spans(
        Timing(load_s=3.5, load=load)
    )
    late = spans(Timing(load_s=1.0, load=load))
    assert (late["queue"], late["fetch"], late["host"]) == (0.0, 0.5, 0.5)


def test_the_header_tells_what_was_spent_outside_of_the_engine_and_the_total() -> None:
    found = read(server_timing(spans(Timing(queue_s=0.001, prefill_s=0.002)), 0.010))
    assert (found["edge"], found["total"]) == (7.0, 10.0)
    # Two clocks may disagree by a little: no span is ever negative.
    assert read(server_timing({"queue": 0.5}, 0.4)) == {"queue": 500.0, "edge": 0.0, "total": 500.0}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
async def test_every_answer_says_where_its_time_went(case: Case, route: str, stream: bool) -> None:
    version = case.publish()
    body: dict[str, Any] = {"model": version.id, "max_tokens": 4, "stream": stream}
    body |= {"messages": [{"role": "user", "content": "x"}]} if route.startswith("chat") else {"prompt": "x"}
    async with case.client() as client:
        answer = await client.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    found = read(answer.headers["server-timing"])
    assert set(found) == {*SPANS, "edge", "total"}
    assert sum(v for name, v in found.items() if name != "total") == pytest.approx(found["total"], abs=0.05)
    assert found["fetch"] == 2.0
    assert answer.headers["x-adapter-cache"] == "disk"


@pytest.mark.anyio
async def test_a_whole_answer_that_a_stop_text_ended_has_its_decoding_told(case: Case) -> None:
    case.engine.pause_s = 0.02
    async with case.client() as client:
        body = {"model": "base", "prompt": "x", "stop": ["wor"], "max_tokens": 50}
        answer = await client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    found = read(answer.headers["server-timing"])
    assert found["decode"] >= 100.0  # ten tokens, 20 ms apart
    assert sum(v for name, v in found.items() if name != "total") == pytest.approx(found["total"], abs=0.05)
    assert "x-adapter-cache" not in answer.headers
