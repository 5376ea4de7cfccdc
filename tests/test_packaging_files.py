"""Pins, Makefile, licence and Dockerfile agree with each other and with what is installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from check_dockerfile import ROOT, dry_run, problems, read_pins, requirements
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TARGETS = ("demo", "test", "lint", "serve", "bench", "loadtest", "clean", "help")
FILES = ("Dockerfile", ".dockerignore", "Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE")


def _wanted() -> list[Requirement]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = set(document["project"]["optional-dependencies"])
    return [*requirements(ROOT, extras), *map(Requirement, document["dependency-groups"]["dev"])]


def test_every_direct_requirement_is_pinned_within_its_range() -> None:
    pins = read_pins(ROOT)
    unpinned = [
        str(r)
        for r in _wanted()
        if (pin := pins.get(canonicalize_name(r.name))) is None or not r.specifier.contains(pin, prereleases=True)
    ]
    assert unpinned == []


def test_what_is_installed_is_what_is_pinned() -> None:
    """The tests speak for the pins only if they ran with them. A build's local tag (+cpu) is the index's choice."""
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    differing = {
        name: (pin, installed[name])
        for name, pin in read_pins(ROOT).items()
        if name in installed and installed[name].partition("+")[0] != pin
    }
    assert differing == {}


def test_everything_that_installed_requirements_pull_in_is_pinned() -> None:
    pins = read_pins(ROOT)
    waiting = [(r.name, frozenset(r.extras)) for r in _wanted()]
    seen: set[tuple[str, frozenset[str]]] = set()
    unpinned: set[str] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or canonicalize_name(name) == "loraplane":
            continue
        seen.add((name, extras))
        try:
            needed = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        if canonicalize_name(name) not in pins:
            unpinned.add(name)
        for requirement in needed:
            environments = [{"extra": extra} for extra in extras or {""}]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    # A CUDA build of torch brings these and pins them itself.
    assert {n for n in unpinned if not n.startswith(("nvidia-", "triton", "cuda-"))} == set()


def test_torch_is_the_version_named_in_the_issue() -> None:
    assert read_pins(ROOT)["torch"] == "2.13.0"


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.mark.parametrize("name", ["Dockerfile", "Makefile", "constraints.txt", "pyproject.toml"])
def test_no_host_but_this_machine_is_named(name: str) -> None:
    assert re.findall(r"https?://(?!127\.0\.0\.1)\S+", (ROOT / name).read_text()) == []


def test_dockerfile_is_sound() -> None:
    assert problems() == []


def test_pip_steps_of_the_image_resolve_with_only_the_copied_files() -> None:
    assert dry_run("cpu") == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("Dockerfile", "python:3.11.14-slim-bookworm", "python:latest", "no exact tag"),
        ("Dockerfile", "COPY train train", "COPY trane trane", "trane does not exist"),
        ("Dockerfile", "COPY train train", "ADD train train", "use COPY"),
        ("Dockerfile", "USER 10001", "USER root", "runs as root"),
        ("Dockerfile", "/health", "/", "no HEALTHCHECK"),
        ("Dockerfile", "HF_HUB_OFFLINE=1 ", "HF_HUB_OFFLINE=0 ", "HF_HUB_OFFLINE=1"),
        ("Dockerfile", "pip==26.3", "pip==1.0", "differs from the pin 26.3"),
        ("Dockerfile", "-c constraints.txt ", "", "without -c constraints.txt"),
        ("Dockerfile", "AS cuda", "AS gpu", "target cuda is missing"),
        ("Dockerfile", "FROM runtime AS cpu", "FROM runtime AS last", "target cpu is missing"),
        ("Dockerfile", "ARG PIP_EXTRA_INDEX_URL", "", "ignores PIP_EXTRA_INDEX_URL"),
        ("Dockerfile", "ENV PIP_NO_CACHE_DIR=1", "ENV PIP_INDEX_URL=https://example.org/simple", "a host is named"),
        (".dockerignore", "!LICENSE", "", "LICENSE is kept out"),
        (".dockerignore", "!serving", "!serving\nserv*", "serving is kept out"),
        ("constraints.txt", "torch==2.13.0", "torch==2.12.0", "torch==2.13.0 is not pinned"),
    ],
)
def test_checker_sees_what_is_wrong(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    root = _copy(tmp_path)
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    assert any(said in problem for problem in problems(root))


def test_dry_run_sees_a_file_that_the_build_needs_and_copy_forgot(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    text = (root / "Dockerfile").read_text()
    (root / "Dockerfile").write_text(text.replace("README.md LICENSE ./", "LICENSE ./"))
    failed = dry_run("cpu", root)
    assert len(failed) == 1
    assert "README.md" in failed[0]


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [t for t in TARGETS if f"make {t} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("script", "said"), [(None, "is not there; install Python 3.11+"), ("exit 1", "is too old; Loraplane needs 3.11")]
)
def test_make_without_a_fit_python_says_so_in_one_line(tmp_path: Path, script: str | None, said: str) -> None:
    root = _copy(tmp_path)
    python = tmp_path / "python"
    if script:
        # Stands in for an old Python: the version test fails, `--version` answers.
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || {script}\n')
        python.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={python}", "test"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    # make adds a line of its own, with its depth in it when the tests were started by make.
    assert len([line for line in done.stderr.splitlines() if "***" not in line]) == 1


def test_changed_pins_make_the_environment_stale() -> None:
    """Whoever pulls a change of the pins gets them with the next `make test`."""
    rule = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("$(STAMP):"))
    assert rule.split(":")[1].split() == ["pyproject.toml", "constraints.txt"]


def _copy(tmp_path: Path) -> Path:
    root = tmp_path / "copy"
    root.mkdir()
    for name in FILES:
        shutil.copyfile(ROOT / name, root / name)
    for package in ("adapters", "serving", "train"):
        (root / package).mkdir()
        (root / package / "__init__.py").write_text("")
    return root
