"""Every way Loraplane says no, in one tree.

LoraplaneError
├── Refused                       the caller asked for something that cannot be had
│   ├── InvalidRequest            a field is wrong
│   │   ├── MissingParameter
│   │   ├── UnsupportedParameter  a field of the protocol that this server does not honour
│   │   └── ContextLengthExceeded
│   ├── AdapterRefused            an adapter may not enter the registry; `reason` says why
│   ├── NotFound
│   │   ├── ModelNotFound
│   │   ├── NoChampion
│   │   ├── VersionWithdrawn      the version is there, and nobody gets it
│   │   │   ├── VersionRetired
│   │   │   └── VersionRevoked
│   │   └── RecordNotFound        a blob, report, policy or alias
│   ├── Conflict
│   │   ├── GenerationMismatch    the alias moved meanwhile
│   │   ├── GateRefused           the gate does not allow this promotion
│   │   └── DigestMismatch        the bytes are not what was declared
│   ├── InvalidKey
│   ├── HostNotAllowed
│   └── PayloadTooLarge
├── Overloaded                    come back in a moment
│   ├── QueueFull
│   ├── AdapterCapacity           every slot is leased and the wait is full
│   │   └── SlotsPinned           every slot is pinned to others: waiting does not help
│   └── DeadlineUnreachable       it could not even start before its deadline
├── Unavailable                   the server, not the caller, is at fault
│   ├── NotReady                  starting, restarting or draining
│   ├── EngineLost                the engine died while it worked on this request
│   ├── AdapterLoadFailed
│   ├── WarmFailed                a version could not be made ready, so nothing was moved
│   ├── AdapterUnloaded           the version was taken out of service while this request waited or ran
│   ├── EngineFault               the engine failed this one request
│   └── StoreFailed               the disk or the database failed, or what lies there has rotted
├── DeadlineExceeded
├── Cancelled                     the caller left
└── OperatorError                 the command line or the configuration is wrong
    ├── BaseMissing
    ├── BaseUnsupported
    ├── DownloadFailed
    ├── PortInUse
    ├── InsecureBind
    ├── HomeLocked
    ├── HomeUnusable
    ├── ServerUnreachable
    ├── ConfigInvalid
    ├── RunInvalid                a training or evaluation file is wrong
    ├── DataRefused               a data set cannot be trained or evaluated on
    └── ExtraMissing              an optional dependency is not installed

Messages are for people and say what to do; attributes are for programmes. `code` is stable and goes on the
wire. One table maps the tree to HTTP (`serving/api/errors.py`), one to exit codes (`adapters/cli.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar


class LoraplaneError(Exception):
    """Root of the tree. `param` names the request field at fault, where there is one."""

    code: ClassVar[str] = "internal_error"
    param: str | None = None

    @property
    def reason_code(self) -> str:
        """The code that goes on the wire."""
        return self.code


class Refused(LoraplaneError):
    """The caller asked for something that cannot be had; asking again changes nothing."""


class InvalidRequest(Refused):
    """A field of the request is wrong."""

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MissingParameter(InvalidRequest):
    """A required field is absent."""

    code = "missing_required_parameter"


class UnsupportedParameter(InvalidRequest):
    """A field of the protocol that this server knows and does not honour."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested tokens do not fit the context. max_tokens 0: none was asked for, the prompt fills it.

    encoder: the prompt has a place of its own, and is too long for it.
    """

    code = "context_length_exceeded"

    def __init__(
        self, prompt_tokens: int, max_tokens: int, limit: int, param: str = "messages", *, encoder: bool = False
    ) -> None:
        if encoder or prompt_tokens > limit:
            rest = ". Shorten the prompt."
        elif max_tokens and prompt_tokens < limit:
            rest = f" and {max_tokens} more were asked for. Shorten the prompt or lower max_tokens."
        else:
            rest = ", which leaves no room for an answer. Shorten the prompt."
        holds = "encoder reads" if encoder else "context holds"
        super().__init__(f"This model's {holds} at most {limit} tokens; the prompt has {prompt_tokens}{rest}", param)
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit


class Reason(StrEnum):
    """Why an adapter is refused. Values are stable and go on the wire."""

    TOO_LARGE = "too_large"
    MISSING_FILE = "missing_file"
    NOT_SAFETENSORS = "not_safetensors"  # a pickle, an archive, anything else
    LFS_POINTER = "lfs_pointer"  # a git-lfs pointer file in place of the weights
    TRUNCATED = "truncated"
    HEADER_SIZE = "st_header_size"
    HEADER_JSON = "st_header_json"
    TENSOR_SET = "st_tensor_set"
    TENSOR_NAME = "st_name"
    DTYPE = "st_dtype"
    LAYOUT = "st_layout"
    CONFIG_JSON = "config_json"
    CONFIG_FIELD = "config_field"
    UNSUPPORTED = "unsupported_feature"  # bias, modules_to_save, other methods, ...
    WRONG_BASE = "wrong_base"
    UNKNOWN_MODULE = "unknown_module"
    SHAPE = "shape"
    RANK = "rank"
    NOT_FINITE = "not_finite"
    NUMERICS = "numerics"
    PROMPT_FORMAT = "prompt_format"
    GOLDEN_ROWS = "golden_rows"
    NO_EFFECT = "no_effect"  # every B is zero: the base would answer under the adapter's name


class AdapterRefused(Refused):
    """An adapter may not enter the registry. `reason` is stable; the message says what to do."""

    code = "adapter_refused"

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def reason_code(self) -> str:
        return self.reason.value


class NotFound(Refused):
    """What was named does not exist."""

    code = "not_found"


class ModelNotFound(NotFound):
    """No base, adapter, version or alias answers to this id."""

    code = "model_not_found"
    param = "model"

    def __init__(self, model: str, nearest: Sequence[str] = ()) -> None:
        hint = f" Did you mean {', '.join(nearest)}?" if nearest else " GET /v1/models lists what is served."
        super().__init__(f"The model {model!r} does not exist.{hint}")
        self.model, self.nearest = model, tuple(nearest)


class NoChampion(ModelNotFound):
    """The adapter exists, but no version of it is promoted."""

    code = "no_champion"

    def __init__(self, name: str, versions: Sequence[str] = ()) -> None:
        NotFound.__init__(
            self,
            f"The adapter {name!r} has no champion. Promote one (loraplane promote {name}@N) or name a version: "
            f"{', '.join(versions) if versions else 'none is published yet'}.",
        )
        self.model, self.nearest = name, tuple(versions)


class VersionWithdrawn(NotFound):
    """The version exists, and is not served: somebody took it back, and said why."""

    param = "model"
    deed: ClassVar[str] = "withdrawn"

    def __init__(self, model: str, who: str, why: str) -> None:
        said = f": {why.strip().rstrip('.')}" if why.strip() else ""
        super().__init__(f"{model} was {self.deed} by {who}{said}. Ask another version; GET /v1/models lists them.")
        self.model, self.who, self.why = model, who, why


class VersionRetired(VersionWithdrawn):
    """The version is out of service for good or for a while (loraplane restore brings it back)."""

    code = "version_retired"
    deed = "retired"


class VersionRevoked(VersionWithdrawn):
    """What the version consists of may not be served, whatever it is called."""

    code = "version_revoked"
    deed = "revoked"


class RecordNotFound(NotFound):
    """A blob, report, policy or alias that is not there."""


class Conflict(Refused):
    """The state is not what the caller believed. Retrying the same call cannot help."""

    code = "conflict"


class GenerationMismatch(Conflict):
    """Compare-and-set failed: the alias points elsewhere than the caller expected, or moved away and back meanwhile."""

    code = "generation_mismatch"

    def __init__(self, name: str, alias: str, expected: int | None, actual: int | None, *, moved: bool = False) -> None:
        said = f"points at {_version(actual)}, not at {_version(expected)} as expected."
        if moved:
            said = f"points at {_version(actual)} again, or still, but it moved or was tried beside in between."
        super().__init__(f"{name}@{alias} {said} Look at `loraplane history {name}` and decide again.")
        self.name, self.alias, self.expected, self.actual = name, alias, expected, actual


def _version(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"


class GateRefused(Conflict):
    """The gate does not allow this promotion; `reasons` lists every rule that failed."""

    code = "gate_refused"

    def __init__(self, model: str, reasons: Sequence[str]) -> None:
        super().__init__(
            f"The gate refuses {model}: {'; '.join(reasons)}. Evaluate it (loraplane eval run {model}), "
            f"or overrule with --force --reason TEXT, which is recorded."
        )
        self.model, self.reasons = model, tuple(reasons)


class DigestMismatch(Conflict):
    """The bytes received are not the bytes declared."""

    code = "digest_mismatch"

    def __init__(self, declared: str, actual: str) -> None:
        super().__init__(f"The bytes have SHA-256 {actual}, but {declared} was declared. Send them again.")
        self.declared, self.actual = declared, actual


class InvalidKey(Refused):
    """No API key, or a wrong one."""

    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("Missing or wrong API key. Send it as 'Authorization: Bearer lp_...'.")


class HostNotAllowed(Refused):
    """The Host header names somebody else (DNS rebinding)."""

    code = "host_not_allowed"


class PayloadTooLarge(Refused):
    """The body, or a part of it, exceeds its limit."""

    code = "too_large"


class Overloaded(LoraplaneError):
    """A bounded queue is full. `retry_after_s` is a hint in seconds."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """The engine's waiting queue is full."""

    code = "queue_full"


