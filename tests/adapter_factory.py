"""Makes bases, PEFT folders and reports for tests: numpy and safetensors only, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from adapters.records import BaseRecord
from adapters.reports import GatePolicy, PairedDifference, Report, Role, SystemScores

HIDDEN, MIDDLE, LAYERS = 16, 24, 2
DATA = hashlib.sha256(b"held-out set").hexdigest()


def modules(hidden: int = HIDDEN, middle: int = MIDDLE, layers: int = LAYERS) -> dict[str, tuple[int, int]]:
    """The linear modules of a tiny Llama: path -> (out, in)."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def base_record(name: str = "tiny", **changes: Any) -> BaseRecord:
    """A base; its digest follows its name."""
    fields: dict[str, Any] = {
        "name": name,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "family": "llama",
        "folder": f"bases/{name}",
        "modules": modules(),
        "max_positions": 256,
        "vocab_size": 320,
        "parameters": 100_000,
        "source": "test",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "aliases": (f"Tests/{name}-Instruct",),
    }
    return BaseRecord(**{**fields, **changes})


def lora_tensors(
    seed: int = 0,
    rank: int = 4,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: str = "float32",
    ranks: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """LoRA pairs by PEFT name for the modules whose last component is a target."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in (shapes or modules()).items():
        if module.rpartition(".")[2] not in targets:
            continue
        r = (ranks or {}).get(module, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(size=(r, columns)).astype(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random.normal(size=(rows, r)).astype(dtype) * 0.1
    return {name: value.astype(dtype) for name, value in tensors.items()}


def lora_weights(seed: int = 0, rank: int = 4, **options: Any) -> bytes:
    """adapter_model.safetensors as the safetensors library writes it."""
    return bytes(save(lora_tensors(seed, rank, **options), metadata={"format": "pt"}))


def lora_config(rank: int = 4, base: str = "Tests/tiny-Instruct", **changes: Any) -> bytes:
    """adapter_config.json with the keys that matter, and `changes`."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
    }
    return json.dumps({**config, **changes}).encode()


def adapter_files(seed: int = 0, rank: int = 4, **config: Any) -> dict[str, bytes]:
    """What `Registry.publish` takes, in memory."""
    return {
        "adapter_config.json": lora_config(rank, **config),
        "adapter_model.safetensors": lora_weights(seed, rank),
    }


def write_adapter(folder: Path, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    """The same as a folder on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(seed, rank, **config).items():
        (folder / name).write_bytes(data)
    return folder


def raw_safetensors(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file whose header says whatever the test wants."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def policy(**changes: Any) -> GatePolicy:
    """A policy that `report` passes."""
    fields: dict[str, Any] = {"data_digest": DATA, "min_n": 50}
    return GatePolicy(**{**fields, **changes})


def report(version: Any, champion: str | None = None, low: float = 0.05, **changes: Any) -> Report:
    """A good report about a version: better than the base, and than the champion if one is named, by low + 0.05."""
    roles = [(Role.BASE, version.base_digest), (Role.CANDIDATE, version.digest)]
    if champion is not None:
        roles.append((Role.CHAMPION, champion))
    n = changes.get("n", 64)
    scores = {role.value: {"rouge1": 0.5 if role is Role.CANDIDATE else 0.45 - low} for role, _ in roles}
    fields: dict[str, Any] = {
        "adapter": version.name,
        "number": version.number,
        "adapter_digest": version.digest,
        "base_digest": version.base_digest,
        "champion_digest": champion,
        "data": "docstrings",
        "data_digest": DATA,
        "code": "test",
        "settings": {"seed": 0},
        "n": n,
        "systems": tuple(
            SystemScores(role, role.value, digest, scores[role.value], 1.1, 0.0) for role, digest in roles
        ),
        "differences": tuple(
            PairedDifference(role, "rouge1", low + 0.05, low, low + 0.1, n)
            for role in (Role.BASE, Role.CHAMPION)
            if role is Role.BASE or champion is not None
        ),
        "examples": tuple(
            {"prompt": f"p {i}", "reference": "r", "answers": {"base": "b"}, "scores": scores} for i in range(n)
        ),
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return Report(**{**fields, **changes})
