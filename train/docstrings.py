"""The data set that needs no download: functions of this very Python environment, and what their authors say of them.

Every function's source is paired with the first line of its docstring. The docstring is taken out of the source and
the function's name is masked as `f`, so that one input carries two tasks: say what it does (`summary`), and name it
(`name`). Whole packages are held out: what is tested was written by people whose code was not trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version

from adapters.errors import DataRefused

TASKS = ("summary", "name")
SPLITS = ("train", "test")

_RECIPE = 7  # Raise when the harvest's rules change: old caches are then left alone.
_SOURCE_CHARS = (60, 900)
_DOC_WORDS = (3, 20)
_FILE_BYTES = (400, 60_000)
_FILES_PER_PACKAGE = 12
_ROWS_PER_PACKAGE = 40
_TEST_SHARE = 5  # one package in five is held out
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|third_?party(_files)?|externals|site-packages|idlelib|lib2to3|turtledemo"
    r"|__pycache__|examples?|benchmarks?|conftest\.py|test_[^/]*|[^/]*_test\.py|[^/]*_pb2\w*\.py)(/|$)"
)
_JUNK = re.compile(
    r"https?:|>>>|^[@:*#.`<\[({-]|\b(todo|fixme|deprecated|internal use|docstring|override)\b|\.\.\.$|:\w+:|``", re.I
)
_WORDS = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Function:
    """One harvested function. source: without docstring, name masked as `f`. doc: first line of its docstring."""

    id: str
    package: str
    split: str
    name: str
    source: str
    doc: str


@dataclass(frozen=True, slots=True)
class DocstringRow:
    """One row of one task: what is shown (`prompt`) and what is wanted (`completion`)."""

    id: str
    package: str
    split: str
    task: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A Python file that may be harvested: the package it counts for, its name in ids, where it lies."""

    package: str
    name: str
    path: Path


def split_of(package: str) -> str:
    """`train` or `test`, by a hash of the package's name alone: a package never moves when others come and go."""
    bucket = int.from_bytes(hashlib.sha256(package.lower().encode()).digest()[:4])
    return "test" if bucket % _TEST_SHARE == 0 else "train"


def rows_of(functions: Iterable[Function], task: str, split: str) -> list[DocstringRow]:
    """The rows of a task in a split, in the harvest's order. Raises DataRefused for an unknown task or split."""
    if task not in TASKS:
        raise DataRefused(f"docstrings has no task {task!r}; it has {' and '.join(TASKS)}")
    if split not in SPLITS:
        raise DataRefused(f"docstrings has no split {split!r}; it has {' and '.join(SPLITS)}")
    return [
        DocstringRow(f.id, f.package, f.split, task, f.source, f.doc if task == "summary" else f.name)
        for f in functions
        if f.split == split
    ]


def digest_of(functions: Iterable[Function]) -> str:
    """SHA-256 hex over the canonical JSON of the rows, one a line."""
    digest = hashlib.sha256()
    for function in functions:
        digest.update(_line(function))
    return digest.hexdigest()


