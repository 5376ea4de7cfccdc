"""What every route works with, made once by `build_app`."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from adapters.registry import Registry
from serving.api.condition import Condition
from serving.auth import KeyRing
from serving.config import EdgeSettings
from serving.flips import Flips
from serving.gateway import Gateway
from serving.metrics import Metrics
from serving.warden import Warden


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms behind the door."""

    gateway: Gateway
    registry: Registry
    settings: EdgeSettings
    metrics: Metrics
    keys: KeyRing
    condition: Condition
    flips: Flips
    warden: Warden


def services_of(request: Request) -> Services:
    """The services of the app that this request came to."""
    found = request.app.state.services
    if not isinstance(found, Services):
        raise TypeError("build_app did not put its services in place")
    return found
