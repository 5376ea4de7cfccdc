"""An evaluation from a version's name to a stored report and the gate's verdict."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from adapters.bases import DEFAULT_BASE
from adapters.errors import BaseMissing, DataRefused, RecordNotFound, RunInvalid
from adapters.gate import decide
from adapters.home import Home
from adapters.records import BASE_ID, AdapterSummary, AdapterVersion, BaseRecord
from adapters.registry_door import API_KEY_VARIABLE, RegistryDoor, open_door
from adapters.reports import Decision, Report, Role
from adapters.runs import DOCSTRINGS, DataSpec, EvalSpec, GateSpec, TrainRun, check_run, eval_data
from train import answers, child, data, rouge, scoring
from train.data import RowSet
from train.progress import Reporter

_SCORING_CODE = ("answers.py", "data.py", "rouge.py", "scoring.py")


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
class Evaluated:
    """The report, its name in the store, and what the gate says of it."""

    report: Report
    digest: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class Subject:
    """The version, what it stands on, who is champion now, and the run it came from, if it is known."""

    version: AdapterVersion
    base: BaseRecord
    champion: AdapterVersion | None
    run: TrainRun | None


@contextmanager
def server_for(home: Home, url: str | None, base: str, reporter: Reporter) -> Iterator[str]:
    """A server to ask: the one at `url`, else the one that holds the home, else one for this block alone."""
    note = None if url else home.server()
    if url is not None or note is not None:
        yield url or (note.url if note else "")
        return
    with child.private_server(home, base, reporter.say) as started:
        yield started


def evaluate(question: Question, home: Home, url: str | None, reporter: Reporter) -> Evaluated:
    """Answer, score, store the report, and judge it.

    Raises DataRefused, NotFound, Conflict (other weights answered), ServerUnreachable, and what the server raised.
    """
    with _closing(open_door(home, url)) as door:
        subject = subject_of(door, question)
    # Before any server starts: bad data must cost seconds.
    spec, rows = rows_for(question, subject, home, reporter)
    settings = subject.run.eval if subject.run is not None else EvalSpec()
    scorer = rouge.Rouge(settings.language)
    max_tokens = question.max_tokens or (
        settings.max_tokens if subject.run else subject.version.prompt_format.defaults.max_tokens or settings.max_tokens
    )
    with server_for(home, url, subject.base.name, reporter) as address:
        systems = systems_of(subject)
        reporter.say(f"{', '.join(s.model for s in systems)} on {len(rows.rows)} rows of {rows.name} at {address}")
        given = answers.collect(rows.rows, systems, answers.Ask(address, _key(), max_tokens), reporter)
        report = make_report(
            subject,
            rows,
            systems,
            given,
            scorer,
            seed=settings.seed,
            settings={
                "max_tokens": max_tokens,
                "temperature": 0,
                "data": spec.model_dump(mode="json"),
                "base_prompt": "dressed as the candidate's prompt format says",
                "language": settings.language,
                "stemmer": scorer.stemmed,
                "tokenizer": rouge.TOKENIZER,
                "rouge_score": metadata.version("rouge-score"),
                "bootstrap": {
                    "method": "BCa", "resamples": scoring.RESAMPLES, "confidence": scoring.CONFIDENCE,
                    "seed": settings.seed,
                },
            },
        )  # fmt: skip
        # The server holds the registry while it runs, so the report goes through it.
        with _closing(open_door(home, url or address)) as door:
            digest = door.add_report(report)
            return Evaluated(report, digest, verdict(door, subject, report, question, reporter))


def subject_of(door: RegistryDoor, question: Question) -> Subject:
    """The version to evaluate, with its base, the present champion and its run. Raises NotFound, BaseMissing."""
    summary = door.adapter(question.name)
    version = _numbered(summary, question.number)
    base = next((b for b in door.bases() if b.digest == version.base_digest), None)
    if base is None:
        raise BaseMissing(
            f"{version.id} needs the base {version.base_digest[:12]}, which is not here; "
            f"get it, for example: loraplane models pull {DEFAULT_BASE}"
        )
    champion = None if summary.champion is None else _numbered(summary, summary.champion)
    return Subject(version, base, champion, _run_of(version))


def rows_for(question: Question, subject: Subject, home: Home, reporter: Reporter) -> tuple[DataSpec, RowSet]:
    """The rows to answer. Raises DataRefused when the version's own held-out file is not what it was in training."""
    run = subject.run
    if question.data is not None:
        spec = eval_data(question.data, run.data if run is not None else None)
        return spec, data.evaluation_rows(spec, home, question.n)
    if run is None:
        raise DataRefused(
            f"{subject.version.id} was not trained here, so its held-out rows are unknown; name rows with --data, "
            f"such as --data {DOCSTRINGS}:summary or a .jsonl file"
        )
    whole = data.evaluation_rows(run.data, home)
    expected = subject.version.facts.get("eval_data_digest")
    if whole.digest != expected:
        if run.data.source != DOCSTRINGS:
            # Facts come with an adapter from whoever published it: a file is read for them only if it is the same.
            source = run.data.eval_source or run.data.source
            raise DataRefused(
                f"the held-out rows of {source} are not those that {subject.version.id} was trained beside; "
                f"say --data {source} to evaluate on the whole file as it is now"
            )
        reporter.say("the installed packages changed since this version was trained, and so did its held-out rows")
    return run.data, whole if question.n is None else data.evaluation_rows(run.data, home, question.n)


