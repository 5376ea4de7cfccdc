"""A base's digest names what it computes, and no library, file layout or spelling."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from base_factory import CONFIG, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, weights, write_base

from adapters.base_digest import base_digest, canonical_config, chat_template, tensors
from adapters.errors import BaseUnsupported

SHARED_LLAMA = Path(__file__).parent / ".." / ".." / "shared" / "models" / "stories260k-llama"

# Frozen. A digest is how adapters know their base: if one of these moves, every published adapter loses its base.
TINY_DIGEST = "74eac572449c6b2b5ef90b2e81953548b9f8417ff27e6f4c60f4a005217f2998"
STORIES_DIGEST = "d6ad47cc3e3b9dc3e98ec11f519521fe15d94819dda9036a8f0b790e453fa938"


def _changed(whole: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(whole), **changes}


def _model(**changes: Any) -> dict[str, Any]:
    return _changed(TOKENIZER, model={**TOKENIZER["model"], **changes})


def test_tiny_base_keeps_its_frozen_digest(tmp_path: Path) -> None:
    assert base_digest(write_base(tmp_path)) == TINY_DIGEST


@pytest.mark.skipif(not SHARED_LLAMA.is_dir(), reason="the shared stories260k model is not beside the repository")
def test_real_llama_keeps_its_frozen_digest() -> None:
    assert base_digest(SHARED_LLAMA) == STORIES_DIGEST


@pytest.mark.parametrize(
    "config",
    [
        _changed(CONFIG, transformers_version="9.9.9", _name_or_path="/somewhere", _commit_hash="abc"),
        _changed(CONFIG, torch_dtype="float16", dtype="bfloat16", use_cache=False, initializer_range=0.5),
        _changed(CONFIG, a_key_of_a_later_release=True, attention_dropout=0.0, architectures=None),
        _changed(CONFIG, eos_token_id=None, bos_token_id=None, pad_token_id=3),
        _changed(CONFIG, rope_parameters=None, rope_theta=10000, rope_scaling=None),
        _changed(CONFIG, hidden_act="silu", mlp_bias=False, attention_bias=False, head_dim=4),
        {k: v for k, v in CONFIG.items() if k not in ("rope_parameters", "tie_word_embeddings")},
    ],
    ids=["provenance", "compute", "new-keys", "token-ids", "older-rope", "written-defaults", "left-out-defaults"],
)
def test_config_spellings_of_one_function_share_a_digest(tmp_path: Path, config: dict[str, Any]) -> None:
    assert base_digest(write_base(tmp_path, config=config)) == TINY_DIGEST


@pytest.mark.parametrize(
    "tokenizer",
    [
        _changed(TOKENIZER, truncation={"max_length": 8}, padding={"length": 8}),
        _model(merges=["a b", "c d"]),
        _model(ignore_merges=False),
        {k: v for k, v in TOKENIZER.items() if v is not None},
    ],
    ids=["state", "older-merges", "new-keys", "left-out-nulls"],
)
def test_tokenizer_spellings_of_one_tokenizer_share_a_digest(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    assert base_digest(write_base(tmp_path, tokenizer=tokenizer)) == TINY_DIGEST


def test_split_into_files_leaves_the_digest_alone(tmp_path: Path) -> None:
    assert base_digest(write_base(tmp_path, shards=3)) == TINY_DIGEST


def test_template_in_its_own_file_or_in_the_config_is_one_template(tmp_path: Path) -> None:
    bare = {k: v for k, v in TOKENIZER_CONFIG.items() if k != "chat_template"}
    folder = write_base(tmp_path, tokenizer_config=bare)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert chat_template(folder) == TEMPLATE
    assert base_digest(folder) == TINY_DIGEST


@pytest.mark.parametrize(
    "parts",
    [
        {"config": _changed(CONFIG, rms_norm_eps=1e-6)},
        {"config": _changed(CONFIG, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})},
        {"config": _changed(CONFIG, rope_scaling={"type": "linear", "factor": 2.0})},
        {"config": _changed(CONFIG, attention_bias=True)},
        {"config": _changed(CONFIG, model_type="mistral")},
        {"tokenizer": _model(merges=[["c", "d"], ["a", "b"]])},
        {"tokenizer": _changed(TOKENIZER, pre_tokenizer={"type": "ByteLevel"})},
        {"tokenizer_config": _changed(TOKENIZER_CONFIG, eos_token="<s>")},
        {"tokenizer_config": _changed(TOKENIZER_CONFIG, chat_template=TEMPLATE + " ")},
        {"tensors": {k: v for k, v in weights().items() if k != "lm_head.weight"}},
        {"tensors": {k: v.astype(np.float16) for k, v in weights().items()}},
        {"tensors": {k: v.reshape(1, *v.shape) for k, v in weights().items()}},
        {"tensors": {k: v + (k == "model.norm.weight") * np.float32(2**-20) for k, v in weights().items()}},
        {"tensors": {k.replace("model.norm", "model.last_norm"): v for k, v in weights().items()}},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_whatever_changes_the_answers_changes_the_digest(tmp_path: Path, parts: dict[str, Any]) -> None:
    assert base_digest(write_base(tmp_path, **parts)) != TINY_DIGEST


def test_unknown_family_keeps_what_is_not_volatile() -> None:
    raw = {"model_type": "newcomer", "width": 4.0, "gate": False, "use_cache": True, "transformers_version": "5"}
    assert canonical_config(raw) == {"model_type": "newcomer", "width": 4.0}


@pytest.mark.parametrize("source", ["tiny", "stories260k"])
def test_saving_again_with_transformers_leaves_the_digest_alone(tmp_path: Path, source: str) -> None:
    """Somebody who loads a base and saves it elsewhere has the same base."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source == "stories260k" and not SHARED_LLAMA.is_dir():
        pytest.skip("the shared stories260k model is not beside the repository")
    before = write_base(tmp_path / "before") if source == "tiny" else SHARED_LLAMA
    AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32).save_pretrained(tmp_path / "after")
    AutoTokenizer.from_pretrained(before).save_pretrained(tmp_path / "after")
    assert base_digest(tmp_path / "after") == base_digest(before)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs"),
        (b"", "not a safetensors file"),
        (b"\x80\x02}q\x00.", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "header"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense", "header"),
    ],
)
def test_broken_weight_file_is_refused_in_words(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_base(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseUnsupported, match=said):
        base_digest(folder)


def test_weight_file_cut_short_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(BaseUnsupported, match="cut short"):
        base_digest(folder)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "again.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(BaseUnsupported, match="keep one"):
        tensors(folder)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseUnsupported, match=r"tokenizer\.json"):
        base_digest(folder)


def test_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").write_text(json.dumps(["llama"]))
    with pytest.raises(BaseUnsupported, match="JSON object"):
        base_digest(folder)
