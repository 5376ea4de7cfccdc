"""The floor under a decode step: what it must read and multiply on this machine, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from serving.engine.linear import FrozenLinear
from serving.engine.model import Decoder

_READ_BYTES = 512 << 20
_PASSES = 8


class MatmulCase:
    """All frozen linears of a base, packed as they are served, on so many rows, and nothing between them."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.name, self.rows = "packed linears alone", rows
        generator = torch.Generator(decoder.device).manual_seed(0)
        self._work = [
            (
                linear,
                torch.randn(rows, linear.in_features, generator=generator, device=decoder.device).to(decoder.dtype),
            )
            for linear in linears(decoder)
        ]

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """See Case."""
        found = []
        for _ in range(count):
            begun = time.perf_counter()
            for linear, x in self._work:
                linear(x)
            found.append(time.perf_counter() - begun)
        return found


@dataclass(frozen=True, slots=True)
class Floors:
    """What bounds a decode step. Bytes of the base's linears and of one adapter; GB/s read; products alone in ms."""

    weight_bytes: int
    adapter_bytes: int
    read_gb_s: float
    matmul_ms: float

    def memory_ms(self, adapters: int) -> float:
        """The least time to read the weights and so many adapters once."""
        return (self.weight_bytes + adapters * self.adapter_bytes) / self.read_gb_s / 1e6

    def matmul_floor_ms(self, adapters: int) -> float:
        """The base's products alone, and the least time to read so many adapters."""
        return self.matmul_ms + adapters * self.adapter_bytes / self.read_gb_s / 1e6

    def shares(self, adapters: int, step_ms: float) -> tuple[float, float]:
        """How much of a step's time the two floors take: 1 is as fast as can be. (memory, products)"""
        return self.memory_ms(adapters) / step_ms, self.matmul_floor_ms(adapters) / step_ms

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "read_gb_s": round(self.read_gb_s, 1), "matmul_ms": round(self.matmul_ms, 2)}


def linears(decoder: Decoder) -> Iterator[FrozenLinear]:
    """Every product of a decode step."""
    for layer in decoder.layers:
        yield from (layer.qkv, layer.out, layer.up, layer.down)
    yield decoder.head


def weight_bytes(decoder: Decoder) -> int:
    """Bytes that a decode step reads of the base's linears, the head among them."""
    size = torch.empty((), dtype=decoder.dtype).element_size()
    return sum(linear.in_features * linear.out_features * size for linear in linears(decoder))


def read_gb_s(device: torch.device) -> float:
    """How fast all threads together read memory that no cache holds: the best of some passes, in GB/s."""
    # Integers: a sum of floats would be bound by its additions on some machines.
    block = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device=device)
    best = 0.0
    for _ in range(_PASSES):
        begun = time.perf_counter()
        int(block.sum())  # the host waits for the device
        best = max(best, _READ_BYTES / (time.perf_counter() - begun) / 1e9)
    return best
