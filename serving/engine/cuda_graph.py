"""Decode steps as CUDA graphs: hundreds of small launches become one.

A graph repeats the same launches on the same memory. So a decode step is computed over cache rows 0 to n - 1, whether
all of them take part or not, for n from a short ladder, and over so many keys, from another; and what differs from step
to step (positions, adapters and their tokens) lies in one tensor that is filled before each replay. A row that takes no
part computes rubbish for nobody: it reads its own cache, and writes where only the idle probe does.

Any function may take the place of the capture: with `computed_anew` this very code runs, and is tested, on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from serving.engine.gpu_slots import Reach, TritonSlots, cut
from serving.engine.plan import NO_SLOT, RowPlan

_FEWEST_KEYS = 128
_MOST_GRAPHS = 64  # each keeps some megabytes; the least recently used goes
_FIELDS = 3
_log = structlog.get_logger()

Compute = Callable[[], Tensor]
Capture = Callable[[Compute], Compute]


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Where a decode step over cache rows 0..n-1 finds what differs from step to step: int64, on the device.

    target: (n,) the row that each writes its key and value to: its own, or the spare one if it takes no part; where:
    (n,) its position; order: (n,) and blocks: (n, 3) as TritonSlots.layout has them; keys: attended to, all positions
    are below; adapters: whether any row may have one.
    """

    target: Tensor
    where: Tensor
    order: Tensor
    blocks: Tensor
    keys: int
    adapters: bool


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph was captured for. reach: None where no row has an adapter."""

    rows: int
    keys: int
    reach: Reach | None


class DecodeGraphs:
    """The captured decode steps of one runner.

    rows: those that are given out; row number `rows` is the spare one. compute: (n, width), what the head reads, of the
    step that the inputs describe; it must launch the same for equal shapes of its inputs.
    """

    def __init__(
        self,
        rows: int,
        positions: int,
        slots: TritonSlots,
        compute: Callable[[DecodeInputs], Tensor],
        capture: Capture,
        device: torch.device,
    ) -> None:
        self._rows, self._slots, self._compute, self._capture, self._device = rows, slots, compute, capture, device
        self._row_ladder, self._key_ladder = _doubling(1, rows), _half_steps(_FEWEST_KEYS, positions)
        self._numbers = torch.zeros(3 + _FIELDS, rows, dtype=torch.long, device=device)
        self._graphs: OrderedDict[_Shape, Compute] = OrderedDict()
        self._works = True

    def __len__(self) -> int:
        return len(self._graphs)

    def hidden(self, rows: Sequence[RowPlan]) -> Tensor | None:
        """(rows, width) of a step; None for one with prompts in it, or if nothing can be captured here."""
        if not self._works or not rows or any(row.tokens for row in rows):
            return None
        shape = self._fill(rows)
        replay = self._graphs.pop(shape, None)
        if replay is None:
            try:
                replay = self._capture(lambda: self._compute(self._inputs(shape)))
            except RuntimeError as error:
                _log.warning("decode_graphs_off", reason=str(error).partition("\n")[0])
                self._works = False
                self._graphs.clear()
                return None
            self._drop(shape)
        self._graphs[shape] = replay
        found = replay()
        return found[torch.tensor([row.row for row in rows], dtype=torch.long, device=self._device)]

    def _fill(self, rows: Sequence[RowPlan]) -> _Shape:
        """Bring this step's numbers to the device, in one copy; the shape of the graph that reads them."""
        count = _first(self._row_ladder, max(row.row for row in rows) + 1)
        keys = _first(self._key_ladder, max(row.start for row in rows) + 1)
        target, where, slots = [self._rows] * self._rows, [0] * self._rows, [NO_SLOT] * self._rows
        for row in rows:
            target[row.row], where[row.row], slots[row.row] = row.row, row.start, row.slot
        segments = cut(slots)
        numbers = [*target, *where, *self._slots.layout(segments, self._rows, self._rows)]
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.long).view_as(self._numbers))
        return _Shape(count, keys, self._slots.reach if segments.blocks else None)

    def _inputs(self, shape: _Shape) -> DecodeInputs:
        target, where, order = self._numbers[:3, : shape.rows]
        blocks = self._numbers[3:].view(self._rows, _FIELDS)[: shape.rows]
        return DecodeInputs(target, where, order, blocks, shape.keys, shape.reach is not None)

    def _drop(self, newest: _Shape) -> None:
        """Forget graphs that are too many, or that do not cover what is now installed."""
        stale = [
            s for s in self._graphs if s.reach is not None and newest.reach is not None and s.reach != newest.reach
        ]
        for shape in stale:
            del self._graphs[shape]
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)


def computed_anew(compute: Compute) -> Compute:
    """In place of a capture: each replay computes."""
    return compute


class CudaCapture:
    """Captures on a card. All graphs share one pool of memory: what a replay gives holds until the next replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Compute once, so that kernels are compiled and libraries have their workspaces, then capture."""
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            compute()
        usual.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that load adapters may pin memory meanwhile: what they do must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            found = compute()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


def _doubling(first: int, most: int) -> list[int]:
    """first, 2 first, 4 first ... and most."""
    found = [first]
    while found[-1] < most:
        found.append(min(most, 2 * found[-1]))
    return found


def _half_steps(first: int, most: int) -> list[int]:
    """first, 1.5 first, 2 first, 3 first, 4 first ... and most: at most half again as long as needed."""
    found = sorted({*(_doubling(first, most)), *(_doubling(first * 3 // 2, most))})
    return [step for step in found if step <= most] or [most]


def _first(ladder: Sequence[int], least: int) -> int:
    return next(step for step in ladder if step >= least)
