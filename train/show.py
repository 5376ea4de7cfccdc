"""An evaluation as people read it: tables on a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapters.reports import ROUGE_METRICS, Decision, PairedDifference, Report, Role, SystemScores
from adapters.screen import say, show_table
from train.offline import OfflineScores
from train.scoring import extremes

_LABELS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
_SYSTEM_COLUMNS = ("SYSTEM", "MODEL", *(_LABELS[m] for m in ROUGE_METRICS), "LENGTH", "EMPTY")
_DIFFERENCE_COLUMNS = ("CANDIDATE MINUS", "METRIC", "MEAN", "95 % INTERVAL", "N")
_EXAMPLES = 3
_PROMPT_CHARS = 240


def show_report(report: Report, decision: Decision, metric: str) -> None:
    """The whole evaluation on stdout."""
    say(
        f"{report.adapter}@{report.number} on {report.n} different prompts of {report.data} ({report.data_digest[:12]})"
    )
    say("")
    show_systems(report.systems)
    say("")
    show_table(_DIFFERENCE_COLUMNS, [_difference_row(d) for d in report.differences], empty="no differences")
    for title, examples in zip(("worst", "best"), extremes(report, metric, _EXAMPLES), strict=True):
        for example in examples:
            say("")
            score = example["scores"][Role.CANDIDATE.value][metric]
            say(f"{title}, {_LABELS[metric]} {score:.3f}: {_printable(_id(example))}")
            say("\n".join(f"    {_printable(line)}" for line in _short(str(example["prompt"])).splitlines()))
            for label, text in _texts(example):
                say(f"  {_printable(label):>9}: {_printable(' '.join(text.split()))}")
    say("")
    show_decision(decision)


def show_offline(scored: OfflineScores) -> None:
    """Scores of a file of predictions: means with intervals, precision and recall, the difference to a baseline."""
    own = next(s for s in scored.systems if s.role is Role.CANDIDATE)
    say(f"{scored.file}: {scored.n} rows, language {scored.language}")
    say(f"length ratio {own.length_ratio:.2f}, empty answers {own.empty_rate:.1%}")
    show_table(
        ("METRIC", "F", "95 % INTERVAL", "PRECISION", "RECALL"),
        [
            (
                _LABELS[m],
                f"{own.scores[m]:.3f}",
                "[{:.3f}, {:.3f}]".format(*scored.intervals[m]),
                f"{scored.precision[m]:.3f}",
                f"{scored.recall[m]:.3f}",
            )
            for m in ROUGE_METRICS
        ],
    )
    if scored.differences:
        say("")
        show_table(("PREDICTION MINUS", *_DIFFERENCE_COLUMNS[1:]), [_difference_row(d) for d in scored.differences])


def show_systems(systems: Iterable[SystemScores]) -> None:
    """One line a system: mean F of each metric, length ratio, share of empty answers."""
    show_table(_SYSTEM_COLUMNS, [_system_row(s) for s in systems])


def show_decision(decision: Decision) -> None:
    """The gate's verdict and its reasons."""
    say(f"gate: {decision.verdict.value}")
    for reason in decision.reasons:
        say(f"  - {reason}")


def markdown(report: Report, decision: Decision, metric: str) -> str:
    """The evaluation as Markdown, for a pull request or a model card."""
    worst, best = extremes(report, metric, _EXAMPLES)
    parts = [
        f"# {report.adapter}@{report.number}: {decision.verdict.value}",
        f"{report.n} different prompts of {report.data} (`{report.data_digest[:12]}`), "
        f"adapter `{report.adapter_digest[:12]}`, base `{report.base_digest[:12]}`, "
        f"{report.code}, {report.created_at}.",
        _md_table(_SYSTEM_COLUMNS, [_system_row(s) for s in report.systems]),
        _md_table(_DIFFERENCE_COLUMNS, [_difference_row(d) for d in report.differences]),
    ]
    if decision.reasons:
        parts.append("\n".join(f"- {reason}" for reason in decision.reasons))
    for title, examples in (("Worst", worst), ("Best", best)):
        for example in examples:
            lines = "\n".join(f"- {label}: {_md_cell(text)}" for label, text in _texts(example))
            fence = "`" * max(3, _longest_run(str(example["prompt"])) + 1)
            parts.append(
                f"## {title}: {_md_cell(_id(example))}\n\n{fence}\n{_short(str(example['prompt']))}\n{fence}\n\n{lines}"
            )
    return "\n\n".join(parts) + "\n"


def _system_row(s: SystemScores) -> tuple[str, ...]:
    # A report that came from elsewhere need not hold all metrics.
    figures = (f"{s.scores[m]:.3f}" if m in s.scores else "-" for m in ROUGE_METRICS)
    return (s.role.value, s.model, *figures, f"{s.length_ratio:.2f}", f"{s.empty_rate:.1%}")


def _difference_row(d: PairedDifference) -> tuple[str, ...]:
    return (
        d.against.value,
        _LABELS.get(d.metric, d.metric),
        f"{d.mean:+.3f}",
        f"[{d.low:+.3f}, {d.high:+.3f}]",
        str(d.n),
    )


def _texts(example: Mapping[str, Any]) -> list[tuple[str, str]]:
    answers = example.get("answers")
    given = answers.items() if isinstance(answers, Mapping) else ()
    return [("reference", str(example.get("reference", ""))), *((str(k), str(v)) for k, v in given)]


def _id(example: Mapping[str, Any]) -> str:
    return str(example.get("id", ""))


def _printable(text: str) -> str:
    """Texts of a model and of strangers: what would move the cursor is shown escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _short(text: str) -> str:
    return text if len(text) <= _PROMPT_CHARS else text[:_PROMPT_CHARS] + " ..."


def _longest_run(text: str) -> int:
    """Length of the longest run of backticks, which a fence must exceed."""
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)


def _md_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"


def _md_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
