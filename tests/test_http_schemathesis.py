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
    case.publish("summarize")
    case.registry.set_policy("summarize", policy(), "test")
    return case


@pytest.fixture(scope="module")
def operations(case: Case) -> list[Any]:
    headers = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", case.app, headers=headers)
    return [found.ok() for found in schema.get_all_operations()]


def name_something_real(request: schemathesis.Case) -> None:
    """Random names lead to a 404 each time; beyond it lies what is worth trying."""
    for place in (request.path_parameters, request.body):
        for key, value in {"model": "summarize", "name": "summarize", "version": 1}.items():
            if isinstance(place, dict) and key in place:
                place[key] = value


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
def test_S18_no_5xx_and_nothing_undocumented(operations: list[Any], mode: GenerationMode) -> None:
    """Scale: 15 requests an operation that fit the description, and 15 that do not.

    LORAPLANE_S18_EXAMPLES=200 makes it the 10,000 of S-18 in full.
    """
    statuses: Counter[int] = Counter()
    for operation in operations:

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(request=operation.as_strategy(generation_mode=mode), known=st.booleans())
        def ask(request: schemathesis.Case, known: bool) -> None:
            if known:
                name_something_real(request)
            answer = request.call_and_validate(checks=CHECKS, headers={"host": "localhost"})
            statuses[answer.status_code] += 1

        try:
            ask()
        except Unsatisfiable:
            # An operation without parameters has nothing to be wrong about.
            assert mode is GenerationMode.NEGATIVE
    print(f"{dict(statuses)}, seed {SEED}")
    assert statuses.total() > 250
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] > 50
