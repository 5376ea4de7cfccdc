"""The training loop: transformers' Trainer over planned batches, loss on answers only, stop and resume at any step."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from adapters.errors import RunInvalid
from adapters.prompts import Example
from adapters.records import PromptFormat
from adapters.runs import TrainRun
from train import checkpoints, pairs
from train.batching import Plan, padded
from train.checks import warmup_steps
from train.models import begin_of
from train.pairs import IGNORED
from train.progress import Reporter

if TYPE_CHECKING:
    from peft import PeftModel

Batch = dict[str, Any]
_FINAL_STEPS = 10  # the loss reported as final is the mean of so many last steps


@dataclass(frozen=True, slots=True)
class RunPlace:
    """A run's folder and what lies in it. digest: of the run, which its states are sealed with."""

    folder: Path
    digest: str
    base_name: str
    prompt_format: PromptFormat

    @property
    def states(self) -> Path:
        return self.folder / "states"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.folder / "loss.png"

    @property
    def adapter(self) -> Path:
        """The finished adapter's PEFT folder."""
        return self.folder / "adapter"

    def step(self, number: int) -> Path:
        """The PEFT folder of an earlier step."""
        return self.folder / "steps" / f"step-{number:06d}"


@dataclass(frozen=True, slots=True)
class Fit:
    """How a training ended. seconds: of all its sittings together. stopped: by a signal, before its last step."""

    steps: int
    first_loss: float
    final_loss: float
    seconds: float
    stopped: bool


class Steps(torch.utils.data.Dataset[Batch]):
    """The planned batches as tensors, one item a step."""

    def __init__(self, plan: Plan, examples: Sequence[Example], make: Callable[[Sequence[Example]], Batch]) -> None:
        self._plan, self._examples, self._make = plan, examples, make

    def __len__(self) -> int:
        return len(self._plan.batches)

    def __getitem__(self, index: int) -> Batch:
        return self._make([self._examples[i] for i in self._plan.batches[index]])


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch of a decoder. input_ids, attention_mask, position_ids, labels: (B, T) int64; logits_to_keep: int.

    Padded on the left so that the answers' ends line up.

    labels[b, t] is the token at t where it counts in the loss, else IGNORED. logits_to_keep: how many last positions
    hold every logit that the loss needs; with a large vocabulary, the others would cost as much as the whole model.
    """
    width = padded(max(len(e.ids) for e in examples))
    pads = [width - len(e.ids) for e in examples]
    ids = torch.tensor([[pad_id] * p + list(e.ids) for p, e in zip(pads, examples, strict=True)])
    mask = torch.tensor([[0] * p + [1] * len(e.ids) for p, e in zip(pads, examples, strict=True)])
    counts = torch.tensor([[False] * p + list(e.loss) for p, e in zip(pads, examples, strict=True)])
    first = min(p + e.loss.index(True) for p, e in zip(pads, examples, strict=True))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.where(counts, ids, IGNORED),
        # The logits that predict token t stand at t - 1.
        "logits_to_keep": min(width, width - first + 1),
    }


def completion_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens of one batch, a float32 scalar.

    Equal to the model's own loss on the same labels, without the logits of the prompts.
    """
    if "decoder_input_ids" in batch:
        return pairs.answer_loss(model, batch)
    keep = int(batch["logits_to_keep"])
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=keep,
        use_cache=False,
    )
    wanted = batch["labels"][:, -keep:][:, 1:]
    counts = wanted != IGNORED
    # Slice from the end: a family that knows no logits_to_keep gives all logits, and this still holds.
    logits = output.logits[:, -keep:][:, :-1][counts]
    return torch.nn.functional.cross_entropy(logits.float(), wanted[counts])


def fit(
    model: PeftModel,
    examples: Sequence[Example],
    plan: Plan,
    run: TrainRun,
    place: RunPlace,
    *,
    pad_id: int,
    bf16: bool,
    reporter: Reporter,
    resume_from: Path | None = None,
) -> Fit:
    """Train the adapter in `model`, and save it as `place.adapter` unless a signal stops it first.

    resume_from: a state of this very run, checked by `checkpoints.newest_state`; the run then goes on as if it had
    never stopped (bit by bit, in float32 on a CPU). SIGTERM and Ctrl-C save a state after the step in hand; a second
    Ctrl-C stops at once. Raises RunInvalid when the loss is no number any more.
    """
    done = 0 if resume_from is None else checkpoints.step_of(resume_from)
    total = len(plan.batches)
    begin = begin_of(model)
    # An encoder-decoder has prompts and answers apart, each within max_length and so within its positions.
    make = partial(pairs.collate, begin=begin, most=run.max_length) if begin else collate
    trainer = _Trainer(
        model=model,
        args=_arguments(run, place, total),
        train_dataset=Steps(plan, examples, partial(make, pad_id=pad_id)),
        data_collator=_only,
    )
    trainer.place, trainer.bf16, trainer.keep = place, bf16, run.checkpoint.keep
    trainer.remove_callback(PrinterCallback)
    with _stop_signals() as stop, _Log(place.metrics, done) as log:
        trainer.add_callback(_Watch(stop, log, reporter, total))
        reporter.begin("training", total, done)
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            reporter.end()
            draw_curve(log.losses, place.curve)
        steps = trainer.state.global_step
        if steps == total:
            checkpoints.export(model, place.adapter, base_name=place.base_name, fmt=place.prompt_format)
        last = log.losses[-_FINAL_STEPS:]
        return Fit(steps, log.losses[0], math.fsum(last) / len(last), log.seconds, steps < total)


