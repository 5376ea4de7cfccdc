"""What an evaluation asks, and whom: the version beside base and champion, and rows that it was not trained on.

All of it is settled before any server starts: what is wrong must cost seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.bases import DEFAULT_BASE, open_base
from adapters.errors import BaseMissing, DataRefused, InvalidRequest, RecordNotFound, RunInvalid
from adapters.gate import rival_of
from adapters.home import Home
from adapters.prompts import PromptRenderer, Renderer
from adapters.records import AdapterSummary, AdapterVersion, BaseRecord, PromptFormat
from adapters.registry_door import RegistryDoor
from adapters.runs import DOCSTRINGS, DataSpec, TrainRun, check_run, eval_data
from train import data, tables
from train.data import Row, RowSet
from train.progress import Reporter


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be found out. data: as in `--data`, None for the held-out rows of the version's own run.

    n: how many rows, None for as many as the run says. max_tokens: None for what the run or the format says.
    """

    name: str
    number: int
    data: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    set_policy: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """The version, what it stands on, the champion to hold it against, and the run it came from, if it is known.

    apart: a champion that stands on another base, so that no server holds both; the version then has no rival.
    """

    version: AdapterVersion
    base: BaseRecord
    champion: AdapterVersion | None
    run: TrainRun | None
    apart: AdapterVersion | None = None


def subject_of(door: RegistryDoor, question: Question) -> Subject:
    """The version to evaluate, with its base, the present champion and its run. Raises NotFound, BaseMissing."""
    summary = door.adapter(question.name)
    version = numbered(summary, question.number)
    base = next((b for b in door.bases() if b.digest == version.base_digest), None)
    if base is None:
        raise BaseMissing(
            f"{version.id} needs the base {version.base_digest[:12]}, which is not here; "
            f"get it, for example: loraplane models pull {DEFAULT_BASE}"
        )
    champion = None if summary.champion is None else numbered(summary, summary.champion)
    rival = rival_of(version, champion)
    apart = champion if champion is not None and champion.base_digest != version.base_digest else None
    return Subject(version, base, rival, _run_of(version), apart)


def numbered(summary: AdapterSummary, number: int) -> AdapterVersion:
    """One version of an adapter. Raises RecordNotFound with those that there are."""
    found = next((v for v in summary.versions if v.number == number), None)
    if found is None:
        have = ", ".join(v.id for v in summary.versions)
        raise RecordNotFound(f"there is no {summary.name}@{number}; there are {have}")
    return found


def rows_for(question: Question, subject: Subject, home: Home, reporter: Reporter) -> tuple[DataSpec, RowSet]:
    """The rows to answer, each prompt once; of rows that are named none that the version was trained on, if known.

    Raises DataRefused when the version's own held-out file is not what it was in training, or no row is left.
    """
    run = subject.run
    if question.data is not None:
        spec = eval_data(question.data, run.data if run is not None else None)
        rows = _unseen(data.evaluation_rows(spec, home, sys.maxsize), subject, spec, home, reporter)
        rows = replace(rows, rows=rows.rows[: question.n or spec.eval_limit])
    elif run is None:
        raise DataRefused(
            f"{subject.version.id} was not trained here, so its held-out rows are unknown; name rows with --data, "
            f"such as --data {DOCSTRINGS}:summary or a .jsonl file that it was not trained on"
        )
    else:
        spec, rows = run.data, _own_rows(run.data, subject, home, reporter)
        if question.n is not None:
            rows = data.evaluation_rows(spec, home, question.n)
    if rows.repeated:
        reporter.say(f"{rows.repeated} rows of {rows.name} ask what another one asks; each prompt counts once")
    return spec, rows


def is_own_set(question: Question, subject: Subject, digest: str) -> bool:
    """Whether rows of this digest are all those, and only those, that the version's own run kept for its evaluation."""
    expected = subject.version.facts.get("eval_data_digest")
    return question.data is None and question.n is None and digest == expected


