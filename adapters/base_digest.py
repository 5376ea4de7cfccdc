"""A base's identity: one SHA-256 over what it computes, whatever library saved it.

Specification, `loraplane-base-1`. The digest is the SHA-256 of the canonical JSON (keys sorted, no spaces, UTF-8,
whole floats written as integers) of

    {"format": "loraplane-base-1",
     "tensors": [[name, dtype, shape, SHA-256 of its bytes], ...]   sorted by name, over all safetensors files
     "config": {...}, "tokenizer": {...}, "special_tokens": {...}, "chat_template": text or null}

tensors: as stored, so the dtype a server computes in plays no part, nor does the split into files.
config: for the families in `_FAMILIES` exactly the keys named there, which define the function computed, with an
absent key read as the value given there; that table is part of this specification, so a transformers release that
adds a key, renames a default or moves a token id to another file changes nothing. Rotary settings are read from
`rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before). Other families: every key but
those of `_VOLATILE`, without null, false and empty values; a release that adds a non-empty default to such a family
does change the digest of a base saved with it.
tokenizer: tokenizer.json without truncation and padding state, `merges` as pairs, without a post-processor that adds
nothing to a text, without null, false and empty values. special_tokens: bos, eos and pad of tokenizer_config.json.
chat_template: chat_template.jinja, else the (default) template in tokenizer_config.json.

Golden tests freeze digests made by this code. A change that moves one is a new format name, never a fix.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import BaseUnsupported

FORMAT = "loraplane-base-1"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_CHUNK_BYTES = 1 << 20
_LFS_MARK = b"version https://git-lfs"

_DECODER: dict[str, Any] = {
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,  # absent: as many as num_attention_heads
    "head_dim": None,  # absent: hidden_size / num_attention_heads
    "vocab_size": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope": None,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_DECODER, "max_position_embeddings": 131072, "sliding_window": None},
    "qwen2": {**_DECODER, "max_position_embeddings": 32768, "use_sliding_window": False},
    "qwen3": {**_DECODER, "max_position_embeddings": 32768, "use_sliding_window": False, "attention_bias": False},
    "bart": {
        "d_model": None,
        "encoder_layers": None,
        "encoder_attention_heads": None,
        "encoder_ffn_dim": None,
        "decoder_layers": None,
        "decoder_attention_heads": None,
        "decoder_ffn_dim": None,
        "vocab_size": None,
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 2,
    },
    "t5": {
        "d_model": None,
        "d_kv": None,
        "d_ff": None,
        "num_layers": None,
        "num_decoder_layers": None,  # absent: as many as num_layers
        "num_heads": None,
        "vocab_size": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
    },
}
_VOLATILE = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "task_specific_params",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
        ".",
    }
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a safetensors file: where its bytes lie, from `start` up to `end` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def base_digest(folder: Path) -> str:
    """SHA-256 hex of the base saved in `folder`, by the specification above; weights are read in a stream.

    Raises BaseUnsupported when a file is missing or not what its name says.
    """
    parts = {
        "format": FORMAT,
        "tensors": [[t.name, t.dtype, list(t.shape), _tensor_sha256(t)] for t in tensors(folder)],
        "config": canonical_config(read_json(folder / "config.json")),
        "tokenizer": _canonical_tokenizer(read_json(folder / "tokenizer.json")),
        "special_tokens": _special_tokens(folder),
        "chat_template": chat_template(folder),
    }
    return hashlib.sha256(_canonical_json(parts)).hexdigest()


def tensors(folder: Path) -> list[TensorEntry]:
    """Every tensor of the folder's safetensors files, sorted by name. Raises BaseUnsupported on a bad file."""
    found: dict[str, TensorEntry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for entry in _file_tensors(file):
            if entry.name in found:
                raise BaseUnsupported(
                    f"tensor {entry.name!r} is in {found[entry.name].file.name} and in {file.name}; keep one of them"
                )
            found[entry.name] = entry
    if not found:
        raise BaseUnsupported(
            f"{folder} holds no safetensors weights; pickled weights (.bin, .pt) are not read: convert them with "
            f"model.save_pretrained(...)"
        )
    return [found[name] for name in sorted(found)]


def canonical_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that says what the model computes, one spelling for each fact."""
    family = str(raw.get("model_type", ""))
    values = {**raw, "rope": _rope(raw)}
    keys = _FAMILIES.get(family)
    if keys is None:
        kept = {k: v for k, v in values.items() if k not in _VOLATILE}
        return {**_without_empty(kept), "model_type": family}
    chosen = {k: default if values.get(k) is None else values[k] for k, default in keys.items()}
    if "head_dim" in chosen and chosen["head_dim"] is None:
        heads = chosen["num_attention_heads"]
        chosen["head_dim"] = chosen["hidden_size"] // heads if heads and chosen["hidden_size"] else None
    for key, like in (("num_key_value_heads", "num_attention_heads"), ("num_decoder_layers", "num_layers")):
        if key in chosen and chosen[key] is None:
            chosen[key] = chosen[like]
    return {**{k: v for k, v in chosen.items() if v is not None}, "model_type": family}


def chat_template(folder: Path) -> str | None:
    """The base's chat template, looked up where transformers looks, or None."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    inside = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(inside, list):
        named = {t.get("name"): t.get("template") for t in inside if isinstance(t, dict)}
        inside = named.get("default")
    return inside if isinstance(inside, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the base. Raises BaseUnsupported when it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseUnsupported(f"{path.parent} has no {path.name}, which a base needs") from None
    except (ValueError, OSError) as error:
        raise BaseUnsupported(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BaseUnsupported(f"{path} must hold a JSON object")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _rope(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rotary settings in transformers 5 words; None for a family that has none."""
    current = raw.get("rope_parameters")
    older = raw.get("rope_scaling")
    if not isinstance(current, dict) and "rope_theta" not in raw and not isinstance(older, dict):
        return {"rope_theta": 10000.0, "rope_type": "default"} if raw.get("model_type") in _FAMILIES else None
    merged: dict[str, Any] = {"rope_theta": raw.get("rope_theta", 10000.0)}
    merged.update(older if isinstance(older, dict) else {})
    merged.update(current if isinstance(current, dict) else {})
    merged["rope_type"] = merged.pop("type", None) or merged.get("rope_type") or "default"
    return {k: v for k, v in merged.items() if v is not None}


def _canonical_tokenizer(raw: Mapping[str, Any]) -> Any:
    kept = {k: v for k, v in raw.items() if k not in ("truncation", "padding")}
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        # Older tokenizers wrote "a b", newer ones ["a", "b"].
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        kept["model"] = {**model, "merges": pairs}
    if _adds_nothing(kept.get("post_processor")):
        kept.pop("post_processor")  # transformers 5 writes such a template where there was none
    return _without_empty(kept)


def _adds_nothing(processor: Any) -> bool:
    """Whether a post-processor is a template of the text alone, which is the same as none."""
    if not isinstance(processor, dict) or processor.get("type") != "TemplateProcessing":
        return False
    return [set(piece) for piece in processor.get("single", [])] == [{"Sequence"}]


def _special_tokens(folder: Path) -> dict[str, str]:
    raw = _optional_json(folder / "tokenizer_config.json")
    found: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = raw.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _without_empty(value: Any) -> Any:
    """The value with null, false and empty members of its objects left out, at every depth."""
    if isinstance(value, dict):
        cleaned = {k: _without_empty(v) for k, v in value.items()}
        return {k: v for k, v in cleaned.items() if v is not None and v is not False and v not in ("", [], {})}
    if isinstance(value, list):
        return [_without_empty(v) for v in value]
    return value


def _canonical_json(value: Any) -> bytes:
    text = json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def _whole(value: Any) -> Any:
    """10000.0 and 10000 are one number; write it one way."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(v) for v in value]
    return value


def _file_tensors(file: Path) -> Iterator[TensorEntry]:
    """The header of one safetensors file; its bytes are hashed by us, so no library that copies them is used."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if head and _LFS_MARK.startswith(head):
            raise BaseUnsupported(
                f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` where it came from"
            )
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BaseUnsupported(f"{file} is not a safetensors file, or it is cut short; fetch it again")
        raw = stream.read(length)
    start = 8 + length
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - start:
                raise BaseUnsupported(f"{file} is cut short: tensor {name!r} ends beyond the file; fetch it again")
            yield TensorEntry(
                name, str(entry["dtype"]), tuple(map(int, entry["shape"])), file, start + begin, start + end
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseUnsupported(f"{file} has no valid safetensors header: {error}") from error


def _tensor_sha256(entry: TensorEntry) -> str:
    hashed = hashlib.sha256()
    left = entry.end - entry.start
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        while left > 0:
            chunk = stream.read(min(_CHUNK_BYTES, left))
            if not chunk:
                raise BaseUnsupported(f"{entry.file} became shorter while it was read; try again")
            hashed.update(chunk)
            left -= len(chunk)
    return hashed.hexdigest()
