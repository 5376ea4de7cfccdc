"""What the HTTP edge is told at its start: read once from arguments and `LORAPLANE_*`, checked, frozen."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from adapters.errors import ConfigInvalid
from serving.limits import LONGEST_DRAIN_S, GatewayLimits

MIN_KEY_CHARS = 20
KEY_PREFIX = "lp_"


class EdgeSettings(BaseSettings):
    """Limits and identity of the HTTP edge. Sizes in bytes, times in seconds and finite; every figure is in /metrics.

    prefetch: warm what is asked for most while there is room (LORAPLANE_PREFETCH=false turns it off).
    api_keys: keys that begin with `lp_`, comma-separated in LORAPLANE_API_KEYS; none means open, and then only a
    loopback bind is allowed. allowed_hosts: Host names accepted beside the bound one.
    """

    model_config = SettingsConfigDict(env_prefix="LORAPLANE_", frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()

    max_json_bytes: int = Field(4 << 20, ge=1024)
    max_report_bytes: int = Field(32 << 20, ge=1024)
    max_blob_bytes: int = Field(256 << 20, ge=1024)
    max_uploads: int = Field(4, ge=1)
    max_header_bytes: int = Field(16 << 10, ge=1024)
    max_headers: int = Field(100, ge=10)
    max_connections: int = Field(1024, ge=1)
    header_timeout_s: float = Field(10.0, gt=0)
    body_timeout_s: float = Field(30.0, gt=0)
    blob_timeout_s: float = Field(600.0, gt=0)
    keep_alive_s: int = Field(15, ge=1)
    drain_s: int = Field(30, ge=0, le=LONGEST_DRAIN_S)

    request_deadline_s: float = Field(600.0, gt=0)
    default_chat_tokens: int = Field(256, ge=1)
    default_completion_tokens: int = Field(16, ge=1)
    max_inflight: int = Field(256, ge=1)
    max_choices: int = Field(128, ge=1)
    max_sequences: int = Field(128, ge=1)
    max_stops: int = Field(4, ge=1)
    max_stop_chars: int = Field(64, ge=1)
    max_logit_bias: int = Field(300, ge=0)
    thread_chars: int = Field(4096, ge=0)

    warm_deadline_s: float = Field(60.0, gt=0)
    warm_ttl_s: float = Field(600.0, gt=0)
    retire_drain_s: float = Field(30.0, ge=0, le=240)
    decree_poll_s: float = Field(0.25, gt=0, le=0.5)

    prefetch: bool = True

    heartbeat_stale_s: float = Field(5.0, gt=0)
    ready_idle_s: float = Field(15.0, gt=0)
    health_grace_s: float = Field(120.0, gt=0)

    @field_validator("api_keys", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _well_formed(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            text = key.get_secret_value()
            if not text.startswith(KEY_PREFIX) or len(text) < MIN_KEY_CHARS or not text.isascii():
                raise ValueError(f"a key must begin with {KEY_PREFIX!r} and have at least {MIN_KEY_CHARS} characters")
        return keys

    @property
    def keys(self) -> tuple[str, ...]:
        """The API keys in the clear: for the key ring only, never for a log."""
        return tuple(key.get_secret_value() for key in self.api_keys)

    @property
    def loopback(self) -> bool:
        """Whether the bind address can be reached from this machine only."""
        return is_loopback(self.host)

    @property
    def gateway(self) -> GatewayLimits:
        """The gateway's own share."""
        return GatewayLimits(
            request_deadline_s=self.request_deadline_s,
            default_chat_tokens=self.default_chat_tokens,
            default_completion_tokens=self.default_completion_tokens,
            max_inflight=self.max_inflight,
            max_choices=self.max_choices,
            max_sequences=self.max_sequences,
            max_stops=self.max_stops,
            max_stop_chars=self.max_stop_chars,
            max_logit_bias=self.max_logit_bias,
            thread_chars=self.thread_chars,
        )

    @property
    def figures(self) -> dict[str, float]:
        """Every numeric limit by name, for /metrics."""
        skip = {"host", "port", "api_keys", "allowed_hosts"}
        return {name: float(value) for name, value in self.model_dump(exclude=skip).items()}


def load_settings(**given: object) -> EdgeSettings:
    """Settings from arguments (None means: not given) over the environment. Raises ConfigInvalid in one line."""
    try:
        return EdgeSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigInvalid(f"{name}: {first['msg']}") from None


def is_loopback(host: str) -> bool:
    """Whether a bind address names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
