"""What the command line says when things go wrong, and what it does not load to say it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from adapters import cli, errors
from adapters.cli import COMMANDS, EXIT_CODES, Entry, exit_code, run
from adapters.errors import ExtraMissing, GateRefused, LoraplaneError

HEAVY = ("torch", "transformers", "ray", "fastapi", "sqlalchemy", "httpx", "numpy")


def _tree(kind: type[LoraplaneError] = LoraplaneError) -> Iterator[type[LoraplaneError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _tree(below)


LEAVES = [kind for kind in _tree() if not kind.__subclasses__()]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_leaf_of_the_error_tree_has_an_exit_code_of_its_branch(kind: type[LoraplaneError]) -> None:
    assert exit_code(kind) != exit_code(Exception)


def test_every_exit_code_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    listed = {int(code) for code in re.findall(r"(\d+) [a-z]", text.partition("Exit codes:")[2])}
    assert listed == {0, *EXIT_CODES.values()}


def test_help_loads_no_heavy_library() -> None:
    """The promise behind a help text in a fifth of a second."""
    code = (
        "import sys, adapters.cli\n"
        f"print([m for m in {HEAVY} if m in sys.modules])\n"
        "adapters.cli.run(['--version'])\n"
        f"print([m for m in {HEAVY} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "[]"
    assert lines[1].startswith("loraplane ")
    assert lines[2] == "[]"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_line_of_the_table_leads_to_a_command_that_loads_no_model_library(name: str) -> None:
    """Every `--help` stays quick, not only the first one."""
    code = (
        "import sys\n"
        "from adapters.cli import COMMANDS, LazyCommand\n"
        f"command = LazyCommand({name!r}, COMMANDS[{name!r}]).real()\n"
        f"print(command.name, [m for m in {HEAVY[:3]} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", f"{name} []\n")


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in shown] == []


@pytest.mark.parametrize("group", [name for name, entry in COMMANDS.items() if name in ("models", "adapters")])
def test_group_alone_shows_its_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([group]) == 0
    assert f"Usage: loraplane {group}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["models", "pull"],
        ["models", "list"],
        ["adapters", "publish"],
        ["adapters", "list"],
        ["adapters", "show"],
        ["adapters", "pull"],
        ["adapters", "policy"],
        ["adapters", "alias"],
        ["promote"],
        ["rollback"],
        ["history"],
        ["doctor"],
        ["eval", "run"],
        ["eval", "show"],
        ["eval", "score"],
    ],
    ids=" ".join,
)
def test_help_of_a_command_has_an_example_and_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*argv, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example: loraplane {' '.join(argv)}" in " ".join(shown.split())
    assert "--json" in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["promot"], "Did you mean 'promote'? See: loraplane --help"),
        (["promote", "--nope"], "See: loraplane promote --help"),
        (["adapters", "publish"], "See: loraplane adapters publish --help"),
        (["adapters", "sho"], "See: loraplane adapters --help"),
        (["rollback"], "See: loraplane rollback --help"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error[usage]: ")
    assert said in output.err
    assert (output.err.count("\n"), output.out) == (1, "")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A command `fail` that raises what is put in the list."""
    errors_to_raise: list[BaseException] = []

    def fail() -> None:
        raise errors_to_raise[0]

    monkeypatch.setitem(COMMANDS, "fail", Entry(f"{__name__}:fail", "Fail."))
    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    return errors_to_raise


def test_typed_error_is_one_line_with_its_code(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(GateRefused("summarize@2", ["too few examples:\n 3 of 64"]))
    assert run(["fail"]) == 6
    output = capsys.readouterr()
    assert output.err.startswith("error[gate_refused]: The gate refuses summarize@2: too few examples: 3 of 64.")
    assert (output.err.count("\n"), output.out) == (1, "")


def test_fault_of_ours_shows_no_traceback(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing.append(KeyError("slot"))
    assert run(["fail"]) == 1
    assert capsys.readouterr().err == "error[internal_error]: 'slot' (KeyError; LORAPLANE_DEBUG=1 shows where)\n"


def test_debug_shows_the_traceback(failing: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    failing.append(KeyError("slot"))
    monkeypatch.setenv("LORAPLANE_DEBUG", "1")
    with pytest.raises(KeyError):
        run(["fail"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), typer.Abort()])
def test_interrupt_is_exit_130(stop: BaseException, failing: list[BaseException]) -> None:
    failing.append(stop)
    assert run(["fail"]) == 130


def test_exit_code_of_a_command_is_kept(failing: list[BaseException]) -> None:
    failing.append(typer.Exit(3))
    assert run(["fail"]) == 3


def test_command_without_its_extra_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "needs_much.py").write_text("import a_library_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "heavy", Entry("needs_much:command", "Needs much.", extra="train"))
    assert run(["heavy"]) == exit_code(ExtraMissing)
    assert "pip install 'loraplane[train]'" in capsys.readouterr().err


def test_main_exits_with_the_code_of_the_run() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["promot"])
    assert caught.value.code == 2
