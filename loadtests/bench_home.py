"""What a bench serves: a base, random adapters for it as PEFT folders, and a home where both are published."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.bases import DEFAULT_BASE, open_base, pull
from adapters.home import Home
from adapters.publish import CONFIG_FILE, WEIGHTS_FILE
from adapters.records import AdapterVersion, BaseRecord
from adapters.registry import Registry
from adapters.registry_door import LocalDoor, RegistryDoor, open_door
from adapters.screen import note
from loadtests.bench_shell import BenchFailed

RANK = 16
WHO = "bench"
_VOCABULARY = 8192
_POSITIONS = 4096
_SPECIALS = ("<s>", "</s>", "<unk>")
# Small enough that sixty layers of it leave logits finite, large enough that no kernel may skip it.
_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """What random adapters are like. linears: last parts of the names of the modules they adapt, none: all.

    spread: of their values; wide ones answer otherwise than the base from the first token on.
    """

    rank: int = RANK
    linears: tuple[str, ...] = ()
    spread: float = _SPREAD

    def adapted(self, modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Those of a base's modules that they adapt. Raises BenchFailed when there is none."""
        found = {m: shape for m, shape in modules.items() if not self.linears or m.rpartition(".")[2] in self.linears}
        if not found:
            raise BenchFailed(f"the base has no {', '.join(self.linears)}; name a Llama-like one with --base")
        return found

    def size_bytes(self, modules: Mapping[str, tuple[int, int]]) -> int:
        """Bytes of one of them on such a base, in bfloat16."""
        return sum(2 * self.rank * (outputs + inputs) for outputs, inputs in self.adapted(modules).values())


_PLAIN = Kind()


@dataclass(frozen=True, slots=True)
class Base:
    """The base to measure. name: for people."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Furnished:
    """A home with a base and adapters in it. peft: their folders as PEFT wrote them, in the order of `versions`."""

    home: Home
    base: BaseRecord
    folder: Path
    versions: tuple[AdapterVersion, ...]
    peft: tuple[Path, ...]


def pick_base(options: argparse.Namespace, scratch: Path) -> Base:
    """The folder that was named, else the home's base, else a random one made in `scratch`.

    Raises BenchFailed when the folder named holds no base.
    """
    if options.base is not None:
        if not (options.base / "config.json").is_file():
            raise BenchFailed(f"--base {options.base}: no base lies there; name the folder that holds its config.json")
        return Base(options.base.resolve().name, options.base.resolve())
    home = Home.find(options.home)
    door = open_door(home)
    try:
        bases = {b.name: b for b in door.bases()}
    finally:
        door.close()
    record = bases.get(DEFAULT_BASE) or next(iter(bases.values()), None)
    if record is None:
        note(f"no base is pulled (loraplane models pull {DEFAULT_BASE}); measuring a small random one")
        return Base("random", random_base(scratch / "random-base"))
    return Base(record.name, open_base(home, record))


def random_base(folder: Path) -> Path:
    """A random Llama as wide as SmolLM2-135M and four layers deep, with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=_POSITIONS, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = [*_SPECIALS, *(f"w{i}" for i in range(len(_SPECIALS), _VOCABULARY))]
    bos, eos, unknown = _SPECIALS
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(folder)
    return folder


def write_adapter(
    modules: Mapping[str, tuple[int, int]],
    folder: Path,
    number: int,
    *,
    base_name: str,
    kind: Kind = _PLAIN,
    task: str = "CAUSAL_LM",
) -> Path:
    """A random adapter in bfloat16 as a PEFT folder. modules: path -> (out, in); equal numbers give equal bytes."""
    adapted = kind.adapted(modules)
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "r": kind.rank,
        "lora_alpha": kind.rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapted}),
        "bias": "none",
    }
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(number)
    tensors: dict[str, Tensor] = {}
    for path, (outputs, inputs) in adapted.items():
        for name, shape in (("lora_A", (kind.rank, inputs)), ("lora_B", (outputs, kind.rank))):
            drawn = torch.randn(shape, generator=generator) * kind.spread
            tensors[f"base_model.model.{path}.{name}.weight"] = drawn.to(torch.bfloat16)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_adapters(
    modules: Mapping[str, tuple[int, int]], root: Path, count: int, *, base_name: str, task: str = "CAUSAL_LM"
) -> tuple[Path, ...]:
    """So many random adapters of rank 16 on all of these modules, as PEFT folders."""
    return tuple(
        write_adapter(modules, root / f"a{number:02}", number, base_name=base_name, task=task)
        for number in range(1, count + 1)
    )


def publish_random(
    door: RegistryDoor, base: BaseRecord, names: Iterable[str], kind: Kind, *, first: int = 1
) -> tuple[AdapterVersion, ...]:
    """Publish a random adapter under each name, through whichever door. Their numbers go on from `first`."""
    found = []
    with tempfile.TemporaryDirectory(prefix="loraplane-adapters-") as scratch:
        for number, name in enumerate(names, first):
            folder = write_adapter(base.modules, Path(scratch) / str(number), number, base_name=base.name, kind=kind)
            found.append(door.publish(name, folder, base=base.name, note="random, to be measured"))
            for file in folder.iterdir():
                file.unlink()  # two thousand of them would fill a small disk twice
    return tuple(found)


def furnish(base: Base, root: Path, adapters: int) -> Furnished:
    """A home in `root` where the base and so many random adapters are published."""
    home = Home.find(root / "home")
    registry = Registry.open(home)
    try:
        record = pull(str(base.folder), home, registry, note, name=base.name)
        peft = write_adapters(record.modules, root / "peft", adapters, base_name=record.name)
        if adapters:
            note(f"publishing {adapters} random adapters of rank {RANK} on all linears")
        door = LocalDoor(registry, home, WHO)
        versions = tuple(
            door.publish(folder.name, folder, base=record.name, note="random, to be measured") for folder in peft
        )
    finally:
        registry.close()
    return Furnished(home, record, open_base(home, record), versions, peft)


def add_adapters(home: Furnished, prefix: str, count: int, kind: Kind) -> tuple[AdapterVersion, ...]:
    """Publish more random adapters, `prefix-0001` and on, in a home that nobody serves now."""
    note(f"publishing {count} random adapters of rank {kind.rank} on {', '.join(kind.linears) or 'all linears'}")
    names = (f"{prefix}-{number:04}" for number in range(1, count + 1))
    registry = Registry.open(home.home)
    try:
        return publish_random(LocalDoor(registry, home.home, WHO), home.base, names, kind)
    finally:
        registry.close()
