"""How a long job tells what it does: a bar on a terminal, plain lines into a pipe, JSON lines for a programme."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 5.0


class Reporter(Protocol):
    """What a job tells. `begin`, then `step` with growing `done`, then `end`, for each stage that can be counted."""

    def say(self, text: str) -> None:
        """One line for a person."""

    def begin(self, what: str, total: int, done: int = 0) -> None: ...

    def step(self, done: int, **figures: float) -> None:
        """So many are done; figures are shown beside."""

    def end(self) -> None: ...


class Quiet:
    """Tells nothing."""

    def say(self, text: str) -> None:
        pass

    def begin(self, what: str, total: int, done: int = 0) -> None:
        pass

    def step(self, done: int, **figures: float) -> None:
        pass

    def end(self) -> None:
        pass


class Lines:
    """Plain lines on a stream, a few seconds apart."""

    def __init__(self, out: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._now = now
        self._what, self._total, self._last_s = "", 0, 0.0

    def say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._last_s = what, total, self._now()
        self.say(f"{what}: {done}/{total}")

    def step(self, done: int, **figures: float) -> None:
        if done < self._total and self._now() - self._last_s < _LINE_EVERY_S:
            return
        self._last_s = self._now()
        self.say(f"{self._what}: {done}/{self._total}{_shown(figures)}")

    def end(self) -> None:
        pass


class JsonLines:
    """One JSON object a line: {"event": "note" | "begin" | "step" | "end", ...}."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._what, self._total = "", 0

    def say(self, text: str) -> None:
        self._write(event="note", text=text)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total = what, total
        self._write(event="begin", what=what, total=total, done=done)

    def step(self, done: int, **figures: float) -> None:
        self._write(event="step", what=self._what, total=self._total, done=done, **figures)

    def end(self) -> None:
        self._write(event="end", what=self._what)

    def _write(self, **fields: str | int | float) -> None:
        self._out.write(json.dumps(fields) + "\n")
        self._out.flush()


class Bar:
    """A progress bar on a terminal, with time gone and time left."""

    def __init__(self) -> None:
        # Imported here: pipes and programmes need no rich.
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.end()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done, figures="")

    def step(self, done: int, **figures: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, figures=_shown(figures).strip())

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


def reporter(as_json: bool) -> Reporter:
    """The reporter that fits where the output goes. JSON goes to stdout, everything else to stderr."""
    if as_json:
        return JsonLines(sys.stdout)
    return Bar() if sys.stderr.isatty() else Lines(sys.stderr)


def _shown(figures: dict[str, float]) -> str:
    return "".join(f"  {name} {value:.4g}" for name, value in figures.items())
