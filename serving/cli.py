"""`loraplane serve`: from arguments to a running server. torch and ray load only once the arguments are known good."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

from adapters.errors import BaseMissing
from adapters.home import Home
from adapters.options import HomeOption
from adapters.records import BASE_ID, BaseRecord
from adapters.registry import Registry
from serving.config import EdgeSettings, load_settings
from serving.engine.config import EngineConfig
from serving.server import Parts, bind, socket_folder
from serving.server import serve as run_server


def serve(
    base: Annotated[
        str, typer.Option("--base", metavar="NAME|DIR", help="A pulled base, or a folder to pull it from.")
    ] = BASE_ID,
    host: Annotated[str | None, typer.Option(help="Address to listen on; beyond loopback keys are required.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads for tensor work; 0: one a core.")] = 0,
    max_model_len: Annotated[int, typer.Option(min=16, help="Longest prompt and answer together, in tokens.")] = 2048,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences that run at the same time.")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Adapters that lie on the device at the same time.")] = 16,
    max_rank: Annotated[int, typer.Option(min=1, help="Highest LoRA rank that is loaded.")] = 64,
    host_mib: Annotated[int, typer.Option(min=1, help="Host memory for adapters, in MiB.")] = 2048,
    queue: Annotated[int, typer.Option(min=1, help="Sequences that may wait; beyond them 429.")] = 256,
    drain: Annotated[int | None, typer.Option(help="Seconds that running requests get to finish at a stop.")] = None,
    home: HomeOption = None,
) -> None:
    """Serve a base and every adapter of the registry over HTTP, OpenAI-compatible.

    Keys come from LORAPLANE_API_KEYS (lp_..., comma-separated); without keys only loopback is allowed.

    Example: loraplane serve --port 8000, then
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json'
    -d '{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    _log_plainly()
    settings = load_settings(host=host, port=port, drain_s=drain)
    chosen = Home.find(home)
    listener = bind(settings)
    registry = Registry.open(chosen)
    try:
        record, folder = _base(base, chosen, registry)
        config = EngineConfig(
            base_folder=str(folder),
            base_name=record.name,
            base_digest=record.digest,
            family=record.family,
            modules=dict(record.modules),
            blobs=str(chosen.blobs),
            device=device,
            dtype=dtype,
            threads=threads,
            max_model_len=min(max_model_len, record.max_positions),
            max_rows=max_rows,
            slots=slots,
            max_rank=max_rank,
            host_bytes=host_mib << 20,
            queue_limit=queue,
        )
        from serving.engine.families import check_family

        check_family(record.family)
        with socket_folder() as sockets:
            code = run_server(_parts(chosen, registry, record, folder, settings, config, sockets), listener)
    finally:
        registry.close()
        listener.close()
    raise typer.Exit(code)


def _base(which: str, home: Home, registry: Registry) -> tuple[BaseRecord, Path]:
    """The base's row and folder; a folder given in place of a name is pulled first. Raises BaseMissing."""
    from adapters.bases import open_base, pull

    if "/" in which or Path(which).is_dir():
        record = pull(which, home, registry, _say)
    elif which == BASE_ID and not registry.bases():
        raise BaseMissing("no base is on this machine yet; run: loraplane models pull smollm2-135m")
    else:
        record = registry.base(which)
    return record, open_base(home, record)


def _parts(
    home: Home,
    registry: Registry,
    record: BaseRecord,
    folder: Path,
    settings: EdgeSettings,
    config: EngineConfig,
    sockets: Path,
) -> Parts:
    from serving.rayenv import prepare

    prepare()  # before ray is imported: it reads the environment then
    from serving.deployment import EngineCluster

    limits = {
        "engine_rows": config.max_rows,
        "engine_slots": config.slots,
        "engine_queue": config.queue_limit,
        "engine_context_tokens": config.max_model_len,
        "engine_host_bytes": config.host_bytes,
        "engine_rank": config.max_rank,
    }
    return Parts(
        home=home,
        registry=registry,
        base=record,
        base_folder=folder,
        settings=settings,
        cluster=EngineCluster(config, sockets),
        engine_limits={name: float(value) for name, value in limits.items()},
        say=_say,
    )


def _say(line: str) -> None:
    print(f"loraplane: {line}", file=sys.stderr, flush=True)


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
