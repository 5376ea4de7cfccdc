"""Weights changed at random, by changes that know the format: refused by name, or whole and read alike everywhere."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load, save

from adapters.errors import AdapterRefused, Reason
from adapters.spec import parse_spec
from adapters.weights import (
    CanonicalWeights,
    check_weights,
    read_pairs,
)
from tests.adapter_factory import lora_config, lora_tensors, lora_weights, modules, raw_safetensors
from tests.weights_case import admit, canonical_bytes

SOUND = lora_weights()


def mutant(data: bytes, rng: random.Random) -> bytes:
    """One change that knows the format: in the length, the header's text, its values, its entries, or the data."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    body = bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    odd: Any = rng.choice(
        [
            0,
            1,
            -1,
            2**31,
            2**63,
            2**64,
            -(2**63),
            1.5,
            None,
            True,
            "",
            "F32",
            "BF16",
            [],
            {},
            [0],
            [[]],
            "\u202e",
            "\x00",
        ]
    )
    match rng.randrange(14):
        case 0:
            return (
                rng.choice([odd if isinstance(odd, int) and odd >= 0 else 3, length + 1, length - 1, 0]).to_bytes(
                    16, "little"
                )[:8]
                + data[8:]
            )
        case 1:
            at = 8 + rng.randrange(length)
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[: rng.randrange(len(data))]
        case 3:
            return data + rng.randbytes(rng.randrange(1, 40))
        case 4:
            entry[rng.choice(["dtype", "shape", "data_offsets", "extra"])] = odd
        case 5:
            entry["shape"][rng.randrange(2)] = odd
        case 6:
            entry["data_offsets"][rng.randrange(2)] = odd
        case 7:
            header[rng.choice([name + ".", name.upper(), name[:-7], "../" + name, name.replace("_A", "_B"), ""])] = (
                entry
            )
        case 8:
            del header[name]
        case 9:
            header[name], header[names[0]] = header[names[0]], header[name]
        case 10:
            at = rng.randrange(len(body) // 4) * 4
            body[at : at + 4] = np.array(rng.choice([np.nan, np.inf, -np.inf, 1e30, 1e4, 0.0]), "<f4").tobytes()
        case 11:
            entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "F8_E4M3", "BOOL", "f32"])
        case 12:
            del entry[rng.choice(sorted(entry))]
        case _:
            text = json.dumps(header)
            cut = rng.randrange(len(text))
            piece = text[cut : cut + rng.randrange(1, 30)]
            return raw_safetensors((text[:cut] + piece + text[cut:]).encode(), bytes(body))
    return raw_safetensors(header, bytes(body))


MUTANTS = 3000
ENDS = modules() | {"model.embed_tokens": (16, 20), "lm_head": (20, 16)}


def rich(**changes: np.ndarray[Any, Any]) -> bytes:
    """An adapter of a linear module, embedding and head with DoRA, and the head's copy that PEFT saves with it."""
    tensors = lora_tensors(shapes={**modules(layers=1), "lm_head": (20, 16)}, targets=("q_proj", "lm_head"))
    tensors |= {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 20), "f4"),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((16, 4), "f4"),
        "base_model.model.lm_head.base_layer.weight": np.ones((20, 16), "f4"),
    }
    widths = {"model.layers.0.self_attn.q_proj": 16, "lm_head": 20, "model.embed_tokens": 16}
    tensors |= {f"base_model.model.{m}.lora_magnitude_vector": np.ones(w, "f4") for m, w in widths.items()}
    return bytes(save({**tensors, **changes}))


RICH = lora_config(4, use_dora=True, target_modules=["q_proj", "lm_head", "embed_tokens"])


def admit_rich(data: bytes) -> CanonicalWeights:
    weights = read_pairs(data)
    check_weights(weights, ENDS, parse_spec(RICH))
    return weights


