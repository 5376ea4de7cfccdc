"""The commands `loraplane train` and `loraplane eval`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.home import Home
from adapters.options import HomeOption, JsonOption, UrlOption, opened
from adapters.screen import say

if TYPE_CHECKING:
    from train.job import Prepared

eval_app = typer.Typer(help="Score a version with ROUGE against base and champion.", add_completion=False)


def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="What to train; see examples/.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, as in optim.lr=1e-4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check run, base and data; show what is trained.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this run if it was interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train again what is trained already.")] = False,
    publish_step: Annotated[
        int | None, typer.Option("--publish-step", help="Publish this trained run as it was after an earlier step.")
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter as a run file says and publish it as a candidate version.

    With --json, one object a line: progress, and last the result. Ctrl-C saves; --resume goes on.

    Example: loraplane train examples/docstring-summary.yaml --set optim.lr=5e-4
    """
    # Imported here: `--help` must answer at once.
    from adapters.runs import load_run
    from train import job
    from train.progress import reporter

    run = load_run(run_file, settings or ())
    told = reporter(as_json)
    with opened(home, url) as door:
        told.say(f"reading {run.data.source}")
        prepared = job.prepare(run, Home.find(home), door)
        if dry_run or not as_json:
            _introduce(prepared, full=dry_run, as_json=as_json)
        if dry_run:
            return
        if publish_step is not None:
            trained = job.publish_step(prepared, door, publish_step)
        else:
            command = _resume_command(run_file, settings or [], home, url)
            trained = job.train(prepared, door, told, resume=resume, force=force, resume_command=command)
    if as_json:
        say(json.dumps({"event": "result", **trained.to_json()}))
        return
    facts = trained.version.facts
    say(f"{trained.version.id} is published, digest {trained.version.digest}")
    say(
        f"  {facts.get('steps')} steps, loss {facts.get('first_loss')} -> {facts.get('final_loss')}, "
        f"{facts.get('seconds')} s; curve: {trained.folder / 'loss.png'}"
    )
    say(f"  next: loraplane eval run {trained.version.id}")


def _introduce(prepared: Prepared, *, full: bool, as_json: bool) -> None:
    """What is about to be trained; with `full` some rendered examples, in which what counts in the loss is marked."""
    facts = prepared.summary()
    if as_json:
        say(json.dumps({"event": "plan", **facts, "examples": prepared.shown}))
        return
    for key, value in facts.items():
        sys.stderr.write(f"  {key.replace('_', ' ')}: {value}\n")
    for text in prepared.shown if full else ():
        sys.stderr.write(f"--- example; in the loss is what stands between ⟦ and ⟧\n{text}\n")


def _resume_command(run_file: Path, settings: list[str], home: Path | None, url: str | None) -> str:
    words = ["loraplane", "train", str(run_file)]
    for setting in settings:
        words += ["--set", setting]
    if home is not None:
        words += ["--home", str(home)]
    if url is not None:
        words += ["--url", url]
    return shlex.join([*words, "--resume"])
