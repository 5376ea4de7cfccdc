"""The commands that try a version before it is champion: canary, shadow, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from adapters.canaries import Arm, CanaryLimits, CanaryReport, Split, Sticky, alias_id
from adapters.errors import InvalidRequest
from adapters.options import (
    ExpectOption,
    HomeOption,
    JsonOption,
    ReasonOption,
    UrlOption,
    adapter_of,
    expected_of,
    opened,
)
from adapters.records import CHAMPION
from adapters.screen import say, show_json, show_table, when
from adapters.wire import canary_report_to_json, move_to_json, split_to_json

_DEFAULTS = CanaryLimits()


class _SetByDefault(TyperGroup):
    """`canary NAME ...` means `canary set NAME ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["set", *args]
        return super().parse_args(ctx, args)


NameArgument = Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="The adapter; its champion, or an alias.")]
ToOption = Annotated[int, typer.Option("--to", min=1, help="The version that is tried.")]

canary = typer.Typer(
    cls=_SetByDefault,
    no_args_is_help=True,
    help="Let a version answer some of an alias's requests; it is rolled back on errors, latency or quality.\n\n"
    "Example: loraplane canary summarize --to 4 --percent 10 (set may be left out)",
)
shadow = typer.Typer(
    cls=_SetByDefault,
    no_args_is_help=True,
    help="Let a version compute some of an alias's requests beside the live answer, never shown.\n\n"
    "Example: loraplane shadow summarize --to 4 --percent 5 (set may be left out)",
)


@canary.command("set")
def canary_set(
    name: NameArgument,
    to: ToOption,
    percent: Annotated[float, typer.Option("--percent", help="Share of the requests: above 0, at most 50.")] = 10.0,
    sticky: Annotated[
        str, typer.Option("--sticky", metavar="user|key", help="What keeps its arm: the request's user, or its key.")
    ] = "user",
    min_requests: Annotated[
        int, typer.Option(min=1, help="Requests of each arm before anything is judged.")
    ] = _DEFAULTS.min_requests,
    max_error_excess: Annotated[
        float, typer.Option(help="How far its error rate may exceed the champion's.")
    ] = _DEFAULTS.max_error_excess,
    max_latency_ratio: Annotated[
        float, typer.Option(help="How many times the champion's its first tokens may take (95 of 100).")
    ] = _DEFAULTS.max_latency_ratio,
    latency_slack: Annotated[
        float, typer.Option(help="Seconds that the first tokens must be slower besides.")
    ] = _DEFAULTS.latency_slack_s,
    min_shadow_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a shadow of this version before quality is judged.")
    ] = _DEFAULTS.min_shadow_tokens,
    min_agreement: Annotated[
        float, typer.Option(help="Share of these tokens that must be the champion's.")
    ] = _DEFAULTS.min_agreement,
    max_logprob_gap: Annotated[
        float, typer.Option(help="Largest mean difference of their log-probabilities.")
    ] = _DEFAULTS.max_logprob_gap,
    reason: ReasonOption = "",
    expect: ExpectOption = "any",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin a canary, or change its share. Whatever moves the alias ends it; promote NAME@N makes it champion.

    Example: loraplane canary summarize --to 4 --percent 10 --sticky user
    """
    limits = CanaryLimits(
        min_requests,
        max_error_excess,
        max_latency_ratio,
        latency_slack,
        min_shadow_tokens,
        min_agreement,
        max_logprob_gap,
    )
    if sticky not in list(Sticky):
        raise InvalidRequest(f"--sticky takes user or key, not {sticky!r}", "sticky")
    adapter, alias = _alias_of(name)
    expected = expected_of(expect)
    with opened(home, url) as door:
        split = door.set_canary(
            adapter,
            to,
            percent,
            alias=alias,
            sticky=Sticky(sticky),
            limits=limits,
            reason=reason,
            expected=expected,
        )
    _tell_split(split, as_json)


@canary.command("show")
def canary_show(
    name: NameArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """What is tried beside the alias, or was last, and what came of it over all gateways.

    Example: loraplane canary show summarize --json
    """
    adapter, alias = _alias_of(name)
    with opened(home, url) as door:
        report = door.trials(adapter, alias)
    if as_json:
        show_json(canary_report_to_json(report))
        return
    _tell_report(report)


@canary.command("stop")
def canary_stop(
    name: NameArgument,
    reason: ReasonOption = "",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the canary: the alias's version answers everybody again. A shadow goes on.

    Example: loraplane canary stop summarize --reason "seen enough"
    """
    _stop(name, Arm.CANARY, reason, home, url, as_json)


@shadow.command("set")
def shadow_set(
    name: NameArgument,
    to: ToOption,
    percent: Annotated[float, typer.Option("--percent", help="Share of the requests: above 0, at most 100.")] = 5.0,
    reason: ReasonOption = "",
    expect: ExpectOption = "any",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin a shadow, or change its share. Its figures are those of canary show NAME.

    Example: loraplane shadow summarize --to 4 --percent 5
    """
    adapter, alias = _alias_of(name)
    expected = expected_of(expect)
    with opened(home, url) as door:
        split = door.set_shadow(adapter, to, percent, alias=alias, reason=reason, expected=expected)
    _tell_split(split, as_json)


@shadow.command("stop")
def shadow_stop(
    name: NameArgument,
    reason: ReasonOption = "",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the shadow. A canary goes on.

    Example: loraplane shadow stop summarize
    """
    _stop(name, Arm.SHADOW, reason, home, url, as_json)


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="2 to 8 models: base, name, name@3.")],
    message: Annotated[str, typer.Option("--message", help="One user message, in each model's own format.")] = "",
    prompt: Annotated[str, typer.Option("--prompt", help="A raw text that each continues.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Bound on new tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For all of them.")] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """One prompt to several models of the running server, in one batch; their answers side by side.

    Example: loraplane compare base summarize@3 summarize@4 --message "Summarize: ..."
    """
    if bool(message) == bool(prompt):
        raise InvalidRequest("give either --message TEXT or --prompt TEXT", "prompt")
    body: dict[str, object] = {"models": models, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    body |= {"messages": [{"role": "user", "content": message}]} if message else {"prompt": prompt}
    with opened(home, url) as door:
        answer = door.compare(body)
    if as_json:
        show_json(answer)
        return
    for side in answer["data"]:
        digest = (side["adapter_digest"] or side["base_digest"])[:12]
        if side["error"] is not None:
            say(f"== {side['model']} ({digest}): {side['error']['code']}: {side['error']['message']}")
            continue
        timing = side["timing"]
        say(
            f"== {side['model']} ({digest}): {side['usage']['completion_tokens']} tokens, first after "
            f"{timing['first_token_ms']:.0f} ms, all after {timing['total_ms']:.0f} ms, {side['finish_reason']}"
        )
        say(side["text"])


def _alias_of(text: str) -> tuple[str, str]:
    parsed = adapter_of(text)
    if parsed.number is not None:
        raise InvalidRequest(f"name the alias that is split, as in {parsed.name}; the version goes after --to", "name")
    return parsed.name, parsed.alias or CHAMPION


def _stop(name: str, kind: Arm, reason: str, home: Path | None, url: str | None, as_json: bool) -> None:
    adapter, alias = _alias_of(name)
    with opened(home, url) as door:
        move = door.stop_trial(adapter, kind, alias=alias, reason=reason)
    if as_json:
        show_json(move_to_json(move))
        return
    say(f"{adapter}@{alias} has no {kind.value} any more; {adapter}@{move.to_number} answers")


def _tell_split(split: Split, as_json: bool) -> None:
    if as_json:
        show_json(split_to_json(split))
        return
    say("; ".join(_parts(split)))


def _parts(split: Split) -> list[str]:
    parts = [f"{alias_id(split)} is {split.name}@{split.number}"]
    if split.canary is not None:
        tried = split.canary
        parts.append(f"canary {split.name}@{tried.number} answers {tried.percent:g} %, sticky by {tried.sticky.value}")
    if split.shadow is not None:
        parts.append(f"shadow {split.name}@{split.shadow.number} computes {split.shadow.percent:g} % beside")
    return parts


def _tell_report(report: CanaryReport) -> None:
    say("; ".join(_parts(report.split)))
    rows = [("champion", report.split.number, report.champion)]
    if report.split.canary is not None:
        rows.append(("canary", report.split.canary.number, report.canary))
        show_table(
            ("ARM", "VERSION", "REQUESTS", "ERRORS", "ERROR RATE", "TOKENS", "FIRST TOKEN P95"),
            [
                (
                    arm,
                    f"{report.split.name}@{number}",
                    str(told.requests),
                    str(told.errors),
                    f"{told.error_rate:.1%}",
                    str(told.tokens),
                    f"{told.first_token_p95_s * 1000:.0f} ms",
                )
                for arm, number, told in rows
            ],
        )
    if report.split.shadow is not None:
        seen = report.shadow
        say(
            f"shadow: {seen.shadows} compared, {seen.dropped} dropped, {seen.failed} failed; {seen.agreement:.1%} of "
            f"{seen.compared} tokens agree, mean log-probability gap {seen.mean_gap:+.3g}"
        )
    if report.fault is not None:
        say(f"at fault: {report.fault}")
    if report.ended is not None:
        say(f"ended {when(report.ended.at)} by {report.ended.who}: {report.ended.why or report.ended.action.value}")
