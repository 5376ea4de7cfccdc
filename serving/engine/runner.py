"""Computes a step: one forward pass over the tokens of all rows, whatever adapters they use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import structlog
import torch
from torch import Tensor

from serving.engine.attention import PlainCache, make_cache
from serving.engine.cuda_graph import Capture, CudaCapture, DecodeGraphs, DecodeInputs
from serving.engine.extras import Extras
from serving.engine.gpu_slots import TritonSlots, triton_missing
from serving.engine.lora import HostAdapter, Slots, StackedSlots
from serving.engine.model import SITES_PER_LAYER, Decoder
from serving.engine.packed import PackedSlots, packable
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan, StepResult
from serving.engine.request import Sampling, TokenLogprob
from serving.engine.sampling import NOT_FINITE, sample, score
from serving.engine.seq2seq import EncoderDecoder

_PROBE = Key((-1, -1))
_SCORED = 64  # prompt tokens whose logits are held at a time
_Lora = Callable[[int, Tensor, Tensor], Tensor]
_log = structlog.get_logger()


class Runner(Protocol):
    """What an engine needs of a base family; encoder-decoders get a runner of their own."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step. A row that cannot be computed gets a fault; an exception means that no row was."""

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot, between two steps."""

    def tidy(self, plan: StepPlan) -> None:
        """Before a step, and once: zero the rows to scrub, then copy what rows are to have of others, in this order."""

    def probe(self) -> bool:
        """Compute one base token on a spare row; whether it came out finite."""


class DecoderRunner:
    """Decoder-only families on CPU or CUDA. capture: how decode steps are captured, where they are; see cuda_graph.
    spare: cache rows behind the idle probe's, for golden rows."""

    def __init__(
        self, decoder: Decoder, rows: int, slots: Slots, capture: Capture | None = None, spare: int = 0
    ) -> None:
        self._d = decoder
        self._slots = slots
        biases = [p.bias for layer in decoder.layers for p in (layer.qkv, layer.out, layer.up, layer.down)]
        self._extras = Extras(decoder.sites, biases, decoder.device)
        self._probe_row = rows  # one row more than is given out, and some for golden rows
        layers = [layer.heads for layer in decoder.layers]
        count = rows + 1 + spare
        self._cache = make_cache(layers, count, decoder.max_model_len, decoder.embedding, decoder.ops.kernels)
        self._last = torch.zeros(count, dtype=torch.long, device=decoder.device)
        if capture is None and decoder.device.type == "cuda":
            capture = CudaCapture(decoder.device)
        self._graphs: DecodeGraphs | None = None
        if capture is not None and isinstance(slots, TritonSlots) and isinstance(self._cache, PlainCache):
            compute = partial(self._captured, self._cache, slots)
            self._graphs = DecodeGraphs(rows, decoder.max_model_len, slots, compute, capture, decoder.device)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Runner. Raises ValueError when the adapter's rank exceeds the slots' limit."""
        self._slots.install(slot, adapter)
        self._extras.install(slot, adapter)

    def tidy(self, plan: StepPlan) -> None:
        """See Runner."""
        for row in plan.scrub:
            self._cache.scrub(row)
        for copy in plan.copies:
            self._cache.copy(*copy)

    def probe(self) -> bool:
        """See Runner."""
        row = RowPlan(_PROBE, self._probe_row, NO_SLOT, 0, (0,), True, Sampling(max_tokens=1, temperature=0.0), 0, 0)
        return self.run(StepPlan((row,))).sampled[self._probe_row].fault is None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """See Runner. Decode rows come first in the plan."""
        wanted = [row for row in plan.rows if row.sample]
        hidden = self._hidden(plan.rows)
        sampled = sample(self._sampling_logits(plan.rows, hidden), wanted) if wanted else []
        if wanted:
            at = torch.tensor([r.row for r in wanted], device=self._d.device)
            self._last[at] = torch.tensor([s.token for s in sampled], device=self._d.device)
        found = {row.row: s for row, s in zip(wanted, sampled, strict=True)}
        scores: dict[int, tuple[TokenLogprob, ...]] = {}
        for row, own in _parts(plan.rows, hidden):
            if row.targets:
                scored = self._score(row, own[row.skipped :])
                if scored is None:
                    found[row.row] = NOT_FINITE
                else:
                    scores[row.row] = tuple(scored)
        return StepResult(found, scores)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """(sampling rows, vocabulary): the forward pass of a step, keys and values written to the cache."""
        return self._sampling_logits(plan.rows, self._hidden(plan.rows))

    def _hidden(self, rows: Sequence[RowPlan]) -> Tensor:
        """(T, width): what the head reads, for every flat token of a step."""
        slots = [r.slot for r in rows for _ in range(r.length)]
        self._extras.begin(slots)
        if self._graphs is not None and not self._extras.active:
            replayed = self._graphs.hidden(rows)
            if replayed is not None:
                return replayed
        self._cache.begin(rows)
        lora = self._add if self._slots.begin(slots) else _nothing
        return self._layers(self._embed(self._tokens(rows), self._where(rows)), lora)

    def _captured(self, cache: PlainCache, slots: TritonSlots, inputs: DecodeInputs) -> Tensor:
        """(n, width): what the head reads, of a decode step over cache rows 0..n-1 without extras. See DecodeGraphs."""
        cache.begin_fixed(inputs.target, inputs.where, inputs.keys)
        slots.begin_fixed(inputs.order, inputs.blocks)
        x = self._embed(self._last[: len(inputs.where)], inputs.where)
        return self._layers(x, self._add if inputs.adapters else _nothing)

    def _sampling_logits(self, rows: Sequence[RowPlan], hidden: Tensor) -> Tensor:
        return self._head(hidden[self._sampling_tokens(rows)], [r.slot for r in rows if r.sample])

    def _score(self, row: RowPlan, hidden: Tensor) -> list[TokenLogprob] | None:
        """Log-probabilities of a row's targets; None if something is not finite. hidden: (tokens, width), from the
        one that the first target follows."""
        top = row.sampling.prompt_logprobs or 0
        found: list[TokenLogprob] = []
        # In blocks, for logits of a long prompt would be gigabytes.
        for first in range(0, len(row.targets), _SCORED):
            targets = row.targets[first : first + _SCORED]
            logits = self._head(hidden[first : first + len(targets)], [row.slot] * len(targets))
            scored = score(logits, targets, top)
            if scored is None:
                return None
            found += scored
        return found

    def _layers(self, x: Tensor, lora: _Lora) -> Tensor:
        """(T, width) -> (T, width): embeddings to what the head reads. x is overwritten."""
        d, ops, cache = self._d, self._d.ops, self._cache
        h = ops.norm(x, d.layers[0].attention_norm)
        norms = [*(layer.attention_norm for layer in d.layers[1:]), d.norm]
        for index, (layer, next_norm) in enumerate(zip(d.layers, norms, strict=True)):
            site = index * SITES_PER_LAYER
            attended = cache.attend(index, lora(site, h, layer.qkv(h)))
            y = lora(site + 1, attended, layer.out(attended))
            h = ops.add_norm(x, ops.maybe_norm(y, layer.attended_norm), layer.mlp_norm)
            mixed = ops.activate(lora(site + 2, h, layer.up(h)), d.activation)
            y = lora(site + 3, mixed, layer.down(mixed))
            h = ops.add_norm(x, ops.maybe_norm(y, layer.mixed_norm), next_norm)
        return h

    def _head(self, h: Tensor, slots: Sequence[int]) -> Tensor:
        """(rows, vocabulary) for rows with these slots."""
        d = self._d
        logits = d.head(h)
        self._extras.head(h, logits, slots)
        return logits if not d.logit_cap else d.logit_cap * torch.tanh(logits / d.logit_cap)

    def _add(self, site: int, x: Tensor, y: Tensor) -> Tensor:
        self._extras.gain(site, y)  # DoRA scales what the base gives, before the update is added
        self._slots.add(site, x, y)
        return y

    def _embed(self, tokens: Tensor, where: Tensor | None) -> Tensor:
        """(T, width): what the first layer reads, of flat tokens at these positions."""
        d = self._d
        x = d.embedding[tokens]
        self._extras.embed(x, tokens)
        if d.embedding_scale != 1.0:
            x = x * torch.tensor(d.embedding_scale, dtype=d.dtype)  # rounded first, as the families do
        return x if d.positions is None or where is None else x + d.positions[where]

    def _where(self, rows: Sequence[RowPlan]) -> Tensor | None:
        """(T,) positions of the flat tokens, where the base has learned ones."""
        if self._d.positions is None:
            return None
        where = [p for r in rows for p in range(r.start, r.start + r.length)]
        return torch.tensor(where, dtype=torch.long, device=self._d.device)

    def _tokens(self, rows: Sequence[RowPlan]) -> Tensor:
        """Flat input ids: prompt tokens from the plan, a decode row's from what was sampled last on the device."""
        fed = torch.tensor([t for r in rows for t in (r.tokens or (0,))], dtype=torch.long, device=self._d.device)
        count = sum(1 for r in rows if not r.tokens)
        if count:
            fed[:count] = self._last[torch.tensor([r.row for r in rows[:count]], device=self._d.device)]
        return fed

    def _sampling_tokens(self, rows: Sequence[RowPlan]) -> Tensor:
        """Index of the last flat token of each row that samples."""
        found, end = [], 0
        for row in rows:
            end += row.length
            if row.sample:
                found.append(end - 1)
        return torch.tensor(found, dtype=torch.long, device=self._d.device)


def _parts(rows: Sequence[RowPlan], hidden: Tensor) -> Iterator[tuple[RowPlan, Tensor]]:
    """Each row with its own flat tokens."""
    return zip(rows, hidden.split([row.length for row in rows]), strict=True)


def _nothing(site: int, x: Tensor, y: Tensor) -> Tensor:
    return y


def make_slots(base: Decoder | EncoderDecoder, slots: int, max_rank: int) -> Slots:
    """Slots of the form that this base is computed with."""
    kernels = base.ops.kernels
    if kernels is not None and packable(base.sites):
        return PackedSlots(base.sites, slots, max_rank, kernels)
    if base.device.type == "cuda":
        missing = triton_missing()
        if missing is None:
            return TritonSlots(base.sites, slots, base.dtype, base.device, max_rank)
        _log.warning("kernels_off", reason=missing)
    return StackedSlots(base.sites, slots, base.dtype, base.device, max_rank)
