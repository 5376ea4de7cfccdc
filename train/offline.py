"""Scores of predictions that were made elsewhere, from a file of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.errors import DataRefused
from adapters.reports import ROUGE_METRICS, PairedDifference, Role, SystemScores
from train.rouge import Rouge
from train.scoring import Case, SystemId, interval, score_cases


@dataclass(frozen=True, slots=True)
class OfflineScores:
    """Means of a file of predictions. intervals: metric -> 95 % interval of its mean."""

    file: str
    n: int
    language: str
    systems: tuple[SystemScores, ...]
    intervals: Mapping[str, tuple[float, float]]
    precision: Mapping[str, float]
    recall: Mapping[str, float]
    differences: tuple[PairedDifference, ...]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


def score_file(path: Path, *, language: str, seed: int) -> OfflineScores:
    """Score a file's rows. Raises InvalidRequest for a language that is none, DataRefused for the first bad row."""
    rouge = Rouge(language)
    cases = _cases(path)
    paired = all(Role.BASE in case.answers for case in cases)
    roles = [Role.BASE, Role.CANDIDATE] if paired else [Role.CANDIDATE]
    systems = [SystemId(role, "baseline" if role is Role.BASE else "prediction", "") for role in roles]
    scored = score_cases(cases, systems, rouge, seed=seed)
    own = scored.scores[Role.CANDIDATE]
    n = len(cases)
    return OfflineScores(
        file=str(path),
        n=n,
        language=language,
        systems=scored.systems,
        intervals={m: interval([s[m].f for s in own], seed=seed) if n > 1 else (0.0, 1.0) for m in ROUGE_METRICS},
        precision={m: math.fsum(s[m].precision for s in own) / n for m in ROUGE_METRICS},
        recall={m: math.fsum(s[m].recall for s in own) / n for m in ROUGE_METRICS},
        differences=scored.differences,
    )


def _cases(path: Path) -> list[Case]:
    try:
        # utf-8-sig: editors on Windows begin a file with a mark. Not splitlines: texts may hold U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataRefused(f"cannot read {path}: {error}") from error
    cases = [_case(f"{path}#{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    with_baseline = sum(Role.BASE in case.answers for case in cases)
    if with_baseline not in (0, len(cases)):
        raise DataRefused(f"{path}: {with_baseline} of {len(cases)} rows have a baseline; all must, or none")
    return cases


def _case(where: str, line: str) -> Case:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataRefused(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataRefused(f"{where}: a row must be a JSON object")
    references = row.get("references", [row.get("reference")])
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise DataRefused(f"{where}: a row needs a text 'reference' or a list of texts 'references'")
    if not all(r.strip() for r in references):
        raise DataRefused(f"{where}: the reference is empty")
    answers = {}
    for role, key in ((Role.CANDIDATE, "prediction"), (Role.BASE, "baseline")):
        text = row.get(key)
        if text is None and role is Role.BASE:
            continue
        if not isinstance(text, str):
            raise DataRefused(f"{where}: {key!r} must be a text (an empty one counts as an empty answer)")
        answers[role] = text
    return Case(where, str(row.get("prompt", "")), tuple(references), answers)