def load(cache: Path) -> list[Function]:
    """The harvest of this environment, from `cache` if it lies there, else made (some seconds) and left there."""
    path = cache / f"docstrings-{environment_digest()[:16]}.jsonl"
    try:
        return [Function(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError):
        pass  # absent, or damaged: made anew
    functions = harvest(environment_files())
    cache.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_bytes(b"".join(map(_line, functions)))
    staged.replace(path)
    return functions


def environment_digest() -> str:
    """SHA-256 hex of what the harvest depends on: its recipe, Python's version and each package's version."""
    versions = sorted({f"{d.name.lower()}=={d.version}" for d in _distributions()})
    return hashlib.sha256(json.dumps([_RECIPE, python_version(), versions]).encode()).hexdigest()


def environment_files() -> list[SourceFile]:
    """The Python files of the standard library and of the installed packages, without tests and vendored copies."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = [
        SourceFile(relative.parts[0].removesuffix(".py"), relative.as_posix(), path)
        for path in stdlib.rglob("*.py")
        for relative in (path.relative_to(stdlib),)
    ]
    for distribution in _distributions():
        for file in distribution.files or ():
            if file.suffix == ".py" and len(file.parts) > 1 and file.parts[0] != "..":
                found.append(SourceFile(file.parts[0], file.as_posix(), Path(str(distribution.locate_file(file)))))
    return [f for f in found if not _SKIPPED.search(f.name)]


def harvest(files: Sequence[SourceFile]) -> list[Function]:
    """Functions worth learning from, in an order that depends on their contents alone.

    Sorted by a hash, so that the first N rows are a fair sample of all packages. A source or a docstring that was
    seen before, in whichever split, is left out.
    """
    candidates = [function for file in _sample(files) for function in _functions(file)]
    candidates.sort(key=lambda f: (_rank(f.id), f.id))
    sources: set[str] = set()
    docs: set[str] = set()
    per_package: dict[str, int] = {}
    kept: list[Function] = []
    for function in candidates:
        source, doc = "".join(function.source.split()), function.doc.lower().rstrip(".")
        if source in sources or doc in docs or per_package.get(function.package, 0) >= _ROWS_PER_PACKAGE:
            continue
        sources.add(source)
        docs.add(doc)
        per_package[function.package] = per_package.get(function.package, 0) + 1
        kept.append(function)
    return kept


def _sample(files: Sequence[SourceFile]) -> Iterator[SourceFile]:
    """At most a few files of each package, so that giants neither dominate the rows nor the time."""
    taken: dict[str, int] = {}
    for file in sorted(files, key=lambda f: (_rank(f.name), f.name)):
        if taken.get(file.package, 0) >= _FILES_PER_PACKAGE:
            continue
        try:
            size = file.path.stat().st_size
        except OSError:
            continue
        if _FILE_BYTES[0] <= size <= _FILE_BYTES[1]:
            taken[file.package] = taken.get(file.package, 0) + 1
            yield file


def _functions(file: SourceFile) -> Iterator[Function]:
    try:
        text = file.path.read_text(encoding="utf-8")
        tree = ast.parse(text) if '"""' in text else None
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return  # not UTF-8, or of another Python: there are enough others
    if tree is None:
        return
    lines = text.split("\n")  # not splitlines: a form feed is no line end to Python's parser
    for node, qualified in _definitions(tree, ""):
        pair = _pair(node, lines)
        if pair is not None:
            name = f"{file.name.removesuffix('.py')}:{qualified}"
            yield Function(name, file.package, split_of(file.package), node.name.strip("_"), *pair)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Functions at top level and in classes, with their qualified names; functions within functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, prefix + child.name
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> tuple[str, str] | None:
    """(masked source, first docstring line), or None when the function teaches nothing."""
    docstring = ast.get_docstring(node)
    if (
        not docstring
        or not docstring.strip()
        or len(node.body) < 2
        or len(node.name.strip("_")) < 3
        or node.name.startswith("__")
    ):
        return None
    first, rest = node.body[0], node.body[1]
    if first.lineno <= node.lineno or rest.lineno <= (first.end_lineno or 0):
        return None  # all on one line
    doc = _first_line(docstring)
    if doc is None or any(_identifier(n) == "f" for n in ast.walk(node)):
        return None
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno or 0 : node.end_lineno]]
    source = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
    # With and without underscores around it: the wanted answer has none.
    name = node.name.strip("_")
    source = re.sub(rf"\b_*{re.escape(name)}_*\b", "f", source)
    if not source.isascii() or not _SOURCE_CHARS[0] <= len(source) <= _SOURCE_CHARS[1]:
        return None
    if _says(source, doc) or re.search(rf"\b_*{re.escape(name)}_*\b", source, re.IGNORECASE):
        return None  # it shows an answer; a name in other letters, such as a class's, is no name to mask
    return source, doc


def _says(source: str, doc: str) -> bool:
    """Whether the source, in a comment or a text, holds the docstring's whole sentence, word by word."""
    words = " ".join(_WORDS.findall(doc.lower()))
    return f" {words} " in f" {' '.join(_WORDS.findall(source.lower()))} "


def _first_line(docstring: str) -> str | None:
    """The docstring's first line, if it is a whole, plain, English-looking statement."""
    lines = docstring.strip().splitlines()
    doc = " ".join(lines[0].split())
    whole = doc.endswith((".", "!", "?")) or len(lines) == 1 or not lines[1].strip()
    words = doc.split()
    if not whole or not _DOC_WORDS[0] <= len(words) <= _DOC_WORDS[1] or not doc.isascii() or _JUNK.search(doc):
        return None
    # A signature or a formula in place of a sentence.
    if "->" in doc or "(" in words[0] or not doc[0].isupper() or sum(c.isalpha() for c in doc) < 0.7 * len(doc):
        return None
    return doc if doc[-1] in ".!?" else f"{doc}."


def _identifier(node: ast.AST) -> str | None:
    """The name that a node reads, binds or takes as a parameter."""
    if isinstance(node, ast.Name):
        return node.id
    return node.arg if isinstance(node, ast.arg) else None


def _distributions() -> list[metadata.Distribution]:
    """Installed packages without this one, whose source changes while one works on it."""
    return [d for d in metadata.distributions() if d.name and d.name.lower() != "loraplane"]


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def _line(function: Function) -> bytes:
    return json.dumps(asdict(function), sort_keys=True, separators=(",", ":")).encode() + b"\n"
