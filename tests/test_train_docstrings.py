"""The harvested data set: honest masking, whole packages held out, the same rows every time."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

from adapters.errors import DataRefused
from train import docstrings
from train.docstrings import Function, SourceFile, digest_of, harvest, rows_of, split_of

BODY = "    total = 0\n    for row in rows:\n        total += {name}([row]) if row else 1\n    return total\n"


def source(name: str = "count_rows", doc: str = "Count all rows of a table.", args: str = "rows") -> str:
    pad = "# " + "x" * 400  # files of a few lines are not harvested
    return f'{pad}\ndef {name}({args}):\n    """{doc}\n\n    More words.\n    """\n{BODY.format(name=name)}'


def files(root: Path, texts: Mapping[str, str]) -> list[SourceFile]:
    found = []
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found.append(SourceFile(name.split("/")[0], name, path))
    return found


def only(root: Path, text: str) -> list[Function]:
    return harvest(files(root, {"pkg/mod.py": text}))


def test_the_docstring_leaves_the_source_and_the_name_is_masked_wherever_it_stands(tmp_path: Path) -> None:
    (found,) = only(tmp_path, source())
    assert (found.name, found.doc) == ("count_rows", "Count all rows of a table.")
    assert found.source == "def f(rows):\n" + BODY.format(name="f").rstrip("\n")


def test_the_name_is_masked_with_and_without_its_underscores(tmp_path: Path) -> None:
    """The wanted name has no underscores around it, so masking `_get_shell` alone left the answer in the source."""
    text = source(name="_get_shell", doc="Find the shell of this user.")
    text = text.replace("total = 0", "total = get_shell(rows) + self.__get_shell + get_shells")
    (found,) = only(tmp_path, text)
    assert found.name == "get_shell"
    assert "total = f(rows) + self.f + get_shells" in found.source


def test_a_source_that_shows_the_name_in_other_letters_is_left_out(tmp_path: Path) -> None:
    assert only(tmp_path, source().replace("total = 0", "total = COUNT_ROWS")) == []


def test_a_source_that_says_the_whole_sentence_is_left_out(tmp_path: Path) -> None:
    told = source().replace("total = 0", "total = 0  # count all\n    #  ROWS of a table")
    assert only(tmp_path, told) == []
    assert len(only(tmp_path, told.replace("ROWS of a table", "ROWS of the table"))) == 1


@pytest.mark.parametrize(
    "doc",
    [
        "Too short.",
        "One line that goes on\n    in the next line without an end",
        "See https://example.org for more on this.",
        "TODO: say what this function does.",
        ":meth:`other` of the parent class is called.",
        "Zählt alle Zeilen einer Tabelle.",
        " ".join(["word"] * 30),
        "   ",
    ],
)
def test_a_docstring_that_teaches_nothing_is_left_out(tmp_path: Path, doc: str) -> None:
    assert only(tmp_path, source(doc=doc)) == []


def test_a_function_that_already_has_an_f_is_left_out(tmp_path: Path) -> None:
    assert only(tmp_path, source(args="rows, f")) == []


def test_equal_sources_and_equal_docstrings_are_kept_once_across_packages(tmp_path: Path) -> None:
    found = harvest(
        files(
            tmp_path,
            {
                "one/a.py": source(),
                "two/a.py": source(),
                "three/a.py": source(doc="Count all rows of a table", args="rows, more"),
                "four/a.py": source(name="sum_up", doc="Sum all rows up at once.", args="rows, start"),
            },
        )
    )
    assert len(found) == 2


def test_a_file_that_is_not_python_is_passed_over(tmp_path: Path) -> None:
    bad = '"""' + "x" * 500
    assert len(harvest(files(tmp_path, {"pkg/bad.py": bad, "pkg/mod.py": source()}))) == 1


def test_tests_and_vendored_copies_are_no_source() -> None:
    names = [f.name for f in docstrings.environment_files()]
    assert len(names) > 500
    for part in ("/tests/", "_vendor/", "/test_", "site-packages"):
        assert not [n for n in names if part in f"/{n}"], part


@pytest.fixture(scope="module")
def stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    packages = ("json", "email", "logging", "asyncio", "concurrent", "importlib", "xml", "unittest", "http", "urllib")
    return [
        SourceFile(p, f.relative_to(root).as_posix(), f) for p in packages for f in sorted((root / p).rglob("*.py"))
    ]


def test_the_order_of_files_does_not_move_a_row(stdlib: list[SourceFile]) -> None:
    first = harvest(stdlib)
    assert len(first) > 100
    assert digest_of(harvest(stdlib[::-1])) == digest_of(first)


def test_no_package_is_in_both_splits(stdlib: list[SourceFile]) -> None:
    found = harvest(stdlib)
    sides = {split: {r.package for r in rows_of(found, "summary", split)} for split in ("train", "test")}
    assert all(sides.values())
    assert not sides["train"] & sides["test"]


def test_no_row_shows_what_is_asked_for(stdlib: list[SourceFile]) -> None:
    for function in harvest(stdlib):
        assert function.doc not in function.source
        assert function.name not in re.findall(r"\w+", function.source)


def test_both_tasks_ask_about_the_same_functions(stdlib: list[SourceFile]) -> None:
    found = harvest(stdlib)
    summary, name = (rows_of(found, task, "test") for task in ("summary", "name"))
    assert [r.prompt for r in summary] == [r.prompt for r in name]
    assert {r.completion for r in name}.isdisjoint(r.completion for r in summary)
    with pytest.raises(DataRefused, match="no task"):
        rows_of(found, "poem", "test")


def test_about_one_package_in_five_is_held_out() -> None:
    held_out = sum(split_of(f"package{i}") == "test" for i in range(1000))
    assert 150 < held_out < 250
    assert split_of("Json") == split_of("json")


def test_the_cache_gives_back_the_very_rows_and_survives_damage(
    tmp_path: Path, stdlib: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings, "environment_files", lambda: stdlib[:40])
    made = docstrings.load(tmp_path)
    assert docstrings.load(tmp_path) == made
    (cache,) = tmp_path.iterdir()
    cache.write_bytes(cache.read_bytes()[:-20])
    assert docstrings.load(tmp_path) == made
