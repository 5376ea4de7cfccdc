"""Weights as publishing takes them in."""

from __future__ import annotations

import pytest

from adapters.errors import AdapterRefused, Reason
from adapters.spec import parse_spec
from adapters.weights import (
    CanonicalWeights,
    canonical_chunks,
    check_weights,
    read_pairs,
)
from tests.adapter_factory import lora_config, modules

SPEC = parse_spec(lora_config(4))


def admit(data: bytes, config: bytes | None = None) -> CanonicalWeights:
    """What publishing does with weights: parse, compare, look at the values."""
    weights = read_pairs(data)
    check_weights(weights, modules(), parse_spec(config) if config else SPEC)
    return weights


def reason_of(data: bytes, config: bytes | None = None) -> Reason:
    with pytest.raises(AdapterRefused) as caught:
        admit(data, config)
    return caught.value.reason


def canonical_bytes(weights: CanonicalWeights) -> bytes:
    return b"".join(bytes(chunk) for chunk in canonical_chunks(weights))