def systems_of(subject: Subject) -> list[answers.System]:
    """Base, champion (unless it is the candidate itself) and candidate, each pinned to its digest."""
    base_digest = subject.base.digest
    found = [answers.System(Role.BASE, BASE_ID, None, base_digest, subject.version.prompt_format)]
    champion = subject.champion
    if champion is not None:
        found.append(answers.System(Role.CHAMPION, champion.id, champion.digest, champion.base_digest))
    found.append(answers.System(Role.CANDIDATE, subject.version.id, subject.version.digest, base_digest))
    return found


def make_report(
    subject: Subject,
    rows: RowSet,
    systems: list[answers.System],
    given: list[Mapping[Role, str]],
    scorer: rouge.Rouge,
    *,
    seed: int,
    settings: Mapping[str, object],
) -> Report:
    """The report of these answers, bound to the digests of everything that went into it."""
    cases = [
        scoring.Case(row.id, row.prompt[-1].content, (row.reference,), answer)
        for row, answer in zip(rows.rows, given, strict=True)
    ]
    named = [scoring.SystemId(s.role, s.model, s.digest or s.base_digest) for s in systems]
    scored = scoring.score_cases(cases, named, scorer, seed=seed)
    version = subject.version
    return Report(
        adapter=version.name,
        number=version.number,
        adapter_digest=version.digest,
        base_digest=version.base_digest,
        champion_digest=None if subject.champion is None else subject.champion.digest,
        data=rows.name,
        data_digest=rows.digest,
        code=code_version(),
        settings=settings,
        n=len(cases),
        systems=scored.systems,
        differences=scored.differences,
        examples=scoring.examples_of(cases, scored),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def verdict(door: RegistryDoor, subject: Subject, report: Report, question: Question, reporter: Reporter) -> Decision:
    """What the gate says, after the adapter got a policy if it had none and its run names one, or if it was asked."""
    name = subject.version.name
    try:
        policy = door.policy(name)
    except RecordNotFound:
        policy = None
    named = subject.run.gate if subject.run is not None else None
    if question.set_policy or (policy is None and named is not None):
        rules = named or GateSpec(min_n=report.n)
        policy = door.set_policy(name, rules.policy(report.data_digest))
        reporter.say(f"{name} has a gate policy now: {policy.metric} on {report.data} ({policy.data_digest[:12]})")
    champion = None if subject.champion is None else subject.champion.digest
    return decide(report, policy, version_digest=subject.version.digest, champion_digest=champion)


def code_version() -> str:
    """The release, and a digest over the code that makes scores: a report of other code is another report."""
    digest = hashlib.sha256()
    for name in _SCORING_CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"loraplane {metadata.version('loraplane')} scoring {digest.hexdigest()[:12]}"


def _run_of(version: AdapterVersion) -> TrainRun | None:
    """The run in a version's facts; None where there is none that this release understands."""
    stored = version.facts.get("run")
    if not isinstance(stored, Mapping):
        return None
    try:
        return check_run(stored, f"the run of {version.id}")
    except RunInvalid:
        return None


def _numbered(summary: AdapterSummary, number: int) -> AdapterVersion:
    found = next((v for v in summary.versions if v.number == number), None)
    if found is None:
        have = ", ".join(v.id for v in summary.versions)
        raise RecordNotFound(f"there is no {summary.name}@{number}; there are {have}")
    return found


def _key() -> str | None:
    """The key to ask with; for a server of our own, the first of those that it accepts."""
    own = os.environ.get("LORAPLANE_API_KEYS", "").split(",")[0].strip()
    return os.environ.get(API_KEY_VARIABLE) or own or None


@contextmanager
def _closing(door: RegistryDoor) -> Iterator[RegistryDoor]:
    try:
        yield door
    finally:
        door.close()