def test_dora_embedding_and_head_keep_pefts_names_and_lose_the_bases_copy() -> None:
    weights = admit_rich(rich())
    assert weights.embeddings == {"model.embed_tokens"}
    assert set(weights.copies) == {"lm_head"}
    kept = load(canonical_bytes(weights))
    assert set(load(rich())) - set(kept) == {"base_model.model.lm_head.base_layer.weight"}
    assert canonical_bytes(admit_rich(canonical_bytes(weights))) == canonical_bytes(weights)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("lm_head.lora_magnitude_vector", np.ones(19, "f4"), Reason.SHAPE),
        ("lm_head.lora_magnitude_vector", np.full(20, np.nan, "f4"), Reason.NOT_FINITE),
        ("lm_head.lora_magnitude_vector", np.full(20, 2e4, "f4"), Reason.NUMERICS),
        ("model.layers.0.self_attn.k_proj.lora_magnitude_vector", np.ones(8, "f4"), Reason.TENSOR_SET),
        ("model.embed_tokens.lora_embedding_A", np.ones((4, 16), "f4"), Reason.SHAPE),
        ("model.embed_tokens.lora_embedding_A", np.ones((3, 20), "f4"), Reason.SHAPE),
        ("lm_head.base_layer.weight", np.ones((21, 16), "f4"), Reason.SHAPE),
        ("lm_head.weight", np.ones((20, 16), "f4"), Reason.TENSOR_SET),
        ("wte.weight", np.ones((20, 16), "f4"), Reason.UNSUPPORTED),
    ],
)
def test_faults_beside_linear_modules_have_their_own_reasons(
    name: str, value: np.ndarray[Any, Any], reason: Reason
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        admit_rich(rich(**{f"base_model.model.{name}": value}))
    assert caught.value.reason is reason


def test_mutants_of_an_adapter_with_everything_are_refused_or_whole() -> None:
    seed = 20261122
    print("seed", seed)
    rng = random.Random(seed)
    sound, reasons = rich(), set()
    for _ in range(1500):
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            data = mutant(sound, rng)
        try:
            weights = admit_rich(data)
        except AdapterRefused as refused:
            reasons.add(refused.reason)
        else:
            assert canonical_bytes(read_pairs(canonical_bytes(weights))) == canonical_bytes(weights)
    assert len(reasons) >= 9


def test_S06_mutants_of_a_valid_adapter_never_crash_or_hang_and_accepts_read_alike() -> None:
    """S-06 at parser level, reduced scale: 3,000 structure-aware mutants (the full figure is 1,000,000)."""
    seed = 20260101
    print("seed", seed)
    rng = random.Random(seed)
    reasons: set[Reason] = set()
    accepted = 0
    slowest = 0.0
    for _ in range(MUTANTS):
        data = mutant(SOUND, rng)
        if rng.random() < 0.2:
            # The first change may have broken it too far for a second one.
            with suppress(ValueError, LookupError, TypeError, AttributeError):
                data = mutant(data, rng)
        began = time.process_time()
        try:
            weights = admit(data)
        except AdapterRefused as refused:
            reasons.add(refused.reason)
        else:
            accepted += 1
            # A second, independent parser must see the very same tensors.
            seen = {n.removeprefix("base_model.model."): e["data"] for n, e in deserialize(data)}  # type: ignore[no-untyped-call]
            ours = {
                f"{module}.lora_{side}.weight": bytes(tensor.buffer)
                for module, pair in weights.tensors.items()
                for side, tensor in zip("AB", pair, strict=True)
            }
            assert ours == {k: bytes(v) for k, v in seen.items()}
            again = read_pairs(canonical_bytes(weights))
            assert canonical_bytes(again) == canonical_bytes(weights)
        slowest = max(slowest, time.process_time() - began)
    print("accepted", accepted, "reasons", sorted(reasons), f"slowest {slowest * 1000:.1f} ms")
    assert accepted > 0
    assert len(reasons) >= 9
    assert slowest < 0.25
