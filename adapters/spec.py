"""adapter_config.json -> AdapterSpec, or a refusal that names the key.

The file is a stranger's. Its schema is closed: a key either means something that serving does exactly, or it is known
and holds an inert value (null, false, empty, PEFT's own default), or it is unknown and inert, which is noted. Nothing
in it is executed: patterns are compared as literal text, and the tensor names say which modules are adapted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from adapters.errors import AdapterRefused, Reason
from adapters.strict_json import read_strict, shown

MAX_CONFIG_BYTES = 16 << 10
MAX_SCALE = 64.0
LFS_MAGIC = b"version https://git-lfs"

_SUFFIX = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LIBRARY = re.compile(r"transformers(?:\.[a-z0-9_]+)*", re.ASCII)
_HEADLESS_TASKS = frozenset({"CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"})
# How A and B began is of no concern once they are trained. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also change the base.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal"})

# Features that PEFT has and our forward pass has not, with what their user can do about it.
_UNSERVED: Mapping[str, str] = {
    "use_qalora": "train without QALoRA",
    "use_bdlora": "train without BD-LoRA",
    "lora_bias": "train with lora_bias=False",
    "modules_to_save": "train without modules_to_save; whole layers are not part of an adapter here",
    "trainable_token_indices": "train without new token embeddings",
    "layer_replication": "train on the base as it is",
    "target_parameters": "adapt linear modules only",
    "alora_invocation_tokens": "train a plain LoRA rather than an activated one",
    "arrow_config": "publish the routed adapters one by one",
    "kasa_config": "train without KaSA; it changes the base's weights",
    "velora_config": "train without VeLoRA",
    "monteclora_config": "train without MonteCLoRA",
    "megatron_config": "export to plain transformers modules",
    "ensure_weight_tying": "train without tied adapters",
    "tokenizer_kwargs": "publish without it; adapters bring no tokenizer",
}
# Settings of the training run that leave no trace in how the weights are used. They are dropped.
_TRAINING_ONLY = frozenset(
    {
        "lora_dropout",
        "inference_mode",
        "eva_config",
        "qalora_group_size",
        "runtime_config",
        "peft_version",
        "revision",
    }
)
_INIT_CONFIGS = frozenset({"loftq_config", "corda_config", "lora_ga_config"})  # they belong to inits that are refused
_READ_BY_NAME = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "base_digest",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)
_IGNORED = _READ_BY_NAME | _TRAINING_ONLY | _INIT_CONFIGS


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What a checked adapter_config.json says about how its weights are used.

    rank and alpha hold for every module that no key of rank_pattern / alpha_pattern matches; keys are literal dotted
    suffixes, the first that matches wins, as in PEFT. target_modules is None when it was a regular expression, which is
    never executed; so are excluded modules. layers: the numbers of layers_to_transform, None for all. notes: what was
    ignored, for a person.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    base_name: str = ""
    base_digest: str | None = None
    task_type: str | None = None
    target_modules: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank that the config gives this module."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha that the config gives this module."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    def contradicts(self, module: str) -> str | None:
        """The key by which PEFT would leave this module as it is, tensors or not; None when it would adapt it."""
        if self.target_modules is not None and not _names(self.target_modules, module):
            return "target_modules"
        if _names(self.excluded, module):
            return "exclude_modules"
        if self.target_modules is not None and module in self.target_modules:
            return None  # named in full, lm_head for instance: PEFT then asks for no layer
        if self.layers is not None and _layer_of(module, self.layers_pattern) not in self.layers:
            return "layers_to_transform"
        return None

    def scale_of(self, module: str) -> float:
        """What B·A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def parse_spec(data: bytes) -> AdapterSpec:
    """The spec of a foreign adapter_config.json. Raises AdapterRefused with the reason and the key at fault."""
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterRefused(
            Reason.TOO_LARGE,
            f"adapter_config.json has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read; shorten its lists",
        )
    if data.startswith(LFS_MAGIC):
        raise AdapterRefused(
            Reason.LFS_POINTER, "adapter_config.json is a git-lfs pointer; run `git lfs pull` and publish again"
        )
    try:
        raw = read_strict(data)
    except ValueError as error:
        raise AdapterRefused(Reason.CONFIG_JSON, f"adapter_config.json cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterRefused(Reason.CONFIG_JSON, "adapter_config.json must hold one JSON object")
    return _Reader(raw).spec()


Value = TypeVar("Value", bound=Hashable)


def _first_match(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    return next((v for key, v in pattern.items() if module == key or module.endswith(f".{key}")), default)


def _names(suffixes: Sequence[str], module: str) -> bool:
    return any(module == suffix or module.endswith(f".{suffix}") for suffix in suffixes)


def _layer_of(module: str, patterns: Sequence[str]) -> int | None:
    """The first number in a module's path, or the one behind the first pattern that is there, as PEFT 0.21 finds it."""
    parts = module.split(".")
    numbers = [at for at in range(1, len(parts) - 1) if parts[at].isdecimal()]
    if not patterns:
        return next((int(parts[at]) for at in numbers if at >= 2), None)
    return next((int(parts[at]) for pattern in patterns for at in numbers if parts[at - 1] == pattern), None)


class _Reader:
    """One pass over the keys of one config."""

    def __init__(self, raw: Mapping[str, object]) -> None:
        self.raw = raw
        self.notes: list[str] = []

    def spec(self) -> AdapterSpec:
        self._is_lora()
        unknown: list[str] = []
        for key, value in self.raw.items():
            check = _CHECKS.get(key)
            if check is not None:
                check(self, key, value)
            elif key in _UNSERVED:
                if not inert(value):
                    raise _unserved(f"adapter_config.json asks for {key}", _UNSERVED[key])
            elif key in _IGNORED:
                continue
            elif inert(value):
                unknown.append(key)
            else:
                raise _field(shown(key), f"is not a key this server knows, and {shown(value)} may matter; remove it")
        if unknown:
            self.notes.append(f"{len(unknown)} unknown keys with inert values were ignored: {shown(unknown, 200)}")
        return AdapterSpec(
            rank=self._rank("r", self.raw.get("r", 8)),
            alpha=self._alpha("lora_alpha", self.raw.get("lora_alpha", 8)),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            rank_pattern=self._pattern("rank_pattern", self._rank),
            alpha_pattern=self._pattern("alpha_pattern", self._alpha),
            fan_in_fan_out=self._flag("fan_in_fan_out"),
            base_name=self._base_name(),
            base_digest=self._base_digest(),
            task_type=self._task_type(),
            target_modules=self._targets(),
            excluded=self._excluded(),
            layers=self._layers(),
            layers_pattern=self._layers_pattern(),
            notes=tuple(self.notes),  # last: reading the others adds to them
        )

    def _is_lora(self) -> None:
        kind = self.raw.get("peft_type")
        if kind == "LORA":
            return
        if kind is None:
            raise _field("peft_type", "is missing: this is not the config of a PEFT adapter; save with save_pretrained")
        raise _unserved(f"peft_type is {shown(kind)}", "publish a LoRA adapter (peft_type LORA)")

    def _auto_mapping(self, key: str, value: object) -> None:
        # PEFT writes it when no task type was given. Nothing here imports it; the shape is checked all the same,
        # because others do import what it names.
        if inert(value):
            return
        if isinstance(value, dict) and set(value) == {"base_model_class", "parent_library"}:
            library, name = value["parent_library"], value["base_model_class"]
            if (
                isinstance(library, str)
                and _LIBRARY.fullmatch(library)
                and isinstance(name, str)
                and name.isidentifier()
            ):
                self.notes.append("auto_mapping was dropped; the base is chosen by the registry")
                return
        raise _field(key, f"is {shown(value)}; set it to null, adapters name no code here")

    def _megatron_core(self, key: str, value: object) -> None:
        if not inert(value) and value != "megatron.core":
            raise _field(key, f"is {shown(value)}; set it to null, adapters name no code here")

    def _bias(self, key: str, value: object) -> None:
        if not inert(value) and value != "none":
            raise _unserved(f"bias is {shown(value)}", "train with bias='none'")

    def _init(self, key: str, value: object) -> None:
        if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _HARMLESS_INITS):
            return
        raise _unserved(
            f"init_lora_weights is {shown(value)}, which trains against a changed base",
            "convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion)",
        )

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise _field(key, f"is {shown(value)}; it must be true or false")

    def _rank(self, key: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 16:
            return value
        raise _field(key, f"is {shown(value)}; a rank must be a whole number from 1")

    def _alpha(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1 << 24:
            return float(value)
        raise _field(key, f"is {shown(value)}; an alpha must be a positive number")

    def _pattern(self, key: str, check: Callable[[str, object], Value]) -> dict[str, Value]:
        value = self.raw.get(key)
        if inert(value):
            return {}
        if not isinstance(value, dict):
            raise _field(key, f"is {shown(value)}; it must map module names to numbers")
        for name in value:
            if _SUFFIX.fullmatch(name) is None:
                raise _field(
                    key, f"has the key {shown(name)}; only literal dotted module names are read, no regular expressions"
                )
        return {name: check(f"{key}[{shown(name)}]", number) for name, number in value.items()}

    def _base_name(self) -> str:
        value = self.raw.get("base_model_name_or_path")
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > 1024 or not value.isprintable():
            raise _field("base_model_name_or_path", f"is {shown(value)}; it must be a printable name")
        return value

    def _base_digest(self) -> str | None:
        value = self.raw.get("base_digest")
        if value is None or (isinstance(value, str) and _DIGEST.fullmatch(value)):
            return value
        raise _field("base_digest", f"is {shown(value)}; it must be 64 hexadecimal digits")

    def _task_type(self) -> str | None:
        value = self.raw.get("task_type")
        if inert(value):
            return None
        if value in _HEADLESS_TASKS and isinstance(value, str):
            return value
        raise _unserved(f"task_type is {shown(value)}", "this server generates text: train with task_type CAUSAL_LM")

    def _targets(self) -> tuple[str, ...] | None:
        value = self.raw.get("target_modules")
        if value is None:
            return None
        if isinstance(value, str):
            self.notes.append("target_modules is a pattern; it was not executed, the tensor names say what is adapted")
            return None
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise _field("target_modules", f"is {shown(value)}; it must be a list of module names")

    def _excluded(self) -> tuple[str, ...]:
        value = self.raw.get("exclude_modules")
        if inert(value):
            return ()
        if isinstance(value, str):
            self.notes.append("exclude_modules is a pattern; it was not executed, the tensor names say what is adapted")
            return ()
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise _field("exclude_modules", f"is {shown(value)}; it must be a list of module names")

    def _layers(self) -> frozenset[int] | None:
        value = self.raw.get("layers_to_transform")
        if inert(value):
            return None
        numbers = value if isinstance(value, list) else [value]
        if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 16 for item in numbers):
            return frozenset(numbers)
        raise _field("layers_to_transform", f"is {shown(value)}; it must be a list of layer numbers")

    def _layers_pattern(self) -> tuple[str, ...]:
        value = self.raw.get("layers_pattern")
        if inert(value):
            return ()
        names = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) and item.isidentifier() for item in names):
            return tuple(names)
        raise _field("layers_pattern", f"is {shown(value)}; only literal names are read, no regular expressions")


_CHECKS: Mapping[str, Callable[[_Reader, str, object], None]] = {
    "auto_mapping": _Reader._auto_mapping,
    "megatron_core": _Reader._megatron_core,
    "bias": _Reader._bias,
    "init_lora_weights": _Reader._init,
}


def inert(value: object) -> bool:
    """Whether a value switches nothing on: null, false, or empty."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _field(key: str, why: str) -> AdapterRefused:
    return AdapterRefused(Reason.CONFIG_FIELD, f"adapter_config.json: {key} {why}")


def _unserved(what: str, remedy: str) -> AdapterRefused:
    return AdapterRefused(Reason.UNSUPPORTED, f"{what}, which cannot be served exactly; {remedy}")
