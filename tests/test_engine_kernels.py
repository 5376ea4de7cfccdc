"""The compiled kernels: equal to torch within bfloat16's rounding, and a token does not know its neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engine.attention import Heads, PackedCache, PlainCache
from serving.engine.kernels import load
from serving.engine.kernels.load import KernelsMissing, cpu_kernels
from serving.engine.linear import FrozenLinear, in_blocks
from serving.engine.lora import HostAdapter, Site, add_reference
from serving.engine.ops import Activation, Norm, Ops
from serving.engine.packed import PackedSlots
from serving.engine.plan import Key, RowPlan
from serving.engine.request import Sampling
from serving.engine.row_attention import over_rows
from tests.engine_case import DEVICE

SEED = 20261122
# One unit of bfloat16 in the last place is 2**-8 of the value; sums here have a few roundings.
ROUNDING = 3 * 2**-8
WHY_NOT = (
    "these kernels are the CPU's; run them with --device cpu"
    if DEVICE.type != "cpu"
    else None
    if cpu_kernels() is not None
    else "this machine has no bfloat16 kernels (CPU or compiler)"
)
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def near(ours: Tensor, exact: Tensor) -> bool:
    """Within bfloat16's rounding of the largest value of each row."""
    size = exact.float().abs().amax(-1, keepdim=True)
    return bool(((ours.float() - exact.float()).abs() <= ROUNDING * size + 1e-6).all())


