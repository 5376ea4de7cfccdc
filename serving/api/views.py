"""Answers as the OpenAI clients read them: whole objects and chunks, each naming the weights it came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.answers import Choice, Head, Piece, Usage
from serving.resolver import Weights
from serving.text import TokenInfo

Json = dict[str, Any]


def weights_fields(weights: Weights) -> Json:
    """The extra fields of every body and chunk (contract C2); null where the base itself answers."""
    return {
        "adapter": weights.adapter,
        "adapter_version": weights.version,
        "adapter_digest": weights.digest,
        "base_digest": weights.base_digest,
        **({} if weights.instead_of is None else {"adapter_instead_of": weights.instead_of}),
    }


def head_fields(head: Head, kind: str, extra: Json) -> Json:
    """What every object of one answer begins with."""
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.weights.model,
        "system_fingerprint": head.weights.fingerprint,
        **extra,
        **weights_fields(head.weights),
        **({} if head.taken is None else {"adapter_arm": head.taken.arm.value}),
    }


def usage_object(usage: Usage) -> Json:
    """The OpenAI usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chat_choice(choice: Choice, logprobs: bool, top: int) -> Json:
    """One whole choice of a chat completion."""
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(choice.tokens, top) if logprobs else None,
        "finish_reason": choice.finish.value,
    }


def chat_delta(index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
    """One choice of a chat chunk."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def chat_piece(piece: Piece, logprobs: bool, top: int) -> Json:
    """A piece of an answer as a choice of a chat chunk."""
    delta = {"content": piece.text} if piece.text else {}
    told = chat_logprobs(piece.tokens, top) if logprobs and piece.tokens else None
    return chat_delta(piece.index, delta, told, None if piece.finish is None else piece.finish.value)


def chat_logprobs(tokens: Sequence[TokenInfo], top: int) -> Json:
    """Log-probabilities in the shape of chat."""
    content = [
        {**_token(t.text, t.logprob), "top_logprobs": [_token(text, value) for text, value in t.top[:top]]}
        for t in tokens
        if t.logprob is not None
    ]
    return {"content": content, "refusal": None}


def completion_choice(index: int, text: str, tokens: Sequence[TokenInfo], top: int | None, finish: str | None) -> Json:
    """One choice of a completion, whole or a chunk's."""
    logprobs = None if top is None else completion_logprobs(tokens, top)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def completion_logprobs(tokens: Sequence[TokenInfo], top: int) -> Json:
    """Log-probabilities in the shape of completions: parallel arrays. The chosen token is always among the top.

    The first token of a repeated prompt has null in both.
    """
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [_best(t, top) for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


def _best(token: TokenInfo, top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    best: dict[str, float] = {}
    for text, value in token.top[:top]:
        best.setdefault(text, value)  # of tokens that read alike, the likeliest
    best.setdefault(token.text, token.logprob)
    return best


def _token(text: str, logprob: float) -> Json:
    # U+FFFD is part of a character: its bytes are not to be had from the text.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
