"""From the store's blobs to an adapter on the host: fetched, checked against its digest and this base, and scaled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.base_weights import BaseWeights
from adapters.errors import AdapterLoadFailed
from adapters.families import is_head, lies_transposed
from adapters.golden import GoldenRow
from adapters.publish import manifest_of
from adapters.shared_store import open_shared
from adapters.spec import AdapterSpec, parse_spec
from adapters.store import BlobStore
from adapters.tensor_file import TensorView
from adapters.weights import CanonicalWeights, check_shapes, open_weights
from serving.dora import gain
from serving.engine.config import EngineConfig
from serving.engine.lora import End, HostAdapter

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter's blobs, each checked against its digest."""

    digest: str
    config: bytes
    weights: bytes
    golden: tuple[GoldenRow, ...]


class StoreTier:
    """Every adapter of this base that was ever published. Its methods block; each may run in any thread."""

    def __init__(self, config: EngineConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._blobs = BlobStore(Path(config.blobs), shared=open_shared(config.store))

    def fetch(self, digest: str) -> Fetched:
        """The blobs of an adapter. Raises LoraplaneError: the store lacks them, fails, or they are another base's."""
        try:
            manifest = manifest_of(self._blobs.fetch(digest))
        except ValueError as error:
            raise AdapterLoadFailed(f"{digest[:12]} is no adapter: {error}", retry_after_s=None) from None
        if manifest.base != self._config.base_digest:
            raise AdapterLoadFailed(f"adapter {digest[:12]} belongs to another base", retry_after_s=None)
        config, weights = self._blobs.fetch(manifest.config), self._blobs.fetch(manifest.weights)
        return Fetched(digest, config, weights, manifest.golden)

    def build(self, fetched: Fetched) -> HostAdapter:
        """What these blobs are to an engine. Raises AdapterRefused when they do not fit its base."""
        config = self._config
        spec = parse_spec(fetched.config)
        # torch wants memory that it could write to.
        weights = open_weights(bytearray(fetched.weights))
        check_shapes(weights, config.modules, spec, config.max_rank)
        folder = Path(config.base_folder)
        return host_adapter(fetched.digest, weights, spec, self._dtype, folder, config.family, fetched.golden)


def read_adapter(config: EngineConfig, digest: str, dtype: torch.dtype) -> HostAdapter:
    """The adapter of a digest, every byte checked against it, scaled and in the compute dtype.

    Raises LoraplaneError when the store lacks it, holds other bytes, or it does not fit this base.
    """
    store = StoreTier(config, dtype)
    return store.build(store.fetch(digest))


def host_adapter(
    digest: str,
    weights: CanonicalWeights,
    spec: AdapterSpec,
    dtype: torch.dtype,
    base_folder: Path,
    family: str,
    golden: tuple[GoldenRow, ...] = (),
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
    return HostAdapter(digest, weights.rank, pairs, gains, ends.get("embedding"), ends.get("head"), golden=golden)


def _tensor(view: TensorView) -> Tensor:
    raw = torch.frombuffer(view.buffer, dtype=_TORCH[view.dtype])
    return raw.reshape(view.shape)
