"""What may be trained and evaluated, as checked data: the models of RUN.yaml.

Unknown keys are refused with the nearest known one; every value has a range. Nothing here reads data or weights.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from adapters.errors import AdapterRefused, InvalidRequest, RunInvalid
from adapters.golden import MAX_ROWS
from adapters.prompts import prompt_format_from_json
from adapters.records import BASE_ID, PromptFormat, check_adapter_name
from adapters.reports import GatePolicy, check_policy

DOCSTRINGS = "docstrings"
Metric = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    """No unknown keys, no NaN, nothing changed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(_Strict):
    """Which columns hold what. `messages`, where it is set, replaces prompt and completion."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None


class DataSpec(_Strict):
    """Where rows come from.

    source: `docstrings`, a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id. task: of `docstrings` only,
    `summary` or `name`. split: of a hub id. eval_source/eval_split: where held-out rows are; without either, `holdout`
    of the rows, chosen by a hash of the prompt, are kept out of training. limit: rows to train on, eval_limit: rows to
    evaluate on. max_chars: longer prompts are left out, in training and evaluation alike. shuffle_targets: give every
    prompt another row's answer, which makes a deliberately bad adapter.
    """

    source: str = Field(min_length=1)
    task: Literal["summary", "name"] | None = None
    split: str = "train"
    eval_source: str | None = None
    eval_split: str | None = None
    holdout: Share = 0.1
    columns: Columns = Columns()
    limit: int | None = Field(default=None, ge=1)
    eval_limit: int = Field(default=64, ge=1, le=100_000)
    max_chars: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    shuffle_targets: bool = False

    @model_validator(mode="after")
    def _task_fits_source(self) -> DataSpec:
        if self.source == DOCSTRINGS and self.task is None:
            raise ValueError("docstrings needs data.task: summary or name")
        if self.source != DOCSTRINGS and self.task is not None:
            raise ValueError("data.task belongs to source: docstrings")
        return self


class PromptFormatSpec(_Strict):
    """How prompts are dressed; becomes part of the published version."""

    style: Literal["chat", "text"] = "chat"
    system: str = ""
    prefix: str = ""
    suffix: str = ""
    stops: tuple[str, ...] = ()
    defaults: Mapping[str, float | int] = {}

    def record(self) -> PromptFormat:
        """The format as the registry knows it. Raises AdapterRefused(prompt_format) when it is out of range."""
        raw = self.model_dump(mode="json")
        return prompt_format_from_json({**raw, "stops": list(self.stops)})

    @model_validator(mode="after")
    def _in_range(self) -> PromptFormatSpec:
        try:
            self.record()
        except AdapterRefused as error:
            raise ValueError(str(error)) from error
        return self


class LoraSpec(_Strict):
    """The adapter's shape. targets: `all-linear` or names of linear modules, such as [q_proj, v_proj]."""

    r: int = Field(default=16, ge=1, le=512)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False

    @field_validator("targets")
    @classmethod
    def _plain_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        # PEFT would take a lone string as a regular expression, and a list's items as suffixes.
        if isinstance(value, tuple) and (not value or not all(v.replace(".", "").isidentifier() for v in value)):
            raise ValueError("must be all-linear or a list of module names")
        return value


class OptimSpec(_Strict):
    """AdamW and its schedule.

    Steps are epochs over the rows, cut at `max_steps`, times `fraction`. A batch holds batch_size rows, or, where
    tokens_per_batch is set, as many rows as fit so many padded tokens. warmup: steps, or a share of them below 1.
    """

    lr: float = Field(default=1e-3, gt=0, le=1)
    epochs: float = Field(default=1.0, gt=0, le=1000)
    max_steps: int | None = Field(default=None, ge=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=4096)
    tokens_per_batch: int | None = Field(default=None, ge=1)
    warmup: float = Field(default=0.05, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=1 << 32)


class CheckpointSpec(_Strict):
    """every_steps: how often; 0 never. keep: how many PEFT folders of earlier steps stay publishable."""

    every_steps: int = Field(default=20, ge=0)
    keep: int = Field(default=3, ge=1, le=100)


class EvalSpec(_Strict):
    """How answers are made and scored. language: of the texts, for ROUGE's stemmer and sentence splitter."""

    max_tokens: int = Field(default=32, ge=1, le=4096)
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}$")
    seed: int = Field(default=0, ge=0)


class GateSpec(_Strict):
    """The rules a version must pass; they become the adapter's policy, bound to the run's evaluation set."""

    metric: Metric = "rouge1"
    min_n: int = Field(default=64, ge=1)
    margin: float = Field(default=0.0, ge=-1, le=1)
    tolerance: float = Field(default=0.02, ge=0, le=1)
    max_empty_rate: Share = 0.1
    length_ratio: tuple[float, float] = (0.2, 5.0)

    @model_validator(mode="after")
    def _can_be_set(self) -> GateSpec:
        try:
            check_policy(self.policy("0" * 64))
        except InvalidRequest as error:
            raise ValueError(str(error)) from error
        return self

    def policy(self, data_digest: str) -> GatePolicy:
        """The policy for one evaluation set."""
        return GatePolicy(
            data_digest=data_digest,
            min_n=self.min_n,
            metric=self.metric,
            margin=self.margin,
            tolerance=self.tolerance,
            max_empty_rate=self.max_empty_rate,
            length_ratio=self.length_ratio,
        )