def draw_curve(losses: Sequence[float], path: Path) -> None:
    """The loss curve as a PNG: every step, and its running mean."""
    if not losses:
        return
    # Imported here: it takes half a second, and only the end of a run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    window = max(1, len(losses) // 20)
    mean = [math.fsum(part) / len(part) for i in range(len(losses)) for part in (losses[max(0, i - window) : i + 1],)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps, mean, color="tab:blue", label=f"mean of {window + 1}")
    axes.set(xlabel="step", ylabel="loss on answer tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is read without types
    """transformers' Trainer with our loss, and with states that carry a manifest and no pickled arguments."""

    place: RunPlace
    bf16: bool
    keep: int

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        # The adapter's float32 weights are used in bfloat16 here, and updated in float32.
        with torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return completion_loss(model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that a resume would not read.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        step = self.state.global_step
        # A state of this step may be left from a sitting that was killed while it wrote it.
        shutil.rmtree(self.place.states / f"checkpoint-{step}", ignore_errors=True)
        super()._save_checkpoint(model, trial)
        checkpoints.seal(self.place.states / f"checkpoint-{step}", self.place.digest)
        if step >= self.state.max_steps:
            return  # the finished adapter is no earlier step
        place = self.place
        checkpoints.export(self.model, place.step(step), base_name=place.base_name, fmt=place.prompt_format)
        kept = sorted(p for p in place.step(step).parent.iterdir() if p.name.startswith("step-"))
        for old in kept[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Tells what happens, writes it down, and stops the run when a signal came or the loss is no number."""

    def __init__(self, stop: threading.Event, log: _Log, reporter: Reporter, total: int) -> None:
        self._stop, self._log, self._reporter, self._total = stop, log, reporter, total

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._stop.is_set() and state.global_step < self._total:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return  # the Trainer's own summary at the end
        loss, rate, norm = float(logs["loss"]), float(logs["learning_rate"]), float(logs.get("grad_norm", math.nan))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunInvalid(f"the loss is {loss} and its gradient {norm} at step {state.global_step}; lower optim.lr")
        self._log.write(step=state.global_step, loss=loss, lr=rate, grad_norm=norm)
        self._reporter.step(state.global_step, loss=loss, lr=rate)


class _Log:
    """metrics.jsonl: one line a step. Opened for a resumed run, it forgets what came after the state's step."""

    def __init__(self, path: Path, done: int) -> None:
        before = _lines(path)[:done]
        self.losses = [float(line["loss"]) for line in before]
        self._before_s = float(before[-1]["seconds"]) if before else 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(json.dumps(line) + "\n" for line in before)
        self._file.flush()
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time trained, in this sitting and those before it."""
        return self._before_s + time.monotonic() - self._started

    def write(self, *, step: int, loss: float, lr: float, grad_norm: float) -> None:
        self.losses.append(loss)
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "seconds": round(self.seconds, 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lines(path: Path) -> list[dict[str, float]]:
    """The whole lines of a metrics file; a last line cut by a kill is left out."""
    found: list[dict[str, float]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return found


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second SIGINT interrupts at once. Elsewhere than in the main thread
    signals cannot be had, and the event stays unset."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _only(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one planned batch that an item already is."""
    return items[0]


def _arguments(run: TrainRun, place: RunPlace, steps: int) -> TrainingArguments:
    every = run.checkpoint.every_steps
    arguments = TrainingArguments(
        output_dir=str(place.states),
        per_device_train_batch_size=1,  # an item is a whole batch
        max_steps=steps,
        learning_rate=run.optim.lr,
        # transformers' plain constant schedule knows no warm-up; the other one is the same without one.
        lr_scheduler_type="constant_with_warmup" if run.optim.schedule == "constant" else run.optim.schedule,
        warmup_steps=warmup_steps(run.optim, steps),
        weight_decay=run.optim.weight_decay,
        max_grad_norm=run.optim.grad_clip,
        optim="adamw_torch",
        seed=run.optim.seed,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=2,  # the last one may be torn by a kill, so the one before it stays
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        push_to_hub=False,
    )
    if arguments.n_gpu > 1:
        # One process trains on one GPU: the planned batches are whole, and must not be dealt out.
        arguments._n_gpu = 1
    return arguments
