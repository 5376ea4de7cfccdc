"""Health, readiness, draining, metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.answers import Ended, Usage
from serving.metrics import MAX_NAMED_ADAPTERS, OTHER, EngineView, Metrics
from tests.fakes import FakeEngine, error_body
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio
ASK = {"model": "base", "prompt": "x"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path, FakeEngine())


async def test_a_fresh_edge_is_alive_and_ready(case: Case) -> None:
    async with case.client() as client:
        for path in ("/health", "/ping", "/ready"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("trouble", ["gone", "silent", "idle", "draining", "registry"])
async def test_ready_says_no_while_a_request_could_not_be_answered(case: Case, trouble: str) -> None:
    match trouble:
        case "gone":
            case_engine(case).connected = False
        case "silent":
            case_engine(case).heartbeat_age = 6.0
        case "idle":
            case_engine(case).idle_s = 15.1
        case "draining":
            case.gateway.admission.drain()
        case "registry":
            case.registry.close()
            case.app.state.services.condition.probe_registry = broken
    async with case.client() as client:
        answer = await client.get("/ready")
        health = await client.get("/health")
    assert (answer.status_code, error_body(answer)["code"]) == (503, "not_ready")
    assert 0 < float(answer.headers["retry-after"]) < 120
    assert health.status_code == 200


def case_engine(case: Case) -> FakeEngine:
    return case.engine


def broken() -> None:
    raise OSError("disk gone")


async def test_health_says_no_only_when_the_engine_stays_away(case: Case) -> None:
    condition = case.app.state.services.condition
    clock = [1000.0]
    condition.monotonic = lambda: clock[0]
    case.engine.connected = False
    async with case.client() as client:
        statuses = []
        for seconds in (0.0, 100.0, 25.0):
            clock[0] += seconds
            statuses.append((await client.get("/health")).status_code)
        case.engine.connected = True
        statuses.append((await client.get("/health")).status_code)
    assert statuses == [200, 200, 503, 200]


async def test_a_draining_edge_refuses_new_requests_with_a_hint(case: Case) -> None:
    case.gateway.admission.drain()
    async with case.client() as client:
        answer = await client.post("/v1/completions", json=ASK)
        assert (answer.status_code, error_body(answer)["code"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "5"
        assert (await client.get("/metrics")).status_code == 200


async def samples(case: Case) -> dict[str, float]:
    """Every sample of /metrics by name and labels."""
    async with case.client() as client:
        text = (await client.get("/metrics")).text
    return {
        s.name + "".join(f"|{k}={v}" for k, v in sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def test_metrics_carry_the_names_that_dashboards_read(case: Case) -> None:
    case.publish("summarize")
    async with case.client() as client:
        await client.post("/v1/completions", json={**ASK, "model": "summarize", "n": 2})
        await client.post("/v1/completions", json={**ASK, "model": "nobody"})
    found = await samples(case)
    label = "|model_name=tiny"
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
    ):
        assert found[f"vllm:{name}_count{label}"] >= 1, name
    assert found[f"vllm:request_success_total|finished_reason=stop{label}"] == 2
    assert found[f"vllm:generation_tokens_total{label}"] == 26
    assert found[f"vllm:prompt_tokens_total{label}"] == 1
    assert found[f"vllm:num_requests_running{label}"] == 0
    assert found["vllm:lora_adapter_loaded|adapter_name=summarize@1|level=gpu|pinned=false"] == 1
    assert found["adapter_requests_total|adapter=summarize|outcome=complete"] == 1
    assert found["adapter_refusals_total|code=model_not_found"] == 1
    assert found["adapter_loads_total|source=disk"] == 1
    assert any(name.startswith("vllm:lora_requests_info|max_lora=4") for name in found)
    assert any(name.startswith("vllm:cache_config_info") for name in found)


async def test_the_time_per_token_of_two_choices_is_that_of_one_of_them(case: Case) -> None:
    """Two choices of eleven tokens each side by side, ten seconds after the first token: a second a token."""
    weights = (await case.gateway.resolver.resolve("base")).weights
    case.metrics.ended(Ended(weights, "complete", ("length", "length"), Usage(5, 22), 2, 11, 0.0, 10.0, None))
    found = await samples(case)
    assert found["vllm:request_time_per_output_token_seconds_sum|model_name=tiny"] == 1.0


async def test_C7_every_limit_of_the_settings_is_in_the_metrics(case: Case) -> None:
    found = await samples(case)
    for name, value in case.settings.figures.items():
        assert found[f"loraplane_limit|name={name}"] == value
    assert len(case.settings.figures) > 20
    assert found["engine_limit|name=queue"] == 256


async def test_metrics_answer_while_no_engine_is_there(tmp_path: Path) -> None:
    case = make_case(tmp_path, FakeEngine(connected=False))
    assert (await samples(case))["gateway_engine_connected"] == 0


def test_names_of_adapters_cannot_flood_the_labels() -> None:
    metrics = Metrics("tiny", look=lambda: EngineView(None, None, float("inf"), 0))
    labels = {metrics._label(f"adapter-{at}") for at in range(3 * MAX_NAMED_ADAPTERS)}
    assert len(labels) == MAX_NAMED_ADAPTERS + 1
    assert OTHER in labels


async def test_unknown_paths_are_one_label(case: Case) -> None:
    async with case.client() as client:
        for at in range(20):
            await client.get(f"/nope/{at}")
    routes = [name for name in await samples(case) if name.startswith("gateway_http_requests_total")]
    assert len([name for name in routes if "unmatched" in name]) == 1
