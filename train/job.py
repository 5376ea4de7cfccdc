"""A training job from its run file to a published candidate: rows, plan, training, facts, publication."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from adapters.bases import open_base
from adapters.errors import Cancelled, DataRefused, LoraplaneError, ModelNotFound, RunInvalid
from adapters.families import ENCODER_DECODERS, check_family
from adapters.home import Home
from adapters.prompts import Renderer
from adapters.records import AdapterVersion, BaseRecord
from adapters.registry_door import RegistryDoor
from adapters.runs import TrainRun
from adapters.shelf import chosen_base
from train import data
from train.batching import Plan, plan
from train.checks import cautions, check_publishable, check_rate, unlike
from train.data import ExampleSet, RowSet
from train.progress import Reporter

if TYPE_CHECKING:
    from train.loop import RunPlace

_SHOWN = 3
_AGAIN = "again"  # where a forced training works, beside the finished one
# What a training leaves in its folder.
_PRODUCTS = ("finished.json", "states", "adapter", "steps", "metrics.jsonl", "loss.png", "run.json")
_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run with everything that is known before the first step."""

    run: TrainRun
    base: BaseRecord
    base_folder: Path
    rows: RowSet
    held_out: RowSet | None
    examples: ExampleSet
    plan: Plan
    digest: str
    folder: Path
    pad_id: int
    end_id: int
    shown: tuple[str, ...]
    cautions: tuple[str, ...]

    def summary(self) -> dict[str, object]:
        """What `--dry-run` tells, as plain JSON values."""
        return {
            "adapter": self.run.name,
            "base": self.base.name,
            "run_digest": self.digest,
            "folder": str(self.folder),
            "data": self.rows.name,
            "rows": len(self.rows.rows),
            "data_digest": self.rows.digest,
            "held_out_rows": 0 if self.held_out is None else len(self.held_out.rows),
            "held_out_digest": None if self.held_out is None else self.held_out.digest,
            "left_out_because_held_out": self.rows.leaked,
            "repeated_rows": self.rows.repeated,
            "steps": len(self.plan.batches),
            "padding_share": round(self.plan.padding, 4),
            "truncated_share": round(self.examples.truncated / len(self.examples.examples), 4),
            "loss_tokens": self.examples.loss_tokens,
            "tokens": sum(len(e.ids) for e in self.examples.examples),
            "warnings": list(self.cautions),
        }


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's end: the version, its facts, and the folder of its curve and states. fresh: trained just now."""

    version: AdapterVersion
    folder: Path
    fresh: bool

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        v = self.version
        return {
            "model": v.id,
            "name": v.name,
            "version": v.number,
            "digest": v.digest,
            "base_digest": v.base_digest,
            "facts": dict(v.facts),
            "folder": str(self.folder),
            "fresh": self.fresh,
        }


def prepare(run: TrainRun, home: Home, door: RegistryDoor) -> Prepared:
    """Load, check and render everything a run needs, without a step of training.

    Raises DataRefused, BaseMissing, BaseUnsupported, RunInvalid.
    """
    base = chosen_base(door.bases(), run.base)
    # Else an adapter is trained and published that nothing can serve.
    check_family(base.family)
    check_publishable(run, base, door)
    folder = open_base(home, base)
    rows = data.training_rows(run.data, home)
    try:
        held_out: RowSet | None = data.evaluation_rows(run.data, home)
    except DataRefused:
        if run.gate is not None:
            raise
        held_out = None  # nothing to evaluate on, and nothing asks for it
    renderer = Renderer(folder)
    apart = base.family in ENCODER_DECODERS
    examples = data.render(rows, renderer, run.prompt_format.record(), run.max_length, apart=apart)
    batches = plan(
        [len(e.ids) for e in examples.examples],
        epochs=run.optim.epochs,
        seed=run.optim.seed,
        batch_size=run.optim.batch_size,
        tokens_per_batch=run.optim.tokens_per_batch,
        max_steps=run.optim.max_steps,
        fraction=run.optim.fraction,
    )
    check_rate(run.optim, len(batches.batches))
    code = f"loraplane {metadata.version('loraplane')}"
    digest = run.digest(base_digest=base.digest, data_digest=rows.digest, code=code)
    return Prepared(
        run=run,
        base=base,
        base_folder=folder,
        rows=rows,
        held_out=held_out,
        examples=examples,
        plan=batches,
        digest=digest,
        folder=home.runs / f"{run.name}-{digest[:12]}",
        pad_id=renderer.pad_token_id,
        end_id=-1 if renderer.eos_token_id is None else renderer.eos_token_id,
        shown=tuple(data.marked(e, renderer) for e in examples.examples[:_SHOWN]),
        cautions=cautions(run, held_out, len(batches.batches)),
    )


