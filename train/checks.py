"""What is known of a run before its first step: whether its adapter could be published, and what will disappoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adapters.canonical_config import canonical_config
from adapters.errors import AdapterRefused, InvalidRequest, ModelNotFound, RunInvalid
from adapters.families import adaptable, is_embedding
from adapters.records import AdapterVersion, BaseRecord
from adapters.registry_door import RegistryDoor, whoami
from adapters.rows import line, text
from adapters.runs import OptimSpec, TrainRun, check_run
from adapters.spec import MAX_CONFIG_BYTES, parse_spec
from adapters.strict_json import canonical
from adapters.tensor_file import TensorView
from adapters.weights import CanonicalWeights, check_shapes
from train.data import RowSet


def check_publishable(run: TrainRun, base: BaseRecord, door: RegistryDoor) -> None:
    """Raise RunInvalid, naming the setting, where the registry would refuse what this run trains."""
    _check_name(run.name, door)
    try:
        text(run.note, "note")
        line(whoami(), "LORAPLANE_USER")
    except InvalidRequest as error:
        raise RunInvalid(str(error)) from error
    if 0 < base.max_positions < run.max_length:
        raise RunInvalid(f"max_length {run.max_length} exceeds the base's {base.max_positions} positions")
    ranks = dict.fromkeys(_adapted(run, base), run.lora.r)
    config = {
        "peft_type": "LORA",
        "r": run.lora.r,
        "lora_alpha": run.lora.alpha,
        "use_rslora": run.lora.rslora,
        "base_model_name_or_path": base.name,
    }
    try:
        spec = parse_spec(canonical(config))
        embeddings = frozenset(module for module in ranks if is_embedding(module))
        check_shapes(CanonicalWeights(_shapes(ranks, base), embeddings=embeddings), adaptable(base), spec)
    except AdapterRefused as error:
        raise RunInvalid(f"lora: the adapter could not be published: {error}") from error
    if len(canonical(canonical_config(spec, ranks, sorted(adaptable(base)), base.name))) > MAX_CONFIG_BYTES:
        raise RunInvalid("lora.targets: naming these modules takes too much room; name whole kinds, such as q_proj")


def check_rate(optim: OptimSpec, steps: int) -> None:
    """Raise RunInvalid where no step would learn anything: the first step of a warm-up has the rate 0."""
    if steps == 1 and warmup_steps(optim, steps) > 0:
        raise RunInvalid(
            "optim.warmup: the run has a single step, and the first step of a warm-up has the rate 0, so nothing would "
            "be learnt; set optim.warmup=0, or train for more steps"
        )


def warmup_steps(optim: OptimSpec, steps: int) -> int:
    """How many of the run's steps warm up: as many as the run says, or a share of them, rounded up."""
    return int(optim.warmup) if optim.warmup >= 1 else math.ceil(steps * optim.warmup)


def cautions(run: TrainRun, held_out: RowSet | None, steps: int) -> tuple[str, ...]:
    """What will not be as hoped, each with what to change."""
    found: list[str] = []
    count = 0 if held_out is None else len(held_out.rows)
    if run.gate is not None and count < run.gate.min_n:
        more = (
            f"raise data.eval_limit (now {run.data.eval_limit})"
            if count == run.data.eval_limit
            else "bring more held-out rows (more rows, a larger data.holdout, or a data.eval_source)"
        )
        found.append(
            f"the gate can never decide: gate.min_n is {run.gate.min_n}, and {count} held-out rows with distinct "
            f"prompts are evaluated; {more}, or lower gate.min_n to at most {count}"
        )
    warmup = warmup_steps(run.optim, steps)
    if warmup >= steps:
        found.append(
            f"the rate never reaches optim.lr: optim.warmup is {warmup} of {steps} steps; lower it, or train longer"
        )
    return tuple(found)


def unlike(run: TrainRun, version: AdapterVersion) -> list[str]:
    """What a run asks for that a version, published from these very weights before, does not have: a line each.

    Settings that leave the weights as they are do not make a new version, and a version never changes.
    """
    stored = version.facts.get("run")
    if not isinstance(stored, Mapping):
        return []
    try:
        before, now = _flat(check_run(stored, version.id).settings()), _flat(run.settings())
    except RunInvalid:
        return []  # of a release that knew other settings
    told: dict[str, list[str]] = {}
    for key in sorted(before.keys() | now.keys()):
        part = key.partition(".")[0]
        if before.get(key) != now.get(key) and part not in ("base", "checkpoint"):
            told.setdefault(part, []).append(f"{key} {now.get(key)!r}, not {before.get(key)!r}")
    return [
        f"{version.id} was published before and stays as it is; this run file's {'; '.join(lines)}, has no effect on "
        f"it. {_HOW.get(part, _HOW_ELSE).format(name=version.name, id=version.id)}"
        for part, lines in told.items()
    ]


_HOW = {
    "gate": "To change the gate: loraplane adapters policy {name}",
    "eval": "An evaluation takes its own options: loraplane eval run {id} --max-tokens N",
    "data": "An evaluation takes its own options: loraplane eval run {id} --n ROWS",
    "note": "A note is fixed with its version",
}
_HOW_ELSE = "The weights came out the same"


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _check_name(name: str, door: RegistryDoor) -> None:
    try:
        door.adapter(name)
    except ModelNotFound:
        if any(name in (base.name, *base.aliases) for base in door.bases()):
            raise RunInvalid(f"name: a base is called {name!r}; give the adapter another name") from None


def _adapted(run: TrainRun, base: BaseRecord) -> list[str]:
    """The base's modules that the run adapts. Raises RunInvalid for a target that is none of them."""
    if isinstance(run.lora.targets, str):
        return [*base.modules]
    found: set[str] = set()
    modules = adaptable(base)
    for target in run.lora.targets:
        hit = [m for m in modules if m == target or m.endswith(f".{target}")]
        if not hit:
            kinds = ", ".join(sorted({m.rpartition(".")[2] for m in modules}))
            raise RunInvalid(f"lora.targets: {target!r} is no module that can be served; {base.name} has {kinds}")
        found.update(hit)
    return sorted(found)


def _shapes(ranks: Mapping[str, int], base: BaseRecord) -> dict[str, tuple[TensorView, TensorView]]:
    """The adapter's tensors as far as their shapes go, without a byte in them."""
    empty = memoryview(b"")
    modules = adaptable(base)
    found: dict[str, tuple[TensorView, TensorView]] = {}
    for module, rank in ranks.items():
        rows, columns = modules[module]
        found[module] = (TensorView("F32", (rank, columns), empty), TensorView("F32", (rows, rank), empty))
    return found
