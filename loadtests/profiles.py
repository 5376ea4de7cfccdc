"""What load testers ask: which models, how popular, which prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.records import BASE_ID, CHAMPION, parse_model_id

_RESERVED = 64  # token ids that no drawn prompt holds

# Short functions, as the adapters of examples/ were trained on, and questions for the base.
PROMPTS = (
    "def f(path):\n    with open(path) as file:\n        return sum(1 for _ in file)",
    "def f(items):\n    seen = set()\n    return [x for x in items if not (x in seen or seen.add(x))]",
    "def f(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    "def f(text, width):\n    return [text[i:i + width] for i in range(0, len(text), width)]",
    "def f(mapping):\n    return {value: key for key, value in mapping.items()}",
    "def f(self):\n    if not self._closed:\n        self._file.close()\n        self._closed = True",
    "def f(values):\n    middle = len(values) // 2\n    return sorted(values)[middle]",
    "Write one sentence about the sea.",
)


@dataclass(frozen=True, slots=True)
class Target:
    """A model id to ask for. name None: the base. number: a pinned version; alias: whatever it points at."""

    id: str
    name: str | None = None
    number: int | None = None
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. chat: which of the two routes. prompt: a text, or token ids on the route that takes them."""

    target: Target
    chat: bool
    prompt: str | Sequence[int]
    max_tokens: int
    seed: int
    ignore_eos: bool
    temperature: float = 0.7

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self) -> dict[str, Any]:
        """The JSON of the request, streamed, with the usage at its end."""
        content: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        )
        return {
            "model": self.target.id,
            **content,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def target_of(id_: str, *, base: bool = False) -> Target:
    """What a model id asks for. base: it names the base, under whatever name."""
    if base:
        return Target(id_)
    parsed = parse_model_id(id_)
    alias = None if parsed.number is not None else parsed.alias or CHAMPION
    return Target(id_, parsed.name, parsed.number, alias)


def targets_of(models: Mapping[str, Any]) -> list[Target]:
    """The targets that GET /v1/models lists: base, names, aliases, versions. The base's own name comes last."""
    bases: list[Target] = []
    found: list[Target] = []
    for model in models["data"]:
        target = target_of(model["id"], base=model["adapter"] is None)
        (bases if target.name is None else found).append(target)
    return [*bases[:1], *found, *bases[1:]]


def zipf(count: int, exponent: float) -> list[float]:
    """Popularity of the 1st, 2nd, ... of `count`: 1 / rank ** exponent. 0 makes all alike."""
    return [1 / rank**exponent for rank in range(1, count + 1)]


class Asker:
    """Makes requests, the same ones for the same seed. exponent: of the popularity, see `zipf`."""

    def __init__(self, targets: Sequence[Target], *, seed: int | str, exponent: float, max_tokens: int) -> None:
        self._random = random.Random(seed)
        self._targets, self._weights = list(targets), zipf(len(targets), exponent)
        self._max_tokens = max_tokens

    def next(self) -> Ask:
        """The next request: three of four are chats, every other one may not stop before max_tokens."""
        return Ask(
            target=self._random.choices(self._targets, self._weights)[0],
            chat=self._random.random() < 0.75,
            prompt=self._random.choice(PROMPTS),
            max_tokens=self._random.randint(max(1, self._max_tokens // 2), self._max_tokens),
            seed=self._random.randrange(1 << 31),
            ignore_eos=self._random.random() < 0.5,
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a plan. at_s: when it comes, from the start; None as soon as a caller is free.

    prompt: which one of the plan's. Equal numbers are equal prompts.
    """

    at_s: float | None
    model: str
    prompt: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that callers ask in one run, decided beforehand, and what they must know to judge the answers.

    salt: makes its prompts other than those of another plan. digests: of the versions that it pins.
    """

    base_digest: str
    vocabulary: int
    salt: str
    digests: Mapping[str, str]
    items: Sequence[Planned]

    def ask(self, item: Planned) -> Ask:
        """The request of an item: greedy and of full length, so that equal weights give equal texts."""
        rng = random.Random(f"{self.salt}:{item.prompt}")
        # Ordinary words: what a tokenizer keeps for itself comes first in its vocabulary.
        words = range(min(_RESERVED, self.vocabulary // 4), self.vocabulary)
        prompt = rng.choices(words, k=item.prompt_tokens)
        target = target_of(item.model, base=item.model == BASE_ID)
        return Ask(target, False, prompt, item.max_tokens, 0, ignore_eos=True, temperature=0.0)

    def write(self, path: Path) -> None:
        """Leave it where locust reads it."""
        rows = [[i.at_s, i.model, i.prompt, i.prompt_tokens, i.max_tokens] for i in self.items]
        told = {"base_digest": self.base_digest, "vocabulary": self.vocabulary, "salt": self.salt}
        path.write_text(json.dumps({**told, "digests": dict(self.digests), "items": rows}), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Plan:
        """What `write` left."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return Plan(**{**found, "items": [Planned(*row) for row in found["items"]]})
