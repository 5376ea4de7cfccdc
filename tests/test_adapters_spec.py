"""adapter_config.json: what is honoured, what is ignored with a note, what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.canonical_config import canonical_config, shortest_suffixes
from adapters.errors import AdapterRefused, LoraplaneError, Reason
from adapters.records import parse_model_id
from adapters.spec import AdapterSpec, parse_spec
from adapters.strict_json import canonical, read_strict
from tests.adapter_factory import lora_config, modules

SHARED = Path(__file__).resolve().parents[2] / "shared" / "adapter-configs"
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def refusal(data: bytes) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        parse_spec(data)
    return caught.value


def test_every_config_that_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(target_modules=["q_proj"], r=16, lora_alpha=32, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    spec = parse_spec((tmp_path / "adapter_config.json").read_bytes())
    assert (spec.rank, spec.alpha, spec.notes) == (16, 32.0, ())


def test_every_field_of_pefts_config_is_known_by_name() -> None:
    peft = pytest.importorskip("peft")
    written = {**peft.LoraConfig().to_dict(), "peft_type": "LORA", "target_modules": ["q_proj"]}
    written.pop("runtime_config", None)  # PEFT never saves it
    assert parse_spec(json.dumps(written, default=str).encode()).notes == ()


SHARED_CONFIGS: dict[str, tuple[Reason | None, str]] = {
    "distilbert-seqcls-modules-to-save.json": (Reason.UNSUPPORTED, "modules_to_save"),
    "falcon-7b-old-peft.json": (None, ""),
    "flan-t5-base-dialogsum-qv-r32.json": (None, ""),
    "gpt2-causal-c_attn-c_proj-r8.json": (None, ""),
    "nemotron-30b-rslora-r24.json": (None, ""),
    "not-peft-adapterhub-xlm-roberta.json": (Reason.CONFIG_FIELD, "peft_type"),
    "paligemma-regex-target-gaussian.json": (None, "not executed"),
    "qwen25-1.5b-peft-0.21.0-all-keys.json": (None, ""),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the collection of real configs is not here")
@pytest.mark.parametrize("name", sorted(SHARED_CONFIGS))
def test_real_configs_are_accepted_or_refused_for_the_right_reason(name: str) -> None:
    reason, words = SHARED_CONFIGS[name]
    data = (SHARED / name).read_bytes()
    if reason is None:
        spec = parse_spec(data)
        assert words in " ".join(spec.notes)
        assert spec.base_name == json.loads(data)["base_model_name_or_path"]
    else:
        found = refusal(data)
        assert found.reason is reason
        assert words in str(found)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the collection of real configs is not here")
def test_the_collection_of_real_configs_is_covered_whole() -> None:
    assert {p.name for p in SHARED.glob("*.json")} - {"INDEX.json"} == set(SHARED_CONFIGS)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    spec = parse_spec(lora_config(24, lora_alpha=48, use_rslora=True))
    assert spec.scale_of(Q) == pytest.approx(48 / math.sqrt(24))


def test_plain_lora_scales_by_the_rank() -> None:
    assert parse_spec(lora_config(24, lora_alpha=48)).scale_of(Q) == 2.0


def test_patterns_change_rank_and_alpha_of_the_modules_they_end() -> None:
    spec = parse_spec(lora_config(4, rank_pattern={"0.self_attn.q_proj": 8}, alpha_pattern={"v_proj": 1}))
    assert (spec.rank_of(Q), spec.rank_of(V)) == (8, 4)
    assert (spec.scale_of(Q), spec.scale_of(V)) == (8 / 8, 1 / 4)


def test_a_pattern_ends_at_a_dot_and_not_inside_a_name() -> None:
    assert parse_spec(lora_config(4, rank_pattern={"proj": 8})).rank_of(Q) == 4


@pytest.mark.parametrize("key", [".*q_proj", "^model.layers", "q_proj$", "(a+)+$", "q|v", "layers.[0]", "", ".q", "q."])
def test_regular_expressions_in_patterns_are_refused(key: str) -> None:
    found = refusal(lora_config(4, rank_pattern={key: 8}))
    assert found.reason is Reason.CONFIG_FIELD
    assert "rank_pattern" in str(found)


def test_a_regular_expression_as_target_is_noted_and_never_executed() -> None:
    spec = parse_spec(lora_config(4, target_modules="(a+)+$" * 200))
    assert spec.target_modules is None
    assert "not executed" in spec.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": 1}, Reason.CONFIG_FIELD),
        ({"use_qalora": True}, Reason.UNSUPPORTED),
        ({"use_bdlora": {"a": 1}}, Reason.UNSUPPORTED),
        ({"ensure_weight_tying": True}, Reason.UNSUPPORTED),
        ({"alora_invocation_tokens": [1, 2]}, Reason.UNSUPPORTED),
        ({"arrow_config": {"a": 1}}, Reason.UNSUPPORTED),
        ({"bias": "all"}, Reason.UNSUPPORTED),
        ({"lora_bias": True}, Reason.UNSUPPORTED),
        ({"modules_to_save": ["lm_head"]}, Reason.UNSUPPORTED),
        ({"trainable_token_indices": [1]}, Reason.UNSUPPORTED),
        ({"layer_replication": [[0, 2]]}, Reason.UNSUPPORTED),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, Reason.UNSUPPORTED),
        ({"init_lora_weights": "pissa_niter_4"}, Reason.UNSUPPORTED),
        ({"init_lora_weights": "loftq"}, Reason.UNSUPPORTED),
        ({"peft_type": "IA3"}, Reason.UNSUPPORTED),
        ({"task_type": "SEQ_CLS"}, Reason.UNSUPPORTED),
        ({"megatron_config": {"a": 1}}, Reason.UNSUPPORTED),
        ({"kasa_config": {"a": 1}}, Reason.UNSUPPORTED),
        ({"megatron_core": "os"}, Reason.CONFIG_FIELD),
        ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, Reason.CONFIG_FIELD),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, Reason.UNSUPPORTED),
        ({"brand_new": 3}, Reason.CONFIG_FIELD),
        ({"r": 0}, Reason.CONFIG_FIELD),
        ({"r": True}, Reason.CONFIG_FIELD),
        ({"r": "8"}, Reason.CONFIG_FIELD),
        ({"lora_alpha": -1}, Reason.CONFIG_FIELD),
        ({"lora_alpha": None}, Reason.CONFIG_FIELD),
        ({"use_rslora": 1}, Reason.CONFIG_FIELD),
        ({"rank_pattern": {"q_proj": 1.5}}, Reason.CONFIG_FIELD),
        ({"target_modules": [1]}, Reason.CONFIG_FIELD),
        ({"base_model_name_or_path": "a\nb"}, Reason.CONFIG_FIELD),
        ({"base_digest": "abc"}, Reason.CONFIG_FIELD),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_served_is_refused_by_the_name_of_its_key(change: dict[str, Any], reason: Reason) -> None:
    found = refusal(lora_config(4, **change))
    assert found.reason is reason
    assert next(iter(change)) in str(found)


def test_an_unknown_key_with_an_inert_value_passes_with_a_note() -> None:
    spec = parse_spec(lora_config(4, enable_lora=None, merge_weights=False))
    assert "enable_lora" in spec.notes[0]
    assert "merge_weights" in spec.notes[0]


def test_the_auto_mapping_that_peft_writes_without_a_task_type_is_dropped() -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    assert "auto_mapping" in parse_spec(lora_config(4, auto_mapping=mapping)).notes[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff{}",
        b'{"r": 8, "r": 8}',
        b'{"peft_type": "LORA", "x": {"a": 1, "a": 2}}',
        b'{"lora_alpha": NaN}',
        b'{"lora_alpha": Infinity}',
        b'{"lora_alpha": 1e999}',
        b'{"base_model_name_or_path": "\\ud800"}',
        b'{"x":' + b"[" * 8000 + b"]" * 8000 + b"}",
        b'{"r": ' + b"9" * 5000 + b"}",
    ],
    ids=range(13),
)
def test_json_that_others_read_differently_is_refused(data: bytes) -> None:
    assert refusal(data).reason is Reason.CONFIG_JSON


def test_a_config_beyond_its_limit_is_refused_before_it_is_parsed() -> None:
    assert refusal(b"{" * (16 * 1024 + 1)).reason is Reason.TOO_LARGE


def test_a_config_that_is_an_lfs_pointer_says_so() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 700\n"
    assert refusal(pointer).reason is Reason.LFS_POINTER


def test_canonical_config_names_exactly_the_adapted_modules() -> None:
    ranks = {m: 4 for m in modules() if m.endswith("q_proj")} | {"model.layers.1.mlp.up_proj": 8}
    config = canonical_config(AdapterSpec(rank=4, alpha=8.0), ranks, sorted(modules()), "tiny")
    assert isinstance(config, dict)
    assert config["target_modules"] == ["1.mlp.up_proj", "q_proj"]
    assert (config["r"], config["rank_pattern"]) == (4, {"up_proj": 8})


def test_peft_loads_a_canonical_config(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    spec = parse_spec(lora_config(4, use_rslora=True, rank_pattern={"0.self_attn.q_proj": 8}, lora_alpha=6))
    ranks = {m: spec.rank_of(m) for m in modules() if m.endswith("q_proj")}
    (tmp_path / "adapter_config.json").write_bytes(canonical(canonical_config(spec, ranks, sorted(modules()), "tiny")))
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    key = peft.utils.other.get_pattern_key
    assert {m: loaded.rank_pattern.get(key(loaded.rank_pattern, m), loaded.r) for m in ranks} == ranks
    assert (loaded.lora_alpha, loaded.use_rslora, loaded.target_modules) == (6, True, {"q_proj"})


@st.composite
def ranked_modules(draw: st.DrawFn) -> dict[str, int]:
    names = draw(st.lists(st.sampled_from(sorted(modules(layers=3))), min_size=1, unique=True))
    return {name: draw(st.integers(1, 3)) for name in names}


@settings(max_examples=150, deadline=None)
@given(ranked_modules(), st.dictionaries(st.sampled_from(["q_proj", "0.self_attn.q_proj", "mlp.up_proj"]), st.just(2)))
def test_a_canonical_config_means_what_the_original_meant(ranks: dict[str, int], alphas: dict[str, int]) -> None:
    universe = sorted(modules(layers=3))
    original = AdapterSpec(
        rank=1, alpha=4.0, rank_pattern=ranks, alpha_pattern={k: float(v) for k, v in alphas.items()}
    )
    again = parse_spec(canonical(canonical_config(original, ranks, universe, "tiny")))
    for module in ranks:
        assert again.rank_of(module) == ranks[module]
        assert again.scale_of(module) == original.scale_of(module)
    assert again.target_modules is not None
    targeted = {m for m in universe if any(m == t or m.endswith(f".{t}") for t in again.target_modules)}
    assert targeted == set(ranks)
    assert all("*" not in key for key in shortest_suffixes(ranks))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["peft_type", "r", "lora_alpha", "rank_pattern", "bias", "target_modules", "zz", "revision"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("LORA"),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_json_object_is_a_spec_or_a_typed_refusal(config: dict[str, Any]) -> None:
    try:
        spec = parse_spec(json.dumps(config).encode())
    except AdapterRefused:
        return
    assert spec.rank >= 1
    assert spec.alpha > 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    try:
        value = read_strict(data)
    except ValueError:
        return
    assert json.dumps(value, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=70) | st.from_regex(r"[a-z0-9._-]{1,66}(@[a-z0-9]{0,10})?", fullmatch=True))
def test_a_model_id_reads_back_as_it_was_written_or_is_refused(text: str) -> None:
    try:
        parsed = parse_model_id(text)
    except LoraplaneError:
        return
    assert str(parsed) == text
    assert ".." not in text
    assert text.isascii()


T5_MODULES = [
    f"decoder.block.{i}.layer.{j}.{module}"
    for i in range(3)
    for j, module in enumerate(["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wi_0"])
]


@settings(max_examples=400, deadline=None)
@given(
    targets=st.lists(
        st.sampled_from(
            [
                "q_proj",
                "v_proj",
                "1.self_attn.q_proj",
                "proj",
                "down_proj",
                "lm_head",
                "embed_tokens",
                "q",
                "wi_0",
                "model.embed_tokens",
                "decoder.block.1.layer.0.SelfAttention.q",
                "layer.2.DenseReluDense.wi_0",
            ]
        ),
        min_size=1,
    ),
    excluded=st.lists(st.sampled_from(["v_proj", "0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "lm_head"])),
    layers=st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), min_size=1),
    pattern=st.none()
    | st.sampled_from(["layers", "h", "block", "layer", ["layers"], ["h", "layers"], ["layer", "block"], []]),
)
def test_what_the_config_leaves_out_is_what_peft_leaves_out(
    targets: list[str], excluded: list[str], layers: int | list[int] | None, pattern: str | list[str] | None
) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    more = {"target_modules": targets, "exclude_modules": excluded or None}
    more |= {"layers_to_transform": layers, "layers_pattern": pattern if layers is not None else None}
    spec = parse_spec(lora_config(4, **more))
    theirs = peft.LoraConfig(r=4, **more)
    for module in [*modules(layers=3), *T5_MODULES, "lm_head", "model.embed_tokens"]:
        assert (spec.contradicts(module) is None) is bool(check_target_module_exists(theirs, module)), module
