"""One renderer of prompts for training, evaluation and serving: the same code, so the same token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from adapters.errors import AdapterRefused, BaseUnsupported, InvalidRequest, Reason
from adapters.records import GenerationDefaults, PromptFormat

ROLES = ("system", "user", "assistant", "tool", "developer")
_CONTEXT = 8  # tokens before a text that decide how its first one reads
_UNSETTLED = 16
_LIMITS = {"system": 8192, "prefix": 8192, "suffix": 8192}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; content is plain text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence. loss[i] says whether token i is an answer's token, and so counts in the loss."""

    ids: tuple[int, ...]
    loss: tuple[bool, ...]


class PromptRenderer(Protocol):
    """What a gateway, a trainer and an evaluation need of a base's tokenizer."""

    def chat(self, messages: Sequence[Message], fmt: PromptFormat, *, continue_final: bool = False) -> list[int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def stream(self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> TextStream: ...


class TextStream:
    """Turns token ids into text as they come, never half a character.

    Each token is decoded together with those of the last piece of text, since many decoders treat a first token apart
    (they drop its space), and the new text is what that adds. `tokenizers` has such a stream of its own, but it
    raises where a byte changes how an earlier one reads, as byte fallback does after bytes that are no text.

    after: tokens whose text the caller has already; what comes is read as going on from them.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(after[-_CONTEXT:])
        self._read = len(self._ids)  # of these ids the text is out; it is decoded again beside what follows

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return self._settled()
        return self._take(text, len(self._ids))

    def flush(self) -> str:
        """What is left when no more tokens come: an unfinished character shows as U+FFFD, as a full decode would."""
        return self._take(self._decode(self._ids), len(self._ids))

    def _settled(self) -> str:
        """Of bytes that are no text, however long they go on: the ones that nothing that follows can change."""
        if len(self._ids) - self._read > _UNSETTLED:
            whole = self._decode(self._ids)
            for kept in range(4, 8):  # the bytes of one character at the end, and a border before them
                at = len(self._ids) - kept
                text = self._decode(self._ids[:at])
                if text + self._decode(self._ids[at:]) == whole:
                    return self._take(text, at)
        return ""

    def _take(self, text: str, at: int) -> str:
        """What the first `at` ids, which read `text`, add to what is out."""
        shown = self._decode(self._ids[: self._read])
        if len(text) <= len(shown):
            return ""
        del self._ids[: self._read]
        self._read = at - self._read
        return text[len(shown) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


class Renderer:
    """The base's tokenizer and chat template, opened from a saved base folder.

    Raises BaseUnsupported when the folder has no fast tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here: the CLI and the registry must start without transformers.
        from transformers import AutoTokenizer

        self._hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not getattr(self._hf, "is_fast", False):
            raise BaseUnsupported(f"the base in {folder.name} has no fast tokenizer (tokenizer.json); it is needed")
        self._tokenizer: Tokenizer = self._hf.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def has_template(self) -> bool:
        """Whether the base came with a chat template; without one, chat is flattened to text."""
        return bool(self._hf.chat_template)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        value = self._hf.eos_token_id
        return None if value is None else int(value)

    @property
    def pad_token_id(self) -> int:
        value = self._hf.pad_token_id
        return int(value) if value is not None else int(self.eos_token_id or 0)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Named special tokens, such as {'eos_token': '</s>'}."""
        return {k: str(v) for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw text, with the specials that this tokenizer puts around a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without clean-up of spaces."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> TextStream:
        """An incremental decoder for one answer. after: the tokens that its text goes on from, if any."""
        return TextStream(self._tokenizer, skip_special_tokens, after)

    def chat(self, messages: Sequence[Message], fmt: PromptFormat, *, continue_final: bool = False) -> list[int]:
        """Token ids of a conversation up to where the answer begins.

        continue_final: the last message is an assistant's beginning, to be continued rather than answered.
        Raises InvalidRequest when the template refuses the conversation.
        """
        turns = dressed(messages, fmt)
        if fmt.style == "text" or not self.has_template:
            return self.encode(flat(turns, continue_final))
        from jinja2 import TemplateError

        try:
            rendered = self._hf.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in turns],
                tokenize=False,
                add_generation_prompt=not continue_final,
                continue_final_message=continue_final,
            )
        except (TemplateError, ValueError) as error:
            # The template is the operator's; what it says of the conversation is meant for the caller.
            raise InvalidRequest(f"The base's chat template refuses these messages: {error}", "messages") from error
        # The template writes the special tokens itself.
        return self.encode(str(rendered), add_special_tokens=False)

    def examples(self, messages: Sequence[Message], fmt: PromptFormat, *, apart: bool = False) -> list[Example]:
        """Training sequences of a conversation: every assistant turn, ended by the end-of-text token, counts.

        One sequence where each turn's prompt continues the ids before it, else one sequence per assistant turn, as
        always for an encoder-decoder (apart): it reads the whole conversation before it writes.
        Raises InvalidRequest when no assistant turn is there.
        """
        found: list[Example] = []
        ids: list[int] = []
        loss: list[bool] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.chat(messages[:index], fmt)
            answer = self.encode(message.content, add_special_tokens=False)
            if self.eos_token_id is not None:
                answer.append(self.eos_token_id)
            if ids and (apart or prompt[: len(ids)] != ids):
                found.append(Example(tuple(ids), tuple(loss)))
                ids, loss = [], []
            loss += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
            ids = [*prompt, *answer]
        if not ids:
            raise InvalidRequest("a training conversation needs an assistant turn", "messages")
        found.append(Example(tuple(ids), tuple(loss)))
        return found


def dressed(messages: Sequence[Message], fmt: PromptFormat) -> list[Message]:
    """The conversation with the format's system text if it has none, its prefix and suffix on the last user turn."""
    turns = list(messages)
    if fmt.system and not any(m.role in ("system", "developer") for m in turns):
        turns.insert(0, Message("system", fmt.system))
    last_user = max((i for i, m in enumerate(turns) if m.role == "user"), default=None)
    if last_user is not None and (fmt.prefix or fmt.suffix):
        turns[last_user] = Message("user", fmt.prefix + turns[last_user].content + fmt.suffix)
    return turns


def flat(turns: Sequence[Message], continue_final: bool = False) -> str:
    """A conversation as the plain text of style `text`: a lone user turn as it is, else one turn a paragraph."""
    if continue_final:
        return flat(turns[:-1], False) + turns[-1].content
    return "\n\n".join(m.content for m in turns)


def prompt_format_to_json(fmt: PromptFormat) -> dict[str, Any]:
    """The format as plain JSON values: what is stored and digested."""
    defaults = {
        k: getattr(fmt.defaults, k)
        for k in ("max_tokens", "temperature", "top_p")
        if getattr(fmt.defaults, k) is not None
    }
    return {
        "style": fmt.style,
        "system": fmt.system,
        "prefix": fmt.prefix,
        "suffix": fmt.suffix,
        "stops": list(fmt.stops),
        "defaults": defaults,
    }


def prompt_format_from_json(raw: object) -> PromptFormat:
    """The format from foreign JSON. Raises AdapterRefused(prompt_format) on anything unknown or out of range."""
    if not isinstance(raw, dict):
        raise _bad("it must be an object")
    unknown = set(raw) - {"style", "system", "prefix", "suffix", "stops", "defaults"}
    if unknown:
        raise _bad(f"unknown keys {sorted(map(str, unknown))}")
    style = raw.get("style", "chat")
    if style not in ("chat", "text"):
        raise _bad(f"style {json.dumps(style)[:40]} is neither 'chat' nor 'text'")
    texts = {k: raw.get(k, "") for k in _LIMITS}
    for key, value in texts.items():
        if not isinstance(value, str) or len(value) > _LIMITS[key]:
            raise _bad(f"{key} must be a text of at most {_LIMITS[key]} characters")
    stops = raw.get("stops", [])
    if not isinstance(stops, list) or len(stops) > 8 or not all(isinstance(s, str) and 0 < len(s) <= 64 for s in stops):
        raise _bad("stops must be at most 8 texts of 1 to 64 characters")
    return PromptFormat(
        style=style,
        system=texts["system"],
        prefix=texts["prefix"],
        suffix=texts["suffix"],
        stops=tuple(stops),
        defaults=_defaults(raw.get("defaults", {})),
    )


def _defaults(raw: object) -> GenerationDefaults:
    if not isinstance(raw, dict) or set(raw) - {"max_tokens", "temperature", "top_p"}:
        raise _bad("defaults may hold max_tokens, temperature and top_p only")
    ranges: dict[str, tuple[float, float]] = {"max_tokens": (1, 1 << 20), "temperature": (0, 2), "top_p": (0, 1)}
    for key, value in raw.items():
        low, high = ranges[key]
        whole = key != "max_tokens" or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, int | float) or not whole or not low <= value <= high:
            raise _bad(f"defaults.{key} must lie between {low:g} and {high:g}")
    return GenerationDefaults(**raw)


def _bad(why: str) -> AdapterRefused:
    return AdapterRefused(Reason.PROMPT_FORMAT, f"the prompt format is not valid: {why}")