def train(
    job: Prepared, door: RegistryDoor, reporter: Reporter, *, resume: bool, force: bool, resume_command: str
) -> Trained:
    """Train and publish. A run that is published already is returned as it is, unless `force`.

    resume: go on from the last state, if there is one. force: train beside what is there, which gives way when the new
    adapter is published. Raises Cancelled when a signal stopped it (its state is saved; the message holds
    `resume_command`), and RunInvalid when an interrupted run lies there and neither was said.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / ".lock", timeout=0):
            published = None if force else published_by(door, job.run.name, job.digest)
            if published is not None:
                reporter.say(f"already trained: {published.id} comes from this very run (--force trains it again)")
                trained = Trained(published, job.folder, fresh=False)
            else:
                trained = _train(job, door, reporter, resume=resume, force=force, resume_command=resume_command)
            for line in unlike(job.run, trained.version):
                reporter.say(line)
            return trained
    except Timeout:
        raise RunInvalid(f"this run is being trained by another process; it works in {job.folder}") from None


def published_by(door: RegistryDoor, name: str, run_digest: str) -> AdapterVersion | None:
    """The version that this run, wholly trained, became; None when there is none."""
    try:
        versions = door.adapter(name).versions
    except ModelNotFound:
        return None
    return next((v for v in versions if v.facts.get("run_digest") == run_digest and not v.facts.get("early")), None)


def publish_step(job: Prepared, door: RegistryDoor, reporter: Reporter, step: int) -> Trained:
    """Publish the adapter as it was after an earlier step. Raises RunInvalid when that step is not kept."""
    steps = job.folder / "steps"
    folder = steps / f"step-{step:06d}"
    if not folder.is_dir():
        have = ", ".join(p.name.removeprefix("step-").lstrip("0") for p in sorted(steps.glob("step-*"))) or "none"
        raise RunInvalid(f"step {step} of this run is not kept; kept are {have}")
    facts = {**_known_facts(job), "steps": step, "early": True}
    return Trained(_publish(job, door, reporter, folder, facts), job.folder, fresh=True)


def _train(
    job: Prepared, door: RegistryDoor, reporter: Reporter, *, resume: bool, force: bool, resume_command: str
) -> Trained:
    # Imported here: a dry run, and a run that is published already, need no torch.
    from train import checkpoints, loop

    again = job.folder / _AGAIN
    place = loop.RunPlace(again if force else job.folder, job.digest, job.base.name, job.run.prompt_format.record())
    # Trained to its end before, but not published: nothing is left to train.
    found = None if force and not resume else checkpoints.finished(place.folder, place.adapter, job.digest)
    if found is None:
        found = _fit(job, place, reporter, resume=resume, force=force, resume_command=resume_command)
        checkpoints.finish(place.folder, place.adapter, job.digest, found)
    else:
        reporter.say(f"trained to its end already, in {place.folder}; publishing it")
    version = _publish(job, door, reporter, place.adapter, {**_known_facts(job), **found})
    if force:
        _take_over(job.folder, again)
    shutil.rmtree(job.folder / place.states.name, ignore_errors=True)  # nothing is left to resume, and they are large
    return Trained(version, job.folder, fresh=True)


def _fit(
    job: Prepared, place: RunPlace, reporter: Reporter, *, resume: bool, force: bool, resume_command: str
) -> dict[str, object]:
    """Train to the end, from the start or from the last state; returns the facts of the training."""
    from train import checkpoints, golden, loop, models

    run = job.run
    state = checkpoints.newest_state(place.states, job.digest, reporter.say) if resume else None
    if not (resume or force) and any(place.states.glob("checkpoint-*")):
        raise RunInvalid(f"{job.folder} holds this run, interrupted; add --resume to go on, or --force to start over")
    if state is None:
        for name in _PRODUCTS:
            _remove(place.folder / name)
    else:
        reporter.say(f"going on after step {checkpoints.step_of(state)}")
    place.folder.mkdir(exist_ok=True)
    (place.folder / "run.json").write_text(json.dumps(run.settings(), indent=2), encoding="utf-8")
    threads = models.use_all_cores()
    bf16 = models.wants_bf16(run.bf16)
    # What the libraries tell each other about names that will go is no news for who trains an adapter.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    model = models.load_with_lora(job.base_folder, run.lora, bf16=bf16, max_length=run.max_length, seed=run.optim.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reporter.say(
        f"{job.base.name}: {trainable / 1e6:.2f} M adapter weights on {model.device}, "
        f"{'bfloat16' if bf16 else 'float32'}, {threads} threads"
    )
    done = loop.fit(
        model, job.examples.examples, job.plan, run, place, pad_id=job.pad_id, bf16=bf16, reporter=reporter,
        resume_from=state,
    )  # fmt: skip
    if done.stopped:
        raise Cancelled(f"stopped after step {done.steps} of {len(job.plan.batches)}; go on with: {resume_command}")
    ends = frozenset({job.end_id})
    rows = golden.golden_rows(model, job.examples.examples, ends=ends, bf16=bf16, most=run.golden_rows)
    golden.write_golden(rows, place.adapter)
    if rows.rows and not rows.telling:
        reporter.say(
            f"the golden rows do not tell this adapter from its base (it is {rows.gap:.2f} nats off at most): what "
            f"serving replays shows little then; train longer if answers should differ"
        )
    return {
        "steps": done.steps,
        "first_loss": round(done.first_loss, 6),
        "final_loss": round(done.final_loss, 6),
        "seconds": round(done.seconds, 1),
        "device": str(model.device),
        "compute_dtype": "bfloat16" if bf16 else "float32",
        "threads": threads,
        "trainable": trainable,
        "golden_gap": round(rows.gap, 3),
    }


def _take_over(folder: Path, again: Path) -> None:
    """Put what a forced training made in the place of what was there before."""
    for name in _PRODUCTS:
        _remove(folder / name)
        if (again / name).exists():
            (again / name).replace(folder / name)
    shutil.rmtree(again, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _known_facts(job: Prepared) -> dict[str, object]:
    """What the registry keeps of how a version was made, as far as it is known before training."""
    run, held_out = job.run, job.held_out
    return {
        "kind": "train",
        "run_digest": job.digest,
        "run": run.settings(),
        "base": job.base.name,
        "base_digest": job.base.digest,
        "data": job.rows.name,
        "data_digest": job.rows.digest,
        "rows": len(job.rows.rows),
        "eval_data": None if held_out is None else held_out.name,
        "eval_data_digest": None if held_out is None else held_out.digest,
        "eval_rows": 0 if held_out is None else len(held_out.rows),
        "seed": run.optim.seed,
        "lr": run.optim.lr,
        "loss_tokens": job.examples.loss_tokens,
        "truncated": job.examples.truncated,
        "padding_share": round(job.plan.padding, 4),
        "versions": _versions(),
    }


def _publish(
    job: Prepared, door: RegistryDoor, reporter: Reporter, folder: Path, facts: Mapping[str, object]
) -> AdapterVersion:
    try:
        return door.publish(
            job.run.name,
            folder,
            base=job.base.name,
            prompt_format=job.run.prompt_format.record(),
            facts=facts,
            note=job.run.note,
        )
    except LoraplaneError:
        by_hand = shlex.join(["loraplane", "adapters", "publish", job.run.name, str(folder), "--base", job.base.name])
        reporter.say(
            f"the trained adapter was not published; it lies in {folder}. Once what follows is mended, the same "
            f"command with --resume publishes it without training, and so does: {by_hand}"
        )
        raise


def _versions() -> dict[str, str]:
    found = {"loraplane": metadata.version("loraplane"), "python": python_version(), "platform": sys.platform}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
