"""LoRA weights: what a stranger's file may hold, whether it fits a base, and the one canonical form that we keep."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterRefused, Reason
from adapters.families import is_embedding, is_end
from adapters.spec import MAX_SCALE, AdapterSpec
from adapters.tensor_file import MAX_HEADER_BYTES, Buffer, TensorView, bad_layout, read_tensors, tensor_chunks

MAX_ABS = 1e4
MAX_RANK = 64

_NAME = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_.-]+)\."
    r"(?:(?P<linear>lora_[AB])(?:\.default)?\.weight|(?P<bare>lora_embedding_[AB]|lora_magnitude_vector)(?:\.default)?)",
    re.ASCII,
)
_LINEAR, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
# PEFT saves the embedding, or the head, whole beside a LoRA on it.
_COPY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.-]+?)(?:\.base_layer)?\.weight", re.ASCII)
# What PEFT writes for features that we refuse; the config says it too, but a file can lie in either place.
_FOREIGN_PARTS: Mapping[str, str] = {
    ".bias": "biases",
    "modules_to_save": "whole layers (modules_to_save)",
    "base_layer": "the base itself",
    "trainable_tokens": "new token embeddings",
}


@dataclass(frozen=True, slots=True)
class CanonicalWeights:
    """LoRA tensors by module path of the base: (A, B) of shapes (r, in) and (out, r). Views; scale not folded in.

    Of an embedding, which PEFT names otherwise (`embeddings`), "in" is the vocabulary and "out" the width.
    magnitudes: DoRA's, (out,). copies: what the file carries of the base itself, no part of the canonical form.
    """

    tensors: Mapping[str, tuple[TensorView, TensorView]]
    magnitudes: Mapping[str, TensorView] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    copies: Mapping[str, TensorView] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """module -> rank, sorted by module."""
        return {module: self.tensors[module][0].shape[0] for module in sorted(self.tensors)}

    @property
    def rank(self) -> int:
        """The largest rank of any module: what a slot must hold."""
        return max(self.ranks.values())


def open_weights(source: Path | Buffer) -> CanonicalWeights:
    """The tensors of a safetensors file of LoRA pairs, as views.

    A path is mapped privately and copy-on-write, so torch may wrap the views; the map lives as long as they do.
    Raises AdapterRefused when the bytes are not sound (`read_pairs`). It knows no base: `check_weights` compares.
    """
    if not isinstance(source, Path):
        return read_pairs(source)
    with source.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return read_pairs(b"")
        return read_pairs(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def size_limit(modules: Mapping[str, tuple[int, int]], copied: Collection[str] = (), max_rank: int = MAX_RANK) -> int:
    """The most bytes that weights for this base can have: every module, at the highest rank, in float32, with DoRA.

    copied: modules whose base weight may come along.
    """
    pairs = sum(4 * max_rank * (rows + columns) + 4 * rows for rows, columns in modules.values())
    return 8 + MAX_HEADER_BYTES + pairs + sum(4 * modules[m][0] * modules[m][1] for m in copied)


def read_pairs(data: Buffer) -> CanonicalWeights:
    """The LoRA pairs of a stranger's safetensors bytes. Raises AdapterRefused, each fault with its own reason."""
    parts: dict[str, dict[str, TensorView]] = {}
    copies: dict[str, TensorView] = {}
    for name, tensor in read_tensors(data).items():
        match = _NAME.fullmatch(name)
        if match is None:
            module, into, part = _copied(name), copies, "copy of the base's weight"
            key = module
        else:
            module, part = match["module"], match["linear"] or match["bare"]
            into, key = parts.setdefault(module, {}), part
        if key in into:
            raise AdapterRefused(Reason.TENSOR_SET, f"{part} of {module} is there twice")
        dimensions = 1 if part == _MAGNITUDE else 2
        if len(tensor.shape) != dimensions:
            raise bad_layout(name, f"has shape {list(tensor.shape)}; {part} has {dimensions} dimension(s)")
        into[key] = tensor
    if not parts:
        raise AdapterRefused(Reason.TENSOR_SET, "the file holds no LoRA matrices")
    pairs = {module: _pair(module, there) for module, there in parts.items()}
    magnitudes = {module: there[_MAGNITUDE] for module, there in parts.items() if _MAGNITUDE in there}
    embeddings = frozenset(module for module, there in parts.items() if _EMBEDDING[0] in there)
    return CanonicalWeights(pairs, magnitudes, embeddings, copies)


