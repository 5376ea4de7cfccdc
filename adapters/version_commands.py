"""The commands on a version while it is served: warm, pin, unpin, retire, revoke, restore; and an alias's fallback."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.errors import InvalidRequest
from adapters.options import HomeOption, JsonOption, ReasonOption, UrlOption, adapter_of, opened, version_of
from adapters.records import CHAMPION, Fallback, InFlight, Residency, Standing, VersionState, Withdrawal
from adapters.screen import say, show_json, size
from adapters.wire import alias_to_json, residency_to_json, standing_to_json, withdrawal_to_json

VersionArgument = Annotated[str, typer.Argument(metavar="NAME@N", help="The version.")]
ToldReason = Annotated[str, typer.Option("--reason", help="Why; it is kept in the history, and callers are told.")]


def warm(
    model: VersionArgument,
    ttl: Annotated[float, typer.Option("--ttl", min=1, max=604_800, help="Seconds that it stays ready.")] = 600.0,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a version ready on the running server: in host memory, and in a slot if one is empty.

    Example: loraplane warm summarize@4 --ttl 600
    """
    name, number = version_of(model)
    with opened(home, url) as door:
        found = door.warm(name, number, ttl)
    _tell_residency(found, f"stays ready for {ttl:g} s at least", as_json)


def pin(model: VersionArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Keep a version in a slot of the running server, whatever else is asked for; also after a restart.

    Example: loraplane pin summarize@4
    """
    name, number = version_of(model)
    with opened(home, url) as door:
        found = door.pin(name, number, True)
    _tell_residency(found, "stays there until it is unpinned", as_json)


def unpin(model: VersionArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Let a pinned version's slot be given away again.

    Example: loraplane unpin summarize@4
    """
    name, number = version_of(model)
    with opened(home, url) as door:
        found = door.pin(name, number, False)
    _tell_residency(found, "may make room for others", as_json)


def retire(
    model: VersionArgument,
    reason: ToldReason = "",
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", min=0, max=240, help="Seconds that running answers get; the server's own: 30."),
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Unload a version: no new request gets it, running ones finish, then its bytes are freed.

    No alias may point at it. loraplane restore brings it back.

    Example: loraplane retire summarize@1 --reason "two champions ago"
    """
    name, number = version_of(model)
    with opened(home, url) as door:
        found = door.retire(name, number, reason=reason, deadline_s=deadline)
    _tell_withdrawal(found, as_json)


def revoke(
    model: VersionArgument,
    reason: ToldReason = "",
    in_flight: Annotated[
        str, typer.Option("--in-flight", metavar="finish|end", help="What becomes of running answers.")
    ] = "finish",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a version everywhere within a second, under every name that its bytes have; aliases at it are refused too.

    Example: loraplane revoke summarize@3 --reason "trained on a leaked set" --in-flight end
    """
    name, number = version_of(model)
    if not reason.strip():
        raise InvalidRequest("revoke needs --reason TEXT; it is kept in the history and told to callers", "reason")
    if in_flight not in set(InFlight):
        raise InvalidRequest(f"--in-flight takes finish or end, not {in_flight!r}", "in_flight")
    with opened(home, url) as door:
        found = door.revoke(name, number, reason=reason, in_flight=InFlight(in_flight))
    _tell_withdrawal(found, as_json)


def restore(
    model: VersionArgument,
    reason: ReasonOption = "",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a retired or revoked version back into service.

    Example: loraplane restore summarize@3 --reason "the wrong version was revoked"
    """
    name, number = version_of(model)
    if not reason.strip():
        raise InvalidRequest("restore needs --reason TEXT; it is kept in the history", "reason")
    with opened(home, url) as door:
        found = door.restore(name, number, reason=reason)
    if as_json:
        show_json(standing_to_json(found))
    else:
        say(f"{found.id} is in service")


def fallback(
    model: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="The alias; without one, the champion.")],
    policy: Annotated[str, typer.Argument(metavar="503|previous", help="Who answers: nobody, or the version before.")],
    reason: ReasonOption = "",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say who answers for an alias while the engine has its version set aside (adapter_quarantined).

    An answer of the version before names it, and says in whose place it answers.

    Example: loraplane fallback summarize previous
    """
    wanted = adapter_of(model)
    if wanted.number is not None:
        raise InvalidRequest(
            f"a version has no fallback, an alias has: give {wanted.name} or {wanted.name}@ALIAS", "name"
        )
    if policy not in set(Fallback):
        raise InvalidRequest(f"the policy is 503 or previous, not {policy!r}", "policy")
    with opened(home, url) as door:
        record = door.set_fallback(wanted.name, wanted.alias or CHAMPION, Fallback(policy), reason=reason)
    if as_json:
        show_json(alias_to_json(record))
        return
    who = "the version before it answers" if record.fallback is Fallback.PREVIOUS else "requests get a 503"
    say(f"while {record.name}@{record.alias} is set aside, {who}")


def _tell_residency(found: Residency, meaning: str, as_json: bool) -> None:
    if as_json:
        show_json(residency_to_json(found))
    else:
        say(f"{found.model} is on the {found.tier} ({size(found.size_bytes)}) and {meaning}")


def _tell_withdrawal(found: Withdrawal, as_json: bool) -> None:
    if as_json:
        show_json(withdrawal_to_json(found))
        return
    standing = found.standing
    say(f"{standing.id} is {standing.state.value} ({standing.who}): {_consequence(standing)}")
    if found.residency is not None:
        say(f"Its bytes are {found.residency.tier}: {size(found.residency.size_bytes)} freed.")


def _consequence(standing: Standing) -> str:
    if standing.state is VersionState.RETIRED:
        return "no new request gets it"
    ended = "was ended" if standing.in_flight is InFlight.END else "may finish"
    return f"its bytes are refused under every name; what ran {ended}"
