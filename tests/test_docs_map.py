"""The map cannot rot: every module is on it, every command is in the README or the docs, every named file exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapters.cli import COMMANDS

ROOT = Path(__file__).parent.parent
ROOMS = ("adapters", "serving", "train", "loadtests")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def modules() -> set[str]:
    """Every module with code in it, as the map writes it: room and path without the suffix."""
    found = {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py" and "versions" not in path.parts
    }
    return {m for m in found if "__pycache__" not in m}


def on_the_map() -> set[str]:
    """The modules that docs/architecture.md lists, each with a clause of its own."""
    room, found = "", set()
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if heading := re.match(r"## (\w+)/", line):
            room = heading[1]
        if row := re.match(r"\| `([\w/]+)` \| (\S.*) \|$", line):
            found.add(f"{room}/{row[1]}")
    return found


def test_every_module_is_on_the_map_and_the_map_names_no_other() -> None:
    assert on_the_map() == modules()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_in_the_docs(command: str) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert f"loraplane {command}" in text


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_two_commands_come_first() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("## ")
