"""Check the Dockerfile as far as that goes without an engine: python tests/check_dockerfile.py

Images and pins, COPY sources against the tree and .dockerignore, targets, user, health check; then the build's pip
steps as dry runs, in a folder that holds exactly what COPY would bring.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("cpu", "cuda")
DEFAULT_TARGET = "cpu"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?==(?P<version>\S+)")


@dataclass(frozen=True)
class Step:
    """One instruction: its keyword in capitals, its arguments as one line, its line number."""

    word: str
    text: str
    line: int


@dataclass
class Stage:
    """A FROM and what follows it. `parent` is an image or the name of an earlier stage."""

    name: str
    parent: str
    steps: list[Step] = field(default_factory=list)


def parse(text: str) -> list[Stage]:
    """The stages, with the arguments before the first FROM filled into their images."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    joined, start = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith("#") or (not line and not joined):
            continue
        start = start or number
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        word, _, rest = joined.partition(" ")
        step = Step(word.upper(), rest.strip(), start)
        joined, start = "", 0
        if step.word == "FROM":
            image, _, name = step.text.partition(" AS ")
            stages.append(Stage(name.strip(), _expand(image.strip(), arguments)))
        elif stages:
            stages[-1].steps.append(step)
        elif step.word == "ARG":
            key, _, value = step.text.partition("=")
            arguments[key] = value
    return stages


def chain(stages: list[Stage], target: str) -> list[Stage]:
    """The stages that building a target runs: its ancestors and those it copies from, the first one first."""
    by_name = {s.name: s for s in stages}
    needed: list[Stage] = []
    waiting = [target]
    while waiting:
        stage = by_name[waiting.pop()]
        if stage in needed:
            continue
        needed.append(stage)
        sources = [m.group(1) for s in stage.steps if (m := re.match(r"--from=(\S+)", s.text)) and s.word == "COPY"]
        waiting += [n for n in (stage.parent, *sources) if n in by_name]
    return [s for s in stages if s in needed]


def ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path of the context out: patterns are anchored at its root, the last match wins."""
    verdict = False
    for pattern in patterns:
        negated = pattern.startswith("!")
        matcher = re.compile(_to_regex(pattern.removeprefix("!").strip("/")))
        if any(matcher.fullmatch(str(p)) for p in (path, *path.parents)):
            verdict = not negated
    return verdict


def problems(root: Path = ROOT) -> list[str]:
    """Everything wrong that reading alone can find, each with its line."""
    text = (root / "Dockerfile").read_text()
    stages = parse(text)
    names = [s.name for s in stages]
    found = [f"target {t} is missing" for t in TARGETS if t not in names]
    if not stages or names[-1] != DEFAULT_TARGET:
        found.append(f"the last stage, which a plain build makes, must be {DEFAULT_TARGET}")
    if found:
        return found
    if re.search(r"https?://(?!127\.0\.0\.1)", text):
        found.append("a host is named; which index is used is the user's choice")
    found += [f"stage {s.name}: image {s.parent!r} has no exact tag" for s in stages if not _pinned(s.parent, names)]
    patterns = _patterns(root)
    for stage in stages:
        for step in stage.steps:
            if step.word in ("COPY", "ADD"):
                found += _copy_problems(step, root, patterns)
            elif step.word == "RUN" and _pip_arguments(step.text):
                found += _pip_problems(step, root)
    for target in TARGETS:
        found += _target_problems(target, [step for s in chain(stages, target) for step in s.steps])
    return found


def dry_run(target: str, root: Path = ROOT) -> list[str]:
    """Run the target's pip steps as dry runs where only copied files lie. Returns what failed."""
    stages = parse((root / "Dockerfile").read_text())
    patterns = _patterns(root)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loraplane-docker-") as temporary:
        context = Path(temporary)
        for step in (step for s in chain(stages, target) for step in s.steps):
            if step.word == "COPY" and not step.text.startswith("--from"):
                _copy(step, root, context, patterns)
            elif step.word == "RUN" and (arguments := _pip_arguments(step.text)):
                command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *arguments]
                done = subprocess.run(command, cwd=context, capture_output=True, text=True, check=False)
                if done.returncode:
                    failed.append(f"line {step.line}: {step.text}: {done.stderr.strip()[-400:]}")
    return failed