def check_lengths(
    rows: Sequence[Row],
    formats: Sequence[PromptFormat],
    renderer: PromptRenderer,
    max_tokens: int,
    limit: int,
    *,
    apart: bool = False,
) -> None:
    """Raise DataRefused, with the row, unless every prompt in every format leaves room for max_tokens of limit tokens.

    apart: an encoder-decoder's answer takes no room of its prompt. Also where the base's chat template refuses a row.
    """
    lengths: list[tuple[int, Row]] = []
    for row in rows:
        try:
            lengths.append((max(len(renderer.chat(row.prompt, fmt)) for fmt in formats), row))
        except InvalidRequest as error:
            raise DataRefused(f"row {row.id} cannot be asked: {error}") from error
    too_long = [(length, row) for length, row in lengths if length + (0 if apart else max_tokens) > limit]
    if too_long:
        length, row = max(too_long, key=lambda pair: pair[0])
        answer = "" if apart else f"with {max_tokens} for the answer "
        raise DataRefused(
            f"{len(too_long)} of {len(rows)} rows are too long; the longest, {row.id}, has {length} tokens, and "
            f"{answer}{limit} is the most that the server holds. Leave such rows out (data.max_chars in the run does)"
            f"{'' if apart else ', or lower --max-tokens'}"
        )


def renderer_of(home: Home, base: BaseRecord) -> PromptRenderer | None:
    """The base's tokenizer, or None where the base lies on another machine."""
    try:
        return Renderer(open_base(home, base))
    except BaseMissing:
        return None


def _own_rows(spec: DataSpec, subject: Subject, home: Home, reporter: Reporter) -> RowSet:
    """The held-out rows of the version's own run."""
    rows = data.evaluation_rows(spec, home)
    if rows.digest == subject.version.facts.get("eval_data_digest"):
        return rows
    if spec.source != DOCSTRINGS:
        # Facts come with an adapter from whoever published it: a file is read for them only if it is the same.
        raise DataRefused(
            f"the held-out rows of {spec.eval_source or spec.source} are not those that {subject.version.id} was "
            f"trained beside; put the file back as it was, or name other rows with --data FILE (rows that it was "
            f"trained on are left out, as far as they are known)"
        )
    reporter.say(
        "the installed packages, or Loraplane, changed since this version was trained, and so did its held-out rows"
    )
    return rows


def _unseen(rows: RowSet, subject: Subject, spec: DataSpec, home: Home, reporter: Reporter) -> RowSet:
    """The rows without those whose prompts the version was trained on. Raises DataRefused when none is left."""
    version = subject.version.id
    trained, exact = _trained_on(subject, spec, home)
    kept = tuple(row for row in rows.rows if data.prompt_key(row.prompt) not in trained)
    left_out = len(rows.rows) - len(kept)
    if not kept:
        raise DataRefused(f"{version} was trained on every prompt of {rows.name}; name rows that it has not seen")
    if left_out:
        reporter.say(
            f"warning: {version} was trained on {left_out} of the {len(rows.rows)} prompts of {rows.name}; "
            f"they are left out"
        )
    if not exact:
        reporter.say(
            f"warning: the data that {version} was trained on is not here as it was, so whether it was trained on "
            f"some of these rows is not known; scores on such rows prove nothing"
        )
    return replace(rows, rows=kept)


def _trained_on(subject: Subject, asked: DataSpec, home: Home) -> tuple[set[str], bool]:
    """The keys of the prompts that the version was trained on, and whether these are known to be the very ones."""
    run = subject.run
    # Nothing is fetched to look: facts come with an adapter from whoever published it.
    here = run is not None and (
        run.data.source in (DOCSTRINGS, asked.source)
        or (tables.is_table(run.data.source) and Path(run.data.source).expanduser().is_file())
    )
    if run is None or not here:
        return set(), False
    try:
        found = data.training_rows(run.data, home)
        exact = found.digest == subject.version.facts.get("data_digest")
        if not exact:
            # The file changed: whatever stands on its training side now may have been there then.
            found = data.training_rows(run.data.model_copy(update={"limit": None}), home)
    except DataRefused:
        return set(), False
    turns = (row.messages[:i] for row in found.rows for i, m in enumerate(row.messages) if m.role == "assistant")
    return {data.prompt_key(prompt) for prompt in turns}, exact


def _run_of(version: AdapterVersion) -> TrainRun | None:
    """The run in a version's facts; None where there is none that this release understands."""
    stored = version.facts.get("run")
    if not isinstance(stored, Mapping):
        return None
    try:
        return check_run(stored, f"the run of {version.id}")
    except RunInvalid:
        return None
