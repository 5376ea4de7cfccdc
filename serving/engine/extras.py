"""What an adapter changes beside its sites: what tokens are looked up as, the head, and DoRA's gains.

All of it is plain torch over the rows that need it. A step without such a row pays one look into a set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from serving.engine.lora import End, HostAdapter, Site
from serving.engine.memory import lazy_zeros


class Extras:
    """The extras of the adapters in all slots of one device.

    biases: of each site's fused linear, or None. A gain g turns what a linear gives, W x + bias, into g * W x + bias
    (Liu et al. 2024, DoRA); g - 1 is kept, in float32, so that rows of zeros mean "as it is".
    """

    def __init__(self, sites: Sequence[Site], biases: Sequence[Tensor | None], device: torch.device) -> None:
        self._device = device
        self._biases = [None if b is None else b.float() for b in biases]
        self._widths = [sum(s.widths) for s in sites]
        self._places = _places(sites)
        self._gains: dict[int, Tensor] = {}  # site -> (slots, width)
        self._gained: dict[int, frozenset[int]] = {}  # slot -> sites with a gain
        self._embeddings: dict[int, End] = {}
        self._heads: dict[int, End] = {}
        self._touched: frozenset[int] = frozenset()
        self._at = self._which = torch.zeros(0, dtype=torch.long, device=device)
        self._lookups: list[tuple[End, Tensor]] = []

    @property
    def size_bytes(self) -> int:
        """Bytes that the slots' extras occupy; of a table of gains, the rows in use."""
        ends = [*self._embeddings.values(), *self._heads.values()]
        gains = sum(4 * self._widths[site] for sites in self._gained.values() for site in sites)
        return gains + sum(end.size_bytes for end in ends)

    @property
    def active(self) -> bool:
        """Whether the step that was begun has a row whose adapter brings gains or an embedding."""
        return bool(self._touched or self._lookups)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter's extras into a slot (1-based), in place of whatever was there."""
        for ends, end in ((self._embeddings, adapter.embedding), (self._heads, adapter.head)):
            ends.pop(slot, None)
            if end is not None:
                ends[slot] = end.to(self._device)
        for site in self._gained.pop(slot, frozenset()):
            self._gains[site][slot - 1].zero_()
        sites = set()
        for module, gain in adapter.gains.items():
            site, first, width = self._places[module]
            self._table(site, slot)[slot - 1, first : first + width] = gain.to(self._device) - 1
            sites.add(site)
        if sites:
            self._gained[slot] = frozenset(sites)

    def _table(self, site: int, slot: int) -> Tensor:
        """The gains of a site, with a row for the slot."""
        table = self._gains.get(site)
        if table is None or len(table) < slot:
            rows = max(slot, 8 if table is None else 2 * len(table))
            grown = lazy_zeros((rows, self._widths[site]), torch.float32, self._device)
            if table is not None:
                for used in self._gained:
                    if used <= len(table):
                        grown[used - 1] = table[used - 1]
            self._gains[site] = table = grown
        return table

    def begin(self, slots: Sequence[int]) -> None:
        """Prepare a step whose flat tokens have these slots."""
        self._touched, self._lookups = frozenset(), []
        if not self._gained.keys().isdisjoint(slots):
            tokens = [t for t, slot in enumerate(slots) if slot in self._gained]
            self._at = self._index(tokens)
            self._which = self._index([slots[t] - 1 for t in tokens])
            self._touched = frozenset().union(*(self._gained[slots[t]] for t in tokens))
        self._lookups = self._rows(self._embeddings, slots)

    def gain(self, site: int, y: Tensor) -> None:
        """Apply the gains of a site to what its base linear gave, in place and before any low-rank update.

        Meaning: ``y[t] += (y[t] - bias) * (g[slot[t]] - 1)``. y: (T, width of the site).
        """
        if site not in self._touched:
            return
        rows, bias = y[self._at].float(), self._biases[site]
        scaled = torch.addcmul(rows, rows if bias is None else rows - bias, self._gains[site][self._which])
        y[self._at] = scaled.to(y.dtype)

    def embed(self, x: Tensor, tokens: Tensor) -> None:
        """Change what tokens were looked up as, in place, before it is scaled. x: (T, width); tokens: (T,)."""
        for end, at in self._lookups:
            x[at] = _changed(end, x[at], end.a[tokens[at]])

    def head(self, h: Tensor, logits: Tensor, slots: Sequence[int]) -> None:
        """Change what the head gave for rows with these slots, in place. h: (rows, width); logits: (rows, vocab)."""
        for end, at in self._rows(self._heads, slots):
            logits[at] = _changed(end, logits[at], h[at] @ end.a.T)

    def _rows(self, ends: Mapping[int, End], slots: Sequence[int]) -> list[tuple[End, Tensor]]:
        """Each end in use and the places of its rows."""
        if ends.keys().isdisjoint(slots):
            return []
        return [
            (ends[slot], self._index([t for t, other in enumerate(slots) if other == slot]))
            for slot in sorted(ends.keys() & set(slots))
        ]

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)


def _changed(end: End, given: Tensor, hidden: Tensor) -> Tensor:
    """given * gain + hidden @ b. given: (rows, out), what the base gave; hidden: (rows, r)."""
    scaled = given if end.gain is None else (given.float() * end.gain).to(given.dtype)
    return torch.addmm(scaled, hidden, end.b)


def _places(sites: Sequence[Site]) -> dict[str, tuple[int, int, int]]:
    """module -> (its site, its first output there, how many)."""
    found = {}
    for number, site in enumerate(sites):
        first = 0
        for module, width in zip(site.modules, site.widths, strict=True):
            found[module] = (number, first, width)
            first += width
    return found


def gain_reference(bias: Tensor | None, gains: Sequence[Tensor | None], y: Tensor) -> None:
    """What `Extras.gain` means, one token at a time: slow and obvious. gains: of each token, (width,) or None."""
    for t, gain in enumerate(gains):
        if gain is not None:
            rest = torch.zeros_like(y[t]) if bias is None else bias
            y[t] = (y[t] - rest) * gain + rest
