"""From a PEFT folder through registry and loader to the engine: what comes out is what transformers + PEFT compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, GPT2Config, LlamaConfig, T5Config

from adapters.bases import open_base, pull
from adapters.errors import AdapterLoadFailed, AdapterRefused, Reason
from adapters.families import adaptable
from adapters.home import Home
from adapters.records import AdapterVersion, BaseRecord
from adapters.registry import Registry
from serving.engine.config import EngineConfig
from serving.engine.lora import HostAdapter
from serving.engine.plan import Key, RowPlan, StepPlan
from serving.engine.reading import load_decoder
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, make_slots
from serving.engine.seq2seq import load_encoder_decoder
from serving.engine.seq2seq_runner import Seq2SeqRunner
from serving.store_tier import read_adapter
from tests.engine_case import DEVICE
from tests.test_engine_families import COMMON, GPT2
from tests.test_engine_seq2seq import BART, T5
from tests.test_engine_seq2seq import VOCAB as SEQ2SEQ_VOCAB
from tests.test_engine_seq2seq import Oracle as Seq2SeqOracle
from tests.tiny_base import Oracle, save_adapter, save_random, save_random_seq2seq

MODELS = Path(__file__).parent / ".." / ".." / "shared" / "models"
CONFIGS = Path(__file__).parent / ".." / ".." / "shared" / "adapter-configs"
GREEDY = Sampling(max_tokens=1, temperature=0.0)
LOGIT_ERROR = 1e-4


@dataclass
class Way:
    """A base in a registry, and what an engine would be told of it."""

    base: Path
    record: BaseRecord
    registry: Registry
    config: EngineConfig
    seq2seq: bool

    def publish(self, folder: Path, name: str = "ours") -> AdapterVersion:
        return self.registry.publish(name, {p.name: p for p in folder.iterdir()}, base=self.record.name, who="t")

    def load(self, version: AdapterVersion) -> HostAdapter:
        return read_adapter(self.config, version.digest, torch.float32)

    def last_logits(self, adapter: HostAdapter, prompt: list[int]) -> torch.Tensor:
        """Of the prompt's last token, or of a decoder's first."""
        row = RowPlan(Key((0, 0)), 0, 1, 0, tuple(prompt), True, GREEDY, 0, 0)
        folder = Path(self.config.base_folder)
        if self.seq2seq:
            both = load_encoder_decoder(folder, torch.float32, DEVICE, 64)
            runner: Seq2SeqRunner | DecoderRunner = Seq2SeqRunner(both, 1, make_slots(both, 1, 64))
        else:
            decoder = load_decoder(folder, torch.float32, DEVICE, 64)
            runner = DecoderRunner(decoder, 1, make_slots(decoder, 1, 64))
        runner.install(1, adapter)
        return runner.logits(StepPlan((row,)))[0].cpu()

    def exact(self, folder: Path | None, prompt: list[int]) -> torch.Tensor:
        if not self.seq2seq:
            return Oracle(self.base, folder).logits(prompt)[-1]
        oracle = Seq2SeqOracle(self.base, folder)
        return oracle.logits(prompt, [int(oracle.model.config.decoder_start_token_id)])[-1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """On SQLite alone: what is stored does not depend on the database."""
    monkeypatch.delenv("LORAPLANE_DATABASE_URL", raising=False)
    return Home.find(tmp_path / "home")


Ways = Callable[[Path], Way]


@pytest.fixture
def way(home: Home) -> Iterator[Ways]:
    registry = Registry.open(home)

    def of(base: Path) -> Way:
        record = pull(str(base), home, registry, lambda line: None)
        config = EngineConfig(
            base_folder=str(open_base(home, record)),
            base_name=record.name,
            base_digest=record.digest,
            family=record.family,
            modules=adaptable(record),
            blobs=str(home.blobs),
        )
        return Way(base, record, registry, config, record.family in ("t5", "bart"))

    yield of
    registry.close()


BASES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (lambda: LlamaConfig(**COMMON), ("q_proj", "down_proj", "embed_tokens", "lm_head")),
    "llama tied": (lambda: LlamaConfig(**COMMON, tie_word_embeddings=True), ("v_proj", "embed_tokens", "lm_head")),
    "gpt2": (lambda: GPT2Config(**GPT2), ("c_attn", "c_proj", "c_fc", "wte", "lm_head")),
    "gpt2, one c_proj of two": (lambda: GPT2Config(**GPT2), ("attn.c_proj",)),
    "t5": (lambda: T5Config(**T5, feed_forward_proj="gated-gelu"), ("q", "EncDecAttention.k", "wi_0", "wi_1", "wo")),
    "bart": (lambda: BartConfig(**BART), ("q_proj", "out_proj", "fc1", "fc2")),
}  # fmt: skip


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", BASES)
def test_a_published_adapter_answers_as_peft_does(way: Ways, tmp_path: Path, kind: str, dora: bool) -> None:
    config, targets = BASES[kind]
    seq2seq = kind in ("t5", "bart")
    base = (save_random_seq2seq if seq2seq else save_random)(config(), tmp_path / "tiny", 7)
    peft = save_adapter(base, tmp_path / "peft", 11, rank=5, targets=targets, dora=dora, seq2seq=seq2seq)
    path = way(base)
    version = path.publish(peft)
    adapter = path.load(version)
    prompt = [3 + (7 * i) % (SEQ2SEQ_VOCAB - 3) for i in range(20)]
    exact = path.exact(peft, prompt)
    worst = float((path.last_logits(adapter, prompt) - exact).abs().max())
    print(f"largest difference {worst:.2e}")
    assert worst <= LOGIT_ERROR
    assert float((exact - path.exact(None, prompt)).abs().max()) > 0.1
    # What `pull` gives is a PEFT folder that means the same.
    canonical = path.registry.export("ours", version.number, tmp_path / "canonical")
    assert not [n for n in load_file(canonical / "adapter_model.safetensors") if "base_layer" in n]
    assert torch.equal(path.exact(canonical, prompt), exact)
    assert path.publish(canonical).digest == version.digest


@pytest.mark.skipif(not MODELS.is_dir(), reason="the collection of tiny real models is not here")
@pytest.mark.parametrize("model", ["bart-g2p-en-us", "bart-g2p-en-gb", "stories260k-llama"])
def test_adapters_of_real_models_answer_as_peft_does(way: Ways, tmp_path: Path, model: str) -> None:
    base = (MODELS / model).resolve()
    seq2seq = model.startswith("bart")
    everything = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2") if seq2seq else ("q_proj", "embed_tokens")
    peft = save_adapter(base, tmp_path / "peft", 3, rank=16, targets=everything, seq2seq=seq2seq)
    path = way(base)
    adapter = path.load(path.publish(peft))
    prompt = [5, 6, 7, 30, 40, 2]
    worst = float((path.last_logits(adapter, prompt) - path.exact(peft, prompt)).abs().max())
    print(f"largest difference {worst:.2e}")
    assert worst <= LOGIT_ERROR


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="the collection of real configs is not here")
@pytest.mark.parametrize(
    ("config", "kind"), [("flan-t5-base-dialogsum-qv-r32", "t5"), ("gpt2-causal-c_attn-c_proj-r8", "gpt2")]
)
def test_real_configs_of_our_families_are_published_and_loaded(
    way: Ways, tmp_path: Path, config: str, kind: str
) -> None:
    """Weights are made for the config that somebody else wrote; its base is known here under another name."""
    theirs = json.loads((CONFIGS / f"{config}.json").read_text())
    make, _ = BASES[kind]
    seq2seq = kind == "t5"
    base = (save_random_seq2seq if seq2seq else save_random)(make(), tmp_path / "tiny", 7)
    peft = save_adapter(
        base, tmp_path / "peft", 1, rank=theirs["r"], alpha=theirs["lora_alpha"], targets=theirs["target_modules"],
        seq2seq=seq2seq,
    )  # fmt: skip
    (peft / "adapter_config.json").write_text(json.dumps(theirs))
    path = way(base)
    adapter = path.load(path.publish(peft))
    assert adapter.rank == theirs["r"]
    prompt = [5, 6, 7, 30, 40]
    assert float((path.last_logits(adapter, prompt) - path.exact(peft, prompt)).abs().max()) <= LOGIT_ERROR


def _head_adapter(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A float32 base, and an adapter of its head, trained on the base as loaded in a dtype."""
    base = save_random(LlamaConfig(**COMMON), tmp_path / "tiny", 7)
    peft = save_adapter(base, tmp_path / "peft", 11, targets=("q_proj", "lm_head"))
    weights = load_file(peft / "adapter_model.safetensors")
    assert [n for n in weights if "base_layer" in n] == ["base_model.model.lm_head.base_layer.weight"]
    save_file({n: t.to(dtype) for n, t in weights.items()}, peft / "adapter_model.safetensors")
    return base, peft


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_of_the_head_in_fewer_bits_is_the_bases(way: Ways, tmp_path: Path, dtype: torch.dtype) -> None:
    base, peft = _head_adapter(tmp_path, dtype)
    assert "lm_head" in way(base).publish(peft).modules


