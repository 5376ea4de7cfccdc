"""Golden rows of real trainings, replayed by a real engine: they know their own adapter from any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.bases import open_base
from adapters.errors import RunInvalid
from adapters.families import adaptable
from adapters.records import AdapterVersion, BaseRecord
from serving.engine.breaker import Doubt
from serving.engine.config import EngineConfig
from serving.engine.lora import HostAdapter
from serving.engine.request import Failed
from serving.engine.runner import Runner
from serving.store_tier import read_adapter
from tests.engine_case import EngineCase, load_tiny
from tests.test_proof_engine import Blind, planted
from tests.tiny_base import save_tiny_base
from tests.train_case import WORDS, train_case
from train import job
from train.golden import ANSWER_TOKENS, PROMPT_TOKENS, TOLERANCE
from train.progress import Quiet

PROMPT = [1, 72, 104, 111, 35, 72]


@dataclass
class Trained:
    """Two adapters that loraplane trained on one base, in one registry."""

    versions: list[AdapterVersion]
    base: BaseRecord
    config: EngineConfig

    def case(self, **options: object) -> EngineCase:
        decoder = load_tiny(Path(self.config.base_folder))
        return EngineCase(decoder, **{"read": self.read, **options})  # type: ignore[arg-type]

    def read(self, digest: str) -> HostAdapter:
        return read_adapter(self.config, digest, torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAPLANE_DATABASE_URL", raising=False)
        case = train_case(root, save_tiny_base(root / "base"))
        door = case.door()
        versions = []
        for shift in (1, 3):
            # Each word is answered by another one: what the two adapters learn, neither the base nor the other says.
            answers = {w: WORDS[(at + shift) % len(WORDS)] for at, w in enumerate(WORDS)}
            rows = [{"prompt": f"{w} {i}", "completion": answers[w]} for i in range(8) for w in WORDS]
            data = root / f"rows{shift}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            run = case.run(f"data.source={data}", f"name=words{shift}", "optim.epochs=6", "gate=null")
            prepared = job.prepare(run, case.home, door)
            versions.append(
                job.train(prepared, door, Quiet(), resume=False, force=False, resume_command="go on").version
            )
        base = door.bases()[0]
        config = EngineConfig(
            base_folder=str(open_base(case.home, base)),
            base_name=base.name,
            base_digest=base.digest,
            family=base.family,
            modules=adaptable(base),
            blobs=str(case.home.blobs),
        )
        yield Trained(versions, base, config)
        door.close()


def test_a_training_leaves_three_short_rows_that_its_base_would_fail(trained: Trained) -> None:
    for version in trained.versions:
        rows = trained.read(version.digest).golden
        assert len(rows) == version.facts["golden_rows"] == 3
        assert all(len(r.prompt) <= PROMPT_TOKENS and 1 <= len(r.expected) <= ANSWER_TOKENS for r in rows)
        assert {r.tolerance for r in rows} == {TOLERANCE}
        assert float(str(version.facts["golden_gap"])) > TOLERANCE


def test_a_run_may_leave_its_rows_out_and_is_another_run_then(trained: Trained, tmp_path: Path) -> None:
    case = train_case(tmp_path, Path(trained.config.base_folder))
    usual, without = case.run(), case.run("golden_rows=0")
    known = {"base_digest": "b", "data_digest": "d", "code": "c"}
    assert usual.digest(**known) != without.digest(**known)
    assert usual.digest(**known) == case.run("golden_rows=3").digest(**known)
    with pytest.raises(RunInvalid, match="golden_rows"):
        case.run("golden_rows=4")


def test_trained_adapters_prove_themselves_and_answer(trained: Trained) -> None:
    case = trained.case(slots=1)
    answers = [case.answer(case.submit(PROMPT, version.digest)) for version in trained.versions * 2]
    assert answers[:2] == answers[2:]
    assert case.engine.heartbeat().set_aside == ()


def test_the_other_adapters_weights_under_its_name_are_set_aside_before_an_answer(trained: Trained) -> None:
    ours, other = trained.versions

    def install(runner: Runner, slot: int, adapter: HostAdapter) -> None:
        runner.install(slot, trained.read(other.digest) if adapter.digest == ours.digest else adapter)

    case = trained.case(wrap=planted(install))
    case.engine._prover = Blind()
    wrong, neighbour = case.submit(PROMPT, ours.digest), case.submit(PROMPT, other.digest)
    case.run()
    ending = case.answers[wrong].endings[0]
    assert isinstance(ending, Failed)
    assert ending.message == Doubt.GOLDEN_MISMATCH.value
    assert case.answers[wrong].ids == []
    assert case.answers[neighbour].ids
