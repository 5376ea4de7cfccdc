"""What an engine is told at its start: frozen, checked once, self-contained (it travels to the replica's process)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.errors import ConfigInvalid

DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine. Sizes in tokens, rows, slots and bytes; base_folder, blobs and packed are absolute paths.

    store: where blobs lie that several machines share (see adapters.shared_store); empty: `blobs` has them all.
    packed: the disk tier's folder, bounded by disk_bytes; 0: no disk tier.

    device: `cpu` or `cuda[:n]`. dtype: `auto`, `float32` or `bfloat16`. threads 0: one a core. max_rank bounds what
    may be loaded; slots grow to the largest rank that is resident.
    """

    base_folder: str
    base_name: str
    base_digest: str
    family: str
    modules: Mapping[str, tuple[int, int]]
    blobs: str
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    max_model_len: int = 2048
    max_rows: int = 16
    slots: int = 16
    max_rank: int = 64
    host_bytes: int = 2 << 30
    store: str = ""
    packed: str = ""
    disk_bytes: int = 0
    queue_limit: int = 256
    prefill_chunk: int = 64
    prefill_chunk_alone: int = 512
    load_workers: int = 2
    probe_after_s: float = 5.0
    negative_cache_s: float = 5.0
    patience_s: float = 2.0
    prefix_reuse: bool = True
    replica: str = field(default="")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigInvalid(f"dtype {self.dtype!r} is not served; use one of {', '.join(DTYPES)}")
        for name in ("max_model_len", "max_rows", "slots", "max_rank", "host_bytes", "queue_limit", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ConfigInvalid(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.disk_bytes < 0 or (self.disk_bytes and not self.packed):
            raise ConfigInvalid(f"disk_bytes {self.disk_bytes} must be 0, or more with a folder for them")

    @property
    def num_threads(self) -> int:
        """Threads for tensor work. Ray gives a replica one by default, so it is always set.

        Without a figure one a core: what the edge takes from them costs less than a core that waits for it
        (docs/decisions.md).
        """
        return self.threads or len(os.sched_getaffinity(0))
