"""What real PEFT writes is published, and what is pulled back answers in PEFT as the original does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.home import Home
from adapters.registry import Registry
from tests.adapter_factory import base_record
from tests.tiny_base import VOCAB, Oracle


@pytest.fixture(scope="module")
def registry(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    modules = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAPLANE_DATABASE_URL", raising=False)
        opened = Registry.open(Home.find(tmp_path_factory.mktemp("home")))
    opened.add_base(base_record("tiny", modules=modules))
    yield opened
    opened.close()


@pytest.mark.parametrize("index", range(6))
def test_an_adapter_pulled_back_answers_as_the_one_published(
    registry: Registry, tiny_base: Path, tiny_adapters: list[Path], tmp_path: Path, index: int
) -> None:
    original = tiny_adapters[index]
    files = {path.name: path for path in original.iterdir()}
    version = registry.publish(f"a{index}", files, base="tiny", who="test")
    pulled = registry.export(version.name, version.number, tmp_path)
    ids = [(7 * i + index) % VOCAB for i in range(24)]
    assert torch.equal(Oracle(tiny_base, original).logits(ids), Oracle(tiny_base, pulled).logits(ids))