def _pair(module: str, there: Mapping[str, TensorView]) -> tuple[TensorView, TensorView]:
    """A and B out of a module's tensors, which must be one whole pair, with or without a magnitude."""
    names = sorted(there.keys() - {_MAGNITUDE})
    for first, second in (_LINEAR, _EMBEDDING):
        if names == [first, second]:
            return there[first], there[second]
    if len(names) == 1:
        (name,) = names
        gone = name[:-1] + ("B" if name.endswith("A") else "A")
        raise AdapterRefused(Reason.TENSOR_SET, f"{module} has {name} without {gone}; save the adapter again, whole")
    raise AdapterRefused(
        Reason.TENSOR_SET, f"{module} has {', '.join(sorted(there))}; it needs lora_A and lora_B, and no other pair"
    )


def check_weights(
    weights: CanonicalWeights, modules: Mapping[str, tuple[int, int]], spec: AdapterSpec, max_rank: int = MAX_RANK
) -> None:
    """Compare weights with the base's modules (path -> (out, in)) and with their config, and look at every value.

    modules: `adapters.families.adaptable`. Whether copies of the base's weights are what they say is not looked at.
    Raises AdapterRefused: the reasons of `check_shapes`, not_finite, numerics, no_effect.
    """
    check_shapes(weights, modules, spec, max_rank)
    effect = False
    for module, (a, b) in weights.tensors.items():
        parts = {"lora_A": a, "lora_B": b}
        if module in weights.magnitudes:
            parts[_MAGNITUDE] = weights.magnitudes[module]
        largest = {part: tensor.largest for part, tensor in parts.items()}
        for part, value in largest.items():
            if value == float("inf"):
                raise AdapterRefused(
                    Reason.NOT_FINITE,
                    f"{part} of {module} holds NaN or infinity; the training run diverged, publish an earlier one",
                )
            if value > MAX_ABS:
                raise AdapterRefused(
                    Reason.NUMERICS, f"{part} of {module} reaches {value:.3g}; values beyond {MAX_ABS:g} are refused"
                )
        effect = effect or bool(largest["lora_A"] and largest["lora_B"])
    if not effect:
        raise AdapterRefused(
            Reason.NO_EFFECT,
            "B·A is zero for every module, so the base would answer under this adapter's name; train it first",
        )


def check_shapes(
    weights: CanonicalWeights, modules: Mapping[str, tuple[int, int]], spec: AdapterSpec, max_rank: int = MAX_RANK
) -> None:
    """The part of `check_weights` that reads no values: whether these tensors could belong to this base.

    Raises AdapterRefused: unknown_module, shape, rank, tensor_set, config_field or unsupported_feature.
    """
    for module, (a, b) in weights.tensors.items():
        _check_module(module, modules, module in weights.embeddings)
        key = spec.contradicts(module)
        if key is not None:
            raise AdapterRefused(
                Reason.CONFIG_FIELD,
                f"adapter_config.json: {key} leaves {module} out, but it has tensors, which PEFT would ignore; "
                f"save the adapter again, or mend {key}",
            )
        rows, columns = modules[module]
        rank = a.shape[0]
        if a.shape[1] != columns or b.shape[0] != rows or b.shape[1] != rank:
            raise AdapterRefused(
                Reason.SHAPE,
                f"{module}: A is {a.shape} and B {b.shape}; this base needs A (r, {columns}) and B ({rows}, r)",
            )
        if rank > max_rank:
            raise AdapterRefused(Reason.RANK, f"{module} has rank {rank}; slots hold at most {max_rank}")
        if rank != spec.rank_of(module):
            raise AdapterRefused(
                Reason.RANK, f"{module} has rank {rank}, but adapter_config.json says {spec.rank_of(module)}"
            )
        if spec.scale_of(module) > MAX_SCALE:
            raise AdapterRefused(
                Reason.RANK,
                f"{module} would be scaled by {spec.scale_of(module):.4g} (lora_alpha); at most {MAX_SCALE:g}",
            )
    _check_magnitudes(weights, modules, spec)
    for module, copy in weights.copies.items():
        if module not in modules or not is_end(module):
            raise AdapterRefused(
                Reason.UNSUPPORTED,
                f"the file carries the whole weight of {module[:120]!r}, and whole layers are not part of an adapter "
                f"here; save with save_embedding_layers=False, without modules_to_save",
            )
        rows, columns = reversed(modules[module]) if is_embedding(module) else modules[module]
        if copy.shape != (rows, columns):
            raise AdapterRefused(
                Reason.SHAPE,
                f"{module} comes along as {list(copy.shape)}, and the base's is {[rows, columns]}: a vocabulary that "
                f"was resized cannot be served; train on the base's own",
            )


