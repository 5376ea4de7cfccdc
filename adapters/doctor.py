"""`loraplane doctor`: is this machine ready? One line for each check, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adapters.errors import HomeUnusable, LoraplaneError
from adapters.home import Home, usable
from adapters.options import HomeOption, JsonOption
from adapters.screen import show_json, show_table, size

MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 2_000_000_000  # the default base, its download and a few adapters
PORT = 8000
IMPORT_NAMES = ("adapters", "serving", "train")
# What each extra stands or falls with: distribution -> the extra that brings it.
_PACKAGES = {
    "torch": "model",
    "transformers": "model",
    "gguf": "model",
    "fastapi": "serve",
    "ray": "serve",
    "prometheus-client": "serve",
    "peft": "train",
    "datasets": "train",
    "rouge-score": "eval",
}


class Health(StrEnum):
    """How a check came out. Only `fail` makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was looked at, how it is, and in words what to do about it."""

    name: str
    health: Health
    detail: str


def doctor(
    port: Annotated[int, typer.Option("--port", help="The port that serve would use.")] = PORT,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: versions, home, base, registry, server, port. Exit code 1 if a check fails.

    Example: loraplane doctor --json
    """
    checks = list(examine(home, port))
    failed = any(c.health is Health.FAIL for c in checks)
    if as_json:
        rows = [{"name": c.name, "health": c.health.value, "detail": c.detail} for c in checks]
        show_json({"object": "doctor", "ok": not failed, "checks": rows})
    else:
        show_table(("CHECK", "", "FOUND"), [(c.name, c.health.value, c.detail) for c in checks])
    if failed:
        raise typer.Exit(1)


def examine(root: Path | None, port: int) -> Iterable[Check]:
    """Every check, in the order in which a newcomer trips over them. None of them changes anything.

    root: the home, as `Home.find` takes it. What lies in a home is looked at only when the home can be used.
    """
    yield python_version(sys.version_info[:3])
    yield from package_versions()
    yield import_names(importlib.metadata.packages_distributions())
    try:
        home = writable(Home.find(root))
    except HomeUnusable as error:
        yield Check("home", Health.FAIL, str(error))
        yield port_free(port, None)
        return
    yield Check("home", Health.OK, str(home.root))
    yield disk_space(home.root, shutil.disk_usage(home.root).free)
    yield _guarded("registry and bases", lambda: registry_opens(home))
    yield server_state(home)
    yield port_free(port, home)


def python_version(version: tuple[int, ...]) -> Check:
    """Whether this Python is new enough."""
    text = ".".join(map(str, version))
    if version[:2] < MIN_PYTHON:
        return Check("python", Health.FAIL, f"{text}; Loraplane needs {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Check("python", Health.OK, f"{text} at {sys.executable}")


def package_versions() -> Iterable[Check]:
    """Loraplane's own version, and those of the packages its extras need; an absent extra is a warning."""
    try:
        yield Check("loraplane", Health.OK, importlib.metadata.version("loraplane"))
    except importlib.metadata.PackageNotFoundError:
        yield Check("loraplane", Health.FAIL, "runs from a folder that is not installed; run: pip install -e .")
    for package, extra in _PACKAGES.items():
        try:
            yield Check(package, Health.OK, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, Health.WARN, f"not installed; for it: pip install 'loraplane[{extra}]'")


def import_names(owners: Mapping[str, Sequence[str]]) -> Check:
    """Whether another distribution installs a package of our names (AdapterHub's `adapters` does).

    owners: import name -> the distributions that install it.
    """
    clashes = {
        name: others
        for name in IMPORT_NAMES
        if (others := sorted({d for d in owners.get(name, ()) if d.lower() != "loraplane"}))
    }
    if not clashes:
        return Check("import names", Health.OK, f"{', '.join(IMPORT_NAMES)} belong to Loraplane alone")
    said = "; ".join(f"{name!r} also comes from {', '.join(others)}" for name, others in clashes.items())
    remove = " ".join(sorted({other for others in clashes.values() for other in others}))
    return Check("import names", Health.FAIL, f"{said}: the two overwrite each other; run: pip uninstall {remove}")


def writable(home: Home) -> Home:
    """The home, after a file without a name was made in it. Raises HomeUnusable when it cannot be written to."""
    with usable(home.root), tempfile.TemporaryFile(dir=home.root):
        return home


def disk_space(folder: Path, free_bytes: int) -> Check:
    """Whether there is room for a base."""
    health = Health.OK if free_bytes >= MIN_FREE_BYTES else Health.WARN
    room = "" if health is Health.OK else f"; a base and its download want {size(MIN_FREE_BYTES)}"
    return Check("disk", health, f"{size(free_bytes)} free at {folder}{room}")


def registry_opens(home: Home) -> Check:
    """Whether the registry opens and a base in it has its files."""
    from adapters.bases import open_base
    from adapters.registry import Registry

    registry = Registry.open(home)
    try:
        bases = registry.bases()
        num_adapters = len(registry.adapters())
    finally:
        registry.close()
    if not bases:
        return Check("registry and bases", Health.WARN, "no base yet; get one: loraplane models pull smollm2-135m")
    for base in bases:
        open_base(home, base)
    names = ", ".join(f"{b.name} ({b.digest[:12]})" for b in bases)
    return Check("registry and bases", Health.OK, f"{names}; {num_adapters} adapters")


def server_state(home: Home) -> Check:
    """Whether a server holds the home now."""
    note = home.server()
    if note is None:
        return Check("server", Health.OK, "none holds this home; start one: loraplane serve")
    return Check("server", Health.OK, f"{note.url} (pid {note.pid}) holds this home")


def port_free(port: int, home: Home | None) -> Check:
    """Whether `serve` could listen on the port, or already does."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            note = home.server() if home else None
            if note is not None and note.url.endswith(f":{port}"):
                return Check("port", Health.OK, f"{port} is the port of the running server")
            return Check("port", Health.WARN, f"{port}: {error.strerror}; serve with another: loraplane serve --port N")
    return Check("port", Health.OK, f"{port} is free")


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that opens things: what it raises is its finding."""
    try:
        return check()
    except LoraplaneError as error:
        return Check(name, Health.FAIL, str(error))
    except Exception as error:  # a doctor reports what is broken, it does not break
        return Check(name, Health.FAIL, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
