"""Foreign safetensors: each fault has its own reason, and what is accepted reads the same everywhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from adapters.errors import AdapterRefused, Reason
from adapters.spec import parse_spec
from adapters.tensor_file import MAX_TENSORS, TensorView
from adapters.weights import (
    check_weights,
    open_weights,
    read_pairs,
    size_limit,
)
from tests.adapter_factory import lora_config, lora_tensors, lora_weights, modules, raw_safetensors
from tests.weights_case import admit, canonical_bytes, reason_of

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def two(header: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A header of one sound pair; `changes` go into the A entry."""
    a = {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256], **changes}
    b = {"dtype": "F32", "shape": [16, 4], "data_offsets": [256, 512]}
    return {f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b, **(header or {})}


ONES = np.ones(128, dtype="<f4").tobytes()


def test_the_sound_pair_that_the_faults_are_made_from_is_accepted() -> None:
    assert admit(raw_safetensors(two(), ONES)).ranks == {"model.layers.0.self_attn.q_proj": 4}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_from_the_safetensors_library_are_accepted(dtype: str) -> None:
    tensors = lora_tensors(dtype=dtype)
    weights = admit(save(tensors))
    for module, (a, b) in weights.tensors.items():
        np.testing.assert_array_equal(a.array, tensors[f"base_model.model.{module}.lora_A.weight"])
        np.testing.assert_array_equal(b.array, tensors[f"base_model.model.{module}.lora_B.weight"])


def test_bfloat16_comes_as_bit_patterns_and_its_values_are_checked() -> None:
    bits = (np.ones(128, dtype="<f4").view("<u4") >> 16).astype("<u2")
    header = {
        f"{PREFIX}.lora_A.weight": {"dtype": "BF16", "shape": [4, 16], "data_offsets": [0, 128]},
        f"{PREFIX}.lora_B.weight": {"dtype": "BF16", "shape": [16, 4], "data_offsets": [128, 256]},
    }
    weights = admit(raw_safetensors(header, bits.tobytes()))
    a, _ = weights.tensors["model.layers.0.self_attn.q_proj"]
    assert (a.dtype, a.array.dtype, a.largest) == ("BF16", np.dtype("<u2"), 1.0)
    bits[3] = 0x7FC0
    assert reason_of(raw_safetensors(header, bits.tobytes())) is Reason.NOT_FINITE


def test_names_with_the_adapters_own_name_are_accepted() -> None:
    header = {k.replace(".weight", ".default.weight"): v for k, v in two().items()}
    assert admit(raw_safetensors(header, ONES)).rank == 4


def test_mixed_dtypes_are_kept_and_stay_aligned_in_the_canonical_form() -> None:
    tensors = lora_tensors(rank=1, shapes={"m.q_proj": (3, 5)})
    tensors = {k: v.astype("float16") if "lora_A" in k else v for k, v in tensors.items()}
    kept = canonical_bytes(read_pairs(save(tensors)))
    assert {k: v.dtype for k, v in load(kept).items()} == {k: v.dtype for k, v in tensors.items()}
    assert canonical_bytes(read_pairs(kept)) == kept


def test_the_canonical_form_has_no_metadata_and_depends_on_the_tensors_only() -> None:
    tensors = lora_tensors()
    one = canonical_bytes(read_pairs(save(tensors, metadata={"secret": "x"})))
    other = canonical_bytes(read_pairs(save(dict(reversed(tensors.items())))))
    assert one == other
    assert b"secret" not in one
    assert int.from_bytes(one[:8], "little") % 8 == 0
    for name, value in load(one).items():
        np.testing.assert_array_equal(value, tensors[name])


