"""The one adapter_config.json that we keep for an adapter, and how it names modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from adapters.spec import AdapterSpec

Value = TypeVar("Value", bound=Hashable)


def canonical_config(
    spec: AdapterSpec, ranks: Mapping[str, int], universe: Sequence[str], base_name: str, *, transposed: bool = False
) -> object:
    """The adapter_config.json that goes with canonical weights, as JSON values; PEFT loads it.

    ranks: adapted module -> rank; universe: every module of the base that can be adapted. Modules are named by the
    shortest suffixes that hit exactly the adapted ones, so the file stays small and no order of keys matters.
    transposed: whether the base's linear modules are Conv1D; PEFT goes by the modules, whatever a config says.
    """
    alphas = {module: spec.alpha_of(module) for module in ranks}
    rank, rank_pattern = _majority(ranks)
    alpha, alpha_pattern = _majority(alphas)
    config = {
        "alpha_pattern": {k: _plain(v) for k, v in alpha_pattern.items()},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": sorted(k for k, hit in shortest_suffixes({m: m in ranks for m in universe}).items() if hit),
        "task_type": spec.task_type,
        "use_rslora": spec.use_rslora,
    }
    # Named only where it is on: the digests of plain adapters are older than it.
    return {**config, "use_dora": True} if spec.use_dora else config


def shortest_suffixes(values: Mapping[str, Value]) -> dict[str, Value]:
    """Dotted suffixes that give each module its value: the shortest on which all modules that share it agree."""
    agreed: dict[str, set[Value]] = {}
    for module, value in values.items():
        for suffix in _suffixes(module):
            agreed.setdefault(suffix, set()).add(value)
    return {next(s for s in _suffixes(module) if len(agreed[s]) == 1): value for module, value in values.items()}


def _suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _majority(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The most common value, and the suffixes of the modules that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {suffix: v for suffix, v in sorted(shortest_suffixes(values).items()) if v != common}


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
