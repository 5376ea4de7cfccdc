"""Records as JSON and back: the one translation that the command line (`--json`) and HTTP share.

Every object says what it is in `object`, in the manner of the OpenAI lists: base, adapter, adapter.version,
adapter.alias, adapter.move, adapter.standing, adapter.residency, adapter.withdrawal, adapter.policy, adapter.report,
adapter.decision, list. Times are ISO 8601 in UTC.
Reading ignores keys it does not know, so that an older client understands a newer server.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from adapters.canaries import CanaryReport, Split, alias_id
from adapters.errors import InvalidRequest
from adapters.records import (
    AdapterSummary,
    AdapterVersion,
    AliasRecord,
    BaseRecord,
    Move,
    Residency,
    Standing,
    Withdrawal,
)
from adapters.reports import Decision, GatePolicy, Report, report_from_json

Json = dict[str, Any]
T = TypeVar("T")


def page(items: Iterable[Json]) -> Json:
    """A list object of objects already translated."""
    return {"object": "list", "data": list(items)}


def page_items(raw: object) -> list[Any]:
    """What a list object holds. Raises InvalidRequest when it is none."""
    data = raw.get("data") if isinstance(raw, Mapping) else None
    if not isinstance(data, list):
        raise InvalidRequest("expected a list object with 'data'")
    return data


def base_to_json(base: BaseRecord) -> Json:
    return {"object": "base", "id": base.name, **_fields(base)}


def base_from_json(raw: object) -> BaseRecord:
    return _read(BaseRecord, raw)


def version_to_json(version: AdapterVersion) -> Json:
    return {"object": "adapter.version", "id": version.id, **_fields(version)}


def version_from_json(raw: object) -> AdapterVersion:
    return _read(AdapterVersion, raw)


def alias_to_json(alias: AliasRecord) -> Json:
    return {"object": "adapter.alias", "id": f"{alias.name}@{alias.alias}", **_fields(alias)}


def alias_from_json(raw: object) -> AliasRecord:
    return _read(AliasRecord, raw)


def summary_to_json(summary: AdapterSummary) -> Json:
    return {
        "object": "adapter",
        "id": summary.name,
        "name": summary.name,
        "champion": summary.champion,
        "aliases": [alias_to_json(a) for a in summary.aliases],
        "versions": [version_to_json(v) for v in summary.versions],
        "standings": [standing_to_json(s) for s in summary.standings],
    }


def summary_from_json(raw: object) -> AdapterSummary:
    return _read(AdapterSummary, raw)


def standing_to_json(standing: Standing) -> Json:
    return {"object": "adapter.standing", "id": standing.id, **_fields(standing)}


def standing_from_json(raw: object) -> Standing:
    return _read(Standing, raw)


def residency_to_json(residency: Residency) -> Json:
    return {"object": "adapter.residency", "id": residency.model, **_fields(residency)}


def residency_from_json(raw: object) -> Residency:
    return _read(Residency, raw)


def withdrawal_to_json(found: Withdrawal) -> Json:
    residency = None if found.residency is None else residency_to_json(found.residency)
    return {
        "object": "adapter.withdrawal",
        "id": found.standing.id,
        "standing": standing_to_json(found.standing),
        "residency": residency,
    }


def withdrawal_from_json(raw: object) -> Withdrawal:
    return _read(Withdrawal, raw)


def split_to_json(split: Split) -> Json:
    return {"object": "adapter.split", "id": alias_id(split), **_fields(split)}


def split_from_json(raw: object) -> Split:
    return _read(Split, raw)


def canary_report_to_json(report: CanaryReport) -> Json:
    """The figures as they were counted, and beside them what follows from them."""
    arms = {
        name: {
            **_fields(figures),
            "error_rate": figures.error_rate,
            "first_token_p95_s": figures.first_token_p95_s,
        }
        for name, figures in (("champion", report.champion), ("canary", report.canary))
    }
    shadow = report.shadow
    return {
        "object": "adapter.canary",
        "id": alias_id(report.split),
        "live": report.ended is None,
        "split": split_to_json(report.split),
        **arms,
        "shadow": {**_fields(shadow), "agreement": shadow.agreement, "mean_gap": shadow.mean_gap},
        "fault": report.fault,
        "ended": None if report.ended is None else move_to_json(report.ended),
    }


def canary_report_from_json(raw: object) -> CanaryReport:
    return _read(CanaryReport, raw)


def move_to_json(move: Move) -> Json:
    return {"object": "adapter.move", **_fields(move)}


def move_from_json(raw: object) -> Move:
    return _read(Move, raw)


def policy_to_json(policy: GatePolicy) -> Json:
    return {"object": "adapter.policy", **_fields(policy)}


def policy_from_json(raw: object) -> GatePolicy:
    return _read(GatePolicy, raw)


def decision_to_json(decision: Decision) -> Json:
    return {"object": "adapter.decision", **_fields(decision)}


def decision_from_json(raw: object) -> Decision:
    return _read(Decision, raw)


def report_to_json(report: Report) -> Json:
    """The whole report, examples included."""
    return {"object": "adapter.report", "id": report.digest, **_fields(report)}


def report_summary_to_json(report: Report) -> Json:
    """The report for a listing: everything but its settings' and examples' bulk; `id` is its digest."""
    whole = report_to_json(report)
    return {**whole, "examples": []}


def report_from_wire(raw: object) -> Report:
    """A report from what `report_to_json` wrote, or from a report's own JSON. Raises InvalidRequest.

    A listing's summary reads back too, with no examples; its digest is then the summary's `id`, not `.digest`.
    """
    if not isinstance(raw, Mapping):
        raise InvalidRequest("a report must be a JSON object")
    named = {f.name for f in fields(Report)}
    try:
        return report_from_json({k: v for k, v in raw.items() if k in named})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"not a report: {type(error).__name__} {error}") from error


def plain(value: Any) -> Any:
    """A value of records, mappings and times as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        # A time without a zone can only be one of ours that lost it in a database: those are UTC.
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return aware.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value


def _fields(record: Any) -> Json:
    return {f.name: plain(getattr(record, f.name)) for f in fields(record)}


@cache
def _reader(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(type[Any], kind))


def _read(kind: type[T], raw: object) -> T:
    """A record of foreign JSON. Raises InvalidRequest that names the first field that is wrong."""
    try:
        record: T = _reader(cast(Hashable, kind)).validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or kind.__name__
        raise InvalidRequest(f"{where}: {first['msg']}", where) from error
    return record
