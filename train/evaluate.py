"""An evaluation from a version's name to a stored report and the gate's verdict."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from adapters.errors import RecordNotFound
from adapters.families import ENCODER_DECODERS
from adapters.gate import decide, rival_of
from adapters.home import Home
from adapters.options import version_of
from adapters.records import BASE_ID, BaseRecord
from adapters.registry_door import API_KEY_VARIABLE, RegistryDoor, open_door
from adapters.reports import Decision, GatePolicy, Report, Role, check_digest
from adapters.runs import EvalSpec, GateSpec
from train import answers, child, rouge, scoring
from train.asked import Question, Subject, check_lengths, is_own_set, numbered, renderer_of, rows_for, subject_of
from train.data import RowSet
from train.progress import Reporter

_SCORING_CODE = ("answers.py", "asked.py", "data.py", "rouge.py", "scoring.py", "tables.py")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The report, its name in the store, and what the gate says of it."""

    report: Report
    digest: str
    decision: Decision


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
    if subject.apart is not None:
        reporter.say(
            f"the champion {subject.apart.id} stands on another base, so it is left out; {subject.version.id} is "
            f"compared with its own base alone, here and by the gate"
        )
    spec, rows = rows_for(question, subject, home, reporter)
    settings = subject.run.eval if subject.run is not None else EvalSpec()
    scorer = rouge.Rouge(settings.language)
    max_tokens = question.max_tokens or (
        settings.max_tokens if subject.run else subject.version.prompt_format.defaults.max_tokens or settings.max_tokens
    )
    systems = systems_of(subject)
    renderer = renderer_of(home, subject.base)
    if renderer is not None:
        formats = [v.prompt_format for v in (subject.version, subject.champion) if v is not None]
        apart = subject.base.family in ENCODER_DECODERS
        check_lengths(rows.rows, formats, renderer, max_tokens, _context(subject.base, home, url), apart=apart)
    with server_for(home, url, subject.base.name, reporter) as address:
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
                "champion_left_out": None if subject.apart is None else f"{subject.apart.id}, on another base",
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
        scoring.Case(row.id, row.prompt[-1].content, (row.reference,), answer, row.prompt[:-1])
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
    """What the gate says, after the adapter got a policy: if it was asked for, or if it had none and these are the rows
    that its run kept for that, all of them. Any others, such as a quick look at a few, must not become the gate.
    """
    name = subject.version.name
    policy = _policy(door, name)
    named = subject.run.gate if subject.run is not None else None
    own = is_own_set(question, subject, report.data_digest)
    if question.set_policy or (policy is None and named is not None and own):
        rules = named or GateSpec(min_n=report.n)
        policy = door.set_policy(name, rules.policy(report.data_digest))
        reporter.say(f"{name} has a gate policy now: {policy.metric} on {report.data} ({policy.data_digest[:12]})")
        if policy.min_n > report.n:
            reporter.say(f"warning: it needs {policy.min_n} prompts and this set has {report.n}; nothing can pass it")
    elif policy is None and named is not None:
        reporter.say(
            f"{name} has no gate policy yet, and these rows do not become it, since they are not just those that "
            f"{subject.version.id} was held to; evaluate without --data and --n, or say --set-policy"
        )
    champion = None if subject.champion is None else subject.champion.digest
    return decide(report, policy, version_digest=subject.version.digest, champion_digest=champion)


def _context(base: BaseRecord, home: Home, url: str | None) -> int:
    """The most tokens that whoever answers can hold: of a server that runs already the base's own bound is known."""
    running = url is not None or home.server() is not None
    positions = base.max_positions or sys.maxsize  # T5 has no bound of its own
    return positions if running else min(positions, child.CONTEXT_TOKENS)


def stored(which: str, home: Home, url: str | None) -> Evaluated:
    """A report that is kept, and what the gate says of it now. which: a digest or its beginning, or name@3 for the
    newest report about that version. Raises InvalidRequest, NotFound.
    """
    with _closing(open_door(home, url)) as door:
        if "@" in which:
            name, number = version_of(which)
            version = numbered(door.adapter(name), number)
            report = door.newest_report(name, number)
            if report is None:
                raise RecordNotFound(
                    f"no report about {version.id} is stored; make one: loraplane eval run {version.id}"
                )
        else:
            report = door.report(check_digest(which))
        summary = door.adapter(report.adapter)
        version = numbered(summary, report.number)
        rival = rival_of(version, None if summary.champion is None else numbered(summary, summary.champion))
        decision = decide(
            report,
            _policy(door, report.adapter),
            version_digest=version.digest,
            champion_digest=None if rival is None else rival.digest,
        )
        return Evaluated(report, report.digest, decision)


def code_version() -> str:
    """The release, and a digest over the code that makes scores: a report of other code is another report."""
    digest = hashlib.sha256()
    for name in _SCORING_CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"loraplane {metadata.version('loraplane')} scoring {digest.hexdigest()[:12]}"


def _policy(door: RegistryDoor, name: str) -> GatePolicy | None:
    try:
        return door.policy(name)
    except RecordNotFound:
        return None


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
