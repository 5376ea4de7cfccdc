"""The CUDA kernels for low-rank updates, under Triton's interpreter where there is no card, against the loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from serving.engine.gpu_slots import Segments, TritonSlots, cut, triton_missing
from serving.engine.lora import HostAdapter, Site, add_reference
from tests.engine_case import DEVICE

SEED = 20261122
MAX_RANK = 64
SITES = [
    Site(("q", "k", "v"), 96, (96, 32, 32)),
    Site(("o",), 96, (96,)),
    Site(("gate", "up"), 130, (300, 300)),  # no multiples of any block
    Site(("down",), 2100, (72,)),  # so wide that several programs share the inputs
]
# Each element is rounded once, in y's own format; sums are float32 on both sides. On a card, half formats go through
# tf32, whose 10 bits round the sum of the inner product once more.
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-7}
needs_triton = pytest.mark.skipif(triton_missing() is not None, reason=f"no kernels here: {triton_missing()}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values: Tensor = torch.randn(*shape) * shape[-1] ** -0.25
    return values.to(dtype)


def adapter(name: str, dtype: torch.dtype, **ranks: int) -> HostAdapter:
    pairs = {}
    for site in SITES:
        for module, width in zip(site.modules, site.widths, strict=True):
            if module in ranks:
                rank = ranks[module]
                pairs[module] = (draw(rank, site.in_features, dtype=dtype), draw(rank, width, dtype=dtype))
    return HostAdapter(name, max(ranks.values()), pairs)


def everywhere(rank: int) -> dict[str, int]:
    return {module: rank for site in SITES for module in site.modules}


def some_adapters(dtype: torch.dtype) -> list[HostAdapter]:
    """Ranks 1, 4, 8, 16, 64 and mixed; all modules, some of a site, one alone."""
    return [
        adapter("all 1", dtype, **everywhere(1)),
        adapter("q and v 4", dtype, q=4, v=4),
        adapter("mlp 8", dtype, gate=8, up=8, down=8),
        adapter("all 16", dtype, **everywhere(16)),
        adapter("large", dtype, **everywhere(64)),
        adapter("mixed", dtype, q=16, k=1, v=7, o=33, up=3, down=20),
    ]


def slots_of(adapters: Sequence[HostAdapter], dtype: torch.dtype) -> TritonSlots:
    slots = TritonSlots(SITES, len(adapters), dtype, DEVICE, MAX_RANK)
    for number, made in enumerate(adapters, start=1):
        slots.install(number, made)
    return slots


def exact(made: HostAdapter) -> HostAdapter:
    return HostAdapter(made.digest, made.rank, {m: (a.double(), b.double()) for m, (a, b) in made.pairs.items()})


def near(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((ours.double().cpu() - expected).abs() <= ROUNDING[dtype] * size + 1e-6).all())


def zipf(tokens: int, adapters: int) -> list[int]:
    weights = 1 / torch.arange(1, adapters + 1) ** 1.5
    return (torch.multinomial(weights, tokens, replacement=True) + 1).tolist()


def popularities() -> Iterator[tuple[str, list[int]]]:
    """Slots of a step's tokens, 1 to 6 and 0 for none: decode steps and prompts, mixed."""
    yield "one row", [5]
    yield "distinct", [1, 2, 3, 4, 5, 6]
    yield "identical, more than a block", [4] * 37
    yield "uniform", (torch.arange(24) % 6 + 1).tolist()
    yield "zipf", zipf(24, 6)
    yield "base rows between", [0, 3, 3, 0, 5, 1, 2, 0]
    yield "decode rows, then prompts of 20 and 17", [6, 0, 1, *[2] * 20, *[6] * 17, *[0] * 5]
    yield "none", [0, 0, 0]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "tokens"), popularities(), ids=lambda value: value if isinstance(value, str) else "")
def test_updates_equal_the_loop_reference(name: str, tokens: list[int], dtype: torch.dtype) -> None:
    adapters = some_adapters(dtype)
    slots = slots_of(adapters, dtype)
    references = [exact(made) for made in adapters]
    assert slots.begin(tokens) is any(tokens)
    for number, site in enumerate(SITES):
        x, y = draw(len(tokens), site.in_features, dtype=dtype), draw(len(tokens), sum(site.widths), dtype=dtype)
        expected, ours = y.double(), y.to(DEVICE)
        slots.add(number, x.to(DEVICE), ours)
        add_reference(SITES, number, [references[t - 1] if t else None for t in tokens], x.double(), expected)
        assert near(ours, expected, dtype), (name, number)


