"""/metrics by arm: what a canary's requests came to beside its champion's, and nothing where no canary runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.canaries import Arm
from serving.answers import Ended, Usage
from serving.arms import Taken
from serving.engine.request import Failed
from serving.metrics import MAX_NAMED_ADAPTERS, OTHER, EngineView, Metrics
from serving.resolver import Weights
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    case = make_case(tmp_path)
    case.publish("sum", 1)
    case.publish("sum", 2, promote=False)
    return case


def arms(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    """Samples of the arms by (name, adapter, arm), buckets left out."""
    found: dict[tuple[str, str, str], float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for name, labels, value, *_ in family.samples:
            if name.startswith("adapter_arm_") and not name.endswith(("_bucket", "_created")):
                found[name, labels["adapter"], labels["arm"]] = value
    return found


async def ask(client: httpx.AsyncClient, count: int) -> list[httpx.Response]:
    body = {"model": "sum", "prompt": "hello", "max_tokens": 4}
    return [await client.post("/v1/completions", json={**body, "user": f"u{user}"}) for user in range(count)]


async def test_each_arm_has_its_requests_errors_and_times(case: Case) -> None:
    second = case.registry.version("sum", 2).digest
    plain = case.engine.script
    case.engine.script = lambda s: [Failed(1, "adapter_numerics", "planted")] if s.adapter == second else plain(s)
    async with case.client() as client:
        await ask(client, 3)
        assert arms(case.metrics) == {}, "no canary runs: no arm is counted"
        case.registry.canaries.set_canary("sum", 2, 50, who="t")
        statuses = Counter(answer.status_code for answer in await ask(client, 40))
        found = arms(case.metrics)
        case.registry.canaries.stop("sum", Arm.CANARY, who="t")
        await ask(client, 3)
        assert arms(case.metrics) == found, "it runs no longer: nothing is added"
    good, bad = statuses[200], statuses[503]
    assert (good + bad, min(good, bad) > 5) == (40, True)
    assert found["adapter_arm_requests_total", "sum", "champion"] == good
    assert found["adapter_arm_errors_total", "sum", "champion"] == 0
    assert found["adapter_arm_requests_total", "sum", "canary"] == bad
    assert found["adapter_arm_errors_total", "sum", "canary"] == bad
    for name in ("adapter_arm_first_token_seconds", "adapter_arm_request_seconds"):
        assert found[f"{name}_count", "sum", "champion"] == good
        assert found.get((f"{name}_count", "sum", "canary"), 0) == 0
        assert 0 < found[f"{name}_sum", "sum", "champion"] < 60


def test_names_of_adapters_are_bounded() -> None:
    metrics = Metrics("tiny", look=lambda: EngineView(None, None, 0.0, 0))
    for number in range(MAX_NAMED_ADAPTERS + 50):
        weights = Weights(f"a{number}@1", "b" * 64, f"a{number}", 1, "d" * 64)
        usage = Usage(1, 1)
        metrics.ended(Ended(weights, "complete", ("stop",), usage, 1, 1, 0.1, 0.2, None, Taken("t", Arm.CANARY)))
    named = {adapter for _, adapter, _ in arms(metrics)}
    assert len(named) == MAX_NAMED_ADAPTERS + 1
    assert arms(metrics)["adapter_arm_requests_total", OTHER, "canary"] == 50
