"""`loraplane serve`: its options. What serves is loaded only once they have been read."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.options import HomeOption
from adapters.records import BASE_ID
from adapters.weights import MAX_RANK
from serving.limits import LONGEST_DRAIN_S


def serve(
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="NAME|DIR",
            help="A pulled base, or a folder to pull it from; base: the first that can be served.",
        ),
    ] = BASE_ID,
    host: Annotated[str | None, typer.Option(help="Address to listen on; beyond loopback keys are required.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads for tensor work; 0: one a core.")] = 0,
    max_model_len: Annotated[int, typer.Option(min=16, help="Longest prompt and answer together, in tokens.")] = 2048,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences that run at the same time.")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Adapters that lie on the device at the same time.")] = 16,
    max_rank: Annotated[int, typer.Option(min=1, max=MAX_RANK, help="Highest LoRA rank that is loaded.")] = MAX_RANK,
    host_mib: Annotated[int, typer.Option(min=1, help="Host memory for adapters, in MiB.")] = 2048,
    disk_mib: Annotated[
        int, typer.Option(min=0, help="Disk for adapters as they are installed, in MiB; 0: none.")
    ] = 8192,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where servers share blobs: a folder, or s3://bucket/prefix and the like (LORAPLANE_STORE).",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Sequences that may wait; beyond them 429.")] = 256,
    prefix_reuse: Annotated[
        bool, typer.Option(help="Let a prompt start behind what its tenant's adapter has computed already.")
    ] = True,
    replicas: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Engines side by side, each with a base of its own.")
    ] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Fewest engines; below --max-replicas their number follows the load, without it it is fixed.",
        ),
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most engines.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="HOST:PORT",
            help="A Ray cluster that runs already; its nodes must see the home at the same path.",
        ),
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(min=0, max=LONGEST_DRAIN_S, help="Seconds that running requests get to finish at a stop."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Serve a base and every adapter of the registry over HTTP, OpenAI-compatible.

    Keys come from LORAPLANE_API_KEYS (lp_..., comma-separated); without keys only loopback is allowed.

    Example: loraplane serve --port 8000, then
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json'
    -d '{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    from serving.start import ServeOptions, start

    options = ServeOptions(
        base=base,
        host=host,
        port=port,
        drain_s=drain,
        home=home,
        device=device,
        dtype=dtype,
        threads=threads,
        max_model_len=max_model_len,
        max_rows=max_rows,
        slots=slots,
        max_rank=max_rank,
        host_bytes=host_mib << 20,
        disk_bytes=disk_mib << 20,
        store=store,
        queue_limit=queue,
        prefix_reuse=prefix_reuse,
        replicas=replicas,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        ray_address=ray_address,
    )
    raise typer.Exit(start(options))
