"""Rows to train and evaluate on: loaded, checked, rendered to token ids with a loss mask, and known by a digest."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import DataRefused, InvalidRequest
from adapters.home import Home
from adapters.prompts import ROLES, Example, Message, Renderer
from adapters.records import PromptFormat
from adapters.runs import DOCSTRINGS, Columns, DataSpec
from train import docstrings, tables
from train.leaks import HeldOut, repeated, words
from train.tables import MAX_CHARS


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation that ends with the wanted answer. id: where it came from."""

    id: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the answer."""
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        """The wanted answer."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows in the order of use, with a name for people and a digest for programmes.

    leaked: how many rows to train on were left out because they show what is tested. repeated: of rows to train on how
    many say what an earlier one says, of rows to evaluate on how many were left out because an earlier one asks the
    same.
    """

    name: str
    rows: tuple[Row, ...]
    leaked: int = 0
    repeated: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 hex over the rows' canonical JSON, one a line, in order.

        Of what is said alone: ids hold the file's path, and the same rows are the same set however a path is typed.
        """
        digest = hashlib.sha256()
        for row in self.rows:
            turns = [[m.role, m.content] for m in row.messages]
            digest.update(json.dumps(turns, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Rendered training sequences. truncated: how many were cut at max_length."""

    examples: tuple[Example, ...]
    truncated: int

    @property
    def loss_tokens(self) -> int:
        return sum(sum(e.loss) for e in self.examples)


def training_rows(spec: DataSpec, home: Home) -> RowSet:
    """The rows to train on, shuffled by the data seed; none of them shows what a held-out row asks.

    Raises DataRefused, naming the row at fault.
    """
    train, test = _sides(spec, home)
    rows = _fitting(spec, train)
    if not rows:
        raise DataRefused(f"{_title(spec)} has no rows to train on")
    # All of them, long ones and those beyond eval_limit too: another evaluation may draw them.
    held_out = HeldOut(test)
    kept = [row for row in rows if not held_out.shown_by(row)]
    if not kept:
        raise DataRefused(f"{_title(spec)}: every row is in the evaluation set too; nothing is left to train on")
    used = _limited(kept, spec.seed, spec.limit)
    copies = repeated(used)
    if spec.shuffle_targets:
        used = _shuffled_targets(used, spec.seed)
    return RowSet(f"{_title(spec)}/train", tuple(used), leaked=len(rows) - len(kept), repeated=copies)


def evaluation_rows(spec: DataSpec, home: Home, limit: int | None = None) -> RowSet:
    """The held-out rows, shuffled by the data seed. limit: instead of the run's eval_limit. Raises DataRefused.

    Of rows with one prompt the first alone: a row said twice is no second piece of evidence.
    """
    tested = _tested(spec, home)
    distinct: dict[str, Row] = {}
    for row in tested:
        distinct.setdefault(prompt_key(row.prompt), row)
    rows = _limited([*distinct.values()], spec.seed, limit or spec.eval_limit)
    for row in rows:
        if not row.reference.strip():
            raise DataRefused(f"{_title(spec)}: row {row.id} has an empty reference; ROUGE would score it 0 whatever")
    return RowSet(f"{_title(spec)}/test", tuple(rows), repeated=len(tested) - len(distinct))


def render(rows: RowSet, renderer: Renderer, fmt: PromptFormat, max_length: int, *, apart: bool = False) -> ExampleSet:
    """Token ids and loss masks, by the code that serving renders with.

    Sequences beyond max_length are cut at the end. apart: for an encoder-decoder. Raises DataRefused when that, or an
    empty answer, leaves a sample without a token to learn from, or an encoder without one to read.
    """
    found: list[Example] = []
    truncated = 0
    for row in rows.rows:
        try:
            rendered = renderer.examples(row.messages, fmt, apart=apart)
        except InvalidRequest as error:
            raise DataRefused(f"{rows.name}: row {row.id}: {error}") from error
        for example in rendered:
            cut = Example(example.ids[:max_length], example.loss[:max_length])
            truncated += len(cut.ids) < len(example.ids)
            if not any(cut.loss):
                raise DataRefused(
                    f"{rows.name}: row {row.id} has no answer token within max_length {max_length} (it has "
                    f"{len(example.ids)} tokens); raise max_length, or leave long prompts out with data.max_chars"
                )
            if apart and cut.loss[0]:
                raise DataRefused(
                    f"{rows.name}: row {row.id} has a prompt without a token; an encoder needs one to read"
                )
            found.append(cut)
    return ExampleSet(tuple(found), truncated)


def marked(example: Example, renderer: Renderer) -> str:
    """The sequence as text, with what counts in the loss between ⟦ and ⟧."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.loss[end] != example.loss[start]:
            text = renderer.decode(example.ids[start:end], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if example.loss[start] else text)
            start = end
    return "".join(parts)


def prompt_key(turns: Sequence[Message]) -> str:
    """What makes two prompts the same prompt: their words, turn by turn; blanks between them do not count."""
    return json.dumps([words(m) for m in turns])


def _sides(spec: DataSpec, home: Home) -> tuple[list[Row], list[Row]]:
    """All rows to train on and all held-out ones, in the source's order."""
    if spec.source == DOCSTRINGS:
        task = spec.task or docstrings.TASKS[0]
        functions = docstrings.load(home.data)
        train, test = (
            [
                Row(r.id, (Message("user", r.prompt), Message("assistant", r.completion)))
                for r in docstrings.rows_of(functions, task, split)
            ]
            for split in docstrings.SPLITS
        )
        return train, test
    rows = _read(spec.source, spec.split, spec.columns)
    if spec.eval_source is not None or spec.eval_split is not None:
        return rows, _read(spec.eval_source or spec.source, spec.eval_split or spec.split, spec.columns)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[_held_out(row, spec.holdout)].append(row)
    return sides


def _tested(spec: DataSpec, home: Home) -> list[Row]:
    """The held-out rows that fit; rows to train on are not read where they lie elsewhere."""
    if spec.source != DOCSTRINGS and (spec.eval_source is not None or spec.eval_split is not None):
        rows = _read(spec.eval_source or spec.source, spec.eval_split or spec.split, spec.columns)
    else:
        rows = _sides(spec, home)[1]
    rows = _fitting(spec, rows)
    if not rows:
        raise DataRefused(f"{_title(spec)} has no rows to evaluate on")
    return rows


def _fitting(spec: DataSpec, rows: list[Row]) -> list[Row]:
    """The rows without those whose prompts are too long for this run."""
    if spec.max_chars is None:
        return rows
    return [r for r in rows if sum(len(m.content) for m in r.prompt) <= spec.max_chars]


def _held_out(row: Row, share: float) -> bool:
    """Whether a row is for evaluation: by its prompt alone, so that equal prompts lie on the same side."""
    text = prompt_key(row.prompt)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * (1 << 64)


def _limited(rows: Sequence[Row], seed: int, limit: int | None) -> list[Row]:
    shuffled = list(rows)
    random.Random(f"rows/{seed}").shuffle(shuffled)
    return shuffled[:limit]


def _shuffled_targets(rows: Sequence[Row], seed: int) -> list[Row]:
    """Every prompt with another row's answer: rotated by one after a shuffle, so that none keeps its own place."""
    order = list(range(len(rows)))
    random.Random(f"targets/{seed}").shuffle(order)
    answers = {order[i]: rows[order[i - 1]].messages[-1] for i in range(len(order))}
    return [replace(row, messages=(*row.prompt, answers[i])) for i, row in enumerate(rows)]


def _title(spec: DataSpec) -> str:
    if spec.source == DOCSTRINGS:
        return f"{DOCSTRINGS}:{spec.task}"
    return Path(spec.source).name if tables.is_table(spec.source) else spec.source


def _read(source: str, split: str, columns: Columns) -> list[Row]:
    """Every row of a file or of a hub data set. Raises DataRefused with the number of the first bad row."""
    return [_row(f"{source}#{number}", raw, columns) for number, raw in tables.read(source, split)]


def _row(where: str, raw: Mapping[str, Any], columns: Columns) -> Row:
    if columns.messages is not None or (columns.prompt not in raw and "messages" in raw):
        name = columns.messages or "messages"
        return Row(where, _conversation(where, raw.get(name), name))
    texts = [raw.get(name) for name in (columns.prompt, columns.completion)]
    for name, text in zip((columns.prompt, columns.completion), texts, strict=True):
        _check_text(where, name, text, raw)
    return Row(where, (Message("user", str(texts[0])), Message("assistant", str(texts[1]))))


def _conversation(where: str, turns: object, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, list | tuple) or not turns:
        raise DataRefused(f"{where}: {name!r} must be a list of messages")
    messages: list[Message] = []
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise DataRefused(f"{where}: a message needs a role of {', '.join(ROLES)} and a text as content")
        _check_content(where, name, content)
        messages.append(Message(str(role), content))
    if messages[-1].role != "assistant" or not messages[-1].content or len(messages) < 2:
        raise DataRefused(f"{where}: a conversation must end with an assistant's answer")
    return tuple(messages)


def _check_text(where: str, name: str, text: object, raw: Mapping[str, Any]) -> None:
    if name not in raw:
        have = ", ".join(sorted(map(str, raw)))
        raise DataRefused(f"{where}: no column {name!r}; there are {have}. Name it in data.columns")
    if not isinstance(text, str):
        raise DataRefused(f"{where}: {name!r} must be a text, not {type(text).__name__}")
    if not text.strip():
        raise DataRefused(f"{where}: {name!r} must be a text and not empty")
    _check_content(where, name, text)


def _check_content(where: str, name: str, text: str) -> None:
    """Refuse what is no text of a row: too long, or half a character, which JSON can escape and no tokenizer reads."""
    if len(text) > MAX_CHARS:
        raise DataRefused(f"{where}: {name!r} has {len(text)} characters; at most {MAX_CHARS} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataRefused(f"{where}: {name!r} holds half a character ({text[error.start]!a}); mend the file") from error
