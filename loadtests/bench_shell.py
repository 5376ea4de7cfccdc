"""What all benches have in common: options, the order of what they tell, exit codes.

Tables for people and the table of goals, then as the last line one JSON object. Exit code 0: measured; 1: measured with
--strict, and a goal is not done; 2: nothing could be measured; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adapters.errors import LoraplaneError
from adapters.screen import say, show_table
from loadtests.goals import COLUMNS, Verdict, all_good
from loadtests.machine import described, machine
from loadtests.processes import ServerFailed, interruptible

Result = TypeVar("Result")


class BenchFailed(Exception):
    """The bench cannot measure; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Told:
    """What a bench found. report: what the JSON line holds beside machine and goals."""

    bench: str
    report: dict[str, Any]
    tables: Sequence[Table]
    goals: Sequence[Verdict]
    left_out: Sequence[str] = field(default=())


def parser(name: str, what: str, example: str) -> argparse.ArgumentParser:
    """A parser with the options that every bench has. what: one sentence; example: a whole command."""
    found = argparse.ArgumentParser(
        prog=f"python -m loadtests.{name}",
        description=what,
        epilog=f"Example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--short", action="store_true", help="a quick look: fewer rounds")
    found.add_argument("--json", action="store_true", help="the JSON line only")
    found.add_argument("--strict", action="store_true", help="exit code 1 when a goal is not done")
    found.add_argument("--threads", type=positive, help="threads for tensor work; default: one a core")
    return found


def add_base_options(to: argparse.ArgumentParser) -> None:
    """Options that choose the base, for benches of decoders."""
    to.add_argument("--base", type=Path, help="a folder with a transformers model; default: the home's base")
    to.add_argument("--home", type=Path, help="where bases are; default $LORAPLANE_HOME or ~/.loraplane")


def positive(text: str) -> int:
    """An option's value that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run(work: Callable[[argparse.Namespace], Told], options: argparse.Namespace) -> int:
    """Measure and tell; returns the exit code. What the bench started does not outlive this."""
    before = machine()
    _quiet()
    try:
        with interruptible():
            told = work(options)
    except (BenchFailed, ServerFailed, LoraplaneError) as error:
        print(f"error[bench]: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error[interrupted]: stopped", file=sys.stderr)
        return 130
    if not options.json:
        _show(told, before)
    line = {"bench": told.bench, "short": options.short, "machine": before, **told.report}
    line |= {"goals": [v.to_json() for v in told.goals], "left_out": list(told.left_out)}
    print(json.dumps(line, allow_nan=False), flush=True)
    return 1 if options.strict and not all_good(told.goals) else 0


def aside(work: Callable[[], Result]) -> Result:
    """Do something in a thread that ends with it, and return what it returns.

    Whatever multiplies tensors beside an engine of this process must go this way: OpenMP keeps a pool for every thread
    that computed, and once they have more threads than there are cores, all of them sleep at each barrier.
    """
    done: list[Result] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            done.append(work())
        except BaseException as error:  # raised again where it is waited for
            failed.append(error)

    thread = threading.Thread(target=target, name="aside", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _quiet() -> None:
    """Keep the bars and warnings of libraries out of what we tell."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show(told: Told, found: dict[str, object]) -> None:
    say(described(found))
    for table in told.tables:
        say("")
        show_table(table.columns, table.rows, empty="nothing was measured")
    say("")
    show_table(COLUMNS, [v.row() for v in told.goals], empty="no goal belongs to what was measured")
    for line in told.left_out:
        say(f"left out: {line}")
