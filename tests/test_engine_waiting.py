"""Queues that are full, deadlines that cannot be met, and what is told of those who wait. On a clock of steps."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from serving.engine import fair
from serving.engine.forecast import Forecast
from serving.engine.request import BASE_LANE, OTHER_LANES, Failed
from serving.metrics import EngineView, Metrics
from tests.fakes import FakeEngine, error_body
from tests.http_case import make_case
from tests.scheduler_case import STEP_S, FakeHost, SchedulerCase, retry_after


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_full_queue_takes_places_from_who_has_most_and_says_when_to_try_again() -> None:
    case = SchedulerCase(rows=2, queue_limit=12)
    flood = [case.submit("hot", tenant="loud", tokens=50) for _ in range(14)]
    case.step()
    refused = case.submit("hot", tenant="loud")
    assert case.asked[refused].code == "queue_full"
    other = case.submit("cold", tenant="loud")
    neighbours = [case.submit("cold", tenant="quiet") for _ in range(5)]
    case.step()
    pushed = [key for key in flood if case.asked[key].endings]
    assert pushed == flood[-6:], "the youngest of the longest queue"
    assert {case.asked[key].code for key in pushed} == {"queue_full"}
    case.run()
    assert {case.asked[key].code for key in (other, *neighbours, *flood[:8])} == {"done"}
    assert case.scheduler.waiting == 0


def test_who_gave_up_a_place_is_told_even_if_the_engine_stops_before_its_next_step() -> None:
    case = SchedulerCase(rows=1, queue_limit=2)
    for adapter in ("a", "a", "a", "b"):
        case.submit(adapter)
    case._tell(case.scheduler.fail_all("not_ready", "stops"))
    assert sorted(asked.code for asked in case.asked.values()) == ["not_ready"] * 3 + ["queue_full"]


def test_nothing_is_told_of_who_gave_up_a_place_and_left() -> None:
    case = SchedulerCase(rows=1, queue_limit=2)
    keys = [case.submit(adapter) for adapter in ("a", "a", "a", "b")]
    case.cancel(keys[2])
    case.run()
    assert {asked.code for asked in case.asked.values()} == {"done"}


def test_places_are_not_taken_from_who_has_no_more_than_the_newcomer() -> None:
    case = SchedulerCase(rows=1, queue_limit=4)
    first = case.submit("a", tokens=50)
    case.step()
    keys = [case.submit(adapter) for adapter in ("a", "a", "b", "b")]
    late = case.submit("b")
    assert case.asked[late].code == "queue_full"
    case.run()
    assert {case.asked[key].code for key in (first, *keys)} == {"done"}


def test_retry_after_is_computed_from_how_long_rows_are_held() -> None:
    """A quarter of what waits has started then; the figures are seconds, below two minutes."""
    quick, slow = (SchedulerCase(rows=2, queue_limit=40) for _ in range(2))
    found = []
    for case, tokens in ((quick, 10), (slow, 400)):
        for _ in range(20):
            case.submit(tokens=tokens)
        case.run()
        for _ in range(42):
            case.submit(tokens=tokens)
        case.step()
        case.submit(tokens=tokens)
        refused = case.submit(tokens=tokens)
        found.append(retry_after(case.asked[refused]))
        case.run()
    print(found)
    assert 1.0 <= found[0] < 2.0
    assert found[1] == pytest.approx(10 * 400 * STEP_S / 2, rel=0.15)


def test_a_deadline_that_the_load_alone_would_miss_is_refused_at_once() -> None:
    case = SchedulerCase(host=FakeHost(usual_s=3.0))
    assert case.asked[case.submit("a", deadline_s=0.5)].endings == [], "nothing is known of loads yet"
    case.run()
    case.submit("b")
    case.run()
    refused, served = case.submit("c", deadline_s=1.0), case.submit("c", deadline_s=10.0)
    assert case.asked[refused].code == "deadline_exceeded"
    assert retry_after(case.asked[refused]) == pytest.approx(2.0, abs=0.2)
    assert case.asked[served].endings == []
    resident = case.submit("b", deadline_s=0.5)
    case.run()
    assert case.asked[resident].code == case.asked[served].code == "done"


def test_a_refusal_for_its_load_starts_the_load_so_that_trying_again_helps() -> None:
    case = SchedulerCase(host=FakeHost(usual_s=3.0))
    case.submit("a")
    case.run()
    refused = case.submit("b", deadline_s=1.0)
    again_at = case.now + retry_after(case.asked[refused]) + 1.0
    while case.now < again_at:
        case.step()
    again = case.submit("b", deadline_s=1.0)
    case.run()
    assert case.asked[again].code == "done"
    assert case.host.loads == ["a", "b"]


@pytest.mark.parametrize("begun_by", ["a request that was refused", "a warm-up", "another tenant"])
def test_of_a_load_that_somebody_else_began_only_what_is_left_counts(begun_by: str) -> None:
    """It was forecast as if it began with the request, 3 s, though 2.5 of them had passed."""
    case = SchedulerCase(host=FakeHost(usual_s=3.0))
    case.submit("a")
    case.run()
    begun = case.now
    match begun_by:
        case "a warm-up":
            case.host.want("b")
        case "another tenant":
            case.submit("b", tenant="first")
        case _:
            assert case.asked[case.submit("b", deadline_s=1.0)].code == "deadline_exceeded"
    while case.now < begun + 2.5:
        case.step()
    late, soon = case.submit("b", deadline_s=0.3), case.submit("b", deadline_s=0.8)
    assert case.asked[late].code == "deadline_exceeded"
    assert case.asked[soon].endings == []
    case.run()
    assert case.asked[soon].code == "done"
    assert case.host.loads == ["a", "b"]


def test_what_does_not_load_is_told_as_that_and_not_as_a_deadline_that_is_too_short() -> None:
    """Who waits no longer than a load takes was told to come again with more time, for ever."""
    case = SchedulerCase(host=FakeHost(usual_s=3.0, broken={"gone"}))
    case.submit("a")
    case.run()
    refused = case.submit("gone", deadline_s=1.0)
    assert case.asked[refused].code == "adapter_load_failed"
    assert retry_after(case.asked[refused]) == 5.0
    case.submit("gone")
    case.run()


def test_a_deadline_behind_a_long_queue_is_refused_and_one_whose_turn_comes_first_is_not() -> None:
    """200 of one adapter wait, two rows: its next would start in half a minute; another adapter's starts at once."""
    case = SchedulerCase(rows=2)
    for adapter in ("hot", "cold"):
        for _ in range(5):
            case.submit(adapter, tokens=15)
    case.run()
    for _ in range(200):
        case.submit("hot", tokens=15)
    case.step()
    late, in_turn = case.submit("hot", deadline_s=10.0), case.submit("cold", deadline_s=10.0)
    assert case.asked[late].code == "deadline_exceeded"
    assert 5 <= retry_after(case.asked[late]) <= 60
    case.run()
    assert case.asked[in_turn].code == "done"
    assert {a.code for key, a in case.asked.items() if key != late} == {"done"}


