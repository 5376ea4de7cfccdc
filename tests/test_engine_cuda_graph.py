"""Decode steps as graphs. Where there is no card, each replay computes anew: the same code, the same tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serving.engine.attention import PlainCache
from serving.engine.cuda_graph import Capture, Compute, CudaCapture, DecodeInputs, computed_anew
from serving.engine.gpu_copies import Arrival, DirectCopies, SideStreamCopies
from serving.engine.gpu_slots import TritonSlots, triton_missing
from serving.engine.lora import HostAdapter, StackedSlots
from serving.engine.model import Decoder
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.reading import load_decoder
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner
from tests.engine_case import DEVICE, MAX_LEN, EngineCase, load_tiny, read_peft
from tests.test_engine_families import FAMILIES
from tests.tiny_base import VOCAB, Oracle, save_adapter, save_random

SEED = 20261122
ROWS = 6
GREEDY = Sampling(max_tokens=99, temperature=0.0, ignore_eos=True)
LOGIT_ERROR = 2e-5
pytestmark = pytest.mark.skipif(triton_missing() is not None, reason=f"no kernels here: {triton_missing()}")


class Counted:
    """A capture that counts what was captured and what was replayed."""

    def __init__(self) -> None:
        self._capture: Capture = CudaCapture(DEVICE) if DEVICE.type == "cuda" else computed_anew
        self.captured = self.replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        self.captured += 1
        found = self._capture(compute)

        def replay() -> Tensor:
            self.replayed += 1
            return found()

        return replay


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def random_adapter(decoder: Decoder, seed: int, rank: int, sites: Sequence[int] | None = None) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(decoder.dtype)

    pairs = {
        module: (draw(rank, site.in_features), draw(rank, width))
        for number, site in enumerate(decoder.sites)
        if sites is None or number in sites
        for module, width in zip(site.modules, site.widths, strict=True)
    }
    return HostAdapter(f"random {seed}", rank, pairs)


def runners(decoder: Decoder, adapters: Sequence[HostAdapter], capture: Capture) -> tuple[DecoderRunner, DecoderRunner]:
    """One whose decode steps are graphs, and one in plain torch without any, with the same adapters."""
    slots = TritonSlots(decoder.sites, len(adapters), decoder.dtype, decoder.device, 64)
    plain = StackedSlots(decoder.sites, len(adapters), decoder.dtype, decoder.device, 64)
    found = DecoderRunner(decoder, ROWS, slots, capture), DecoderRunner(decoder, ROWS, plain)
    for runner in found:
        for slot, made in enumerate(adapters, start=1):
            runner.install(slot, made)
    return found


def step(*rows: tuple[int, int, int, int]) -> StepPlan:
    """(cache row, slot, start, prompt tokens or 0 to decode)."""
    return StepPlan(
        tuple(
            RowPlan(
                Key((0, row)), row, slot, at, tuple(3 + (row * 31 + at + i) % 250 for i in range(n)), True, GREEDY, 0, 0
            )
            for row, slot, at, n in rows
        )
    )


STEPS = (
    step((0, 1, 0, 20), (1, 2, 0, 33), (2, NO_SLOT, 0, 5), (5, 1, 0, 126)),
    step((1, 2, 33, 0), (0, 1, 20, 0)),  # in another order than their rows
    step((0, 1, 21, 0), (1, 2, 34, 0), (2, NO_SLOT, 5, 0), (5, 1, 126, 0)),
    step((0, 1, 22, 0), (3, 2, 0, 30)),  # a prompt joins: not for a graph
    step((0, 1, 23, 0), (1, 2, 35, 0), (2, NO_SLOT, 6, 0), (3, 2, 30, 0), (5, 1, 127, 0)),
    step((5, 1, 128, 0), (2, NO_SLOT, 7, 0)),  # beyond the first rung of keys; the rows between take no part
    step((1, 2, 36, 0), (3, 2, 31, 0)),
    step((2, NO_SLOT, 8, 0)),
)


@pytest.mark.parametrize(
    "name", ["llama, tied head", "gemma2", "gpt2", "mistral, window of 20", "qwen3, own head width"]
)
def test_replayed_steps_give_the_logits_of_ordinary_ones(name: str, tmp_path: Path) -> None:
    decoder = load_tiny(save_random(FAMILIES[name](), tmp_path / "base", seed=3))
    counted = Counted()
    adapters = [random_adapter(decoder, 1, 4, sites=[4, 7]), random_adapter(decoder, 2, 19, sites=[5, 6])]
    replaying, ordinary = runners(decoder, adapters, counted)
    for number, plan in enumerate(STEPS):
        ours, theirs = replaying.logits(plan), ordinary.logits(plan)
        worst = float((ours - theirs).abs().max())
        print(f"step {number}: {worst:.1e}")
        assert worst <= LOGIT_ERROR * float(theirs.abs().max()), number
        tokens = theirs.argmax(dim=-1)
        for runner in (replaying, ordinary):
            runner._last[torch.tensor([r.row for r in plan.rows], device=DEVICE)] = tokens
    assert counted.replayed == sum(not any(r.tokens for r in plan.rows) for plan in STEPS)


def test_an_engine_on_graphs_answers_as_each_adapter_alone(
    decoder: Decoder, tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    """Base and adapters through two slots: evictions, prompts in chunks, joins at any step, prefixes reused."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    counted = Counted()
    slots = TritonSlots(decoder.sites, 2, decoder.dtype, DEVICE, 64)

    def replaying(_: object) -> DecoderRunner:
        return DecoderRunner(decoder, ROWS, slots, counted)

    case = EngineCase(decoder, rows=ROWS, slots=2, chunk=16, wrap=replaying, device_slots=slots)
    asked = []
    for _ in range(10):
        adapter = rng.choice([None, *tiny_adapters[:4]])
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 30))]
        asked.append((adapter, prompt, case.submit(prompt, adapter, max_tokens=rng.randrange(2, 8), ignore_eos=True)))
        for _ in range(rng.randrange(0, 3)):
            case.step()
    case.run()
    for adapter, prompt, key in asked:
        ids = case.answer(key)
        assert ids == Oracle(tiny_base, adapter).greedy(prompt, len(ids)), (adapter, prompt)
    print(f"{counted.captured} captured, {counted.replayed} replayed, {case.slots.evictions} evictions")
    assert counted.replayed > counted.captured > 0
    assert case.slots.evictions > 0


