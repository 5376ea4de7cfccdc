"""Brings adapters from the store into host memory: single flight per digest, off the step loop, within a byte budget.

All state belongs to the engine's thread: workers only read and check, and their results are taken in by `poll`. So
nothing here locks, a cancelled request cannot leave a load half done, and one slow read delays only its own adapter.
"""

from __future__ import annotations

import json
import queue
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.base_weights import BaseWeights
from adapters.errors import AdapterLoadFailed, LoraplaneError
from adapters.families import is_head, lies_transposed
from adapters.golden import golden_from_json
from adapters.spec import AdapterSpec, parse_spec
from adapters.store import BlobStore
from adapters.tensor_file import TensorView
from adapters.weights import CanonicalWeights, check_shapes, open_weights
from serving.dora import gain
from serving.engine.config import EngineConfig
from serving.engine.lora import End, HostAdapter
from serving.engine.plan import Load, LoadState

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_adapter(config: EngineConfig, digest: str, dtype: torch.dtype) -> HostAdapter:
    """The adapter of a digest, every byte checked against it, scaled and in the compute dtype.

    Raises LoraplaneError when the store lacks it, holds other bytes, or it does not fit this base.
    """
    store = BlobStore(Path(config.blobs))
    manifest = json.loads(store.read_verified(digest))
    if manifest["base"] != config.base_digest:
        raise AdapterLoadFailed(f"adapter {digest[:12]} belongs to another base", retry_after_s=None)
    spec = parse_spec(store.read_verified(manifest["config"]))
    weights = open_weights(store.verify(manifest["weights"]))
    check_shapes(weights, config.modules, spec, config.max_rank)
    adapter = host_adapter(digest, weights, spec, dtype, Path(config.base_folder), config.family)
    return replace(adapter, golden=golden_from_json(manifest.get("golden", [])))


def host_adapter(
    digest: str, weights: CanonicalWeights, spec: AdapterSpec, dtype: torch.dtype, base_folder: Path, family: str
) -> HostAdapter:
    """Checked weights as the engine installs them, in dtype; see HostAdapter.

    base_folder: where the base lies; its files are read for DoRA, whose gains depend on the base's weights.
    """
    base = BaseWeights(base_folder) if weights.magnitudes else None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    gains: dict[str, Tensor] = {}
    ends: dict[str, End] = {}
    for module, (a, b) in weights.tensors.items():
        scaled = _tensor(b).float() * spec.scale_of(module)
        factor = None
        if base is not None:
            magnitude = _tensor(weights.magnitudes[module]).float()
            factor = gain(base, module, lies_transposed(family, module), _tensor(a).float(), scaled, magnitude)
            scaled = scaled * factor[:, None]
        low = scaled.to(dtype).T.contiguous()
        if module in weights.embeddings:
            ends["embedding"] = End(_tensor(a).to(dtype, copy=True).T.contiguous(), low, factor)
        elif is_head(module):
            ends["head"] = End(_tensor(a).to(dtype, copy=True), low, factor)
        else:
            pairs[module] = (_tensor(a).to(dtype, copy=True), low)
            if factor is not None:
                gains[module] = factor
    return HostAdapter(digest, weights.rank, pairs, gains, **ends)


def _tensor(view: TensorView) -> Tensor:
    raw = torch.frombuffer(view.buffer, dtype=_TORCH[view.dtype])
    return raw.reshape(view.shape)


@dataclass(frozen=True, slots=True)
class _Loaded:
    digest: str
    adapter: HostAdapter | None
    failure: tuple[str, str]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Failure:
    code: str
    message: str
    until: float


@dataclass(slots=True)
class LoadCounts:
    """How often, and for how long, adapters were brought from where; keys are tiers, `failed` among them."""

    loads: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, source: str, seconds: float) -> None:
        """Book one load."""
        self.loads[source] = self.loads.get(source, 0) + 1
        self.seconds[source] = self.seconds.get(source, 0.0) + seconds


