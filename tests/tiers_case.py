"""A host tier driven by hand: its workers run when told, on a clock of the test's own."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import torch

from serving.below import Below
from serving.disk_tier import DiskTier
from serving.engine.lora import HostAdapter
from serving.engine.plan import Load
from serving.load_workers import STORE
from serving.loader import Bringing, HostTier
from serving.packed_file import Target

TARGET = Target("b" * 64, "float32", "")


def digest_of(number: int) -> str:
    """A digest for each number."""
    return f"{number:064x}"


def adapter_of(digest: str, bytes_wanted: int = 4096) -> HostAdapter:
    """An adapter of so many bytes, whose numbers are its own."""
    own = torch.Generator().manual_seed(int(digest, 16) % (1 << 31))
    half = torch.randn(1, bytes_wanted // 8, generator=own)
    return HostAdapter(digest, 1, {"layer": (half, half + 1.0)})


class HandWorkers:
    """Implements serving.load_workers.Workers; `run` runs what waits, of one pool or of all."""

    def __init__(self) -> None:
        self.waiting: defaultdict[str, deque[Callable[[], None]]] = defaultdict(deque)

    def submit(self, pool: str, task: Callable[[], None]) -> None:
        self.waiting[pool].append(task)

    def close(self) -> None:
        self.waiting.clear()

    def run(self, *pools: str) -> None:
        """Run tasks until those pools (default: all) are empty."""
        while any(self.waiting[pool] for pool in pools or list(self.waiting)):
            for pool in pools or list(self.waiting):
                while self.waiting[pool]:
                    self.waiting[pool].popleft()()


class TierCase:
    """A host tier whose loads are read by `read` in the store's pool, after a look at the disk's."""

    def __init__(
        self,
        read: Callable[[str], HostAdapter] = adapter_of,
        *,
        budget_bytes: int = 1 << 20,
        below: Below | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        self.time = 0.0
        self.reads: list[str] = []
        self.workers = HandWorkers()
        self._read, self._disk = read, disk
        self.tier = HostTier(
            self.bring,
            budget_bytes=budget_bytes,
            workers=2,
            negative_cache_s=5.0,
            wake=lambda: None,
            now=lambda: self.time,
            pools=self.workers,
            below=below,
        )

    def bring(self, digest: str) -> Bringing:
        found = self._disk.get(digest) if self._disk is not None else None
        if found is not None:
            return found
        yield STORE
        self.reads.append(digest)
        return self._read(digest)

    def load(self, *digests: str) -> list[Load]:
        """Want them, let everything run, and see where they are."""
        for digest in digests:
            self.tier.want(digest)
        self.settle()
        return [self.tier.want(digest).load for digest in digests]

    def settle(self, *pools: str) -> None:
        """Let the workers run, and the tier take in what they did, until nothing more happens."""
        self.tier.poll()
        while any(self.workers.waiting[pool] for pool in pools or list(self.workers.waiting)):
            self.workers.run(*pools)
            self.tier.poll()

    def idle(self) -> bool:
        """Nothing loads, and nobody would."""
        return self.tier.loading == 0 and not any(self.workers.waiting.values())


def disk_tier(folder: Path, target: Target = TARGET, budget_bytes: int = 1 << 20, **given: object) -> DiskTier:
    """A disk tier in a folder."""
    return DiskTier(folder, target, budget_bytes=budget_bytes, **given)  # type: ignore[arg-type]