def test_one_graph_serves_every_mixture_of_adapters(decoder: Decoder) -> None:
    counted = Counted()
    replaying, ordinary = runners(
        decoder, [random_adapter(decoder, n, 3 + n, sites=[1, 4, 6]) for n in range(1, 6)], counted
    )
    everyone = [1, 2, 3, 4, 5, NO_SLOT]
    prompts = step(*((row, slot, 0, 9 + row) for row, slot in enumerate(everyone)))
    replaying.logits(prompts)
    ordinary.logits(prompts)
    for at, slots in enumerate(([1, 2, 3, 4, 5, 0], [3] * 6, [0, 0, 0, 0, 0, 2], [5, 5, 1, 0, 1, 5])):
        plan = step(*((row, slot, 9 + row + at, 0) for row, slot in enumerate(slots)))
        torch.testing.assert_close(replaying.logits(plan), ordinary.logits(plan), rtol=1e-4, atol=1e-4)
    assert counted.captured == 1


class Launches(TorchDispatchMode):
    """Notes every operation with all that a captured launch would freeze: shapes, strides, numbers, addresses."""

    def __init__(self, fixed: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fixed = [t.untyped_storage().data_ptr() for t in fixed]
        self.inputs: set[tuple[int, int]] = set()
        self.seen: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"):
            raise AssertionError(f"{func} asks the device for a value")
        self.seen.append((str(func), *map(self._frozen, args), *map(self._frozen, (kwargs or {}).values())))
        return func(*args, **(kwargs or {}))

    def _frozen(self, value: object) -> object:
        if isinstance(value, Tensor):
            memory = value.untyped_storage().data_ptr()
            here = (self._fixed.index(memory), int(value.storage_offset())) if memory in self._fixed else (-1, 0)
            self.inputs.add(here)
            return tuple(value.shape), value.stride(), here
        return tuple(map(self._frozen, value)) if isinstance(value, list | tuple) else value


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a real capture freezes the launches by itself")
@pytest.mark.parametrize("name", ["llama, tied head", "gemma2", "gpt2"])
def test_a_shapes_launches_depend_on_no_value_of_the_step(name: str, tmp_path: Path) -> None:
    """What a capture would freeze: two steps of one shape are the same operations on the same inputs' memory.

    Rows, positions, adapters and their mixture differ, and no operation brings one of them to the host.
    """
    decoder = load_tiny(save_random(FAMILIES[name](), tmp_path / "base", seed=3))
    noted: list[list[tuple[object, ...]]] = []
    kernel: list[tuple[object, ...]] = []

    def watched(compute: Compute) -> Compute:
        def replay() -> Tensor:
            graphs = runner._graphs
            assert graphs is not None
            kernel.clear()
            with Launches([graphs._numbers, runner._last]) as launches:
                found = compute()
            noted.append([*launches.seen, *kernel])
            # Target rows and positions of the step, and the tokens that were sampled last.
            assert {(0, 0), (0, ROWS), (1, 0)} <= launches.inputs
            return found

        return replay

    runner, _ = runners(decoder, [random_adapter(decoder, 1, 4), random_adapter(decoder, 2, 19)], watched)
    slots = runner._slots
    assert isinstance(slots, TritonSlots)
    slots._add = lambda shape, x, y, order, blocks, ranks: kernel.append(  # type: ignore[assignment]
        (shape.first, x.shape, y.shape, order.data_ptr(), order.shape, blocks.data_ptr(), blocks.shape, ranks)
    )
    runner.run(step((0, 1, 0, 20), (3, 2, 0, 33), (5, 1, 0, 4)))
    runner.run(step((0, 1, 20, 0), (5, 1, 4, 0)))
    runner.run(step((5, 2, 90, 0), (3, NO_SLOT, 33, 0), (1, 1, 0, 0)))
    assert len(noted[0]) > 50
    assert any(isinstance(n[0], int) for n in noted[0])  # adapters' kernels are among them
    assert noted[0] == noted[1]


class OnDevice(TorchDispatchMode):
    """Refuses operations on the host's tensors; its numbers (no dimensions) may travel with a launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for arg in args for value in (arg if isinstance(arg, list | tuple) else (arg,))]
        host = [v for v in given if isinstance(v, Tensor) and v.dim() and v.device.type == "cpu"]
        if host:
            raise AssertionError(f"{func} works on {len(host)} tensors of the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_captured_step_touches_no_tensor_of_the_host(name: str, tmp_path: Path) -> None:
    """On torch's device without values: what mixes it with the host, or asks it for a value, fails there.

    An ordinary step may bring the host's numbers over, but must not compute with tensors of both.
    """
    meta = torch.device("meta")
    decoder = load_decoder(save_random(FAMILIES[name](), tmp_path / "base", seed=3), torch.bfloat16, meta, MAX_LEN)
    slots = TritonSlots(decoder.sites, 2, decoder.dtype, meta, 64)
    runner = DecoderRunner(decoder, ROWS, slots, computed_anew)
    target, where, order, *blocks = torch.zeros(6, ROWS, dtype=torch.long, device=meta)
    assert isinstance(runner._cache, PlainCache)
    with torch.inference_mode(), OnDevice():  # type: ignore[no-untyped-call]
        inputs = DecodeInputs(target, where, order, torch.stack(blocks, dim=1), 128, True)
        found = runner._captured(runner._cache, slots, inputs)
    assert (found.device, len(found)) == (meta, ROWS)
    runner._graphs = None
    assert runner.logits(step((0, NO_SLOT, 5, 0), (2, NO_SLOT, 7, 0), (1, NO_SLOT, 0, 9))).device == meta


def test_rows_that_take_no_part_keep_their_keys_and_values(decoder: Decoder) -> None:
    """A row may be between two chunks of its prompt while the others decode."""
    replaying, _ = runners(decoder, [random_adapter(decoder, 1, 4)], Counted())
    replaying.logits(step((0, 1, 0, 5), (1, 1, 0, 6), (3, 1, 0, 7)))
    cache: Any = replaying._cache
    before = [(k[1:3].clone(), v[1:3].clone()) for k, v in zip(cache._keys, cache._values, strict=True)]
    replaying.logits(step((0, 1, 5, 0), (3, 1, 7, 0)))
    for layer, (keys, values) in enumerate(before):
        assert torch.equal(cache._keys[layer][1:3], keys)
        assert torch.equal(cache._values[layer][1:3], values)


def test_a_step_without_adapters_launches_nothing_for_them(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    replaying, _ = runners(decoder, [random_adapter(decoder, 1, 4)], computed_anew)
    replaying.logits(step((0, 1, 0, 5), (1, NO_SLOT, 0, 6)))
    launched: list[int] = []
    monkeypatch.setattr(replaying._slots, "_add", lambda shape, *_: launched.append(shape.first))
    replaying.logits(step((1, NO_SLOT, 6, 0)))
    assert launched == []
    replaying.logits(step((1, NO_SLOT, 7, 0), (0, 1, 5, 0)))
    assert launched


def test_an_adapter_that_reaches_further_is_covered_by_a_new_graph(decoder: Decoder) -> None:
    """Captured when only site 0 had adapters; then one comes with a larger rank and on all sites."""
    counted = Counted()
    first, second = random_adapter(decoder, 1, 2, sites=[0]), random_adapter(decoder, 2, 40)
    replaying, ordinary = runners(decoder, [first, first], counted)
    for runner in (replaying, ordinary):
        runner.logits(step((0, 1, 0, 5), (1, 2, 0, 6)))
        runner.logits(step((0, 1, 5, 0), (1, 2, 6, 0)))
        runner.install(2, second)
    plan = step((0, 1, 6, 0), (1, 2, 7, 0))
    torch.testing.assert_close(replaying.logits(plan), ordinary.logits(plan), rtol=1e-4, atol=1e-4)
    assert counted.captured == 2
    assert replaying._graphs is not None
    assert len(replaying._graphs) == 1


def test_rows_whose_adapters_change_more_than_sites_go_the_ordinary_way(
    decoder: Decoder, tiny_base: Path, tmp_path: Path
) -> None:
    counted = Counted()
    dora = read_peft(save_adapter(tiny_base, tmp_path / "dora", 9, targets=("q_proj", "up_proj"), dora=True))
    replaying, ordinary = runners(decoder, [dora, random_adapter(decoder, 1, 4)], counted)
    for plan in (step((0, 1, 0, 5), (1, 2, 0, 6)), step((0, 1, 5, 0), (1, 2, 6, 0)), step((1, 2, 7, 0))):
        torch.testing.assert_close(replaying.logits(plan), ordinary.logits(plan), rtol=1e-4, atol=1e-4)
    assert counted.replayed == 1


def test_where_nothing_can_be_captured_steps_are_computed_the_ordinary_way(decoder: Decoder) -> None:
    tried: list[Compute] = []

    def refuses(compute: Compute) -> Compute:
        tried.append(compute)
        raise RuntimeError("operation not permitted when stream is capturing")

    replaying, ordinary = runners(decoder, [random_adapter(decoder, 1, 4)], refuses)
    for plan in (step((0, 1, 0, 5)), step((0, 1, 5, 0)), step((0, 1, 6, 0))):
        torch.testing.assert_close(replaying.logits(plan), ordinary.logits(plan), rtol=1e-4, atol=1e-4)
    assert len(tried) == 1


def test_graphs_are_few_and_the_least_recently_used_goes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.cuda_graph._MOST_GRAPHS", 2)
    counted = Counted()
    replaying, _ = runners(decoder, [random_adapter(decoder, 1, 4)], counted)
    replaying.logits(step(*((row, NO_SLOT, 0, 4) for row in range(ROWS))))
    for row, captured in ((0, 1), (1, 2), (0, 2), (3, 3), (0, 3), (1, 4)):
        replaying.logits(step((row, NO_SLOT, 4, 0)))
        assert counted.captured == captured, row


def test_the_ladders_hold_every_row_and_position() -> None:
    from serving.engine.cuda_graph import _doubling, _half_steps

    assert _doubling(1, 1) == [1]
    assert _doubling(1, 6) == [1, 2, 4, 6]
    assert _half_steps(128, 100) == [100]
    assert _half_steps(128, 1000) == [128, 192, 256, 384, 512, 768, 1000]
    assert _half_steps(128, MAX_LEN)[-1] == MAX_LEN


class LateCopies(DirectCopies):
    """Copies that happen when they are waited for, and no sooner: what a busy side stream may do."""

    def __init__(self) -> None:
        self.waited = 0

    def send(self, staged: Tensor, target: Tensor) -> Arrival:
        return _Late(lambda: self._land(staged, target))

    def _land(self, staged: Tensor, target: Tensor) -> None:
        self.waited += 1
        target.copy_(staged)


class _Late:
    def __init__(self, land: Callable[[], None]) -> None:
        self.wait = land


@pytest.mark.parametrize("capture", [None, computed_anew], ids=["ordinary", "replayed"])
def test_only_a_step_that_uses_a_slot_waits_for_what_comes_into_it(decoder: Decoder, capture: Capture | None) -> None:
    copies = LateCopies()
    adapters = [random_adapter(decoder, n, 4) for n in (1, 2, 3)]
    slots = TritonSlots(decoder.sites, 2, decoder.dtype, DEVICE, 64, copies)
    late = DecoderRunner(decoder, ROWS, slots, capture)
    _, ordinary = runners(decoder, adapters[:2], computed_anew)
    late.install(1, adapters[0])
    for runner in (late, ordinary):
        runner.logits(step((0, 1, 0, 5)))
    assert copies.waited == 1
    late.install(2, adapters[1])
    for at in (5, 6):
        late.logits(step((0, 1, at, 0)))
        ordinary.logits(step((0, 1, at, 0)))
    assert copies.waited == 1
    plan = step((0, 1, 7, 0), (1, 2, 0, 0))
    torch.testing.assert_close(late.logits(plan), ordinary.logits(plan), rtol=1e-4, atol=1e-4)
    assert copies.waited == 2
    for runner in (late, ordinary):
        runner.install(1, adapters[2])
    plan = step((0, 1, 8, 0), (1, 2, 1, 0))
    torch.testing.assert_close(late.logits(plan), ordinary.logits(plan), rtol=1e-4, atol=1e-4)
    assert copies.waited == 3


class FakeStream:
    """One of CUDA's streams, as far as its order shows."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self._name} waits for all of {other._name}")

    def record_event(self) -> str:
        self._log.append(f"event on {self._name}")
        return f"{self._name}'s event"

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self._name} waits for {event}")


def test_a_copy_comes_behind_the_steps_that_were_started_and_before_those_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evicted adapter may still be read by a step under way: nothing is written over it before that has ended."""
    log: list[str] = []
    usual = FakeStream("steps", log)

    def on(stream: FakeStream) -> AbstractContextManager[None]:
        log.append(f"on {stream._name}:")
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copies", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: usual)
    monkeypatch.setattr(torch.cuda, "stream", on)
    copies = SideStreamCopies(torch.device("cuda"))
    staged, target = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    arrival = copies.send(staged, target)
    assert torch.equal(staged, target)
    assert log == ["copies waits for all of steps", "on copies:", "event on copies"]
    arrival.wait()
    assert log[3:] == ["steps waits for copies's event"]
