"""The engine as a Ray Serve deployment: Ray places, restarts and checks it; tokens travel on the link.

The only module of `serving` that imports ray; `serving/rayenv.py` prepares the environment first. `loraplane serve`
deploys it with Serve's own HTTP proxy off.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
from dataclasses import replace
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.deployment import Deployment
from ray.serve.handle import DeploymentHandle

from serving.engine.config import EngineConfig
from serving.link import Address

APP = "loraplane"
# Ray's defaults find a dead replica only after a minute; a client waits for this one.
_HEALTH_PERIOD_S = 1.0
_HEALTH_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours travels through it


class EngineReplica:
    """One engine in a process of its own. sockets: the folder of the link's sockets, for its owner alone."""

    def __init__(self, config: EngineConfig, sockets: str, token: str) -> None:
        # Imported in the replica: the process that deploys needs no torch.
        from serving.engine.build import build_engine
        from serving.link import LinkServer

        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._address = Address(str(Path(sockets) / name), token, name)
        self._link = LinkServer(Path(self._address.path), token)
        self._engine = build_engine(replace(config, replica=name), self._link.sink)
        # What lives as long as the process is not searched for garbage again and again: that took longer than a step.
        gc.collect()
        gc.freeze()
        self._engine.start()
        self._link.start(self._engine)

    async def address(self) -> Address:
        """Where gateways reach this replica."""
        return self._address

    def check_health(self) -> None:
        """Raises RuntimeError when the engine no longer steps; Ray then replaces the replica."""
        if not self._engine.alive:
            raise RuntimeError("the engine's thread has ended")


class EngineCluster:
    """A local Ray with one engine replica, as `loraplane serve` runs it. Blocking: call it from a worker thread."""

    def __init__(self, config: EngineConfig, sockets: Path) -> None:
        self._config, self._sockets = config, sockets
        self._token = secrets.token_hex(32)
        self._handle: DeploymentHandle | None = None

    def start(self) -> None:
        """Start Ray and the replica; returns when it is healthy. Raises RuntimeError when it cannot be."""
        # Serve sets the level of its own logger anew at each start; a filter stays.
        logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
        gpus = 1 if self._config.device.startswith("cuda") else 0
        # Ray lets its workers import from the current folder first: from ours, which is empty, not from the caller's.
        with contextlib.chdir(self._sockets):
            ray.init(
                address="local",
                include_dashboard=False,
                configure_logging=True,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=_OBJECT_STORE_BYTES,
                # Ray counts logical CPUs: enough for its own actors whatever the machine has.
                num_cpus=8,
                num_gpus=gpus,
            )
        serve.start(proxy_location=ProxyLocation.Disabled, http_options=HTTPOptions(host="127.0.0.1"))
        bound = _deployment(gpus).bind(self._config, str(self._sockets), self._token)
        try:
            self._handle = serve.run(bound, name=APP, route_prefix=None)
        except RuntimeError as error:
            raise RuntimeError(_cause() or str(error)) from None

    async def locate(self) -> Address:
        """The address of a living replica. Raises ConnectionError while there is none."""
        if self._handle is None:
            raise ConnectionError("the engine has not been deployed yet")
        handle = self._handle
        try:
            address: Address = await asyncio.to_thread(lambda: handle.address.remote().result(timeout_s=5))
        except Exception as error:  # Ray raises many kinds for a replica that is not there
            raise ConnectionError(type(error).__name__) from error
        return address

    def stop(self) -> None:
        """Take everything down."""
        if ray.is_initialized():
            ray.shutdown()  # the cluster is ours alone and goes as a whole, Serve with it


def _cause() -> str:
    """Why the replica could not be made, as its own constructor said it; Serve's exception only says that it failed."""
    application = serve.status().applications.get(APP)
    told = application.deployments["engine"].message if application and "engine" in application.deployments else ""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _deployment(gpus: int) -> Deployment:
    """The engine's deployment: one replica, bounded queues, replaced soon after it dies."""
    decorate = serve.deployment(
        name="engine",
        num_replicas=1,
        max_ongoing_requests=16,
        max_queued_requests=64,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=5.0,
        # The machine's CPUs are the engine's by its own thread count; a logical claim would starve train jobs for ever.
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
    )
    deployment: Deployment = decorate(EngineReplica)
    return deployment