def test_loads_are_forecast_by_source_and_size_and_else_by_what_is_nearest() -> None:
    forecast = Forecast(rows=4)
    assert forecast.load_s("store", 1000) == 0.0
    forecast.loaded("store", 1000, 2.0)
    forecast.loaded("store", 20_000_000, 8.0)
    forecast.loaded("disk", 1000, 0.1)
    assert forecast.load_s("store", 900) == 2.0
    assert forecast.load_s("store", 17_000_000) == 8.0
    assert forecast.load_s("disk", 0) == 0.1
    assert 2.0 < forecast.load_s("store", 0) < 8.0, "size unknown: the source's mean"
    assert 0.1 < forecast.load_s("elsewhere", 1000) < 8.0, "source unknown: the mean of all"
    for _ in range(100):
        forecast.loaded("store", 1000, 0.5)
    assert forecast.load_s("store", 900) == pytest.approx(0.5, abs=0.01), "what is long past is forgotten"


def test_forecasts_refuse_nobody_before_anything_was_seen() -> None:
    case = SchedulerCase(rows=1)
    keys = [case.submit("a", deadline_s=1.0, tokens=2) for _ in range(300)]
    assert all(not case.asked[key].endings for key in keys)
    case.run()


@pytest.mark.anyio
async def test_a_deadline_refused_at_once_is_a_429_that_says_when_to_try_again(tmp_path: Path) -> None:
    """Told apart by its status from a deadline that passed (504); the code is the same."""
    case = make_case(tmp_path, FakeEngine(script=lambda s: [Failed(1, "deadline_exceeded", "in 9 s", 12.5)]))
    async with case.client() as client:
        answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "13")
        assert error_body(answer)["code"] == "deadline_exceeded"
        case.engine.script = lambda s: [Failed(1, "deadline_exceeded", "passed")]
        answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert (answer.status_code, error_body(answer)["code"]) == (504, "deadline_exceeded")


# -- what is told of those who wait --------------------------------------------------------------------------------


def test_who_waits_is_told_by_adapter_up_to_a_bound_and_for_how_long() -> None:
    case = SchedulerCase(rows=1, queue_limit=2000, host=FakeHost(usual_s=100.0))
    for number in range(50):
        for _ in range(50 - number):
            case.submit(f"a{number}")
    case.submit()
    case.submit()
    case.step()
    told = case.scheduler.waiting_by()
    assert len(told) == fair.TOLD + 1
    assert (told["a0"], told["a19"], sum(told.values())) == (50, 31, case.scheduler.waiting)
    assert told[OTHER_LANES] == sum(50 - number for number in range(20, 50)) + 1
    assert case.scheduler.oldest_wait_s(case.now + 3.0) == pytest.approx(3.0 + STEP_S)


def test_metrics_name_who_waits() -> None:
    engine = FakeEngine()
    assert engine.heartbeat is not None
    beat = msgspec.structs.replace(
        engine.heartbeat, waiting=9, waiting_by={"d" * 64: 4, BASE_LANE: 3, OTHER_LANES: 2}, oldest_wait_s=1.5
    )
    text = Metrics("tiny", look=lambda: EngineView(engine.facts, beat, 0.1, 9)).render().decode()
    for line in (
        'adapter_waiting{adapter="dddddddddddd"} 4.0',
        'adapter_waiting{adapter="base"} 3.0',
        'adapter_waiting{adapter="other"} 2.0',
        "engine_oldest_wait_seconds 1.5",
        'waiting_lora_adapters="dddddddddddd"',
    ):
        assert line in text
