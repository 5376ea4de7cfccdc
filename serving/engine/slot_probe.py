"""Looks at a slot from outside of a step: does it hold what was put there, and does that change what the base says?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from serving.engine.lora import HostAdapter, Site, Slots
from serving.engine.model import Decoder
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.request import Sampling
from serving.engine.seq2seq import EncoderDecoder

_LOOKED_AT = 4  # sites of an adapter; all of them would take as long as a step
_PLACES = 4096
# Relative to the largest number: bfloat16 rounds what the kernels sum, and another adapter's numbers are as far off as
# they are large.
_CLOSE = 0.1
_KEY = Key((-1, -1))
_ONE = Sampling(max_tokens=1, temperature=0.0)


class Prover(Protocol):
    """What can be seen of a slot from outside of a step. spare_rows: cache rows that no sequence is ever given."""

    @property
    def spare_rows(self) -> Sequence[int]: ...

    def applies(self, slot: int, adapter: HostAdapter) -> bool:
        """Whether the slot gives what the adapter's own tensors give."""

    def moves(self, slot: int, adapter: HostAdapter) -> bool:
        """Whether the output on fixed tokens differs from the base's. Takes a small forward pass."""


class NoProver:
    """Believes everything, for engines whose runner holds no tensors."""

    spare_rows: Sequence[int] = ()

    def applies(self, slot: int, adapter: HostAdapter) -> bool:
        return True

    def moves(self, slot: int, adapter: HostAdapter) -> bool:
        return True


class SlotProbe:
    """A Prover beside a runner.

    logits: the forward pass of a plan, (sampling rows, vocabulary), with nothing else in the batch, so that equal
    weights give equal bits. probe_row: the cache row it may write; spare_rows: see Prover.
    """

    def __init__(
        self,
        slots: Slots,
        sites: Sequence[Site],
        logits: Callable[[StepPlan], Tensor],
        *,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        probe_row: int,
        spare_rows: Sequence[int] = (),
    ) -> None:
        self._slots, self._sites, self._logits = slots, tuple(sites), logits
        self._dtype, self._device, self._row = dtype, device, probe_row
        self.spare_rows = tuple(spare_rows)
        self._fixed = tuple(vocabulary * part // 5 for part in (1, 2, 3, 4))
        self._base: Tensor | None = None

    @torch.inference_mode()
    def applies(self, slot: int, adapter: HostAdapter) -> bool:
        """See Prover. Of an adapter that was laid out, some of the slot's bytes are compared; else what a few sites of
        the slot give for a fixed input is compared with what the adapter's pairs give."""
        begun = self._slots.begin([slot])
        if adapter.form is not None:
            return _same(adapter.form.tensors[0].flatten(), self._slots.laid(slot))
        found = [(i, s) for i, s in enumerate(self._sites) if any(m in adapter.pairs for m in s.modules)]
        stride = max(1, -(-(len(found) - 1) // (_LOOKED_AT - 1)))
        looked_at = [*found[:-1:stride], *found[-1:]]
        return not looked_at or (begun and all(self._gives(index, site, adapter) for index, site in looked_at))

    def _gives(self, index: int, site: Site, adapter: HostAdapter) -> bool:
        """Whether the slot that was begun adds at this site what the adapter's pairs say."""
        x = torch.cos(torch.arange(site.in_features, dtype=torch.float32)).to(self._device, self._dtype)[None]
        wanted = torch.zeros(1, sum(site.widths))
        for part, module in zip(wanted.split(site.widths, dim=-1), site.modules, strict=True):
            if module in adapter.pairs:
                a, b = (t.float() for t in adapter.pairs[module])
                part.copy_(x.cpu().float() @ a.T @ b)
        given = torch.zeros(1, sum(site.widths), dtype=self._dtype, device=self._device)
        self._slots.add(index, x, given)
        found = given.cpu().float()
        if not bool(wanted.isfinite().all() and found.isfinite().all()):
            return not bool(found.isfinite().all())  # overflow is for the breaker to count, request by request
        error = (found - wanted).abs().amax()
        return bool(error <= _CLOSE * wanted.abs().amax() + torch.finfo(self._dtype).tiny)

    def moves(self, slot: int, adapter: HostAdapter) -> bool:
        """See Prover. Not one bit may be the base's by chance: every logit of the last token is compared."""
        if adapter.embedding is not None:
            # Training leaves the rows of tokens that it never saw at zero: look where the adapter has something.
            tokens = (*self._fixed, int(adapter.embedding.a.float().abs().amax(dim=1).argmax()))
            base = self._compute(NO_SLOT, tokens)
        else:
            tokens = self._fixed
            if self._base is None:
                self._base = self._compute(NO_SLOT, tokens)
            base = self._base
        return not torch.equal(self._compute(slot, tokens), base)

    def _compute(self, slot: int, tokens: tuple[int, ...]) -> Tensor:
        row = RowPlan(_KEY, self._row, slot, 0, tokens, True, _ONE, 0, 0)
        return self._logits(StepPlan((row,))).clone()


def _same(wanted: Tensor, held: Tensor | None) -> bool:
    """Whether a slot holds these bytes, as far as a few thousand places show. wanted: 1-D; held may be longer."""
    if held is None or held.numel() < wanted.numel():
        return False
    if not wanted.numel():
        return True
    at = torch.linspace(0, wanted.numel() - 1, min(wanted.numel(), _PLACES), dtype=torch.float64).long()
    return torch.equal(wanted[at.to(wanted.device)].cpu(), held[at.to(held.device)].cpu())


def slot_probe(
    base: Decoder | EncoderDecoder, slots: Slots, logits: Callable[[StepPlan], Tensor], rows: int, spare: int
) -> SlotProbe:
    """The probe of an engine. rows: given to sequences; behind them lie the idle probe's row and `spare` more."""
    return SlotProbe(
        slots,
        base.sites,
        logits,
        vocabulary=base.embedding.shape[0],
        dtype=base.dtype,
        device=base.device,
        probe_row=rows,
        spare_rows=range(rows + 1, rows + 1 + spare),
    )
