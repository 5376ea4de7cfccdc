"""From options to a running server. torch and ray load only once the options are known good."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from adapters.base_digest import read_json
from adapters.bases import open_base, pull
from adapters.errors import ConfigInvalid
from adapters.families import adaptable, check_family
from adapters.home import Home
from adapters.records import BASE_ID, BaseRecord
from adapters.registry import Registry
from serving.config import EdgeSettings, load_settings
from serving.engine.config import EngineConfig
from serving.rayenv import check_address, prepare
from serving.scaling import Scaling, remark, scaling
from serving.server import Cluster, Parts, bind, run_server, socket_folder


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `loraplane serve` was told; see its --help."""

    base: str
    host: str | None
    port: int | None
    drain_s: int | None
    home: Path | None
    device: str
    dtype: str
    threads: int
    max_model_len: int
    max_rows: int
    slots: int
    max_rank: int
    host_bytes: int
    disk_bytes: int
    store: str | None
    queue_limit: int
    prefix_reuse: bool
    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    ray_address: str | None = None


def start(options: ServeOptions) -> int:
    """Serve until told to stop; the exit code. Raises OperatorError for what the operator can mend."""
    _log_plainly()
    settings = load_settings(host=options.host, port=options.port, drain_s=options.drain_s)
    wanted = scaling(options.replicas, options.min_replicas, options.max_replicas)
    if said := remark(options.min_replicas, options.max_replicas, wanted):
        _say(said)
    _check_device(options.device, wanted)
    if options.ray_address is not None:
        check_address(options.ray_address)
    home = Home.find(options.home, options.store)
    listener = bind(settings)
    registry = Registry.open(home)
    try:
        record, folder = find_base(options.base, home, registry)
        registry.mean_by_base(record)
        with socket_folder() as sockets:
            config = _engine(options, home, record, folder, wanted)
            cluster = _cluster(config, sockets, wanted, options.ray_address, settings.drain_s)
            parts = _parts(home, registry, record, folder, settings, config, cluster, wanted)
            return run_server(parts, listener)
    finally:
        registry.close()
        listener.close()


def _check_device(device: str, wanted: Scaling) -> None:
    if wanted.highest > 1 and device.startswith("cuda:"):
        raise ConfigInvalid(f"every replica takes a card of its own: use --device cuda in place of {device}")


def _threads(options: ServeOptions, wanted: Scaling) -> int:
    """Threads of one replica. Those of one machine share its cores; on a cluster of others each may have all."""
    if options.threads or wanted.highest == 1 or options.ray_address is not None:
        return options.threads
    return max(1, len(os.sched_getaffinity(0)) // wanted.highest)


def _engine(options: ServeOptions, home: Home, record: BaseRecord, folder: Path, wanted: Scaling) -> EngineConfig:
    return EngineConfig(
        base_folder=str(folder),
        base_name=record.name,
        base_digest=record.digest,
        family=record.family,
        modules=adaptable(record),
        blobs=str(home.blobs),
        device=options.device,
        dtype=options.dtype,
        threads=_threads(options, wanted),
        # 0: the base has no positions that could run out (T5).
        max_model_len=min(options.max_model_len, record.max_positions or options.max_model_len),
        max_rows=options.max_rows,
        slots=options.slots,
        max_rank=options.max_rank,
        host_bytes=options.host_bytes,
        store=home.store,
        packed=str(home.packed),
        disk_bytes=options.disk_bytes,
        queue_limit=options.queue_limit,
        prefix_reuse=options.prefix_reuse,
    )


def find_base(which: str, home: Home, registry: Registry) -> tuple[BaseRecord, Path]:
    """The row and the folder of the base to serve; a folder given in place of a name is pulled first.

    `base` is the first base that can be served. Raises BaseMissing, or BaseUnsupported before anything is remembered.
    """
    folder = Path(which).expanduser()
    if which != BASE_ID and ("/" in which or folder.is_dir()):
        if (folder / "config.json").is_file():
            check_family(str(read_json(folder / "config.json").get("model_type", "")))  # before gigabytes are copied
        record = pull(which, home, _ServedShelf(registry), _say)
    else:
        record = registry.base(which)
    check_family(record.family)
    return record, open_base(home, record)


@dataclass(frozen=True, slots=True)
class _ServedShelf:
    """The registry as a shelf for bases that a runner computes: one that is refused must not become a row."""

    registry: Registry

    def bases(self) -> Sequence[BaseRecord]:
        return self.registry.bases()

    def add_base(self, base: BaseRecord) -> BaseRecord:
        check_family(base.family)
        return self.registry.add_base(base)


def _cluster(config: EngineConfig, sockets: Path, wanted: Scaling, ray_address: str | None, drain_s: float) -> Cluster:
    prepare(ours=ray_address is None)  # before ray is imported: it reads the environment then
    from serving.deployment import EngineCluster

    return EngineCluster(config, sockets, wanted, ray_address=ray_address, drain_s=drain_s)


def _parts(
    home: Home,
    registry: Registry,
    record: BaseRecord,
    folder: Path,
    settings: EdgeSettings,
    config: EngineConfig,
    cluster: Cluster,
    wanted: Scaling,
) -> Parts:
    limits = {
        "engine_rows": config.max_rows,
        "engine_slots": config.slots,
        "engine_queue": config.queue_limit,
        "engine_context_tokens": config.max_model_len,
        "engine_host_bytes": config.host_bytes,
        "engine_disk_bytes": config.disk_bytes,
        "engine_rank": config.max_rank,
        "engine_threads": config.num_threads,
        "engine_replicas_lowest": wanted.lowest,
        "engine_replicas_highest": wanted.highest,
    }
    return Parts(
        home=home,
        registry=registry,
        base=record,
        base_folder=folder,
        settings=settings,
        cluster=cluster,
        engine_limits={name: float(value) for name, value in limits.items()},
        say=_say,
    )


def _say(line: str) -> None:
    sys.stderr.write(f"loraplane: {line}\n")
    sys.stderr.flush()


def _log_plainly() -> None:
    """Our own log to stderr, JSON when nobody watches; what libraries chat about stays out of it."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