def _check_module(module: str, modules: Mapping[str, tuple[int, int]], as_embedding: bool) -> None:
    if module not in modules:
        if as_embedding or is_end(module):
            raise AdapterRefused(
                Reason.UNSUPPORTED,
                f"{module[:120]!r} is an embedding or an output head, and this base's cannot be served adapted (of "
                f"decoder-only bases the token embedding and lm_head can); train without it",
            )
        raise AdapterRefused(
            Reason.UNKNOWN_MODULE, f"the base has no linear module {module[:120]!r}; train on this base, or name yours"
        )
    if as_embedding != is_embedding(module):
        names = ", ".join(_EMBEDDING if is_embedding(module) else _LINEAR)
        raise AdapterRefused(Reason.TENSOR_SET, f"{module} needs {names}, which is all that PEFT would load for it")


def _check_magnitudes(weights: CanonicalWeights, modules: Mapping[str, tuple[int, int]], spec: AdapterSpec) -> None:
    """DoRA for every adapted module, or for none: PEFT would make up what is missing and ignore what is too much."""
    if not spec.use_dora:
        if weights.magnitudes:
            raise AdapterRefused(
                Reason.CONFIG_FIELD,
                f"adapter_config.json: use_dora is not set, but {min(weights.magnitudes)} has a {_MAGNITUDE}, which "
                f"PEFT would ignore; set use_dora, or save the adapter again",
            )
        return
    for module in weights.tensors.keys() | weights.magnitudes.keys():
        if module not in weights.magnitudes or module not in weights.tensors:
            raise AdapterRefused(
                Reason.TENSOR_SET, f"{module} has no {_MAGNITUDE}, which use_dora needs; save the adapter again, whole"
            )
        (length,) = weights.magnitudes[module].shape
        if length != modules[module][0]:
            raise AdapterRefused(
                Reason.SHAPE, f"{module}: {_MAGNITUDE} has {length} values; this base needs {modules[module][0]}"
            )


def canonical_chunks(weights: CanonicalWeights) -> Iterator[bytes | memoryview]:
    """The one byte form of these weights, piece by piece: names as PEFT writes them, without copies of the base."""
    named: dict[str, TensorView] = {}
    for module, pair in weights.tensors.items():
        embedding = module in weights.embeddings
        for part, tensor in zip(_EMBEDDING if embedding else _LINEAR, pair, strict=True):
            named[f"base_model.model.{module}.{part}{'' if embedding else '.weight'}"] = tensor
    for module, magnitude in weights.magnitudes.items():
        named[f"base_model.model.{module}.{_MAGNITUDE}"] = magnitude
    return tensor_chunks(named)


def _copied(name: str) -> str:
    """The module whose weight a tensor copies. Raises AdapterRefused for a name that is no copy either."""
    match = _COPY.fullmatch(name)
    if match is not None and is_end(match["module"]):
        return match["module"]
    for part, what in _FOREIGN_PARTS.items():
        if part in name:
            raise AdapterRefused(
                Reason.UNSUPPORTED,
                f"tensor {name[:120]!r} belongs to {what}, which cannot be served exactly; train without",
            )
    raise AdapterRefused(
        Reason.TENSOR_NAME,
        f"tensor {name[:120]!r} is not a LoRA matrix as PEFT names them (base_model.model.<module>.lora_A.weight)",
    )
