"""The commands `loraplane train` and `loraplane eval`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import InvalidRequest
from adapters.home import Home
from adapters.options import HomeOption, JsonOption, UrlOption, opened, version_of
from adapters.screen import say, show_json

if TYPE_CHECKING:
    from train.evaluate import Evaluated
    from train.job import Prepared

_MAIN_METRIC = "rouge1"  # whose worst and best examples are shown

MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the report there, as Markdown.")
]

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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: progress, and last the result.")] = False,
) -> None:
    """Train an adapter as a run file says and publish it as a candidate version.

    Ctrl-C saves what is trained so far and says how to go on.

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
        # A programme that asks for the plan finds them in it.
        for caution in prepared.cautions if not (dry_run and as_json) else ():
            told.say(f"warning: {caution}")
        if dry_run:
            return
        if publish_step is not None:
            trained = job.publish_step(prepared, door, told, publish_step)
        else:
            command = _resume_command(run_file, settings or [], home, url, force=force)
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


@eval_app.callback()
def _eval() -> None:
    """Score a version with ROUGE against base and champion."""


@eval_app.command("run")
def eval_run(
    model: Annotated[str, typer.Argument(metavar="NAME@N", help="The version.")],
    data: Annotated[
        str | None, typer.Option("--data", help="docstrings:summary, docstrings:name or a file; default: its run's.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many rows; default: as its run says.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = None,
    set_policy: Annotated[
        bool, typer.Option("--set-policy", help="Make these rows the adapter's gate, whatever it was.")
    ] = False,
    markdown: MarkdownOption = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let base, champion and version answer held-out rows, score them, store the report, ask the gate.

    The answers come from a running server: the one at --url, or the one that holds this home; when there is none, one
    is started for this job and stopped after it.

    Example: loraplane eval run docstring-summary@1
    """
    # Imported here: `--help` must answer at once.
    from train.asked import Question
    from train.evaluate import evaluate
    from train.progress import reporter

    name, number = version_of(model)
    _check_page(markdown)
    question = Question(name, number, data, n, max_tokens, set_policy)
    _show(evaluate(question, Home.find(home), url, reporter(False)), markdown, as_json)


@eval_app.command("show")
def eval_show(
    which: Annotated[
        str, typer.Argument(metavar="DIGEST|NAME@N", help="A report, or a version, whose newest report is shown.")
    ],
    markdown: MarkdownOption = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a stored report, and what the gate says of it now. The beginning of a digest, as in `history`, is enough.

    Example: loraplane eval show docstring-summary@1
    """
    # Imported here: `--help` must answer at once.
    from train.evaluate import stored

    _check_page(markdown)
    _show(stored(which, Home.find(home), url), markdown, as_json)


@eval_app.command("score")
def eval_score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with prediction and reference.")],
    language: Annotated[str, typer.Option("--language", help="Of the texts, such as en, de, ru.")] = "en",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Score predictions made elsewhere: JSON lines with prediction and reference (or a list, references).

    Where rows also hold a baseline's answer in `baseline`, the paired difference is shown.

    Example: loraplane eval score predictions.jsonl
    """
    # Imported here: `--help` must answer at once.
    from train.offline import score_file
    from train.show import show_offline

    scored = score_file(file, language=language, seed=seed)
    if as_json:
        show_json(scored.to_json())
    else:
        show_offline(scored)


def _show(done: Evaluated, markdown: Path | None, as_json: bool) -> None:
    """A report and its verdict on stdout, and then, where it was asked for, on a page."""
    from adapters.wire import decision_to_json, report_to_json
    from train.show import markdown as as_markdown
    from train.show import show_report

    if as_json:
        show_json({"report": report_to_json(done.report), "decision": decision_to_json(done.decision)})
    else:
        show_report(done.report, done.decision, _MAIN_METRIC)
        say(f"report {done.digest}")
    if markdown is not None:
        try:
            markdown.write_text(as_markdown(done.report, done.decision, _MAIN_METRIC), encoding="utf-8")
        except OSError as error:
            raise _no_page(markdown, error.strerror or str(error)) from error


def _check_page(markdown: Path | None) -> None:
    """Raise InvalidRequest for a page that cannot be written: before an evaluation, not after it."""
    if markdown is None:
        return
    if markdown.is_dir():
        raise _no_page(markdown, "it is a folder")
    if not markdown.parent.is_dir():
        raise _no_page(markdown, f"there is no folder {markdown.parent}")
    if not os.access(markdown if markdown.exists() else markdown.parent, os.W_OK):
        raise _no_page(markdown, "it may not be written")


def _no_page(markdown: Path, why: str) -> InvalidRequest:
    return InvalidRequest(f"--markdown {markdown} cannot be written: {why}", "markdown")


def _introduce(prepared: Prepared, *, full: bool, as_json: bool) -> None:
    """What is about to be trained; with `full` some rendered examples, in which what counts in the loss is marked."""
    facts = prepared.summary()
    if as_json:
        say(json.dumps({"event": "plan", **facts, "examples": prepared.shown}))
        return
    del facts["warnings"]  # said by themselves
    for key, value in facts.items():
        sys.stderr.write(f"  {key.replace('_', ' ')}: {value}\n")
    for text in prepared.shown if full else ():
        sys.stderr.write(f"--- example; in the loss is what stands between ⟦ and ⟧\n{text}\n")


def _resume_command(run_file: Path, settings: list[str], home: Path | None, url: str | None, *, force: bool) -> str:
    words = ["loraplane", "train", str(run_file)]
    for setting in settings:
        words += ["--set", setting]
    if home is not None:
        words += ["--home", str(home)]
    if url is not None:
        words += ["--url", url]
    # A forced training is gone on with as one; without it, the finished run beside it is meant.
    return shlex.join([*words, *(["--force"] if force else []), "--resume"])