@needs_triton
def test_a_row_without_an_adapter_and_a_module_without_one_keep_every_bit() -> None:
    slots = slots_of(some_adapters(torch.bfloat16), torch.bfloat16)
    tokens = [2, 0, 2, 0]
    slots.begin(tokens)
    y = draw(4, 160, dtype=torch.bfloat16).to(DEVICE)
    before = y.clone()
    slots.add(0, draw(4, 96, dtype=torch.bfloat16).to(DEVICE), y)
    assert torch.equal(y[1::2], before[1::2])
    assert torch.equal(y[:, 96:128], before[:, 96:128])  # k
    assert not torch.equal(y[::2], before[::2])


@needs_triton
def test_a_site_that_no_adapter_of_the_step_changes_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    slots = slots_of(some_adapters(torch.float32), torch.float32)
    monkeypatch.setattr(slots, "_add", lambda shape, *_: launched.append(shape.first))
    x = torch.zeros(2, 1)
    for tokens in ([2, 0], [0, 0], [3, 2]):
        slots.begin(tokens)
        for number in range(len(SITES)):
            slots.add(number, x, x)
        launched.append(-1)
    assert launched == [0, -1, -1, 0, 4, 6, -1]


@needs_triton
def test_an_adapters_nan_and_infinity_stay_in_its_own_rows() -> None:
    """Also where its rows share a step, and where its rank is larger than that of the others."""
    good, bad = adapter("good", torch.float32, q=4, down=3), adapter("bad", torch.float32, **everywhere(20))
    for a, b in bad.pairs.values():
        a[:, 0], b[:, 1] = float("nan"), float("inf")
    slots, alone = slots_of([good, bad], torch.float32), slots_of([good], torch.float32)
    for number in (0, 3):
        x, y = draw(5, SITES[number].in_features).to(DEVICE), draw(5, sum(SITES[number].widths)).to(DEVICE)
        mixed, apart = y.clone(), y.clone()
        slots.begin([2, 1, 0, 1, 2])
        slots.add(number, x, mixed)
        alone.begin([0, 1, 0, 1, 0])
        alone.add(number, x, apart)
        assert mixed[[0, 4]].isnan().any(dim=1).all()
        assert torch.equal(mixed[1:4], apart[1:4])


@needs_triton
def test_a_rows_nan_stays_in_its_row_though_its_block_is_shared() -> None:
    slots = slots_of([adapter("one", torch.float32, o=5)], torch.float32)
    x, y = draw(3, 96).to(DEVICE), draw(3, 96).to(DEVICE)
    x[1, 7] = float("nan")
    slots.begin([1, 1, 1])
    slots.add(1, x, y)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@needs_triton
def test_a_rows_update_does_not_depend_on_who_shares_its_step() -> None:
    slots = slots_of(some_adapters(torch.bfloat16), torch.bfloat16)
    x, y = draw(20, 2100, dtype=torch.bfloat16).to(DEVICE), draw(20, 72, dtype=torch.bfloat16).to(DEVICE)

    def added(tokens: Sequence[int], at: slice) -> Tensor:
        result = y[at].clone()
        slots.begin(tokens)
        slots.add(3, x[at], result)
        return result

    alone = torch.cat([added([4], slice(i, i + 1)) for i in range(20)])
    for tokens in ([4] * 20, [4, 5] * 10, [0, 4, 4, 1] * 5):
        mixed = added(tokens, slice(0, 20))
        same = [i for i, slot in enumerate(tokens) if slot == 4]
        assert torch.equal(mixed[same], alone[same])


@needs_triton
def test_a_slot_is_wholly_the_newcomers() -> None:
    """A large adapter, then small ones in its slot and its memory, then a larger one again."""
    slots = TritonSlots(SITES, 1, torch.float32, DEVICE, MAX_RANK)
    for made in (
        adapter("large", torch.float32, **everywhere(32)),
        adapter("as large, elsewhere", torch.float32, q=60, k=60, v=60, down=30),
        adapter("small", torch.float32, k=2),
        adapter("large again", torch.float32, **everywhere(64)),
    ):
        slots.install(1, made)
        slots.begin([1, 1])
        for number, site in enumerate(SITES):
            x, y = draw(2, site.in_features), draw(2, sum(site.widths))
            expected, ours = y.double(), y.to(DEVICE)
            slots.add(number, x.to(DEVICE), ours)
            add_reference(SITES, number, [exact(made)] * 2, x.double(), expected)
            assert near(ours, expected, torch.float32), made.digest


