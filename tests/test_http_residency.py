"""Where adapters lie, what loading took and why one is set aside: the residency document, and /metrics beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import InvalidRequest
from adapters.records import check_adapter_name
from serving.engine.breaker import Doubt
from serving.engine.request import LOAD_BUCKETS_S, Failed, Heartbeat, SetAsideState, SlotState
from serving.metrics import EngineView, Metrics
from tests.fakes import FakeEngine
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio
URL = "/v1/adapters/residency"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Told(FakeEngine):
    """An engine whose heartbeat says what a test wants."""

    beat: dict[str, Any]

    @property
    def heartbeat(self) -> Heartbeat | None:
        beat = super().heartbeat
        return None if beat is None else msgspec.structs.replace(beat, **self.beat)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    engine = Told()
    engine.beat = {}
    return make_case(tmp_path, engine)


def tell(case: Case, **beat: Any) -> None:
    engine = case.engine
    assert isinstance(engine, Told)
    engine.beat = beat


async def test_residency_tells_tiers_leases_and_why_an_adapter_is_set_aside(case: Case) -> None:
    version = case.publish()
    await ask(case, version.id)  # so that the gateway knows the digest by its name
    tell(
        case,
        slots=(SlotState(version.digest, 2, 8),),
        host_digests=("e" * 64, version.digest),
        pinned=(version.digest,),
        warm=("e" * 64,),
        set_aside=(SetAsideState("f" * 64, Doubt.GOLDEN_MISMATCH.value, 12.5, 2),),
        disk_count=3,
        disk_bytes=300,
        disk_bytes_limit=1000,
        evicted={"host": 4, "device": 1},
    )
    async with case.client() as client:
        answer = await client.get(URL)
    assert answer.status_code == 200, answer.text
    (replica,) = answer.json()["replicas"]
    assert replica["age_s"] == case.engine.heartbeat_age == 0.1
    assert replica["disk"] == {"adapters": 3, "bytes": 300, "bytes_limit": 1000}
    assert replica["evicted"] == {"device": 1, "host": 4}
    ours, aside, warm = replica["adapters"]
    assert ours == {
        "digest": version.digest,
        "model": version.id,
        "tiers": ["device", "host"],
        "leases": 2,
        "rank": 8,
        "pinned": True,
        "warm": False,
        "dropping": False,
        "set_aside": None,
    }
    assert aside["set_aside"] == {"reason": "golden_mismatch", "retry_after_s": 12.5, "times": 2}
    assert (aside["tiers"], warm["tiers"], warm["warm"]) == ([], ["host"], True)


async def test_a_list_that_is_cut_says_how_much_is_left_out(case: Case) -> None:
    tell(case, host_digests=tuple(f"{at:064x}" for at in range(20)))
    async with case.client() as client:
        (replica,) = (await client.get(URL, params={"limit": 5})).json()["replicas"]
        wrong = [(await client.get(URL, params={"limit": limit})).status_code for limit in ("0", "x", "10001", "-1")]
    assert (len(replica["adapters"]), replica["left_out"]) == (5, 15)
    assert replica["adapters"][0]["digest"] == f"{19:064x}"  # the most recently wanted
    assert wrong == [400] * 4


async def test_without_an_engine_residency_is_a_503_and_not_an_empty_list(case: Case) -> None:
    case.engine.connected = False
    async with case.client() as client:
        answer = await client.get(URL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


def test_no_adapter_is_called_as_the_residency_page_is() -> None:
    with pytest.raises(InvalidRequest):
        check_adapter_name("residency")


@pytest.mark.parametrize("doubt", Doubt)
async def test_a_client_is_told_why_an_adapter_is_set_aside_and_when_to_come_again(case: Case, doubt: Doubt) -> None:
    version = case.publish()
    case.engine.script = lambda submission: [Failed(1, "adapter_quarantined", doubt.value, retry_after_s=30.0)]
    answer = await ask(case, version.id)
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "adapter_quarantined"
    assert f"({doubt.value})" in error["message"]
    assert version.id in error["message"]
    assert answer.headers["retry-after"] == "30"


async def ask(case: Case, model: str) -> Any:
    async with case.client() as client:
        return await client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 3})


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


async def test_metrics_have_loads_as_histograms_evictions_by_tier_and_doubts_by_reason(case: Case) -> None:
    counts = tuple(range(1, len(LOAD_BUCKETS_S) + 2))
    tell(
        case,
        load_histograms={"disk": counts},
        load_seconds={"disk": 1.5},
        evicted={"device": 2, "disk": 5},
        set_aside=(SetAsideState("f" * 64, Doubt.NO_EFFECT.value, 1.0, 1),),
        disk_count=7,
    )
    found = {(name, *sorted(labels.values())): value for name, labels, value in samples(case.metrics)}
    assert found["adapter_load_seconds_bucket", "+Inf", "disk"] == counts[-1]
    assert found["adapter_load_seconds_bucket", "0.005", "disk"] == 1
    assert found["adapter_load_seconds_sum", "disk"] == 1.5
    assert found["adapter_load_seconds_count", "disk"] == counts[-1]
    assert found["adapter_tier_evictions_total", "disk"] == 5
    assert found["adapter_set_aside", "no_effect"] == 1
    assert found["adapter_set_aside", "numerics"] == 0
    assert found["adapter_resident", "disk"] == 7


async def test_series_do_not_grow_with_adapters(case: Case) -> None:
    tell(
        case,
        slots=tuple(SlotState(f"{at:064x}", 0, 4) for at in range(1000)),
        host_digests=tuple(f"{at:064x}" for at in range(5000)),
        set_aside=tuple(SetAsideState(f"{at:064x}", "numerics", 1.0, 1) for at in range(1000)),
    )
    assert sum(1 for name, _, _ in samples(case.metrics) if name.startswith(("adapter_", "vllm:lora"))) < 600


async def test_the_time_from_publication_to_the_first_answer_is_counted_once_a_version(case: Case) -> None:
    version = case.publish()
    for _ in range(3):
        assert (await ask(case, version.id)).status_code == 200
    second = case.publish(seed=1)
    await ask(case, second.id)
    found = {name: value for name, labels, value in samples(case.metrics) if not labels}
    assert found["adapter_publish_to_first_answer_seconds_count"] == 2
    assert 0 <= found["adapter_publish_to_first_answer_seconds_sum"] < 60


async def test_a_version_from_before_this_gateway_is_not_taken_for_new(case: Case) -> None:
    version = case.publish()
    view = EngineView(case.engine.facts, case.engine.heartbeat, 0.0, 0)
    later = Metrics("tiny", look=lambda: view, now=lambda: version.published_at.timestamp() + 5)
    case.gateway.audience.add(later)
    await ask(case, version.id)
    found = {
        name: value for name, labels, value in samples(later) if not labels or name == "vllm:generation_tokens_total"
    }
    assert found["vllm:generation_tokens_total"] > 0  # it heard of the answer
    assert found["adapter_publish_to_first_answer_seconds_count"] == 0