@pytest.mark.parametrize("form", ["lm_head.base_layer.weight", "lm_head.weight"])
def test_a_copy_that_was_trained_is_refused_with_the_reason(way: Ways, tmp_path: Path, form: str) -> None:
    base, peft = _head_adapter(tmp_path)
    weights = load_file(peft / "adapter_model.safetensors")
    copy = weights.pop("base_model.model.lm_head.base_layer.weight")
    copy[-1, -1] += 1e-3
    save_file({**weights, f"base_model.model.{form}": copy}, peft / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="carries lm_head whole, and it differs from the one of tiny") as caught:
        way(base).publish(peft)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_resized_vocabulary_is_refused_with_the_reason(way: Ways, tmp_path: Path) -> None:
    base, peft = _head_adapter(tmp_path)
    weights = load_file(peft / "adapter_model.safetensors")
    name = "base_model.model.lm_head.base_layer.weight"
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    save_file(weights, peft / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="a vocabulary that was resized cannot be served") as caught:
        way(base).publish(peft)
    assert caught.value.reason is Reason.SHAPE


@pytest.mark.parametrize(("kind", "target"), [("t5", "shared"), ("t5", "lm_head"), ("bart", "lm_head")])
def test_ends_of_encoder_decoders_are_refused_by_name(way: Ways, tmp_path: Path, kind: str, target: str) -> None:
    base = save_random_seq2seq(BASES[kind][0](), tmp_path / "tiny", 7)
    peft = save_adapter(base, tmp_path / "peft", 1, targets=(target,), seq2seq=True)
    with pytest.raises(AdapterRefused, match=rf"{target}.* is an embedding or an output head") as caught:
        way(base).publish(peft)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_tied_adapters_are_refused_by_name(way: Ways, tmp_path: Path) -> None:
    """PEFT itself leaves a tied head as the base's when the embedding alone is adapted; so do we."""
    base = save_random(LlamaConfig(**COMMON, tie_word_embeddings=True), tmp_path / "tiny", 7)
    peft = save_adapter(base, tmp_path / "peft", 1, targets=("embed_tokens",))
    config = json.loads((peft / "adapter_config.json").read_text())
    path = way(base)
    adapter = path.load(path.publish(peft))
    assert adapter.embedding is not None
    assert adapter.head is None
    (peft / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": True}))
    with pytest.raises(AdapterRefused, match="ensure_weight_tying"):
        path.publish(peft)


def test_dora_whose_base_has_a_row_of_zeros_fails_to_load_by_name(way: Ways, tmp_path: Path) -> None:
    base = save_random(LlamaConfig(**COMMON), tmp_path / "tiny", 7)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    model.save_pretrained(base)
    peft = save_adapter(base, tmp_path / "peft", 1, targets=("q_proj",), dora=True)
    weights = load_file(peft / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3] = 0
    save_file(weights, peft / "adapter_model.safetensors")
    path = way(base)
    version = path.publish(peft)
    with pytest.raises(AdapterLoadFailed, match=r"layers\.0\.self_attn\.q_proj are not finite"):
        path.load(version)
