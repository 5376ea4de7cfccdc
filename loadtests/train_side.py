"""One side of the training bench as a process: our loop, or plain Trainer and PEFT; asked in JSON lines, like a peer.

    {"folder": "...", "side": "ours", "examples": [[ids, loss], ...], "batches": [[0, 5], ...], ...}   {"ready": true}
    {"steps": 4}                                                         {"seconds": 12.3, "losses": [2.1, ...]}

It trains as many steps as it is told, and waits inside the loop for the next word: so two trainings take turns.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from adapters.prompts import Example
from adapters.records import PromptFormat
from adapters.runs import CheckpointSpec, DataSpec, LoraSpec, OptimSpec, TrainRun
from train import loop, models
from train.batching import Plan

OURS, PLAIN, PLAIN_OURS = "ours", "plain", "plain, our batches"
_IGNORED = -100


class Told:
    """The one who asks. Counts steps of the loop and lets it go on only as far as it was told."""

    def __init__(self, asked: TextIO, answers: TextIO, now: Callable[[], float] = time.perf_counter) -> None:
        self._asked, self._answers, self._now = asked, answers, now
        self._left, self._began = 0, 0.0
        self._losses: list[float] = []

    def read(self) -> dict[str, Any]:
        """What is asked next; raises SystemExit when nobody asks any more."""
        line = self._asked.readline()
        if not line:
            raise SystemExit(0)
        found: dict[str, Any] = json.loads(line)
        return found

    def write(self, **answer: object) -> None:
        """Answer."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def ready(self) -> None:
        """The loop is about to begin: say so, and wait to be told how many steps."""
        self.write(ready=True)
        self._wait()

    def stepped(self, loss: float) -> None:
        """A step is done."""
        self._losses.append(loss)
        self._left -= 1
        if not self._left:
            seconds = self._now() - self._began
            losses, self._losses = self._losses, []
            self.write(seconds=seconds, losses=losses)
            self._wait()

    def _wait(self) -> None:
        self._left = int(self.read()["steps"])
        self._began = self._now()


class _Reporter:
    """Our loop's reporter: every step is one of those we were told to make."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def say(self, text: str) -> None:
        """Nothing is told."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self._told.ready()

    def step(self, done: int, **figures: float) -> None:
        self._told.stepped(figures["loss"])

    def end(self) -> None:
        """Nothing is told."""


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is read without types
    """The same for the plain Trainer, at the same place of the loop."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._told.ready()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._told.stepped(float(logs["loss"]))


def train_ours(told: Told, asked: Mapping[str, Any], scratch: Path) -> None:
    """The product's own way: its model, its loss on completion rows, its loop."""
    lora = LoraSpec(r=int(asked["rank"]), alpha=float(2 * asked["rank"]))
    run = TrainRun(
        name="bench",
        data=DataSpec(source="rows.jsonl"),
        lora=lora,
        optim=OptimSpec(lr=float(asked["lr"]), warmup=0, schedule="constant", seed=int(asked["seed"])),
        checkpoint=CheckpointSpec(every_steps=0),
    )
    bf16 = bool(asked["bf16"])
    folder = Path(str(asked["folder"]))
    model = models.load_with_lora(folder, lora, bf16=bf16, max_length=int(asked["max_length"]), seed=run.optim.seed)
    examples = [Example(tuple(ids), tuple(map(bool, loss))) for ids, loss in asked["examples"]]
    plan = Plan(tuple(tuple(b) for b in asked["batches"]), padding=0.0)
    place = loop.RunPlace(scratch, "0" * 64, folder.name, PromptFormat())
    loop.fit(model, examples, plan, run, place, pad_id=int(asked["pad_id"]), bf16=bf16, reporter=_Reporter(told))


def train_plain(told: Told, asked: Mapping[str, Any], scratch: Path) -> None:
    """What the libraries' guides show: a PEFT model, the Trainer, batches padded to their longest row on the right."""
    from peft import LoraConfig, get_peft_model

    folder, bf16, rank = Path(str(asked["folder"])), bool(asked["bf16"]), int(asked["rank"])
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if bf16 else torch.float32, local_files_only=True
    )
    set_seed(int(asked["seed"]))
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    batches = [[asked["examples"][i] for i in batch] for batch in asked["batches"]]
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=1,  # an item is a whole batch, so that both sides know which rows it holds
            max_steps=len(batches),
            learning_rate=float(asked["lr"]),
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=1.0,
            seed=int(asked["seed"]),
            bf16=bf16,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
        ),
        train_dataset=batches,
        data_collator=_Padded(AutoTokenizer.from_pretrained(folder, local_files_only=True), int(asked["pad_id"])),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(told))
    trainer.train()


class _Padded:
    """transformers' collator for labelled text on the rows of one batch."""

    def __init__(self, tokenizer: Any, pad_id: int) -> None:
        from transformers import DataCollatorForSeq2Seq

        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        tokenizer.padding_side = "right"
        self._collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED)

    def __call__(self, items: Sequence[Sequence[tuple[list[int], list[int]]]]) -> Any:
        (rows,) = items
        return self._collate(
            [
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": [i if counts else _IGNORED for i, counts in zip(ids, loss, strict=True)],
                }
                for ids, loss in rows
            ]
        )


def main() -> None:
    """Train until nobody asks for more steps."""
    # Libraries print what they like; answers go where only answers go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    told = Told(sys.stdin, answers)
    asked = told.read()
    torch.set_num_threads(int(asked["threads"]))
    train = train_ours if asked["side"] == OURS else train_plain
    with tempfile.TemporaryDirectory(prefix="loraplane-train-") as scratch:
        try:
            train(told, asked, Path(scratch))
        except Exception as error:  # whatever it is, who asked must hear of it
            told.write(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
