"""Which training rows would show what is tested: by their words, at every answer of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

from adapters.prompts import Message

_Turns: TypeAlias = tuple[str, ...]
_UNSPOKEN = frozenset({"system", "developer"})


class Conversation(Protocol):
    """What is asked of a row: its turns, the last of which is the wanted answer."""

    @property
    def messages(self) -> Sequence[Message]: ...


class HeldOut:
    """The rows that are tested on, as they are looked for. Blanks and line ends between words do not count."""

    def __init__(self, rows: Iterable[Conversation]) -> None:
        self._prompts: set[_Turns] = set()
        self._asked: set[_Turns] = set()
        for row in rows:
            self._prompts.add(tuple(map(words, row.messages[:-1])))
            self._asked.add(tuple(words(m) for m in row.messages if m.role not in _UNSPOKEN))
        self._prompt_lengths = {len(turns) for turns in self._prompts}
        self._asked_lengths = {len(turns) for turns in self._asked}

    def shown_by(self, row: Conversation) -> bool:
        """Whether training on this row teaches a held-out answer.

        It does where one of its answers follows a held-out prompt, or where a held-out prompt stands anywhere in it
        with the held-out answer, whatever was said before and whatever the system text is.
        """
        texts = [words(m) for m in row.messages]
        for i, message in enumerate(row.messages):
            if message.role == "assistant" and i in self._prompt_lengths and tuple(texts[:i]) in self._prompts:
                return True
        spoken = [text for text, m in zip(texts, row.messages, strict=True) if m.role not in _UNSPOKEN]
        return any(
            tuple(spoken[end - length : end]) in self._asked
            for length in self._asked_lengths
            for end in range(length, len(spoken) + 1)
        )


def repeated(rows: Iterable[Conversation]) -> int:
    """How many rows say, word for word, what a row before them says."""
    seen: set[_Turns] = set()
    count = 0
    for row in rows:
        turns = tuple(map(words, row.messages))
        count += turns in seen
        seen.add(turns)
    return count


def words(message: Message) -> str:
    """A turn's text with every run of blanks and line ends as one blank."""
    return " ".join(message.content.split())
