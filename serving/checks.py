"""What of a request cannot be had here, refused by its field before anything is computed. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adapters.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from serving.commands import ChatCommand, CompletionCommand, Wishes
from serving.engine.request import EngineFacts
from serving.limits import GatewayLimits


def check_wishes(
    wishes: Wishes,
    limits: GatewayLimits,
    facts: EngineFacts,
    vocabulary: int,
    writes_newlines: Callable[[], bool],
) -> None:
    """Raise InvalidRequest or UnsupportedParameter for what is too much, too long, or not in the vocabulary.

    vocabulary: how many tokens the base knows; writes_newlines: whether a line break is among them.
    """
    if wishes.n > limits.max_choices:
        raise InvalidRequest(f"n may be at most {limits.max_choices} here.", "n")
    if len(wishes.stops) > limits.max_stops:
        raise InvalidRequest(f"stop may hold at most {limits.max_stops} texts.", "stop")
    if any(len(stop) > limits.max_stop_chars for stop in wishes.stops):
        raise InvalidRequest(f"A stop text may have at most {limits.max_stop_chars} characters.", "stop")
    if facts.max_answer_len and any("\n" in stop for stop in wishes.stops) and not writes_newlines():
        raise UnsupportedParameter(
            "This model's vocabulary has no line break, so such a stop is never met; leave it out.", "stop"
        )
    if wishes.num_beams > 1:
        _check_beams(wishes, facts)
    if len(wishes.logit_bias) > limits.max_logit_bias:
        raise InvalidRequest(f"logit_bias may hold at most {limits.max_logit_bias} tokens.", "logit_bias")
    _check_ids(wishes.logit_bias, vocabulary, "logit_bias")
    _check_ids(wishes.stop_token_ids, vocabulary, "stop_token_ids")


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, param: str) -> None:
    """Raise InvalidRequest for a prompt without tokens, or with one that the base does not know."""
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest("The prompt has no tokens.", param)
        _check_ids(prompt, vocabulary, param)


def check_count(command: CompletionCommand, limits: GatewayLimits) -> None:
    """Raise InvalidRequest for more sequences than one request may have."""
    if len(command.prompts) * command.wishes.n > limits.max_sequences:
        raise InvalidRequest(f"Prompts times n may be at most {limits.max_sequences} in one request.", "prompt")


def check_echo(command: CompletionCommand, facts: EngineFacts) -> None:
    """Raise UnsupportedParameter where there is nothing to repeat."""
    if command.echo and facts.max_answer_len:
        raise UnsupportedParameter(
            "This base is an encoder-decoder: its answer does not go on from the prompt, so there is nothing to "
            "repeat and the prompt has no log-probabilities; leave echo out.",
            "echo",
        )


def check_continued(command: ChatCommand, facts: EngineFacts) -> None:
    """Raise UnsupportedParameter where an answer cannot go on from a message."""
    if command.continue_final and facts.max_answer_len:
        raise UnsupportedParameter(
            "This base is an encoder-decoder: its answer is a text of its own and cannot go on from a message; "
            "leave continue_final_message out.",
            "continue_final_message",
        )


def most_tokens(
    given: int | None, wanted: int, prompts: Sequence[Sequence[int]], facts: EngineFacts, param: str
) -> int:
    """The bound on new tokens. What was asked for must fit; a default is cut to what the context has left.

    Raises ContextLengthExceeded, InvalidRequest.
    """
    longest = max(map(len, prompts))
    if given == 0 and longest <= facts.max_model_len:
        return 0
    room = facts.room(longest)
    if room < 1 or (given is not None and given > room):
        if facts.max_answer_len and room:
            raise InvalidRequest(f"This model's answers have at most {room} tokens; lower max_tokens.", "max_tokens")
        encoder = bool(facts.max_answer_len)
        raise ContextLengthExceeded(longest, given or 0, facts.max_model_len, param, encoder=encoder)
    return min(wanted, room)


def _check_beams(wishes: Wishes, facts: EngineFacts) -> None:
    if not facts.max_answer_len:
        raise UnsupportedParameter(
            "Beam search is served for encoder-decoder bases; leave num_beams out, or set it to 1.", "num_beams"
        )
    if wishes.num_beams > facts.max_rows:
        raise InvalidRequest(f"num_beams may be at most {facts.max_rows} here.", "num_beams")
    if wishes.n > 1:
        raise InvalidRequest("Beam search gives one answer, the best; set n to 1.", "n")
    if wishes.temperature:
        raise InvalidRequest("Beam search draws nothing; leave temperature out, or set it to 0.", "temperature")
    for name, drawn in (("top_p", wishes.top_p not in (None, 1)), ("top_k", wishes.top_k > 0), ("min_p", wishes.min_p)):
        if drawn:
            raise InvalidRequest(f"Beam search draws nothing; leave {name} out.", name)
    if wishes.logprobs is not None:
        raise UnsupportedParameter("Beam search tells no log-probabilities; leave logprobs out.", "logprobs")


def _check_ids(ids: Sequence[int] | Mapping[int, float], vocabulary: int, param: str) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocabulary):
        raise InvalidRequest(f"Token ids must lie between 0 and {vocabulary - 1}.", param)