class HostTier:
    """Adapters in host memory. `read` runs on worker threads; `wake` is called there when a result is ready.

    budget_bytes bounds what is kept; the least recently wanted go first, and a newcomer is verified before any goes.
    """

    def __init__(
        self,
        read: Callable[[str], HostAdapter],
        *,
        budget_bytes: int,
        workers: int,
        negative_cache_s: float,
        wake: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._read, self._budget, self._wake, self._now = read, budget_bytes, wake, now
        self._negative_cache_s = negative_cache_s
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="adapter-load", initializer=begin)
        self._results: queue.SimpleQueue[_Loaded] = queue.SimpleQueue()
        self._held: OrderedDict[str, HostAdapter] = OrderedDict()
        self._loading: set[str] = set()
        self._failed: dict[str, _Failure] = {}
        self._fresh: set[str] = set()
        self._kept: set[str] = set()
        self.counts = LoadCounts()

    @property
    def loading(self) -> int:
        """Loads under way or queued."""
        return len(self._loading)

    @property
    def budget_bytes(self) -> int:
        return self._budget

    @property
    def held_bytes(self) -> int:
        """Bytes of all adapters on the host."""
        return sum(a.size_bytes for a in self._held.values())

    def digests(self) -> tuple[str, ...]:
        """What is on the host, least recently wanted first."""
        return tuple(self._held)

    def want(self, digest: str) -> LoadState:
        """Where the adapter is; starts its load if it is nowhere. Never blocks."""
        if digest in self._held:
            self._held.move_to_end(digest)
            return LoadState(Load.READY, source="store" if digest in self._fresh else "host")
        failure = self._failed.get(digest)
        if failure is not None:
            wait = failure.until - self._now()
            if wait > 0:
                return LoadState(Load.FAILED, (failure.code, failure.message), retry_after_s=wait)
            del self._failed[digest]
        if digest not in self._loading:
            self._loading.add(digest)
            self._pool.submit(self._load, digest)
        return LoadState(Load.LOADING, source="store")

    def source_of(self, digest: str) -> str:
        """The tier that the adapter lies in now, as far as is known: host, disk or store. Starts nothing."""
        return "host" if digest in self._held else "store"

    def take(self, digest: str) -> HostAdapter:
        """The tensors of an adapter that `want` called READY. Raises KeyError otherwise."""
        self._fresh.discard(digest)
        return self._held[digest]

    def poll(self) -> None:
        """Take in what the workers finished, then drop what the budget no longer holds."""
        while True:
            try:
                done = self._results.get_nowait()
            except queue.Empty:
                break
            if done.digest not in self._loading:  # dropped meanwhile
                continue
            self._loading.discard(done.digest)
            if done.adapter is None:
                self._failed[done.digest] = _Failure(*done.failure, until=self._now() + self._negative_cache_s)
                self.counts.count("failed", done.seconds)
                continue
            self._held[done.digest] = done.adapter
            self._fresh.add(done.digest)
            self.counts.count("store", done.seconds)
        self._failed = {d: f for d, f in self._failed.items() if self._now() < f.until}
        held = self.held_bytes
        for digest in [d for d in self._held if d not in self._kept][:-1]:
            if held <= self._budget:
                break
            held -= self.drop(digest)

    def keep(self, digest: str) -> bool:
        """Hold on to an adapter whatever the budget wants; False when what is kept would then exceed the budget.

        Raises KeyError for an adapter that is not on the host.
        """
        kept = self._kept | {digest}
        if sum(self._held[d].size_bytes for d in kept) > self._budget:
            return False
        self._kept = kept
        return True

    def release(self, digest: str) -> None:
        """Hold on to it no longer than to any other."""
        self._kept.discard(digest)

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter on the host; 0 when it is not there."""
        return self._held[digest].size_bytes if digest in self._held else 0

    def drop(self, digest: str) -> int:
        """Forget an adapter; how many bytes that freed. A load of it that is under way ends in nothing."""
        self._fresh.discard(digest)
        self._kept.discard(digest)
        self._loading.discard(digest)
        adapter = self._held.pop(digest, None)
        return 0 if adapter is None else adapter.size_bytes

    def close(self) -> None:
        """Stop the workers; loads not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, digest: str) -> None:
        begun = self._now()
        adapter: HostAdapter | None = None
        failure = ("", "")
        try:
            adapter = self._read(digest)
        except LoraplaneError as error:
            failure = (AdapterLoadFailed.code, f"adapter {digest[:12]} cannot be loaded: {error}")
        except Exception as error:  # a worker's failure must reach whoever waits for this adapter
            failure = (AdapterLoadFailed.code, f"adapter {digest[:12]} cannot be loaded: {type(error).__name__}")
        self._results.put(_Loaded(digest, adapter, failure, self._now() - begun))
        self._wake()
