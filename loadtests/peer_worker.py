"""Runs transformers and PEFT in an environment of their own; asked and answering in JSON lines on stdin and stdout.

    {"do": "load", "folder": "...", "dtype": "bfloat16", "threads": 2, "seq2seq": false}    {"ok": true}
    {"do": "adapt", "adapters": 16, "rank": 16, "targets": "all-linear"}                    {"ok": true}
    {"do": "steps", "rows": 16, "adapters": ["a1", ...] or null, "count": 8}                {"seconds": [...]}
    {"do": "continuous", "rows": 16, "new_tokens": 64}                                      {"seconds": 3.2}
    {"do": "versions"}                                                                      {"versions": {...}}

What fails answers {"error": "..."}. Imports nothing that needs more than torch, transformers and PEFT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from loadtests.peer_models import ContinuousCase, GenerateCase, load_model, with_peft

_LIBRARIES = ("torch", "transformers", "peft")
Asked = Mapping[str, Any]


class Bench:
    """The one model that is loaded, with or without adapters."""

    def __init__(self) -> None:
        self._model: Any = None
        self._continuous: ContinuousCase | None = None

    def load(self, asked: Asked) -> dict[str, Any]:
        """Load a base, in the place of what was there."""
        torch.set_num_threads(int(asked["threads"]))
        self._model = self._continuous = None
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[str(asked["dtype"])]
        self._model = load_model(
            Path(str(asked["folder"])), dtype, torch.device("cpu"), seq2seq=bool(asked.get("seq2seq"))
        )
        return {"ok": True}

    def adapt(self, asked: Asked) -> dict[str, Any]:
        """Put random adapters into the model."""
        self._model = with_peft(
            self._model, int(asked["adapters"]), int(asked["rank"]), targets=asked.get("targets", "all-linear")
        )
        return {"ok": True}

    def steps(self, asked: Asked) -> dict[str, Any]:
        """Time decode steps."""
        case = GenerateCase("", self._model, int(asked["rows"]), asked.get("adapters"))
        return {"seconds": case.steps(int(asked["count"]))}

    def continuous(self, asked: Asked) -> dict[str, Any]:
        """Time whole answers of continuous batching."""
        self._continuous = self._continuous or ContinuousCase(self._model)
        return {"seconds": self._continuous.seconds(int(asked["rows"]), int(asked["new_tokens"]))}

    def versions(self, asked: Asked) -> dict[str, Any]:
        """What is installed here."""
        return {"versions": {name: metadata.version(name) for name in _LIBRARIES}}


def main() -> None:
    """Answer until stdin ends."""
    # Libraries print what they like; answers go where only answers go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench()
    work: Mapping[str, Callable[[Asked], dict[str, Any]]] = {
        "load": bench.load,
        "adapt": bench.adapt,
        "steps": bench.steps,
        "continuous": bench.continuous,
        "versions": bench.versions,
    }
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = work[asked["do"]](asked)
        except Exception as error:  # whatever it is, who asked must hear of it
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
