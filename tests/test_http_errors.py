"""The one table from typed errors to HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from adapters import errors as tree
from adapters.errors import (
    AdapterCapacity,
    AdapterRefused,
    EngineLost,
    GateRefused,
    GenerationMismatch,
    InvalidKey,
    LoraplaneError,
    NotReady,
    QueueFull,
    Reason,
)
from serving.api.errors import TABLE, body, headers, response, wire


def leaves(kind: type[LoraplaneError] = LoraplaneError) -> list[type[LoraplaneError]]:
    """Every error class that has no subclass in the product."""
    below = [sub for sub in kind.__subclasses__() if sub.__module__ == tree.__name__]
    return [leaf for sub in below for leaf in leaves(sub)] if below else [kind]


LEAVES = sorted(leaves(), key=lambda kind: kind.__name__)


def made(kind: type[LoraplaneError]) -> LoraplaneError:
    """An instance with whatever values, as if raised."""
    error = kind.__new__(kind, "what happened")
    Exception.__init__(error, "what happened")
    given: dict[str, Any] = {"retry_after_s": 500.0, "reason": Reason.RANK}
    for name, value in given.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_leaf_of_the_tree_is_mapped(kind: type[LoraplaneError]) -> None:
    error = made(kind)
    row = wire(error)
    assert 400 <= row.status < 600
    nearest = next(k for k in kind.__mro__ if k in TABLE)
    assert nearest is not LoraplaneError or row.status == 500
    assert set(body(error)["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body(error)["error"]["code"], str)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_a_client_is_never_told_to_wait_two_minutes(kind: type[LoraplaneError]) -> None:
    assert float(headers(made(kind)).get("retry-after", "0")) < 120


def test_only_families_without_a_row_fall_to_the_generic_500() -> None:
    generic = [k.__name__ for k in LEAVES if next(a for a in k.__mro__ if a in TABLE) is LoraplaneError]
    assert generic == []


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (GenerationMismatch("a", "champion", 1, 2), 409, {"x-should-retry": "false"}),
        (GateRefused("a@1", ["worse"]), 409, {"x-should-retry": "false"}),
        (QueueFull("full", 0.2), 429, {"retry-after": "1", "retry-after-ms": "200"}),
        (AdapterCapacity("full", 7.0), 429, {"retry-after": "7"}),
        (NotReady("later", 5.0), 503, {"retry-after": "5"}),
        (EngineLost("lost", None), 503, {"x-should-retry": "false"}),
        (InvalidKey(), 401, {"www-authenticate": "Bearer"}),
        (AdapterRefused(Reason.WRONG_BASE, "other base"), 400, {}),
    ],
)
def test_headers_say_whether_and_when_to_try_again(error: LoraplaneError, status: int, told: dict[str, str]) -> None:
    answer = response(error)
    assert answer.status_code == status
    assert told.items() <= dict(answer.headers).items()
    assert ("x-should-retry" in answer.headers) == ("x-should-retry" in told)


def test_S14_what_an_internal_error_says_stays_inside() -> None:
    for error in (LoraplaneError("/root/x.py"), tree.ConfigInvalid("/etc/secret"), tree.PortInUse("8000 by pid 7")):
        answer = response(error)
        assert answer.status_code == 500
        assert b"/" not in bytes(answer.body).replace(b"\\/", b"")
        assert b"pid" not in bytes(answer.body)


def test_an_adapters_reason_is_the_code() -> None:
    assert body(AdapterRefused(Reason.NOT_FINITE, "NaN in q_proj"))["error"]["code"] == "not_finite"