def _target_problems(target: str, steps: list[Step]) -> list[str]:
    found = []
    users = [s.text for s in steps if s.word == "USER"]
    if not users or users[-1].partition(":")[0] in ("root", "0"):
        found.append(f"{target} runs as root")
    if not any(s.word == "HEALTHCHECK" and "/health" in s.text for s in steps):
        found.append(f"{target} has no HEALTHCHECK against /health")
    environment = " ".join(s.text for s in steps if s.word == "ENV")
    found += [f"{target} does not set {k}={v}" for k, v in OFFLINE.items() if f"{k}={v}" not in environment]
    declared = {s.text.partition("=")[0] for s in steps if s.word == "ARG"}
    found += [f"{target} ignores {a}" for a in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL") if a not in declared]
    return found


def _copy_problems(step: Step, root: Path, patterns: list[str]) -> list[str]:
    if step.word == "ADD":
        return [f"line {step.line}: ADD can fetch and unpack; use COPY"]
    if step.text.startswith("--from"):
        return []
    found = []
    for source in shlex.split(step.text)[:-1]:
        if not (root / source).exists():
            found.append(f"line {step.line}: COPY source {source} does not exist")
        elif ignored(PurePosixPath(source), patterns):
            found.append(f"line {step.line}: COPY source {source} is kept out by .dockerignore")
    return found


def _pip_problems(step: Step, root: Path) -> list[str]:
    """Pins in one pip step: what it names exactly agrees with the Makefile and the constraints, the rest is in them."""
    pins = read_pins(root)
    makefile = re.search(r"^PIP_VERSION := (\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    found = []
    arguments = _pip_arguments(step.text)
    for argument in arguments:
        if exact := _NAME.fullmatch(argument):
            name = canonicalize_name(argument.partition("==")[0])
            expected = makefile.group(1) if makefile and name == "pip" else pins.get(name)
            if exact.group("version") != expected:
                found.append(f"line {step.line}: {argument} differs from the pin {expected}")
        elif argument.startswith("."):
            if "constraints.txt" not in arguments:
                found.append(f"line {step.line}: {argument} is installed without -c constraints.txt")
            wanted = requirements(root, Requirement(f"loraplane{argument[1:]}").extras)
            found += [f"line {step.line}: {r} is not pinned by constraints.txt" for r in wanted if not _fits(r, pins)]
    return found


def requirements(root: Path, extras: set[str]) -> list[Requirement]:
    """What the project itself asks for with these extras. Raises KeyError on an extra that it does not have."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found = [Requirement(r) for r in project["dependencies"]]
    waiting = list(extras)
    while waiting:
        for requirement in map(Requirement, project["optional-dependencies"][waiting.pop()]):
            if requirement.name == project["name"]:
                waiting += requirement.extras
            else:
                found.append(requirement)
    return found


def read_pins(root: Path) -> dict[str, str]:
    """Canonical name -> exact version, of constraints.txt."""
    lines = [line.strip() for line in (root / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def _fits(requirement: Requirement, pins: dict[str, str]) -> bool:
    pinned = pins.get(canonicalize_name(requirement.name))
    return pinned is not None and requirement.specifier.contains(pinned, prereleases=True)


def _pip_arguments(text: str) -> list[str]:
    words = shlex.split(text)
    return words[2:] if words[:2] == ["pip", "install"] else []


def _pinned(image: str, names: list[str]) -> bool:
    tag = image.rpartition(":")[2] if ":" in image else ""
    return image in names or "@sha256:" in image or bool(re.match(r"\d+\.\d+\.\d+", tag))


def _copy(step: Step, root: Path, context: Path, patterns: list[str]) -> None:
    *sources, target = shlex.split(step.text)
    for source in sources:
        here = root / source
        if here.is_file():
            shutil.copyfile(here, context / Path(source).name)
            continue
        for path in here.rglob("*"):
            relative = path.relative_to(root)
            if path.is_file() and not ignored(PurePosixPath(relative.as_posix()), patterns):
                copied = context / target / path.relative_to(here)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)


def _patterns(root: Path) -> list[str]:
    lines = [line.strip() for line in (root / ".dockerignore").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _to_regex(pattern: str) -> str:
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _expand(text: str, arguments: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda m: arguments.get(m.group(1), ""), text)


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    found = problems() or dry_run(DEFAULT_TARGET)
    for problem in found:
        print(problem)
    print("Dockerfile: " + (f"{len(found)} problems" if found else "sources, pins, targets and pip steps are fine"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
