"""The engine as a Ray Serve deployment: Ray places, restarts and checks it; tokens travel on the link.

The only module of `serving` that imports ray; `serving/rayenv.py` prepares the environment first. `loraplane serve`
deploys it with Serve's own HTTP proxy off. A replica that is ready writes its address into Ray's key-value store, where
gateways look; what is sent to which is theirs to decide (`serving/router.py`), and Ray's router is never asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions, ProxyLocation
from ray.serve.deployment import Deployment

from serving.engine.config import EngineConfig
from serving.link import Address
from serving.scaling import Scaling

if TYPE_CHECKING:  # the process that deploys needs no torch
    from serving.engine.engine import Engine

APP = "loraplane"
# Ray's defaults find a dead replica only after a minute; a client waits for this one.
_HEALTH_PERIOD_S = 1.0
_HEALTH_TIMEOUT_S = 10.0
_PUBLISH_S = 5.0
# Six times what a living replica takes to be heard again.
_STRUCK_OFF_S = 30.0
# A gateway looks into the directory twice a second: after this, nobody sends to one who left it.
_QUIET_S = 1.5
_LAST_WORDS_S = 3.0
_LOAD = "sequences_a_row"
_LOOK_BACK_S = 20.0
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours travels through it


class EngineReplica:
    """One engine in a process of its own. sockets: the folder of the link's sockets, for its owner alone.

    session: under which name replicas of this server are in the directory; gateway_node: the Ray node of the gateway,
    where a unix socket reaches it; drain_s: how long running sequences may go on once this replica is to end.
    """

    _engine: Engine | None = None

    def __init__(
        self, config: EngineConfig, sockets: str, token: str, session: str, gateway_node: str, drain_s: float
    ) -> None:
        # Imported in the replica: the process that deploys needs no torch.
        from serving.engine.build import build_engine
        from serving.link import LinkServer

        self._drain_s = drain_s
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        far = ray.get_runtime_context().get_node_id() != gateway_node
        host = ray.util.get_node_ip_address() if far else ""
        path = str(Path(sockets) / name)
        self._link = LinkServer(Path(path), token, host)
        engine = build_engine(replace(config, replica=name), self._link.sink)
        # What lives as long as the process is not searched for garbage again and again: that took longer than a step.
        gc.collect()
        gc.freeze()
        engine.start()
        self._link.start(engine)
        self._engine = engine
        self._entry = Entry("" if far else path, host, self._link.port, 0)
        self._key = f"{session}/{name}"
        self._published_at = float("-inf")
        self.check_health()

    def check_health(self) -> None:
        """Tell the directory that this replica is here; Ray calls it once a second.

        Raises RuntimeError when the engine no longer steps; Ray then replaces the replica.
        """
        if self._engine is None or not self._engine.alive:
            raise RuntimeError("the engine's thread has ended")
        if time.monotonic() - self._published_at >= _PUBLISH_S:
            self._entry = replace(self._entry, beat=self._entry.beat + 1)
            _internal_kv_put(self._key, msgspec.json.encode(self._entry), namespace=APP)
            self._published_at = time.monotonic()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Sequences a row, for `wanted_replicas`: requests do not pass through Ray, so it cannot count them."""
        if self._engine is None:
            return {}
        beat = self._engine.heartbeat()
        return {_LOAD: (beat.running + beat.waiting) / max(1, beat.rows)}

    def __del__(self) -> None:
        """Serve calls this before it ends a replica that is no longer wanted: what runs may end first.

        Out of the directory, so that gateways send nothing new; then wait until nothing runs; then the rest fails by
        name. A replica that dies with its whole server has nothing running any more.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        # The directory may be gone already, and waiting for it takes a minute: a thread of its own.
        leave = threading.Thread(target=_leave, args=(self._key,), daemon=True)
        leave.start()
        leave.join(timeout=2)
        give_up = time.monotonic() + self._drain_s
        quiet_since = time.monotonic()
        while (now := time.monotonic()) < give_up and now - quiet_since < _QUIET_S and engine.alive:
            beat = engine.heartbeat()
            if beat.running or beat.waiting:
                quiet_since = now
            time.sleep(0.1)
        engine.stop()
        self._link.stop()


@dataclass(frozen=True, slots=True)
class Entry:
    """A replica in the directory: where it listens; beat grows while it lives."""

    path: str
    host: str
    port: int
    beat: int


def _leave(key: str) -> None:
    with contextlib.suppress(Exception):  # no directory, no need to leave it
        _internal_kv_del(key, namespace=APP)


class ReplicaDirectory:
    """The replicas of one session, as they wrote themselves into Ray's own key-value store; see `serving.router`.

    Who is silent for too long is struck off: a replica that was killed cannot do it itself. Blocking.
    """

    def __init__(self, session: str, token: str, now: Callable[[], float] = time.monotonic) -> None:
        self._session, self._token, self._now = session, token, now
        self._heard: dict[str, tuple[int, float]] = {}

    def read(self) -> list[Address]:
        """Who is there. Raises ConnectionError while Ray does not answer."""
        try:
            return self._read()
        except Exception as error:  # Ray raises many kinds for a store that is not there
            raise ConnectionError(type(error).__name__) from error

    def _read(self) -> list[Address]:
        found: list[Address] = []
        now = self._now()
        keys = [key.decode() for key in _internal_kv_list(f"{self._session}/", namespace=APP)]
        self._heard = {key: heard for key, heard in self._heard.items() if key in keys}
        for key in keys:
            told = _internal_kv_get(key, namespace=APP)
            if told is None:
                continue
            entry = msgspec.json.decode(told, type=Entry)
            beat, at = self._heard.get(key, (-1, now))
            if entry.beat != beat:
                self._heard[key] = (entry.beat, now)
            elif now - at > _STRUCK_OFF_S:
                _internal_kv_del(key, namespace=APP)
                continue
            name = key.rpartition("/")[2]
            found.append(Address(entry.path, self._token, name, entry.host, entry.port))
        return found


class EngineCluster:
    """Engine replicas on Ray, as `loraplane serve` runs them. Blocking: call it from a worker thread.

    ray_address: a cluster that runs already (HOST:PORT); None: a local one of our own. drain_s: what a
    replica that is ended gives to its running sequences.
    """

    def __init__(
        self,
        config: EngineConfig,
        sockets: Path,
        scaling: Scaling | None = None,
        *,
        ray_address: str | None = None,
        drain_s: float = 30.0,
    ) -> None:
        self._config, self._sockets, self._scaling = config, sockets, scaling or Scaling()
        self._ray_address, self._drain_s = ray_address, drain_s
        self._token = secrets.token_hex(32)
        self._session = secrets.token_hex(4)
        self._directory = ReplicaDirectory(self._session, self._token)
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="directory")
        self._connected = False

    def start(self) -> None:
        """Start Ray or join it, then the replicas; returns when all are healthy. Raises RuntimeError if one is not."""
        # Serve sets the level of its own logger anew at each start; a filter stays.
        logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
        gpus = 1 if self._config.device.startswith("cuda") else 0
        # Ray lets its workers import from the current folder first: from ours, which is empty, not from the caller's.
        with contextlib.chdir(self._sockets):
            self._init(gpus)
        self._connected = True
        serve.start(proxy_location=ProxyLocation.Disabled, http_options=HTTPOptions(host="127.0.0.1"))
        node = ray.get_runtime_context().get_node_id()
        bound = _deployment(gpus, self._scaling, self._drain_s).bind(
            self._config, str(self._sockets), self._token, self._session, node, self._drain_s
        )
        try:
            serve.run(bound, name=APP, route_prefix=None)
        except RuntimeError as error:
            raise RuntimeError(_cause() or str(error)) from None

    def _init(self, gpus: int) -> None:
        if self._ray_address is not None:
            try:
                ray.init(
                    address=self._ray_address, log_to_driver=False, logging_level="error", ignore_reinit_error=True
                )
            except (ConnectionError, ValueError) as error:
                where = f"the Ray cluster at {self._ray_address}"
                raise RuntimeError(f"{where} does not let us in; is RAY_AUTH_TOKEN the cluster's? {error}") from error
            return
        ray.init(
            address="local",
            include_dashboard=False,
            configure_logging=True,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=_OBJECT_STORE_BYTES,
            # Ray counts logical CPUs: enough for its own actors whatever the machine has.
            num_cpus=8,
            num_gpus=gpus * self._scaling.highest,
        )

    async def addresses(self) -> Sequence[Address]:
        """Where the living replicas listen. Raises ConnectionError while nobody can say."""
        if not self._connected:
            raise ConnectionError("the engine has not been deployed yet")
        return await asyncio.get_running_loop().run_in_executor(self._asking, self._directory.read)

    def stop(self) -> None:
        """Take everything down that is ours: a cluster that ran before us goes on without our replicas."""
        self._asking.shutdown(wait=False, cancel_futures=True)
        if not ray.is_initialized():
            return
        if self._ray_address is not None:
            serve.delete(APP)
        ray.shutdown()  # a cluster of our own goes as a whole, Serve with it


def _cause() -> str:
    """Why the replica could not be made, as its own constructor said it; Serve's exception only says that it failed."""
    application = serve.status().applications.get(APP)
    told = application.deployments["engine"].message if application and "engine" in application.deployments else ""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class LoadPolicy:
    """Serve's autoscaling asks this, with the settings of `Scaling`; see there."""

    def __init__(self, **settings: float) -> None:
        self._scaling = msgspec.convert(settings, Scaling)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """How many replicas are wanted for what the engines reported, and no memory of it."""
        told = (context.aggregated_metrics or {}).get(_LOAD, {})
        return self._scaling.wanted(list(told.values()), context.target_num_replicas), {}


def _deployment(gpus: int, scaling: Scaling, drain_s: float) -> Deployment:
    """The engine's deployment: so many replicas, bounded queues, each replaced soon after it dies."""
    decorate = serve.deployment(
        name="engine",
        num_replicas=scaling.replicas if scaling.fixed else None,
        autoscaling_config=None if scaling.fixed else _autoscaling(scaling),
        max_ongoing_requests=16,
        max_queued_requests=64,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s + _LAST_WORDS_S,
        # The machine's CPUs are the engine's by its own thread count; a logical claim would starve train jobs for ever.
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
    )
    deployment: Deployment = decorate(EngineReplica)
    return deployment


def _autoscaling(scaling: Scaling) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=scaling.lowest,
        max_replicas=scaling.highest,
        initial_replicas=scaling.replicas,
        upscale_delay_s=scaling.up_after_s,
        downscale_delay_s=scaling.down_after_s,
        look_back_period_s=_LOOK_BACK_S,
        policy=AutoscalingPolicy(
            policy_function=f"{__name__}:{LoadPolicy.__name__}", policy_kwargs=msgspec.to_builtins(scaling)
        ),
    )
