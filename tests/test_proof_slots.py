"""What is seen of a slot from outside of a step, for every kind of base, adapter and slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine.kernels.load import cpu_kernels
from serving.engine.lora import End, HostAdapter, Site
from serving.engine.packed import PackedSlots
from serving.engine.reading import load_decoder
from serving.engine.runner import DecoderRunner, make_slots
from serving.engine.seq2seq import load_encoder_decoder
from serving.engine.seq2seq_runner import Seq2SeqRunner
from serving.engine.slot_probe import SlotProbe, slot_probe
from tests.engine_case import DEVICE, read_peft
from tests.test_engine_whole_path import BASES
from tests.tiny_base import save_adapter, save_random, save_random_seq2seq

Made = tuple[SlotProbe, Callable[[int, HostAdapter], None], HostAdapter, HostAdapter]


def make(folder: Path, kind: str, dora: bool, targets: tuple[str, ...] | None = None) -> Made:
    """A probe, what installs, and two adapters of a base."""
    config, known = BASES[kind]
    seq2seq = kind in ("t5", "bart")
    base = (save_random_seq2seq if seq2seq else save_random)(config(), folder / "base", 7)
    adapters = [
        read_peft(
            save_adapter(base, folder / f"peft{seed}", seed, targets=targets or known, dora=dora, seq2seq=seq2seq)
        )
        for seed in (11, 12)
    ]
    if seq2seq:
        both = load_encoder_decoder(base, torch.float32, DEVICE, 64)
        slots = make_slots(both, 2, 64)
        runner: Any = Seq2SeqRunner(both, 1, slots)
        return slot_probe(both, slots, runner.logits, 1, 0), runner.install, *adapters
    decoder = load_decoder(base, torch.float32, DEVICE, 64)
    slots = make_slots(decoder, 2, 64)
    runner = DecoderRunner(decoder, 1, slots, spare=2)
    return slot_probe(decoder, slots, runner.logits, 1, 2), runner.install, *adapters


def without_effect(adapter: HostAdapter) -> HostAdapter:
    """The same modules, all of them zero; the gains of DoRA one."""

    def none(end: End | None) -> End | None:
        return None if end is None else End(end.a, torch.zeros_like(end.b))

    pairs = {module: (a, torch.zeros_like(b)) for module, (a, b) in adapter.pairs.items()}
    return HostAdapter(adapter.digest, adapter.rank, pairs, {}, none(adapter.embedding), none(adapter.head))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_in_its_slot_is_seen_and_one_without_effect_too(tmp_path: Path, kind: str, dora: bool) -> None:
    probe, install, ours, other = make(tmp_path, kind, dora)
    install(1, ours)
    assert probe.applies(1, ours)
    assert probe.moves(1, ours)
    install(1, other)
    assert probe.applies(1, other)
    assert not probe.applies(1, ours)
    nothing = without_effect(ours)
    install(1, nothing)
    assert probe.applies(1, nothing)
    assert not probe.moves(1, nothing)
    assert not probe.applies(1, ours)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_an_end_alone_is_seen_to_change_the_output(tmp_path: Path, target: str) -> None:
    """An embedding is trained for the tokens that training saw; the others' rows stay zero."""
    probe, install, ours, _ = make(tmp_path, "llama", False, (target,))
    if ours.embedding is not None:
        seen = torch.zeros_like(ours.embedding.a)
        seen[17] = ours.embedding.a[17]
        ours = replace(ours, embedding=End(seen, ours.embedding.b))
    install(1, ours)
    assert probe.applies(1, ours)
    assert probe.moves(1, ours)


def test_packed_slots_are_compared_by_their_bytes() -> None:
    """The kernels read the very memory that was laid out; a slot that was left as it was holds another's."""
    if cpu_kernels() is None:
        pytest.skip("no compiled kernels on this machine")
    sites = (Site(("a", "b"), 32, (32, 16)), Site(("c",), 16, (32,)))
    slots = PackedSlots(sites, 2, 16, cpu_kernels())

    def adapter(seed: int) -> HostAdapter:
        random = torch.Generator().manual_seed(seed)
        shapes = {"a": (32, 32), "b": (32, 16), "c": (16, 32)}
        pairs = {
            name: tuple(torch.randn(*shape, generator=random).bfloat16() for shape in ((4, n_in), (4, n_out)))
            for name, (n_in, n_out) in shapes.items()
        }
        return slots.prepare(HostAdapter(str(seed), 4, pairs))  # type: ignore[arg-type]

    probe = SlotProbe(
        slots, sites, lambda plan: torch.zeros(1, 1), vocabulary=5, dtype=torch.bfloat16, device=DEVICE, probe_row=0
    )
    ours, other = adapter(1), adapter(2)
    slots.install(1, ours)
    slots.install(2, other)
    assert probe.applies(1, ours)
    assert probe.applies(2, other)
    assert not probe.applies(2, ours)
