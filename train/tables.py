"""Rows of data files, as their writers wrote them: every value is what stands in the file, no type is guessed.

Files are read anew each time: a copy kept beside them would have to know when they change.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from adapters.errors import DataRefused, ExtraMissing

# Numbered rows: the line of JSON lines, the record of other kinds, counted from 1.
Rows: TypeAlias = Iterator[tuple[int, Mapping[str, Any]]]

MAX_CHARS = 1 << 20  # of one text; longer ones are a mistake in the file, not a row
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def is_table(source: str) -> bool:
    """Whether this names a file of a kind that is read, by its ending."""
    return Path(source).suffix.lower() in _READERS


def read(source: str, split: str) -> Rows:
    """The rows of a file, or of a hub data set's split. Raises DataRefused with the file and, where known, the line."""
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        _refuse_unread(source, path)
        yield from _hub(source, split)
        return
    if not path.is_file():
        raise DataRefused(f"there is no file {path.absolute()}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataRefused(f"cannot read {source}: {error.strerror or error}") from error


def _refuse_unread(source: str, path: Path) -> None:
    """Raise DataRefused where a source without a known ending cannot be a hub id: the network need not be asked."""
    kinds = f"what is read are {', '.join(_READERS)}, or a hub id (owner/name)"
    if path.exists():
        what = "a folder; name one file in it" if path.is_dir() else "a file of another kind"
        raise DataRefused(f"{source} is {what}; {kinds}")
    if _HUB_ID.fullmatch(source) is None:
        raise DataRefused(f"there is no file {path.absolute()}; {kinds}")


def _hub(source: str, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise ExtraMissing("train", "reading data sets of a hub") from error
    datasets.disable_progress_bars()
    try:
        yield from enumerate(datasets.load_dataset(source, split=split), 1)
    # The library raises whatever its readers, the hub's client and the network raise.
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataRefused(f"cannot read {source} ({', '.join(_READERS)} or a hub id): {said}") from error


def _json_lines(path: Path) -> Rows:
    for number, line in enumerate(io.StringIO(_text(path)), 1):
        if line.strip():
            yield number, _object(f"{path}#{number}", _parsed(f"{path}#{number}", line))


def _json(path: Path) -> Rows:
    """A list of objects; or JSON lines, which some name .json."""
    text = _text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise DataRefused(f"{path}: not JSON: {error}") from error
        yield from _json_lines(path)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield number, _object(f"{path}#{number}", row)


def _commas(path: Path) -> Rows:
    return _separated(path, ",")


def _tabs(path: Path) -> Rows:
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(MAX_CHARS + 1)  # the library's own limit is an eighth of it
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataRefused(f"{path}#1: the column {twice[0]!r} is there twice")
        number = 0
        for fields in reader:
            if not fields:
                continue  # an empty line
            number += 1
            if len(fields) != len(header):
                raise DataRefused(
                    f"{path}: line {reader.line_num} has {len(fields)} fields, but the header names {len(header)}; "
                    f"put texts with a separator or a line end in double quotes"
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataRefused(f"{path}: line {reader.line_num} is not CSV: {error}") from error


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ExtraMissing("train", "reading Parquet files") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataRefused(f"cannot read {path} after row {number}: {said}") from error


_READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _commas,
    ".tsv": _tabs,
    ".parquet": _parquet,
}


def _text(path: Path) -> str:
    """The whole file, with or without a byte order mark. Raises DataRefused with the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataRefused(
            f"{path}#{line}: not UTF-8 (byte 0x{data[error.start]:02X}); save the file as UTF-8"
        ) from error


def _parsed(where: str, line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataRefused(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise DataRefused(f"{where}: nested too deeply") from error


def _object(where: str, row: object) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataRefused(f"{where}: a row must be a JSON object")
    return row
