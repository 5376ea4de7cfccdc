"""W1 to W8 against a server: locust replays a plan, the published figure stands beside ours.

    python -m loadtests.scenarios W6 [--short] [--url http://127.0.0.1:8000]

Without --url it starts a server with random adapters. With --url it publishes them there, named load-..., and the
server's own slots count. Every answer's digest is checked; W6 compares the texts too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapters.records import BASE_ID
from adapters.screen import note
from loadtests.arm_figures import ArmFound, ArmRun, Figure, arm_found, figures, requests_per_s, text_key
from loadtests.bench_shell import BenchFailed, Table, Told, add_base_options, parser, run
from loadtests.flips import Flip, Flipper, flipped
from loadtests.goals import GOALS, Verdict
from loadtests.profiles import Plan, Planned
from loadtests.run import LoadTestFailed, drive
from loadtests.shapes import SCENARIOS, Arm, Item, Scenario, schedule
from loadtests.stage import Stage, stage

_EVERY = "all"
_USUAL = ("W5", "W6", "W7")
_PATIENCE = 4.0  # how many times as long as planned an arm may take before no more is asked
_LEAST_S = 120.0
_SLOWEST_PER_S = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Play and tell; returns the exit code."""
    return run(_play, _options(argv))


def _play(options: argparse.Namespace) -> Told:
    chosen = options.scenario or _USUAL
    names = list(SCENARIOS) if _EVERY in chosen else list(dict.fromkeys(chosen))
    tables: list[Table] = []
    reports: list[dict[str, Any]] = []
    shown: list[Figure] = []
    left_out: list[str] = []
    for name in names:
        scenario = SCENARIOS[name].shortened() if options.short else SCENARIOS[name]
        with stage(scenario, options) as found:
            fitted = scenario.fitted(found.slots, found.positions)
            runs, missing = replay(fitted, found, seed=options.seed, rate=options.rate)
        told_figures = figures(fitted, runs)
        lines = [arm_found(r) for r in runs]
        shown += told_figures
        left_out += missing
        tables.append(Table(tuple((f"{name}: {c}" if c == "ARM" else c) for c in ArmFound.COLUMNS),
                            [line.row() for line in lines]))  # fmt: skip
        reports.append(report(fitted, runs, lines, told_figures))
    tables.append(Table(Figure.COLUMNS, [f.row() for f in shown]))
    left_out += [f"{r['id']}, {a['arm']}: {p}" for r in reports for a in r["arms"] for p in a["problems"]]
    return Told("scenarios", {"seed": options.seed, "scenarios": reports}, tables, judged(shown), left_out)


def replay(scenario: Scenario, at: Stage, *, seed: int, rate: float | None = None) -> tuple[list[ArmRun], list[str]]:
    """Play every arm, one after the other, behind a warm-up that also finds how much the server completes.

    rate: requests a second that it completes when it is always busy; None: as found. Returns what could not be played
    too. Raises BenchFailed.
    """
    warm = Arm("warm-up", scenario.arms[0].adapters, users=scenario.rows, requests=8 * scenario.rows)
    runs: list[ArmRun] = []
    missing: list[str] = []
    for arm in (warm, *scenario.arms):
        url = at.url
        if arm.merged:
            if at.merged_url is None:
                missing.append(f"{scenario.id}, {arm.name}: it needs a server of its own; leave --url out")
                continue
            url = at.merged_url
        at.alone(url)
        offered = None if arm.arrivals is None or rate is None else rate * arm.arrivals.share
        note(f"{scenario.id}: {arm.name}, {arm.requests} requests" + (f" at {offered:.1f}/s" if offered else ""))
        done = play(scenario, arm, at, url, rate=rate or 1.0, seed=seed)
        if arm is not warm:
            runs.append(done)
            continue
        found = requests_per_s(done.samples)
        if not found:
            raise BenchFailed(f"{scenario.id}: the server answered nothing; {'; '.join(arm_found(done).problems)}")
        rate = rate or found
    at.alone(at.url)
    return runs, missing


def play(scenario: Scenario, arm: Arm, at: Stage, url: str, *, rate: float, seed: int) -> ArmRun:
    """Replay one arm by locust. rate: see `replay`."""
    items = schedule(scenario, arm, rate=rate, seed=seed)
    made = plan(scenario, arm, at, items, seed)
    offered = None if arm.arrivals is None else rate * arm.arrivals.share
    limit = _LEAST_S + _PATIENCE * len(items) / max(_SLOWEST_PER_S, min(rate, offered or rate))
    flips = scenario.flip_every_s if arm in scenario.arms else 0.0
    flipper: Flipper | None = None
    with contextlib.ExitStack() as stack:
        if flips:
            names = [v.name for v in at.versions[: arm.adapters]]
            flipper = stack.enter_context(Flipper(at.door, at.base, names, scenario.kind, flips))
        samples = _driven(scenario, arm, url, made, min(arm.users, len(items)), limit)
    again: list[dict[str, Any]] = []
    if flipper is not None:
        quiet = asked_again(made, samples, flipper.flips)
        if quiet.items:
            note(f"{scenario.id}: the same again in quiet, {len(quiet.items)} requests")
            again = _driven(scenario, arm, url, quiet, scenario.rows, limit)
    return ArmRun(
        arm=arm,
        picks=tuple(item.adapter for item in items),
        models=tuple(model_ids(scenario, at)[: arm.adapters]),
        samples=samples,
        slots=at.slots,
        offered_per_s=offered,
        flipped=None if flipper is None else flipped(flipper.flips, samples),
        again=again,
    )


