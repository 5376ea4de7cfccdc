"""The command `loraplane`: a table of sub-commands, each imported when it is run, and what errors become.

The table below is all that `loraplane --help` reads, so it answers at once; a room's own `cli` and the heavy
libraries behind it load only when their command runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from adapters import errors

DEBUG_VARIABLE = "LORAPLANE_DEBUG"
_OURS = ("adapters", "serving", "train")

# Exit codes, by the nearest class above an error. 0 is success and 130 an interrupt; scripts may rely on these.
EXIT_CODES: dict[type[BaseException], int] = {
    Exception: 1,  # a fault of ours
    errors.InvalidRequest: 2,  # what was typed or written is wrong (so is an unknown option)
    errors.ConfigInvalid: 2,
    errors.RunInvalid: 2,
    errors.HomeUnusable: 2,
    errors.AdapterRefused: 3,  # what was brought cannot be taken
    errors.DataRefused: 3,
    errors.BaseUnsupported: 3,
    errors.PayloadTooLarge: 3,
    errors.NotFound: 4,  # what was named is not there
    errors.BaseMissing: 4,
    errors.Conflict: 5,  # the state is not what was believed
    errors.GateRefused: 6,  # the gate says no
    errors.InvalidKey: 7,  # not allowed
    errors.HostNotAllowed: 7,
    errors.InsecureBind: 7,
    errors.Overloaded: 8,  # try again in a moment
    errors.Unavailable: 8,
    errors.DeadlineExceeded: 8,
    errors.ServerUnreachable: 8,
    errors.HomeLocked: 9,  # somebody else has it
    errors.PortInUse: 9,
    errors.DownloadFailed: 10,
    errors.ExtraMissing: 11,  # an optional dependency is not installed
    errors.Cancelled: 130,
}
USAGE_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130

_EPILOG = (
    "Settings: LORAPLANE_HOME (default ~/.loraplane), LORAPLANE_API_KEY, LORAPLANE_USER, NO_COLOR, LORAPLANE_DEBUG=1."
    "\n\n"
    "Exit codes: 0 done, 1 fault, 2 wrong usage, 3 refused content, 4 not found, 5 conflict, 6 the gate refuses, "
    "7 not allowed, 8 try again, 9 taken, 10 download, 11 extra missing, 130 interrupted."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One sub-command: where it lives (`module:object`, a typer app or a function), its help line, its extra."""

    target: str
    help: str
    group: bool = False
    extra: str = ""


COMMANDS: dict[str, Entry] = {
    "models": Entry("adapters.commands:models", "Fetch and list bases: the frozen models that adapters need.", True),
    "adapters": Entry("adapters.commands:adapters", "Publish, list, show and pull adapters; set gate policies.", True),
    "promote": Entry("adapters.alias_commands:promote", "Make a version the champion, if its gate passes."),
    "rollback": Entry("adapters.alias_commands:rollback", "Put the previous champion back."),
    "warm": Entry("adapters.version_commands:warm", "Have a version ready on the running server."),
    "pin": Entry("adapters.version_commands:pin", "Keep a version in a slot."),
    "unpin": Entry("adapters.version_commands:unpin", "Let a pinned version's slot go."),
    "retire": Entry("adapters.version_commands:retire", "Unload a version: hide it, drain it, free its bytes."),
    "revoke": Entry("adapters.version_commands:revoke", "Refuse a version everywhere, at once."),
    "restore": Entry("adapters.version_commands:restore", "Bring a retired or revoked version back."),
    "fallback": Entry("adapters.version_commands:fallback", "Who answers while a version is set aside."),
    "canary": Entry("adapters.canary_commands:canary", "Let a version answer some of an alias's requests.", True),
    "shadow": Entry("adapters.canary_commands:shadow", "Let a version compute some requests unseen.", True),
    "compare": Entry("adapters.canary_commands:compare", "One prompt, several models, side by side."),
    "history": Entry("adapters.alias_commands:history", "Who moved which alias, when and why."),
    "train": Entry("train.cli:train", "Train an adapter as a run file says and publish it.", extra="train"),
    "eval": Entry("train.cli:eval_app", "Score a version with ROUGE against base and champion.", True, "eval"),
    "serve": Entry("serving.cli:serve", "Serve the base and every adapter over HTTP.", extra="serve"),
    "doctor": Entry("adapters.doctor:doctor", "Check this machine: versions, home, base, registry, port."),
}


class LazyCommand(TyperCommand):
    """A line of the table that becomes the real command when it is parsed."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help)
        self.entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.real().make_context(info_name, args, parent, **extra)

    def real(self) -> Any:
        """The command behind this line. Raises ExtraMissing when what it is built on is not installed."""
        module, _, name = self.entry.target.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if self.entry.extra and (error.name or "").partition(".")[0] not in _OURS:
                raise errors.ExtraMissing(self.entry.extra, f"loraplane {self.name} ({error.name})") from error
            raise
        if not isinstance(found, typer.Typer):
            found = _single(found, self.name)
        # A group stays a group, also while it has a single command.
        command: Any = typer.main.get_group(found) if self.entry.group else typer.main.get_command(found)
        command.name = self.name
        return command


class LazyGroup(TyperGroup):
    """The top of the command line: the table, as commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            self.add_command(LazyCommand(name, entry))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code. Errors of ours are one line on stderr, never a traceback."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    if not argv or (len(argv) == 1 and argv[0] in COMMANDS and COMMANDS[argv[0]].group):
        argv = [*argv, "--help"]
    try:
        code = typer.main.get_command(_app()).main(args=argv, prog_name="loraplane", standalone_mode=False)
    except TyperException as error:
        # Only usage errors know the command they arose in.
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "loraplane"
        return _complain("usage", f"{error.format_message()} See: {path} --help", USAGE_EXIT_CODE)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", "stopped", INTERRUPT_EXIT_CODE)
    except Exception as error:  # the rim: whatever happens becomes one line and a code
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        known = isinstance(error, errors.LoraplaneError)
        reason = error.reason_code if isinstance(error, errors.LoraplaneError) else "internal_error"
        said = " ".join(str(error).split()) or type(error).__name__
        hint = "" if known else f" ({type(error).__name__}; {DEBUG_VARIABLE}=1 shows where)"
        return _complain(reason, said + hint, exit_code(type(error)))
    if code == INTERRUPT_EXIT_CODE:
        # typer makes an exit of a Ctrl-C, without a word.
        return _complain("interrupted", "stopped", INTERRUPT_EXIT_CODE)
    return code if isinstance(code, int) else 0


def exit_code(kind: type[BaseException]) -> int:
    """The exit code of an error class: its own, or that of the nearest class above it."""
    return next(EXIT_CODES[above] for above in (*kind.__mro__, Exception) if above in EXIT_CODES)


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=True,
        pretty_exceptions_enable=False,
        help="Train, evaluate, promote and serve LoRA adapters on one frozen base model.",
        epilog=_EPILOG,
    )
    app.callback()(_top)
    return app


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"loraplane {version('loraplane')}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """The options before any sub-command."""


def _single(function: Callable[..., Any], name: str | None) -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command(name)(function)
    return app


def _complain(code: str, message: str, status: int) -> int:
    print(f"error[{code}]: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
