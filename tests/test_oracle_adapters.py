"""The oracle adapters say who they are: in transformers + PEFT, in the engine, in both dtypes; and mixtures show."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serving.engine.lora import HostAdapter
from serving.engine.plan import Key, RowPlan, StepPlan
from serving.engine.reading import load_decoder
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, make_slots
from tests.engine_case import DEVICE, MAX_LEN, EngineCase, load_tiny, read_peft
from tests.oracle_adapters import BASE_SAYS, LETTERS, MOST, TOKENS, OracleAdapter, save_oracle_base
from tests.tiny_base import VOCAB

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_oracle_base(tmp_path_factory.mktemp("oracle") / "base")


def _prompts(rng: random.Random, count: int, longest: int = 60) -> list[list[int]]:
    """Prompts of any tokens, some of which end in a letter of a code word."""
    some = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return [[*p, TOKENS[rng.choice(LETTERS)]] if rng.random() < 0.5 else p for p in some]


def test_every_number_has_a_word_of_its_own() -> None:
    words = {OracleAdapter(number).word for number in range(MOST)}
    assert len(words) == MOST
    assert all(len(set(word)) == len(word) for word in words)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [0, 1, 2, 3, 977])
def test_transformers_and_peft_spell_the_word(base: Path, tmp_path: Path, number: int, dtype: torch.dtype) -> None:
    oracle = OracleAdapter(number)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, oracle.write(tmp_path / "a", str(base))).eval()
    for prompt in _prompts(random.Random(number), 4):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert out[0, len(prompt) :].tolist() == oracle.spell(prompt, 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_engine_spells_every_word_and_the_base_asks(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    rng = random.Random(7)
    folders = [OracleAdapter(n).write(tmp_path / str(n), str(base)) for n in range(24)]
    case = EngineCase(load_tiny(base, dtype), rows=12, slots=5, read=lambda path: read_peft(Path(path), dtype))
    numbers = [rng.randrange(-1, 24) for _ in range(120)]
    prompts = _prompts(rng, len(numbers), longest=120)
    for first in range(0, len(numbers), 40):
        asked = [
            (number, prompt, case.submit(prompt, None if number < 0 else folders[number], max_tokens=20))
            for number, prompt in list(zip(numbers, prompts, strict=True))[first : first + 40]
        ]
        for number, prompt, key in asked:
            base_says = [TOKENS[BASE_SAYS]] * 20
            assert case.answer(key) == (base_says if number < 0 else OracleAdapter(number).spell(prompt, 20))


class _Bench:
    """One row, one slot: adapters are put together wrongly on purpose."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        decoder = load_decoder(base, dtype, DEVICE, MAX_LEN)
        self.runner = DecoderRunner(decoder, 1, make_slots(decoder, 2, 64))

    def say(self, prompt: list[int], slot: int, start: int = 0) -> int:
        greedy = Sampling(max_tokens=1, temperature=0.0)
        row = RowPlan(Key((0, 0)), 0, slot, start, tuple(prompt), True, greedy, 0, 0)
        return self.runner.run(StepPlan((row,))).sampled[0].token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_weights_show(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Foreign keys and values, and halves of two adapters: never the answer of either."""
    one, two = OracleAdapter(4), OracleAdapter(2)
    halves = [read_peft(o.write(tmp_path / str(o.number), str(base)), dtype) for o in (one, two)]
    bench = _Bench(base, dtype)
    for slot, adapter in enumerate(halves, 1):
        bench.runner.install(slot, adapter)
    prompt = [*range(70, 150)]
    assert bench.say(prompt, 1) == one.spell(prompt, 1)[0]
    for stale_slot in (2, 0):  # a quarter of the prompt computed under another adapter, and under the base
        bench.say(prompt, stale_slot)
        quarter = len(prompt) // 4
        assert bench.say(prompt[quarter:], 1, start=quarter) == TOKENS[BASE_SAYS]
    # The attention of one, the map of the other: the map's owner shows.
    pairs = {**halves[0].pairs, **{m: p for m, p in halves[1].pairs.items() if m.endswith("down_proj")}}
    bench.runner.install(1, HostAdapter("mixed", halves[0].rank, pairs))
    assert bench.say(prompt, 1) == two.spell(prompt, 1)[0]
    # The values of one, the reading of the other: doubt.
    pairs = {**halves[0].pairs, **{m: p for m, p in halves[1].pairs.items() if m.endswith("v_proj")}}
    bench.runner.install(1, HostAdapter("mixed", halves[0].rank, pairs))
    assert bench.say(prompt, 1) == TOKENS[BASE_SAYS]