class AdapterCapacity(Overloaded):
    """Every slot is leased and the queue for slots is full."""

    code = "adapter_capacity"


class SlotsPinned(AdapterCapacity):
    """Every slot is pinned to other adapters: this one is not served before one is unpinned."""


class Unavailable(LoraplaneError):
    """The server is at fault. `retry_after_s` None means that retrying does not help."""

    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float | None = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(Unavailable):
    """No engine takes requests just now: it starts, restarts or drains."""

    code = "not_ready"


class EngineLost(Unavailable):
    """The engine died while it worked on this request."""

    code = "engine_lost"


class AdapterLoadFailed(Unavailable):
    """A published adapter could not be brought into a slot."""

    code = "adapter_load_failed"


class WarmFailed(Unavailable):
    """A version could not be made ready on the running server, so no alias was moved to it."""

    code = "warm_failed"

    def __init__(self, model: str, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{model} could not be warmed, so nothing was moved: {why}", retry_after_s)
        self.model = model


class AdapterNumerics(Unavailable):
    """A published adapter made the model's numbers infinite for this prompt."""

    code = "adapter_numerics"


class AdapterQuarantined(Unavailable):
    """A published adapter failed repeatedly, or its proof at load, and is not asked for a while. `reason` says which:
    numerics, slot_contents, no_effect or golden_mismatch."""

    code = "adapter_quarantined"

    def __init__(self, message: str, retry_after_s: float | None = 2.0, reason: str = "numerics") -> None:
        super().__init__(message, retry_after_s)
        self.reason = reason


class AdapterUnloaded(Unavailable):
    """The version was taken out of service while this request waited or ran; its alias may name another by now."""

    code = "adapter_unloaded"


class EngineFault(Unavailable):
    """The engine failed this one request; its neighbours go on."""

    code = "engine_fault"


class StoreFailed(Unavailable):
    """The registry's disk or database failed (full, broken, busy), or stored bytes no longer match their digest."""

    code = "store_failed"


class DeadlineExceeded(LoraplaneError):
    """The request's deadline passed before it was complete."""

    code = "deadline_exceeded"


class DeadlineUnreachable(Overloaded):
    """The request would not have started before its deadline, so it was not let in; `retry_after_s` later it would."""

    @property
    def reason_code(self) -> str:
        """One code for a deadline that passed and one that would have; the status tells them apart."""
        return DeadlineExceeded.code


class Cancelled(LoraplaneError):
    """The caller left before the answer was complete."""

    code = "cancelled"


class OperatorError(LoraplaneError):
    """The command line or the configuration is wrong; one line says how to mend it."""

    code = "operator_error"


class BaseMissing(OperatorError):
    """The named base is not on this machine."""

    code = "base_missing"


class BaseUnsupported(OperatorError):
    """The base exists, but no runner of ours can serve it."""

    code = "base_unsupported"


class DownloadFailed(OperatorError):
    """A base could not be fetched."""

    code = "download_failed"


class PortInUse(OperatorError):
    """Another process listens on the port."""

    code = "port_in_use"


class InsecureBind(OperatorError):
    """A bind beyond loopback without keys."""

    code = "insecure_bind"


class HomeLocked(OperatorError):
    """Another server holds this LORAPLANE_HOME."""

    code = "home_locked"


class HomeUnusable(OperatorError):
    """LORAPLANE_HOME is no folder that this user can write to."""

    code = "home_unusable"


class ServerUnreachable(OperatorError):
    """The server named by --url, or the one that holds this home, does not answer."""

    code = "server_unreachable"


class ConfigInvalid(OperatorError):
    """A setting is wrong."""

    code = "config_invalid"


class RunInvalid(OperatorError):
    """A training or evaluation file is wrong."""

    code = "run_invalid"


class DataRefused(OperatorError):
    """A data set cannot be trained or evaluated on."""

    code = "data_refused"


class ExtraMissing(OperatorError):
    """An optional dependency is not installed; the message names the extra."""

    code = "extra_missing"

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the extra {extra!r}: pip install 'loraplane[{extra}]'")
        self.extra = extra
