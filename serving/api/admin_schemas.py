"""What the registry's routes accept: closed schemas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from adapters.alias_moves import ANY, Expected
from adapters.errors import InvalidRequest
from adapters.reports import LONGEST_RATIO, MOST_EXAMPLES, GatePolicy, Report
from adapters.wire import report_from_wire
from serving.api.schemas import WHOLE, Closed

# No NUL: Postgres cannot store it.
Line = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]
Short = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Ratio = Annotated[float, Field(ge=0, le=LONGEST_RATIO)]
# Kept as they came: a report's digest is over its figures as they were written.
Figure = int | float
Score = Annotated[Figure, Field(ge=0, le=1)]
Difference = Annotated[Figure, Field(ge=-1, le=1)]
Number = Annotated[int, Field(ge=1, le=999_999_999), WHOLE]


class PublishedFiles(Closed):
    """The files of a version by name, as digests of blobs that were sent before."""

    config: Digest = Field(alias="adapter_config.json")
    weights: Digest = Field(alias="adapter_model.safetensors")
    prompt_format: Digest | None = Field(None, alias="prompt_format.json")
    golden_rows: Digest | None = Field(None, alias="golden_rows.json")

    @property
    def digests(self) -> dict[str, str]:
        """File name -> digest."""
        given: dict[str, str] = self.model_dump(by_alias=True, exclude_none=True)
        return given


class PublishRequest(Closed):
    """POST /v1/adapters/{name}/versions. prompt_format: in place of a prompt_format.json among the files."""

    files: PublishedFiles
    base: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]+$")] | None = None
    prompt_format: dict[str, JsonValue] | None = None
    facts: Annotated[dict[str, JsonValue], Field(max_length=200)] | None = None
    note: Line | None = None


class AliasRequest(Closed):
    """PUT .../aliases/{alias}. expected_version: the version that the alias must point at now, null for none;
    without the field it may point anywhere."""

    version: Number
    expected_version: Number | None = None
    reason: Line | None = None


class PromoteRequest(Closed):
    """POST .../promote. force overrules the gate and needs a reason; both are recorded. warm false: move the alias
    without having the version ready first."""

    version: Number
    reason: Line | None = None
    force: bool | None = None
    warm: bool | None = None
    expected_version: Number | None = None


class RollbackRequest(Closed):
    """POST .../rollback: to the champion before, or to the version named."""

    reason: Line
    to: Number | None = None


class FallbackRequest(Closed):
    """PUT .../aliases/{alias}/fallback: while the alias's version is set aside, 503, or the version before answers."""

    policy: Literal["503", "previous"]
    reason: Line | None = None


class WarmRequest(Closed):
    """POST .../versions/{number}/warm: ready for ttl_s seconds at least, a week at most."""

    ttl_s: Annotated[float, Field(ge=1, le=604_800)] = 600.0


class RetireRequest(Closed):
    """POST .../versions/{number}/retire. deadline_s: how long running answers get before they are ended."""

    reason: Line | None = None
    deadline_s: Annotated[float, Field(ge=0, le=240)] | None = None


class RevokeRequest(Closed):
    """POST .../versions/{number}/revoke. in_flight: whether running answers finish, or end with an error."""

    reason: Annotated[Line, Field(min_length=1)]
    in_flight: Literal["finish", "end"] = "finish"


class RestoreRequest(Closed):
    """POST .../versions/{number}/restore."""

    reason: Annotated[Line, Field(min_length=1)]


def expected(request: AliasRequest | PromoteRequest) -> Expected:
    """What the alias must point at: a number, None for nothing, or ANY when the caller did not say."""
    return request.expected_version if "expected_version" in request.model_fields_set else ANY


class PolicyRequest(Closed):
    """PUT .../policy. Ratios lie in 0..1; length_ratio is [lowest, highest] of answer words to reference words."""

    object: Literal["adapter.policy"] | None = None
    data_digest: Digest
    min_n: Annotated[int, Field(ge=1, le=MOST_EXAMPLES), WHOLE]
    metric: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rouge1"
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.02
    max_empty_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    length_ratio: Annotated[list[Ratio], Field(min_length=2, max_length=2)] | None = None

    def to_record(self) -> GatePolicy:
        """The policy as the gate reads it. Raises InvalidRequest when the ratio's bounds are crossed."""
        fields = self.model_dump(exclude={"object", "length_ratio"})
        if self.length_ratio is None:
            return GatePolicy(**fields)
        low, high = self.length_ratio
        if low > high:
            raise InvalidRequest("length_ratio must be [lowest, highest].", "length_ratio")
        return GatePolicy(**fields, length_ratio=(low, high))


class SystemRequest(Closed):
    """One system's scores in a report."""

    role: Literal["base", "champion", "candidate"]
    model: Short
    digest: Short
    scores: dict[Short, Score]
    length_ratio: Annotated[Figure, Field(ge=0)]
    empty_rate: Score


class DifferenceRequest(Closed):
    """A paired difference in a report."""

    against: Literal["base", "champion", "candidate"]
    metric: Short
    mean: Difference
    low: Difference
    high: Difference
    n: Annotated[int, Field(ge=1, le=MOST_EXAMPLES), WHOLE]


class ReportRequest(Closed):
    """POST .../reports: an evaluation report, as `loraplane eval run` writes it, with every example in it."""

    object: Literal["adapter.report"] | None = None
    id: Short | None = None
    adapter: Short
    number: Number
    adapter_digest: Digest
    base_digest: Digest
    champion_digest: Digest | None
    data: Line
    data_digest: Digest
    code: Line
    settings: dict[str, JsonValue]
    n: Annotated[int, Field(ge=1, le=MOST_EXAMPLES), WHOLE]
    systems: Annotated[list[SystemRequest], Field(max_length=8)]
    differences: Annotated[list[DifferenceRequest], Field(max_length=64)]
    examples: Annotated[list[dict[str, JsonValue]], Field(max_length=100_000)]
    created_at: Short

    def to_record(self, name: str) -> Report:
        """The report. Raises InvalidRequest when it speaks of another adapter than the path."""
        if self.adapter != name:
            raise InvalidRequest(f"The report is about {self.adapter!r}, not {name!r}.", "adapter")
        return report_from_wire(self.model_dump(exclude={"object", "id"}))