def test_weights_opened_from_a_path_are_mapped_and_hold_after_the_file_is_unlinked(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(lora_weights())
    weights = open_weights(path)
    path.unlink()
    a, _ = weights.tensors["model.layers.0.self_attn.q_proj"]
    assert np.isfinite(a.array).all()
    assert a.array.flags.writeable  # so torch wraps it without a warning; the map is private


def _nan(position: int, value: float) -> bytes:
    data = np.ones(128, dtype="<f4")
    data[position] = value
    return raw_safetensors(two(), data.tobytes())


SOUND = lora_weights()
FAULTS: dict[str, tuple[bytes, Reason]] = {
    "empty": (b"", Reason.TRUNCATED),
    "truncated header": (SOUND[:100], Reason.TRUNCATED),
    "truncated data": (SOUND[:-1], Reason.TRUNCATED),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", Reason.LFS_POINTER),
    "zip": (b"PK\x03\x04" + bytes(60), Reason.NOT_SAFETENSORS),
    "pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(60), Reason.NOT_SAFETENSORS),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), Reason.NOT_SAFETENSORS),
    "html": (b"<!DOCTYPE html><html>not found</html>", Reason.HEADER_SIZE),
    "header of 2 GB": ((1 << 31).to_bytes(8, "little") + b"{}", Reason.HEADER_SIZE),
    "header of 1 byte": ((1).to_bytes(8, "little") + b"{}", Reason.HEADER_SIZE),
    "header not json": (raw_safetensors(b"{'a': 1}", b""), Reason.HEADER_JSON),
    "header an array": (raw_safetensors(b"[1, 2]  ", b""), Reason.HEADER_JSON),
    "header after a space": (raw_safetensors(b" " + json.dumps(two()).encode(), ONES), Reason.HEADER_JSON),
    "header padded with newlines": (raw_safetensors(json.dumps(two()).encode() + b"\n", ONES), Reason.HEADER_JSON),
    "header nested": (raw_safetensors(b'{"a":' * 2000 + b"1" + b"}" * 2000, b""), Reason.HEADER_JSON),
    "metadata not texts": (raw_safetensors(two({"__metadata__": {"a": 1}}), ONES), Reason.HEADER_JSON),
    "extra field": (raw_safetensors(two(stride=[1]), ONES), Reason.HEADER_JSON),
    "name twice": (
        raw_safetensors(json.dumps(two()).encode()[:-1] + b"," + json.dumps(two()).encode()[1:], ONES),
        Reason.HEADER_JSON,
    ),
    "key twice in an entry": (
        raw_safetensors(json.dumps(two()).replace('"dtype"', '"dtype": "F32", "dtype"', 1).encode(), ONES),
        Reason.HEADER_JSON,
    ),
    "offset NaN": (raw_safetensors(two(data_offsets=[0, float("nan")]), ONES), Reason.HEADER_JSON),
    "no tensors": (raw_safetensors(b"{}", b""), Reason.TENSOR_SET),
    "too many tensors": (
        raw_safetensors({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(5000)}, b""),
        Reason.TENSOR_SET,
    ),
    "dtype F64": (raw_safetensors(two(dtype="F64"), ONES), Reason.DTYPE),
    "dtype I8": (raw_safetensors(two(dtype="I8"), ONES), Reason.DTYPE),
    "dtype a list": (raw_safetensors(two(dtype=["F32"]), ONES), Reason.DTYPE),
    "offset float": (raw_safetensors(two(data_offsets=[0, 256.0]), ONES), Reason.LAYOUT),
    "offset bool": (raw_safetensors(two(data_offsets=[False, 256]), ONES), Reason.LAYOUT),
    "offset negative": (raw_safetensors(two(data_offsets=[-256, 0]), ONES), Reason.LAYOUT),
    "overlap": (raw_safetensors(two(data_offsets=[256, 512]), ONES), Reason.LAYOUT),
    "gap": (raw_safetensors(two(data_offsets=[4, 260]), ONES), Reason.LAYOUT),
    "trailing bytes": (raw_safetensors(two(), ONES + b"PK"), Reason.LAYOUT),
    "size and shape differ": (raw_safetensors(two(shape=[4, 15]), ONES), Reason.LAYOUT),
    "huge dims that wrap": (raw_safetensors(two(shape=[1 << 40, 1 << 40]), ONES), Reason.LAYOUT),
    "zero dim": (raw_safetensors(two(shape=[0, 1 << 60], data_offsets=[0, 0]), ONES), Reason.LAYOUT),
    "one dimension": (raw_safetensors(two(shape=[64]), ONES), Reason.LAYOUT),
    "scalar": (raw_safetensors(two(shape=[], data_offsets=[0, 4]), ONES), Reason.LAYOUT),
    "foreign name": (save({"../../etc/passwd": np.ones((2, 2), "f4")}), Reason.TENSOR_NAME),
    "saved base layer": (save({f"{PREFIX}.base_layer.weight": np.ones((2, 2), "f4")}), Reason.UNSUPPORTED),
    "a whole module": (save({f"{PREFIX}.weight": np.ones((2, 2), "f4")}), Reason.TENSOR_NAME),
    "a saved head and nothing else": (
        save({"base_model.model.lm_head.weight": np.ones((2, 2), "f4")}),
        Reason.TENSOR_SET,
    ),
    "a module to save": (
        save({"base_model.model.lm_head.modules_to_save.default.weight": np.ones((2, 2), "f4")}),
        Reason.UNSUPPORTED,
    ),
    "new tokens": (save({"base_model.model.embed.trainable_tokens_delta": np.ones((2, 2), "f4")}), Reason.UNSUPPORTED),
    "dora with two dimensions": (
        save({f"{PREFIX}.lora_magnitude_vector": np.ones((1, 16), "f4")}),
        Reason.LAYOUT,
    ),
    "dora alone": (save({f"{PREFIX}.lora_magnitude_vector": np.ones(16, "f4")}), Reason.TENSOR_SET),
    "dora that the config does not mean": (
        save({**lora_tensors(), f"{PREFIX}.lora_magnitude_vector": np.ones(16, "f4")}),
        Reason.CONFIG_FIELD,
    ),
    "half an embedding": (save({"base_model.model.embed.lora_embedding_A": np.ones((2, 2), "f4")}), Reason.TENSOR_SET),
    "an embedding's A with a linear's B": (
        save({f"{PREFIX}.lora_embedding_A": np.ones((4, 16), "f4"), f"{PREFIX}.lora_B.weight": np.ones((16, 4), "f4")}),
        Reason.TENSOR_SET,
    ),
    "a linear module as an embedding": (
        save(
            {f"{PREFIX}.lora_embedding_A": np.ones((4, 16), "f4"), f"{PREFIX}.lora_embedding_B": np.ones((16, 4), "f4")}
        ),
        Reason.TENSOR_SET,
    ),
    "an embedding that cannot be adapted": (
        save(
            {
                "base_model.model.transformer.wpe.lora_embedding_A": np.ones((4, 16), "f4"),
                "base_model.model.transformer.wpe.lora_embedding_B": np.ones((16, 4), "f4"),
            }
        ),
        Reason.UNSUPPORTED,
    ),
    "bias": (save({f"{PREFIX}.lora_B.bias": np.ones((2, 2), "f4")}), Reason.UNSUPPORTED),
    "A alone": (save({f"{PREFIX}.lora_A.weight": np.ones((4, 16), "f4")}), Reason.TENSOR_SET),
    "B alone": (save({f"{PREFIX}.lora_B.weight": np.ones((16, 4), "f4")}), Reason.TENSOR_SET),
    "A under both names": (
        save(
            {
                f"{PREFIX}.lora_A.weight": np.ones((4, 16), "f4"),
                f"{PREFIX}.lora_A.default.weight": np.ones((4, 16), "f4"),
                f"{PREFIX}.lora_B.weight": np.ones((16, 4), "f4"),
            }
        ),
        Reason.TENSOR_SET,
    ),
    "module of another base": (lora_weights(shapes={"transformer.h.0.q_proj": (16, 16)}), Reason.UNKNOWN_MODULE),
    "shape of another base": (lora_weights(shapes=modules(hidden=32)), Reason.SHAPE),
    "rank differs from the config": (lora_weights(rank=8), Reason.RANK),
    "NaN in A": (_nan(5, float("nan")), Reason.NOT_FINITE),
    "infinity in B": (_nan(100, float("-inf")), Reason.NOT_FINITE),
    "far too large": (_nan(100, -1.1e4), Reason.NUMERICS),
    "B zero": (
        save({k: v * 0.0 if "lora_B" in k else v for k, v in lora_tensors().items()}),
        Reason.NO_EFFECT,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_own_reason(fault: str) -> None:
    data, reason = FAULTS[fault]
    assert reason_of(data) is reason


def test_a_rank_beyond_the_slots_is_refused() -> None:
    wide = lora_weights(rank=65, shapes=dict.fromkeys(modules(), (128, 128)))
    with pytest.raises(AdapterRefused) as caught:
        check_weights(read_pairs(wide), dict.fromkeys(modules(), (128, 128)), parse_spec(lora_config(65)))
    assert caught.value.reason is Reason.RANK


def test_a_scale_that_would_drown_the_base_is_refused() -> None:
    assert reason_of(SOUND, lora_config(4, lora_alpha=4 * 65)) is Reason.RANK


def test_ranks_by_pattern_are_held_against_the_tensors() -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 8}
    data = save(lora_tensors(ranks=ranks))
    weights = admit(data, lora_config(4, rank_pattern={"0.self_attn.q_proj": 8}))
    assert weights.rank == 8
    assert reason_of(data, lora_config(4, rank_pattern={"q_proj": 8})) is Reason.RANK


def test_negative_zero_counts_as_zero() -> None:
    data = save({k: v * -0.0 if "lora_B" in k else v for k, v in lora_tensors().items()})
    assert reason_of(data) is Reason.NO_EFFECT


def test_the_size_limit_admits_the_largest_adapter_of_a_base() -> None:
    largest = lora_weights(rank=64, targets=tuple({m.rpartition(".")[2] for m in modules()}))
    assert len(largest) <= size_limit(modules())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=16), st.sampled_from(["F32", "F16"]))
def test_the_largest_magnitude_is_the_one_numpy_finds(values: list[float], dtype: str) -> None:
    with np.errstate(over="ignore"):
        array = np.array([values], dtype="<f4" if dtype == "F32" else "<f2")
    view = TensorView(dtype, (1, len(values)), memoryview(array.tobytes()))
    expected = float(np.abs(array).max()) if np.isfinite(array).all() else float("inf")
    assert view.largest == expected


def test_a_header_at_its_limits_is_refused_in_bounded_time() -> None:
    entry = '"%d":{"dtype":"F32","shape":[1,1],"data_offsets":[0,0]},'
    text = "{" + "".join(entry % i for i in range(MAX_TENSORS + 1))
    began = time.process_time()
    assert reason_of(raw_safetensors((text[:-1] + "}").encode(), b"")) is Reason.TENSOR_SET
    assert reason_of(raw_safetensors(b'{"a":[' + b"0," * 520_000 + b"0]}", b"")) is Reason.HEADER_JSON
    spent = time.process_time() - began
    print(f"{spent * 1000:.0f} ms of CPU")
    assert spent < 3  # some 100 ms here; what is quadratic in 520,000 entries takes minutes
