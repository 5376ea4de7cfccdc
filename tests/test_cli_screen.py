"""Tables: drawn on a terminal, plain and whole in a pipe, colourless when asked."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import pytest

from adapters.screen import show_json, show_table, size, when

ROWS = [("summarize@1", "x" * 200), ("[bold]n[/bold]", "-")]


def test_pipe_gets_whole_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("MODEL", "NOTE"), ROWS)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading == "MODEL           NOTE"
    assert first == f"summarize@1     {'x' * 200}"
    assert second == "[bold]n[/bold]  -"


def test_terminal_gets_a_drawn_table_without_colour_if_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    show_table(("MODEL", "NOTE"), ROWS)
    assert "\x1b[1m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    show_table(("MODEL", "NOTE"), ROWS)
    shown = capsys.readouterr().out
    assert "\x1b[3" not in shown
    assert "[bold]n[/bold]" in shown  # a published name is never markup
    assert shown.count("x") == 200


@pytest.mark.parametrize("terminal", [False, True])
def test_cell_cannot_forge_a_row(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note with a line break in it wrote the next version's row."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    show_table(("VERSION", "NOTE"), [("sum@1", "fine\nsum@2  \tbest\x1b[2K\u2028\u202egood"), ("sum@3", "größer 好")])
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert [line.split()[0] for line in lines] == ["VERSION", "sum@1", "sum@3"]
    assert r"fine\nsum@2  \tbest\x1b[2K\u2028\u202egood" in lines[1]
    assert "größer 好" in lines[2]


def test_no_rows_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("MODEL",), [], empty="publish one")
    assert capsys.readouterr().out == "publish one\n"


def test_json_is_one_document_and_never_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"ü": 1})
    assert capsys.readouterr().out == '{\n  "ü": 1\n}\n'
    with pytest.raises(ValueError):
        show_json(float("nan"))


def test_time_is_shown_with_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = when(datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC))
    assert datetime.fromisoformat(shown) == datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.mark.parametrize(("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3 * 10**9, "3.0 GB")])
def test_sizes_read_as_people_say_them(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