@needs_kernels
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out", [1, 15, 48, 49, 100, 960])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
def test_a_product_equals_torchs_and_a_row_is_the_same_bits_alone(rows: int, out: int, biased: bool) -> None:
    x, weight, bias = draw(rows, 130), draw(out, 130, scale=0.1), draw(out) if biased else None
    kernels = cpu_kernels()
    assert kernels is not None
    sums = torch.zeros(in_blocks(weight).shape[0] * 48)
    if bias is not None:
        sums[:out] = bias
    made = kernels.product(x, in_blocks(weight), sums, out)
    exact = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert made.shape == (rows, out)
    assert near(made, exact)
    for at in (0, rows // 2, rows - 1):
        assert torch.equal(kernels.product(x[at : at + 1].contiguous(), in_blocks(weight), sums, out)[0], made[at])
    assert kernels.product(x[:0], in_blocks(weight), sums, out).shape == (0, out)


@needs_kernels
def test_a_product_of_what_is_no_number_spoils_its_own_row_alone() -> None:
    x, linear = draw(20, 64), FrozenLinear(draw(50, 64))
    clean = linear(x)
    x[7, 3], x[11, 0] = float("nan"), float("inf")
    made = linear(x)
    assert not made[7].isfinite().any()
    assert not made[11].isfinite().any()
    rest = [row for row in range(20) if row not in (7, 11)]
    assert torch.equal(made[rest], clean[rest])


@needs_kernels
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_norm_and_sum_equal_torch(rows: int, offset: float) -> None:
    x, y, norm = draw(rows, 576), draw(rows, 576), Norm(draw(576), 1e-5, offset)
    fast, slow = x.clone(), x.clone()
    assert near(Ops(cpu_kernels()).add_norm(fast, y, norm), Ops(None).add_norm(slow, y, norm))
    assert torch.equal(fast, slow)
    assert near(Ops(cpu_kernels()).norm(x, norm), Ops(None).norm(x, norm))


@needs_kernels
@pytest.mark.parametrize("tanh_gelu", [False, True])
def test_gates_equal_torch_far_out_too(tanh_gelu: bool) -> None:
    gate_up = torch.cat([draw(40, 64, scale=20), draw(40, 64)], dim=1)
    gate_up[0, :8] = torch.tensor([0.0, 200.0, -200.0, 1e-30, -1e-30, 88.0, -88.0, 3e38])
    gate_up[0, 64:72] = 1
    form = Activation.GATED_TANH_GELU if tanh_gelu else Activation.GATED_SILU
    assert near(Ops(cpu_kernels()).activate(gate_up, form), Ops(None).activate(gate_up.float(), form))


def heads(groups: int, dim: int, **more: object) -> Heads:
    angles = torch.outer(torch.arange(300), 10000 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    return Heads(2 * groups, 2, dim, angles.cos().bfloat16(), angles.sin().bfloat16(), dim**-0.5, **more)  # type: ignore[arg-type]


def rows(*parts: tuple[int, int, int]) -> list[RowPlan]:
    """(cache row, start, prompt tokens or 0 to decode)."""
    greedy = Sampling(max_tokens=1, temperature=0.0)
    return [RowPlan(Key((0, i)), row, 0, at, (1,) * n, True, greedy, 0, 0) for i, (row, at, n) in enumerate(parts)]


@needs_kernels
@pytest.mark.parametrize(
    "layer",
    [
        heads(3, 64),
        heads(1, 64),
        heads(8, 32),
        heads(9, 64),
        heads(3, 64, window=20),
        heads(3, 64, softcap=5.0),
        heads(2, 128, q_norm=torch.rand(128).bfloat16(), k_norm=torch.rand(128).bfloat16(), norm_eps=1e-6),
        heads(2, 64, q_norm=-torch.rand(64).bfloat16(), k_norm=-torch.rand(64).bfloat16(), norm_offset=1.0),
    ],
    ids=["group 3", "group 1", "group 8", "group 9", "window", "softcap", "head norms", "head norms with offset"],
)
def test_attention_equals_torch_through_chunks_and_decoding(layer: Heads) -> None:
    packed = PackedCache([layer], 4, 300, cpu_kernels())
    plain = PlainCache([layer], 4, 300, torch.float32, CPU)
    wide = (layer.heads + 2 * layer.kv) * layer.dim
    for step in (
        rows((1, 0, 37), (2, 0, 5)),
        rows((2, 5, 0), (1, 37, 70)),
        rows((1, 107, 0), (2, 6, 0), (0, 0, 1)),
        rows((1, 108, 0)),
    ):
        qkv = draw(sum(r.length for r in step), wide)
        packed.begin(step)
        plain.begin(step)
        assert near(packed.attend(0, qkv.clone()), plain.attend(0, qkv.float()))


@needs_kernels
def test_a_token_attends_bit_for_bit_the_same_alone_and_in_a_chunk() -> None:
    layer = heads(3, 64)
    together, alone = (PackedCache([layer], 2, 300, cpu_kernels()) for _ in range(2))
    qkv = draw(100, 10 * 64)
    together.begin(rows((0, 0, 100)))
    chunk = together.attend(0, qkv.clone())
    single = []
    for at in range(100):
        alone.begin(rows((1, at, 1)))
        single.append(alone.attend(0, qkv[at : at + 1].clone()))
    assert torch.equal(chunk, torch.cat(single))


@needs_kernels
@pytest.mark.parametrize("window", [0, 5])
def test_what_another_left_in_a_row_is_not_read_even_where_it_is_no_number(window: int) -> None:
    """Behind a window, what is no number stays unseen by who wrote it; the next one in that row failed of it."""
    layer = replace(heads(3, 64), window=window)
    clean, used = (PackedCache([layer], 2, 300, cpu_kernels()) for _ in range(2))
    for cache in (*used._keys, *used._values):
        cache.fill_(float("nan"))
    for step in (
        rows((0, 0, 1), (1, 0, 3)),
        rows((0, 1, 0), (1, 3, 30)),
        rows((0, 2, 0), (1, 33, 0)),
        rows((0, 3, 14)),
    ):
        qkv = draw(sum(r.length for r in step), 10 * 64)
        clean.begin(step)
        used.begin(step)
        assert torch.equal(used.attend(0, qkv.clone()), clean.attend(0, qkv.clone()))


@needs_kernels
def test_a_copied_prefix_answers_like_its_source() -> None:
    layer = heads(3, 64)
    cache = PackedCache([layer], 3, 300, cpu_kernels())
    qkv, more = draw(50, 10 * 64), draw(1, 10 * 64)
    cache.begin(rows((0, 0, 50)))
    cache.attend(0, qkv.clone())
    cache.copy(0, 2, 37)
    cache.begin(rows((2, 37, 13)))
    cache.attend(0, qkv[37:].clone())
    cache.begin(rows((0, 50, 0), (2, 50, 0)))
    first, second = cache.attend(0, more.repeat(2, 1))
    assert torch.equal(first, second)


@needs_kernels
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("biased", [False, True])
def test_one_token_a_row_attends_as_in_torch_whoever_else_does(dim: int, biased: bool) -> None:
    """Nine rows of 1 to 130 positions out of order, against torch in float32; alone, bit for bit the same."""
    keys, values, q = draw(12, 4, 192, dim), draw(12, 4, 192, dim), draw(9, 4, dim)
    rows = torch.tensor([3, 0, 11, 5, 4, 9, 1, 7, 2])
    lengths = torch.tensor([1, 130, 64, 65, 17, 16, 128, 2, 99])
    bias = torch.randn(4, 9, 192) if biased else None
    exact = over_rows(rows, lengths, 192, bias, 0.3, None, keys.float())(q.float(), keys.float(), values.float())
    found = over_rows(rows, lengths, 192, bias, 0.3, cpu_kernels(), keys)(q, keys, values)
    assert near(found, exact)
    for n in range(9):
        own = None if bias is None else bias[:, n : n + 1]
        alone = over_rows(rows[n : n + 1], lengths[n : n + 1], 192, own, 0.3, cpu_kernels(), keys)
        assert torch.equal(alone(q[n : n + 1], keys, values), found[n : n + 1])
    keys[5] = float("nan")
    sick = over_rows(rows, lengths, 192, bias, 0.3, cpu_kernels(), keys)(q, keys, values)
    assert sick[3].isnan().all()
    assert torch.equal(sick[:3], found[:3])
    assert torch.equal(sick[4:], found[4:])


@needs_kernels
def test_rows_and_lengths_outside_a_cache_are_refused() -> None:
    cache, q = draw(2, 1, 16, 16), draw(1, 1, 16)
    for row, length in ((2, 1), (-1, 1), (0, 17), (0, 0)):
        with pytest.raises(RuntimeError, match="outside the cache"):
            over_rows(torch.tensor([row]), torch.tensor([length]), 16, None, 1.0, cpu_kernels(), cache)(q, cache, cache)


@needs_kernels
def test_a_nan_is_neither_lost_nor_passed_on() -> None:
    layer = heads(3, 64)
    cache = PackedCache([layer], 3, 300, cpu_kernels())
    qkv = draw(2, 10 * 64)
    qkv[0, 5] = float("nan")
    cache.begin(rows((0, 0, 1), (1, 0, 1)))
    bad, good = cache.attend(0, qkv)
    assert bad.isnan().any()
    assert not good.isnan().any()
    gate_up = torch.tensor([[float("nan")] * 16 + [1.0] * 16, [1.0] * 32]).bfloat16()
    gated = Ops(cpu_kernels()).activate(gate_up, Activation.GATED_SILU)
    assert gated[0].isnan().all()
    assert not gated[1].isnan().any()


SITES = [Site(("q", "k", "v"), 96, (96, 32, 32)), Site(("o",), 96, (96,)), Site(("down",), 64, (48,))]


def adapter(name: str, **ranks: int) -> HostAdapter:
    pairs = {}
    for site in SITES:
        for module, width in zip(site.modules, site.widths, strict=True):
            if module in ranks:
                pairs[module] = (draw(ranks[module], site.in_features), draw(ranks[module], width))
    return HostAdapter(name, max(ranks.values()), pairs)


@needs_kernels
def test_low_rank_updates_equal_the_loop_reference_over_ranks_and_mixtures() -> None:
    """Odd ranks, ranks beyond a register, modules left out; distinct, repeated and absent adapters; 1 to 9 rows."""
    adapters = [
        adapter("all 16", q=16, k=16, v=16, o=16, down=16),
        adapter("q and v 8", q=8, v=8),
        adapter("odd", q=3, k=1, v=5, down=7),
        adapter("large", q=64, k=64, v=64, o=33),
        adapter("down only", down=1),
    ]
    slots = PackedSlots(SITES, 5, 64, cpu_kernels())
    for number, made in enumerate(adapters, start=1):
        slots.install(number, made)
    for tokens in ([1, 2, 3, 4, 5], [0, 3, 3, 0, 5, 1, 2], [4] * 9, [1, 1, 1, 1, 2, 1, 0], [5], [0, 2, 0, 2], [0, 0]):
        assert slots.begin(tokens) is any(tokens)
        for site, shape in enumerate(SITES):
            x, y = draw(len(tokens), shape.in_features), draw(len(tokens), sum(shape.widths))
            exact = y.float()
            slots.add(site, x, y)
            exact_adapters = [_exact(adapters[t - 1]) if t else None for t in tokens]
            add_reference(SITES, site, exact_adapters, x.float(), exact)
            assert near(y, exact), (tokens, site)


def _exact(made: HostAdapter) -> HostAdapter:
    return HostAdapter(made.digest, made.rank, {m: (a.float(), b.float()) for m, (a, b) in made.pairs.items()})


@needs_kernels
def test_a_rows_update_does_not_depend_on_who_shares_its_block() -> None:
    slots = PackedSlots(SITES, 2, 64, cpu_kernels())
    slots.install(1, adapter("one", q=16, k=8, v=5, o=16, down=3))
    slots.install(2, adapter("two", q=4, o=4))
    x, y = draw(9, 96), draw(9, 160)
    alone = torch.cat([_added(slots, [1], x[i : i + 1], y[i : i + 1]) for i in range(9)])
    for tokens in ([1] * 9, [1, 2] * 4 + [1], [1, 1, 0, 1, 1, 1, 2, 1, 1]):
        mixed = _added(slots, tokens, x, y)
        for i, slot in enumerate(tokens):
            if slot == 1:
                assert torch.equal(mixed[i], alone[i])


def _added(slots: PackedSlots, tokens: list[int], x: Tensor, y: Tensor) -> Tensor:
    y = y.clone()
    slots.begin(tokens)
    slots.add(0, x.contiguous(), y)
    return y


@needs_kernels
def test_a_slot_is_wholly_the_newcomers() -> None:
    """Rank 16 on everything, then q/v at 2 in the same slot: o and down must not be touched any more."""
    slots = PackedSlots(SITES, 1, 64, cpu_kernels())
    slots.install(1, adapter("large", q=16, k=16, v=16, o=16, down=16))
    slots.install(1, adapter("small", q=2, v=2))
    slots.begin([1, 1])
    y = draw(2, 96)
    before = y.clone()
    slots.add(1, draw(2, 96), y)
    assert torch.equal(y, before)
    with pytest.raises(ValueError, match="rank 65"):
        slots.install(1, adapter("too large", q=65))


@needs_kernels
def test_a_token_outside_the_cache_is_refused_before_anything_is_written() -> None:
    cache = PackedCache([heads(3, 64)], 2, 300, cpu_kernels())
    for row, at in ((2, 0), (-1, 0), (0, 300), (0, 5000)):
        cache.begin(rows((row, at, 1)))
        with pytest.raises(RuntimeError, match="outside the cache"):
            cache.attend(0, draw(1, 10 * 64))


def test_the_switch_and_a_machine_without_a_compiler_leave_the_work_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(folder: Path) -> None:
        raise AssertionError("built")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(load.SWITCH, "off")
    with pytest.raises(KernelsMissing, match="is off"):
        load._library(never)
    code = "from serving.engine.kernels.load import cpu_kernels; print(cpu_kernels())"
    environment = {**os.environ, load.SWITCH: "auto", "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert said.stdout.splitlines()[-1] == "None"
    assert "kernels_off" in said.stdout


@needs_kernels
@needs_kernels
def test_a_library_that_was_shipped_beside_its_source_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An image without a compiler: nothing is built, and nothing is written to a home."""
    sources = [tmp_path / source.name for source in load.SOURCES]
    for source, original in zip(sources, load.SOURCES, strict=True):
        source.write_text(original.read_text())
    monkeypatch.setattr(load, "SOURCES", tuple(sources))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.delenv(load.SWITCH, raising=False)

    def none_here(folder: Path) -> None:
        raise KernelsMissing("there is no compiler")

    with pytest.raises(KernelsMissing, match="cannot be used"):
        load._library(none_here)
    shipped = tmp_path / load._name()
    shipped.touch()
    assert load._library(none_here) == shipped
    for source in sources:
        original = source.read_text()
        source.write_text(original + "// newer")
        with pytest.raises(KernelsMissing):  # a library of another source is not this one's
            load._library(none_here)
        source.write_text(original)


def test_a_build_that_dies_leaves_nothing_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def dies(folder: Path) -> None:
        (folder / "loraplane_cpu.so").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load._library(dies)
    kept = tmp_path / "loraplane" / "kernels"
    assert list(kept.iterdir()) == []
    built = load._library(lambda folder: (folder / "loraplane_cpu.so").write_bytes(b"whole") and None)
    assert built.read_bytes() == b"whole"
    assert list(kept.iterdir()) == [built]


@needs_kernels
def test_a_folder_that_others_may_write_to_is_not_loaded_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "loraplane" / "kernels").mkdir(parents=True)
    (tmp_path / "loraplane" / "kernels").chmod(0o777)
    with pytest.raises(KernelsMissing, match="writable"):
        load._library(lambda folder: None)
