"""A home with the tiny base in its registry, and a small run file to train on it in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapters.bases import pull
from adapters.home import Home
from adapters.registry import Registry
from adapters.registry_door import RegistryDoor, open_door
from adapters.runs import TrainRun, load_run

WORDS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")


@dataclass(frozen=True)
class TrainCase:
    """Where things lie for a training of the tiny base."""

    home: Home
    run_file: Path

    def run(self, *overrides: str) -> TrainRun:
        return load_run(self.run_file, overrides)

    def door(self) -> RegistryDoor:
        return open_door(self.home)


def train_case(root: Path, base: Path, **changed: Any) -> TrainCase:
    """A home under `root` that knows the base, and 64 rows: say a colour backwards."""
    home = Home.find(root / "home")
    registry = Registry.open(home)
    try:
        pull(str(base), home, registry, lambda _: None, name="tiny")
    finally:
        registry.close()
    rows = [{"prompt": f"{w} {i}", "completion": w[::-1]} for i in range(8) for w in WORDS]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "backwards",
        "data": {"source": str(data), "holdout": 0.25, "eval_limit": 8},
        "prompt_format": {"prefix": "Turn: ", "suffix": "!"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "optim": {"lr": 0.01, "epochs": 2, "batch_size": 4, "warmup": 2},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "max_length": 64,
        "bf16": False,
        "eval": {"max_tokens": 8},
        "gate": {"min_n": 8},
        **changed,
    }
    run_file = root / "run.yaml"
    run_file.write_text(yaml.safe_dump(run))
    return TrainCase(home, run_file)