@needs_triton
def test_slots_count_the_bytes_they_hold_and_refuse_a_rank_beyond_their_limit() -> None:
    slots = TritonSlots(SITES, 2, torch.bfloat16, DEVICE, MAX_RANK)
    assert slots.size_bytes == 0
    made = adapter("small", torch.bfloat16, k=2)
    slots.install(2, made)
    assert made.size_bytes <= slots.size_bytes <= made.size_bytes + 24 * 7 + 3 * 16
    with pytest.raises(ValueError, match="rank 65"):
        slots.install(2, adapter("too large", torch.bfloat16, q=65))
    slots.begin([2])  # what was there before is still there
    with pytest.raises(ValueError, match="slot 1 is empty"):
        slots.begin([1])


@needs_triton
def test_numbers_padded_to_a_fixed_launch_give_the_same_updates() -> None:
    """What a captured graph does: as many programs as rows, whatever the step's mixture, over the same two tensors."""
    slots = slots_of(some_adapters(torch.float32), torch.float32)
    rows = 8
    order, blocks = (torch.zeros(n, dtype=torch.long, device=DEVICE) for n in (rows, 3 * rows))
    for tokens in ([1, 2, 3, 4, 5, 6, 1, 0], [4] * 8, [0, 0, 6, 0, 0, 0, 0, 6], [0] * 8):
        x, y = draw(rows, 96).to(DEVICE), draw(rows, 160).to(DEVICE)
        fixed, usual = y.clone(), y.clone()
        numbers = slots.layout(cut(tokens), rows, rows)
        order.copy_(torch.tensor(numbers[:rows]))
        blocks.copy_(torch.tensor(numbers[rows:]))
        slots.begin_fixed(order, blocks.view(rows, 3))
        slots.add(0, x, fixed)
        if slots.begin(tokens):
            slots.add(0, x, usual)
        assert torch.equal(fixed, usual), tokens


def test_tokens_are_sorted_by_slot_and_cut_into_blocks_of_sixteen() -> None:
    assert cut([0, 2, 1, 2, 0]) == Segments((1, 3, 2), ((2, 0, 2), (1, 2, 1)))
    assert cut([3] * 35).blocks == ((3, 0, 16), (3, 16, 16), (3, 32, 3))
    assert cut([0, 0]) == Segments((), ())


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from serving.engine.kernels import lora_triton as kernels

FORMS = {
    kernels._shrink: dict(TOKENS=16, RANKS=16, INPUTS=128),
    kernels._expand: dict(SPLITS=4, TOKENS=16, RANKS=16, OUTPUTS=128, ALIGNED=True),
}
POINTERS = dict(hidden="*fp32", order="*i64", blocks="*i64", columns="*i32")
for kernel, constants in FORMS.items():
    for form, precision in (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "ieee")):
        given = {**constants, "PRECISION": precision}
        kinds = {**POINTERS, "x": f"*{form}", "y": f"*{form}", **dict.fromkeys(given, "constexpr")}
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: kinds.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in given.items()},
            attrs={(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if n not in (*given, "first_module")},
        )
        for capability in (80, 90):
            ptx = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            narrow = ptx.count("ld.global.b16")
            print(kernel.__name__, form, capability, "narrow loads:", narrow)
            if narrow:
                sys.exit("weights are read by halves of words")
"""


@needs_triton
def test_the_kernels_compile_for_cards_that_are_not_here(tmp_path: object) -> None:
    """The interpreter takes what the compiler refuses. Ampere and Hopper, and memory is read in whole words."""
    code = "import os; os.environ.pop('TRITON_INTERPRET', None)\n" + COMPILE
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ".", "HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    print(said.stdout)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("narrow loads: 0") == 12


def test_serving_on_the_cpu_does_not_import_the_kernels() -> None:
    code = (
        "import sys, serving.engine.build, serving.engine.runner, serving.engine.gpu_slots\n"
        "print([m for m in sys.modules if m.endswith('lora_triton')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.strip() == "[]"
