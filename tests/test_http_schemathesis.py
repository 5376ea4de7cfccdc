"""S-18: requests made from our own description find no 5xx, no status that it does not name, no other shape."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.adapter_factory import policy
from tests.fakes import FakeEngine, say
from tests.http_case import Case, make_case

SEED = 20261121
EXAMPLES = int(os.environ.get("LORAPLANE_S18_EXAMPLES", "15"))
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = make_case(tmp_path_factory.mktemp("home"), FakeEngine(script=say("ok")))
    case.publish("summarize", 1)
    for seed_of_files in (2, 3):
        case.publish("summarize", seed_of_files, promote=False)
    case.registry.set_policy("summarize", policy(), "test")
    return case


@pytest.fixture(scope="module")
def operations(case: Case) -> list[Any]:
    headers = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", case.app, headers=headers)
    return [found.ok() for found in schema.get_all_operations()]


def name_something_real(request: schemathesis.Case, number: int) -> None:
    """Random names lead to a 404 each time; beyond it lies what is worth trying."""
    real: dict[str, Any] = {
        "model": "summarize",
        "models": ["summarize", "base"],
        "name": "summarize",
        "number": number,
        "version": number,
        "alias": "champion",
        "expected_version": 1,
    }
    for place in (request.path_parameters, request.query, request.body):
        for key, value in real.items():
            if isinstance(place, dict) and key in place:
                place[key] = value


def bring_back(case: Case) -> None:
    """What one operation withdrew would be refused by all that come after it."""
    for number in (1, 2, 3):
        case.registry.standings.restore("summarize", number, who="test", reason="test")
    case.registry.promote("summarize", 1, who="test", reason="test", force=True)


# What must have been done at least once, not only refused: else its answers were not held against the description.
DONE = {
    "POST /v1/compare",
    "POST /v1/adapters/{name}/promote",
    "PUT /v1/adapters/{name}/aliases/{alias}/fallback",
    "PUT /v1/adapters/{name}/canary",
    "PUT /v1/adapters/{name}/shadow",
    "PUT /v1/adapters/{name}/versions/{number}/pin",
    "DELETE /v1/adapters/{name}/versions/{number}/pin",
    *(f"POST /v1/adapters/{{name}}/versions/{{number}}/{deed}" for deed in ("retire", "revoke", "restore", "warm")),
}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
def test_S18_no_5xx_and_nothing_undocumented(case: Case, operations: list[Any], mode: GenerationMode) -> None:
    """Scale: 15 requests an operation that fit the description, and 15 that do not.

    LORAPLANE_S18_EXAMPLES=200 makes it the 10,000 of S-18 in full.
    """
    statuses: Counter[int] = Counter()
    done: Counter[str] = Counter()
    for operation in operations:

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(request=operation.as_strategy(generation_mode=mode), known=st.sampled_from((0, 1, 2, 3)))
        def ask(request: schemathesis.Case, known: int) -> None:
            if known:
                name_something_real(request, known)
            answer = request.call_and_validate(checks=CHECKS, headers={"host": "localhost"})
            statuses[answer.status_code] += 1
            done[request.operation.label] += answer.status_code < 300

        try:
            ask()
        except Unsatisfiable:
            # An operation without parameters has nothing to be wrong about.
            assert mode is GenerationMode.NEGATIVE
        bring_back(case)
    print(f"{dict(statuses)}, seed {SEED}")
    assert statuses.total() > 250
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] > 50
    assert mode is GenerationMode.NEGATIVE or {label for label in DONE if not done[label]} == set()