class TrainRun(_Strict):
    """One training run: what RUN.yaml says. name: the adapter to publish a candidate version of."""

    name: str
    data: DataSpec
    base: str = BASE_ID
    mode: Literal["sft"] = "sft"
    prompt_format: PromptFormatSpec = PromptFormatSpec()
    lora: LoraSpec = LoraSpec()
    optim: OptimSpec = OptimSpec()
    max_length: int = Field(default=512, ge=8, le=131_072)
    checkpoint: CheckpointSpec = CheckpointSpec()
    bf16: Literal["auto"] | bool = "auto"
    eval: EvalSpec = EvalSpec()
    gate: GateSpec | None = None
    golden_rows: int = Field(default=MAX_ROWS, ge=0, le=MAX_ROWS)
    note: str = Field(default="", max_length=1000)

    @field_validator("name")
    @classmethod
    def _publishable(cls, value: str) -> str:
        try:
            return check_adapter_name(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from error

    def settings(self) -> dict[str, Any]:
        """Plain JSON values of the whole run, defaults included: what is stored with the version."""
        return self.model_dump(mode="json")

    def digest(self, *, base_digest: str, data_digest: str, code: str) -> str:
        """SHA-256 hex that names this run: its settings on these weights, these rows and this code.

        Settings that do not change the weights (notes, evaluation, gate, how many checkpoints are kept) are left out.
        """
        settings = self.settings()
        for key in ("note", "eval", "gate", "checkpoint", "base"):
            del settings[key]
        del settings["data"]["eval_limit"]
        if self.golden_rows == MAX_ROWS:  # what runs did before they could say so
            del settings["golden_rows"]
        named = {"settings": settings, "base": base_digest, "data": data_digest, "code": code}
        return hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_run(path: Path, overrides: Sequence[str] = ()) -> TrainRun:
    """The run of a YAML file. overrides: `optim.lr=1e-4` and the like; the value is read as YAML.

    Raises RunInvalid, which names the field and, for an unknown key, the nearest known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunInvalid(f"cannot read {path}: {error.strerror if isinstance(error, OSError) else error}") from error
    raw = _yaml(text, f"{path} is not YAML")
    if not isinstance(raw, dict):
        raise RunInvalid(f"{path} must hold a mapping: name, data, ...")
    for override in overrides:
        _apply(raw, override)
    return check_run(raw, str(path))


def check_run(raw: Mapping[str, Any], where: str) -> TrainRun:
    """The run of plain values. where: what messages call the source. Raises RunInvalid."""
    try:
        return TrainRun.model_validate(raw)
    except ValidationError as error:
        raise RunInvalid(f"{where}: " + "; ".join(_told(e) for e in error.errors(include_url=False))) from error


def eval_data(text: str, like: DataSpec | None = None) -> DataSpec:
    """The rows that `--data` names: `docstrings:summary` or a file, with the other settings of `like`.

    Raises RunInvalid for a task that docstrings has not.
    """
    source, _, task = text.partition(":")
    settings = like.model_dump() if like is not None else {}
    if source == DOCSTRINGS:
        settings |= {"source": DOCSTRINGS, "task": task or "summary"}
    else:
        # A file that is named for evaluation is wholly for evaluation.
        settings |= {"source": text, "task": None, "eval_source": text, "eval_split": None}
    try:
        return DataSpec.model_validate(settings)
    except ValidationError as error:
        raise RunInvalid("--data: " + "; ".join(_told(e) for e in error.errors(include_url=False))) from error


class _Loader(yaml.SafeLoader):
    """YAML's safe part, without the licence to say a key twice: the second would win in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(name)
        return node


def _yaml(text: str, problem: str) -> Any:
    """The value of a YAML text. problem: what a refusal begins with. Raises RunInvalid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise RunInvalid(f"{problem}: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise RunInvalid(f"{problem}: {error}") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key, making the mappings on the way."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise RunInvalid(f"--set {override!r}: write KEY=VALUE, for example optim.lr=1e-4")
    value = _yaml(text, f"--set {override!r}: the value is not YAML")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 takes 1e-4 for a text
    *path, last = key.split(".")
    place = raw
    for part in path:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RunInvalid(f"--set {override!r}: {part} is no mapping")
        place = inner
    place[last] = value


def _told(error: Mapping[str, Any]) -> str:
    """One problem in words: the field's dotted name, what is wrong, and the nearest known key."""
    # Names of a union's branches are no part of the file.
    place = [str(p) for p in error["loc"] if not str(p).startswith(("literal[", "tuple[", "bool", "constrained"))]
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(place) or 'the run'}: {message}"
    known = _known_keys(place[:-1])
    nearest = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"{'.'.join(place)}: no such key; {hint}"


def _known_keys(path: Sequence[str]) -> list[str]:
    model: Any = TrainRun
    for part in path:
        field = model.model_fields.get(part)
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if model is None:
            return []
    return sorted(model.model_fields)