def _driven(scenario: Scenario, arm: Arm, url: str, made: Plan, users: int, limit_s: float) -> list[dict[str, Any]]:
    """What came of a plan. Raises BenchFailed."""
    with tempfile.TemporaryDirectory(prefix="loraplane-plan-") as folder:
        path = Path(folder) / "plan.json"
        made.write(path)
        try:
            return drive(url, users, limit_s, ["--plan", str(path)])[0]
        except LoadTestFailed as error:
            raise BenchFailed(f"{scenario.id}, {arm.name}: {error}") from error


def asked_again(made: Plan, samples: Sequence[Mapping[str, Any]], flips: Sequence[Flip]) -> Plan:
    """A plan of what was answered, each version and prompt once, by pinned ids: what weights say when nothing moves."""
    lengths = {item.prompt: (item.prompt_tokens, item.max_tokens) for item in made.items}
    answered = {(s["named"], s["prompt"]) for s in samples if text_key(s) is not None}
    published = {f"{f.name}@{f.number}": f.digest for f in flips if not f.error}
    items = [Planned(None, named, prompt, *lengths[prompt]) for named, prompt in sorted(answered)]
    return replace(made, digests={**made.digests, **published}, items=items)


def model_ids(scenario: Scenario, at: Stage) -> list[str]:
    """What to ask for, by adapter: versions, or names where versions flip."""
    return [v.name if scenario.flip_every_s else v.id for v in at.versions]


def plan(scenario: Scenario, arm: Arm, at: Stage, items: Sequence[Item], seed: int) -> Plan:
    """The items as locust's users take them."""
    models = model_ids(scenario, at)
    base = at.merged_base if arm.merged and at.merged_base is not None else at.base
    return Plan(
        base_digest=base.digest,
        vocabulary=base.vocab_size,
        # Prompts that come again elsewhere would be found computed already.
        salt=f"{seed}:{scenario.id}" if scenario.prompts else f"{seed}:{scenario.id}:{arm.name}",
        digests={v.id: v.digest for v in at.versions},
        items=[
            Planned(
                at_s=i.at_s,
                model=BASE_ID if i.adapter < 0 else models[i.adapter],
                prompt=i.seed,
                prompt_tokens=i.prompt_tokens,
                max_tokens=i.max_tokens,
            )
            for i in items
        ],
    )


def report(
    scenario: Scenario, runs: Sequence[ArmRun], lines: Sequence[ArmFound], found: Sequence[Figure]
) -> dict[str, Any]:
    """A scenario as JSON values."""
    return {
        "id": scenario.id,
        "what": scenario.what,
        "published": scenario.anchor,
        "slots": scenario.slots,
        "prompt_tokens": scenario.prompt,
        "answer_tokens": scenario.answer,
        "arms": [asdict(line) for line in lines],
        "figures": [{"figure": f.what, "ours": f.ours, "unit": f.unit} for f in found],
        "flips": [r.flipped.to_json() for r in runs if r.flipped is not None],
    }


def judged(found: Sequence[Figure]) -> list[Verdict]:
    """Verdicts on those figures that have a goal."""
    return [GOALS[f.goal].judge(f.ours) for f in found if f.goal]


def _known(text: str) -> str:
    if text not in (*SCENARIOS, _EVERY):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SCENARIOS)} and {_EVERY}")
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(
        "scenarios",
        "Plays the loads W1 to W8 with locust and prints the published figure beside ours:\n"
        + "\n".join(f"  {s.id}  {s.what}" for s in SCENARIOS.values()),
        "python -m loadtests.scenarios W5 W6 W7 --short",
    )
    add_base_options(found)
    found.add_argument("scenario", nargs="*", type=_known, metavar="W", help="W1 to W8, or all; default: W5 W6 W7")
    found.add_argument("--url", help="a running server; random adapters are published there, named load-...")
    found.add_argument("--seed", type=int, default=0, help="equal seeds ask the same")
    found.add_argument("--rate", type=_positive, help="requests/s that the server completes; default: found beforehand")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
