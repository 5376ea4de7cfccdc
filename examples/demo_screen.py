"""What the demo shows: stages with their budgets, progress, claims, answers side by side, tables.

On a terminal rich draws it; into a pipe go plain lines, none more often than every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120
_LINE_EVERY_S = 10.0


class ClaimFailed(Exception):
    """Something that the story says did not happen."""


@dataclass(frozen=True, slots=True)
class Card:
    """One answer, to stand beside others. lines: what is known of it; text: what it said."""

    title: str
    lines: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage. Times in seconds; reused: what an earlier demo had left, so that it took less."""

    title: str
    budget_s: float
    took_s: float
    reused: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Whether it kept its budget, in words."""
        over = self.took_s - self.budget_s
        return f"OVER by {over:.0f} s" if over > 0 else "in time"


@dataclass
class Screen:
    """Where the story is told, and what of it has been told so far."""

    console: Console
    now: Callable[[], float] = time.monotonic
    stages: list[Stage] = field(default_factory=list)
    claims: int = 0
    _reused: list[str] = field(default_factory=list)
    _bar: Progress | None = None
    _last_line: float = float("-inf")

    @classmethod
    def of_terminal(cls) -> Screen:
        """The screen that stdout is."""
        console = Console(highlight=False)
        return cls(console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH))

    @contextmanager
    def stage(self, title: str, budget_s: float) -> Iterator[None]:
        """A part of the story; its time is taken and told, however it ends."""
        number = len(self.stages) + 1
        self._line("")
        self._line(f"[{number}] {title}  (budget {budget_s:.0f} s)", "bold cyan")
        begun = self.now()
        self._reused = []
        ended = False
        try:
            yield
            ended = True
        finally:
            self._end_bar()
            done = Stage(title, budget_s, self.now() - begun, tuple(self._reused))
            self.stages.append(done)
            what = "took" if ended else "broke off after"
            over = done.took_s > budget_s
            self._line(
                f"    {what} {done.took_s:.1f} s of {budget_s:.0f} s, {done.verdict}", "yellow" if over else "dim"
            )

    def say(self, text: str, style: str = "") -> None:
        """One line of the story."""
        self._line(f"    {text}", style)

    def reuse(self, what: str) -> None:
        """Tell that something is there already and was not made again."""
        self._reused.append(what)
        self.say(f"reused: {what}", "dim")

    def claim(self, text: str, held: bool, why: str = "") -> None:
        """What the story says must be so. Raises ClaimFailed when it is not."""
        if not held:
            self.say(f"✗ {text}{': ' + why if why else ''}", "bold red")
            raise ClaimFailed(f"{text}{': ' + why if why else ''}")
        self.claims += 1
        self.say(f"✓ {text}", "green")

    def progress(self, what: str, done: int, total: int, figures: str = "") -> None:
        """How far a job has come: a bar on a terminal, now and then a line elsewhere."""
        if self.console.is_terminal:
            self._draw_bar(what, done, total, figures)
        elif done >= total or self.now() - self._last_line >= _LINE_EVERY_S:
            self.say(f"{what}: {done}/{total}  {figures}".rstrip())

    def murmur(self, text: str) -> None:
        """Something that only shows that work goes on; into a pipe it is told rarely."""
        if self.console.is_terminal or self.now() - self._last_line >= _LINE_EVERY_S:
            self.say(text[: self.console.width - 8], "dim")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table."""
        self._end_bar()
        drawn = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        self.console.print(drawn)

    def side_by_side(self, cards: Sequence[Card]) -> None:
        """Answers beside each other, each in a frame of its own."""
        self._end_bar()
        self.console.print(columns_of(cards, self.console.width))

    def times(self) -> None:
        """What each stage was given and what it took."""
        rows = [
            (str(i), s.title, f"{s.budget_s:.0f}", f"{s.took_s:.1f}", s.verdict, "; ".join(s.reused) or "-")
            for i, s in enumerate(self.stages, 1)
        ]
        budget, took = sum(s.budget_s for s in self.stages), sum(s.took_s for s in self.stages)
        rows.append(("", "together", f"{budget:.0f}", f"{took:.1f}", Stage("", budget, took, ()).verdict, ""))
        self.table(("", "STAGE", "BUDGET S", "TOOK S", "", "REUSED"), rows)

    def _line(self, text: str, style: str = "") -> None:
        self._last_line = self.now()
        target = self._bar.console if self._bar is not None else self.console
        target.print(text, style=style, markup=False, soft_wrap=True)

    def _draw_bar(self, what: str, done: int, total: int, figures: str) -> None:
        if self._bar is None or self._bar.tasks[0].description != what:
            self._end_bar()
            self._bar = Progress(
                TextColumn("    {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}"), console=self.console, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._bar.add_task(what, total=total, figures="")
        self._bar.update(self._bar.tasks[0].id, completed=done, total=total, figures=figures)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def columns_of(cards: Sequence[Card], width: int) -> Columns:
    """The cards as equal columns of a screen so wide."""
    each = max(24, width // max(1, len(cards)) - 1)
    return Columns([_panel(card, each) for card in cards], width=each, padding=(0, 1, 0, 0))


def _panel(card: Card, width: int) -> Panel:
    content = Text()
    for line in card.lines:
        content.append(line + "\n", style="dim")
    content.append("\n" + (card.text.strip() or "…"))
    return Panel(content, title=Text(card.title, style="bold"), width=width)
