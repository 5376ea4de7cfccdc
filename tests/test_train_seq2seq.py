"""Encoder-decoders: trained on prompts and answers apart, published with golden rows, served as they were trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, T5Config

from adapters.bases import open_base
from adapters.errors import DataRefused, RunInvalid
from adapters.families import adaptable
from adapters.prompts import Example, Message, Renderer
from adapters.records import AdapterVersion, BaseRecord, PromptFormat
from adapters.runs import LoraSpec
from serving.engine.breaker import Doubt
from serving.engine.config import EngineConfig
from serving.engine.lora import HostAdapter
from serving.engine.runner import Runner
from serving.engine.seq2seq import load_encoder_decoder
from serving.store_tier import read_adapter
from tests.engine_case import DEVICE, EngineCase
from tests.test_engine_seq2seq import BART, T5
from tests.test_proof_engine import Blind, planted, refusal
from tests.tiny_base import SPECIALS, save_random_seq2seq
from tests.tiny_base import VOCAB as BYTES
from tests.train_case import WORDS, TrainCase, train_case
from train import child, data, evaluate, job, loop, models, pairs
from train.asked import check_lengths
from train.data import Row, RowSet
from train.golden import ANSWER_TOKENS, PROMPT_TOKENS, TOLERANCE
from train.progress import Quiet

MODELS = Path(__file__).parent / ".." / ".." / "shared" / "models"
LENGTH = 128
END = SPECIALS.index("</s>")
# The byte tokenizer's ids, for both families.
IDS = {"vocab_size": BYTES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": 0}
BASES: dict[str, Any] = {
    "t5": lambda: T5Config(**{**T5, **IDS}, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: BartConfig(**{**BART, **IDS}),
}
QUICK = ("optim.epochs=6", "optim.lr=0.03", "optim.batch_size=8", "checkpoint.every_steps=0", "gate=null")
EXAMPLES = [
    Example(tuple(range(10, 10 + n)), tuple([False] * (n - answer) + [True] * answer))
    for n, answer in ((9, 3), (23, 5), (14, 1), (40, 19))
]


@pytest.fixture(scope="module", params=sorted(BASES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq") / "base"
    return save_random_seq2seq(BASES[request.param](), folder, seed=5, forced=None if request.param == "t5" else 1)


@dataclass
class Trained:
    """Two adapters that loraplane trained on one base, in one registry."""

    case: TrainCase
    versions: list[AdapterVersion]
    base: BaseRecord
    config: EngineConfig

    def engine(self, **options: object) -> EngineCase:
        both = load_encoder_decoder(Path(self.config.base_folder), torch.float32, DEVICE, LENGTH)
        return EngineCase(both, **{"read": self.read, **options})  # type: ignore[arg-type]

    def read(self, digest: str) -> HostAdapter:
        return read_adapter(self.config, digest, torch.float32)

    def prompt(self, number: int) -> list[int]:
        renderer = Renderer(Path(self.config.base_folder))
        return renderer.chat([Message("user", f"{WORDS[number]} 1")], self.versions[0].prompt_format)


def config_of(case: TrainCase, base: BaseRecord) -> EngineConfig:
    return EngineConfig(
        base_folder=str(open_base(case.home, base)),
        base_name=base.name,
        base_digest=base.digest,
        family=base.family,
        modules=adaptable(base),
        blobs=str(case.home.blobs),
    )


def train(root: Path, base: Path) -> Trained:
    """Words are answered with words, by the one adapter in small letters, by the other in capitals: what each learns,
    neither the base nor the other says."""
    case = train_case(root, base)
    door = case.door()
    try:
        versions = []
        for name, write in (("small", str.lower), ("capitals", str.upper)):
            rows = [{"prompt": f"{w} {i}", "completion": write(w[:3])} for i in range(8) for w in WORDS]
            source = root / f"{name}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
            run = case.run(f"data.source={source}", f"name={name}", *QUICK)
            prepared = job.prepare(run, case.home, door)
            done = job.train(prepared, door, Quiet(), resume=False, force=False, resume_command="go on")
            versions.append(done.version)
        (record,) = door.bases()
    finally:
        door.close()
    return Trained(case, versions, record, config_of(case, record))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAPLANE_DATABASE_URL", raising=False)
        yield train(tmp_path_factory.mktemp("trained"), base)


def lora_model(folder: Path) -> Any:
    return models.load_with_lora(folder, LoraSpec(r=4), bf16=False, max_length=64, seed=0).eval()


def test_the_loss_equals_the_models_own_on_each_pair_alone(base: Path) -> None:
    model = lora_model(base)
    begin = models.begin_of(model)
    batch = pairs.collate(EXAMPLES, 0, begin, 64)
    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    with torch.no_grad():
        for example in EXAMPLES:
            prompt, answer = pairs.split(example)
            fed = torch.tensor([[*begin, *answer[:-1]]])
            labels = torch.tensor([[*[pairs.IGNORED] * (len(begin) - 1), *answer]])
            loss = model(input_ids=torch.tensor([prompt]), decoder_input_ids=fed, labels=labels).loss
            total += loss.double() * len(answer)
            count += len(answer)
        ours = loop.completion_loss(model, batch)
    torch.testing.assert_close(ours.double(), total / count, rtol=1e-5, atol=1e-6)


def test_a_batch_is_never_padded_beyond_the_positions_that_the_base_has() -> None:
    batch = pairs.collate(EXAMPLES[:2], 0, (2, 0), 20)
    assert batch["input_ids"].shape == (2, 20)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, 16)
    assert batch["decoder_input_ids"][0, :5].tolist() == [2, 0, 16, 17, 0]
    assert batch["labels"][0, :5].tolist() == [pairs.IGNORED, 16, 17, 18, pairs.IGNORED]
    assert pairs.collate(EXAMPLES[:2], 0, (2,), 64)["input_ids"].shape == (2, 32)


def test_each_answer_of_a_conversation_is_a_pair_of_its_own(base: Path) -> None:
    turns = [Message(r, t) for r, t in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    renderer, fmt = Renderer(base), PromptFormat()
    first, second = renderer.examples(turns, fmt, apart=True)
    assert pairs.split(first) == (tuple(renderer.chat(turns[:1], fmt)), (*renderer.encode("b"), END))
    assert pairs.split(second) == (tuple(renderer.chat(turns[:3], fmt)), (*renderer.encode("d"), END))


def test_a_prompt_without_a_token_is_refused_with_its_row(base: Path) -> None:
    rows = RowSet("rows", (Row("rows#7", (Message("user", ""), Message("assistant", "b"))),))
    with pytest.raises(DataRefused, match="rows#7 has a prompt without a token"):
        data.render(rows, Renderer(base), PromptFormat(style="text"), 64, apart=True)


def test_training_learns_and_adapts_encoder_and_decoder(trained: Trained) -> None:
    """A BART was taken for its decoder alone, and a T5 refused."""
    for version in trained.versions:
        facts = version.facts
        assert float(str(facts["final_loss"])) < 0.8 * float(str(facts["first_loss"]))
        paths = set(trained.read(version.digest).pairs)
        assert paths == set(trained.base.modules)


def test_a_training_leaves_three_short_rows_that_its_base_would_fail(trained: Trained) -> None:
    for version in trained.versions:
        rows = trained.read(version.digest).golden
        assert len(rows) == version.facts["golden_rows"] == 3
        assert all(len(r.prompt) <= PROMPT_TOKENS and 1 <= len(r.expected) <= ANSWER_TOKENS for r in rows)
        assert {r.tolerance for r in rows} == {TOLERANCE}
        assert float(str(version.facts["golden_gap"])) > TOLERANCE


def test_trained_adapters_prove_themselves_and_answer_what_their_rows_say(trained: Trained) -> None:
    case = trained.engine(slots=1)
    for version in trained.versions * 2:
        for row in trained.read(version.digest).golden:
            told = case.answer(case.submit(row.prompt, version.digest, max_tokens=len(row.expected), ignore_eos=True))
            assert tuple(told) == row.expected
    assert case.engine.heartbeat().set_aside == ()


def test_the_other_adapters_weights_under_its_name_are_set_aside_before_an_answer(trained: Trained) -> None:
    ours, other = trained.versions

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        runner.install(slot, trained.read(other.digest) if adapter.digest == ours.digest else adapter)

    case = trained.engine(wrap=planted(install))
    case.engine._prover = Blind()
    prompt = trained.prompt(0)
    wrong, neighbour = case.submit(prompt, ours.digest), case.submit(prompt, other.digest)
    assert refusal(case, wrong).message == Doubt.GOLDEN_MISMATCH.value
    alone = trained.engine()
    assert case.answers[wrong].ids == []
    assert case.answer(neighbour) == alone.answer(alone.submit(prompt, other.digest))


def test_an_evaluation_counts_a_prompt_without_its_answer_and_knows_that_t5_has_no_bound(
    trained: Trained, base: Path
) -> None:
    """A T5, which has no bound of positions, was taken for one without any room, and nothing could be evaluated."""
    rows = [Row("rows#1", (Message("user", "x" * 40), Message("assistant", "y")))]
    formats, renderer = [PromptFormat(style="text")], Renderer(base)
    check_lengths(rows, formats, renderer, 60, 40, apart=True)
    with pytest.raises(DataRefused, match="rows#1, has 40 tokens, and 39 is the most"):
        check_lengths(rows, formats, renderer, 60, 39, apart=True)
    with pytest.raises(DataRefused, match="with 60 for the answer 99 is the most"):
        check_lengths(rows, formats, renderer, 60, 99)
    room = evaluate._context(trained.base, trained.case.home, None)
    assert room == (child.CONTEXT_TOKENS if trained.base.family == "t5" else 128)


def test_a_run_longer_than_the_base_has_positions_is_refused(trained: Trained) -> None:
    if not trained.base.max_positions:
        pytest.skip("T5 counts distances: nothing is too long for it")
    door = trained.case.door()
    try:
        with pytest.raises(RunInvalid, match="128 positions"):
            job.prepare(trained.case.run("max_length=256"), trained.case.home, door)
    finally:
        door.close()


def test_a_real_bart_is_trained_and_proves_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MODELS / "bart-g2p-en-gb"
    if not folder.is_dir():
        pytest.skip("no BART in ../shared/models")
    monkeypatch.delenv("LORAPLANE_DATABASE_URL", raising=False)
    case = train_case(tmp_path, folder, prompt_format={"style": "text"}, max_length=48)
    door = case.door()
    try:
        prepared = job.prepare(case.run(*QUICK), case.home, door)
        version = job.train(prepared, door, Quiet(), resume=False, force=False, resume_command="go on").version
        (record,) = door.bases()
    finally:
        door.close()
    trained = Trained(case, [version], record, config_of(case, record))
    engine = trained.engine()
    row = trained.read(version.digest).golden[0]
    ids = engine.answer(engine.submit(row.prompt, version.digest, max_tokens=len(row.expected), ignore_eos=True))
    assert tuple(ids) == row.expected
