"""One prompt to several models at once: submitted together, so that one batch computes them, and told side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.errors import LoraplaneError
from adapters.prompts import Message
from serving.answers import Answer, Choice
from serving.commands import ChatCommand, CompletionCommand, Wishes
from serving.gateway import Gateway
from serving.resolver import Target


@dataclass(frozen=True, slots=True)
class CompareCommand:
    """What to ask of whom. Either messages, each model's in its own format, or a raw prompt; wishes hold for all."""

    models: tuple[str, ...]
    wishes: Wishes
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] = ""


@dataclass(frozen=True, slots=True)
class Side:
    """One model's answer, or the error that came in its place. total_s: seconds from the request to its end."""

    answer: Answer
    choice: Choice | None
    error: LoraplaneError | None
    total_s: float


async def compare(gateway: Gateway, command: CompareCommand, seed: int) -> list[Side]:
    """All answers, in the order of the models. An alias means its own version: canaries and shadows are left aside.

    A model that cannot be resolved, or a prompt that one of them cannot take, refuses the whole; one that fails on the
    way fails alone. Raises as `Gateway.chat` does, and the first model's error when all of them fail.
    """
    gateway.admission.enter()
    try:
        started = gateway.monotonic()
        targets = await asyncio.gather(*(_target(gateway, command, at) for at in range(len(command.models))))
        wishes = replace(command.wishes, seed=seed if command.wishes.seed is None else command.wishes.seed)
        answers = [await _prepared(gateway, command, target, wishes, started) for target in targets]
        sides = await asyncio.gather(*(_side(gateway, answer, started) for answer in answers))
    finally:
        gateway.admission.leave()
    errors = [side.error for side in sides if side.error is not None]
    if len(errors) == len(sides):
        raise errors[0]
    return sides


async def _target(gateway: Gateway, command: CompareCommand, at: int) -> Target:
    try:
        return await gateway.resolver.resolve(command.models[at])
    except LoraplaneError as error:
        if error.param == "model":  # as other routes call it; here there are several
            error.param = f"models[{at}]"
        raise


async def _prepared(
    gateway: Gateway, command: CompareCommand, target: Target, wishes: Wishes, started: float
) -> Answer:
    wishes = replace(wishes, model=target.weights.model)
    prompt: Sequence[int]
    if command.messages:
        prompt = await gateway.render(ChatCommand(wishes, command.messages), target.prompt_format)
        limit = gateway.limits.default_chat_tokens
        return gateway.prepare("cmp", wishes, target, [prompt], "messages", limit, started)
    given = command.prompt
    prompt = await gateway.encode(given) if isinstance(given, str) else list(given)
    raw = CompletionCommand(wishes, (given,))
    return gateway.prepare(
        "cmp", wishes, target, [prompt], "prompt", gateway.limits.default_completion_tokens, started, raw
    )


async def _side(gateway: Gateway, answer: Answer, started: float) -> Side:
    choice, error = None, None
    gateway.runs(answer)  # a revocation is to reach it as it does any other
    try:
        await answer.begin()
        (choice,) = await answer.collect()
    except LoraplaneError as found:
        error = found
    finally:
        answer.close()
    return Side(answer, choice, error, gateway.monotonic() - started)
