"""From a stranger's files to blobs that may be served: read, bind to a base, check, write the canonical form.

Nothing here is visible to anyone: the blobs are staged, and the registry commits them with the row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.base_weights import BaseWeights
from adapters.canonical_config import canonical_config
from adapters.errors import AdapterRefused, Conflict, InvalidRequest, PayloadTooLarge, Reason
from adapters.families import ENCODER_DECODERS, TRANSPOSED, adaptable, is_end
from adapters.golden import (
    GOLDEN_FILE,
    MAX_GOLDEN_BYTES,
    GoldenRow,
    check_golden,
    golden_from_json,
    golden_to_json,
    read_golden,
)
from adapters.prompts import prompt_format_from_json, prompt_format_to_json
from adapters.records import AdapterVersion, BaseRecord, BoundBy, PromptFormat
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.store import BlobStore, Source, Staged
from adapters.strict_json import canonical, read_strict
from adapters.weights import CanonicalWeights, canonical_chunks, check_shapes, check_weights, open_weights, size_limit

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_FILE = "prompt_format.json"
MAX_FORMAT_BYTES = 64 << 10
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?", re.ASCII)

Files = Mapping[str, Path | bytes]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version consists of; the SHA-256 of its canonical JSON is the version's digest.

    config and weights: digests of the canonical blobs; base: the base's digest; golden: what it answered when it was
    made. Rows that are not there are not written, so versions without them keep their digests.
    """

    config: str
    weights: str
    prompt_format: PromptFormat
    base: str
    golden: tuple[GoldenRow, ...] = ()

    def canonical(self) -> bytes:
        """The bytes that are stored under the version's digest."""
        return canonical(
            {
                "kind": "adapter",
                "config": self.config,
                "weights": self.weights,
                "prompt_format": prompt_format_to_json(self.prompt_format),
                "base": self.base,
                **({"golden": golden_to_json(self.golden)} if self.golden else {}),
            }
        )


def manifest_of(data: bytes) -> Manifest:
    """The manifest of its own bytes. Raises ValueError when they are another blob's."""
    raw = read_strict(data)
    if not isinstance(raw, dict) or raw.get("kind") != "adapter":
        raise ValueError("the blob is not the manifest of an adapter")
    texts = {key: raw.get(key) for key in ("config", "weights", "base")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("the manifest lacks config, weights or base")
    return Manifest(
        config=str(raw["config"]),
        weights=str(raw["weights"]),
        prompt_format=prompt_format_from_json(raw.get("prompt_format")),
        base=str(raw["base"]),
        golden=golden_from_json(raw.get("golden", [])),
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked adapter, staged. `commit` makes its blobs durable; until then it leaves no trace."""

    digest: str
    manifest: Manifest
    base: BaseRecord
    bound_by: BoundBy
    rank: int
    modules: tuple[str, ...]
    size_bytes: int
    originals: Mapping[str, str]
    notes: tuple[str, ...]
    staged: tuple[Staged, ...]

    def commit(self, known: AdapterVersion | None = None) -> None:
        """Make the blobs durable. The manifest comes last, so it never names a blob that is not there.

        known: the version that has this content already; then its blobs only, which mends any that have rotted.
        """
        for blob in self.staged:
            if known is None or blob.digest in self.canonical or blob.digest in known.originals.values():
                blob.commit()

    @property
    def canonical(self) -> tuple[str, ...]:
        """Digests of the blobs that are served."""
        return (self.manifest.config, self.manifest.weights, self.digest)


@contextmanager
def prepare(
    store: BlobStore,
    files: Files,
    *,
    root: Path,
    bases: Sequence[BaseRecord],
    chosen: BaseRecord | None,
    prompt_format: PromptFormat | None,
) -> Iterator[Prepared]:
    """Check an adapter against the bases and stage its blobs for as long as the context lasts.

    root: where the folders of bases lie. chosen: the base that the caller named. bases: all that it could belong to, at
    least one, the default first. prompt_format: in place of the file's. Raises AdapterRefused; BaseUnsupported when
    the file carries a copy of the base's weights and the base itself cannot be read.
    """
    _refuse_missing(files)
    with ExitStack() as stack:
        config = _small_file(files, CONFIG_FILE, MAX_CONFIG_BYTES)
        spec = parse_spec(config)
        # Before a byte of the weights is read: those of another base may be larger than any that fit here.
        bound = bind(spec, bases, chosen)
        limit = max(_size_limit(base, spec) for base in ([bound[0]] if bound else bases))
        original = _stage_limited(stack, store, files[WEIGHTS_FILE], limit, spec)
        weights = open_weights(original.path)
        base, bound_by = bound or (_by_shape(spec, weights, bases), BoundBy.SHAPE)
        modules = adaptable(base)
        check_weights(weights, modules, spec)
        _check_transposed(spec, base)
        _check_copies(weights, base, root)

        originals = {CONFIG_FILE: stack.enter_context(store.stage(config)), WEIGHTS_FILE: original}
        if FORMAT_FILE in files:
            data = _small_file(files, FORMAT_FILE, MAX_FORMAT_BYTES)
            originals[FORMAT_FILE] = stack.enter_context(store.stage(data))
            prompt_format = prompt_format or _format_of(data)
        golden: tuple[GoldenRow, ...] = ()
        if GOLDEN_FILE in files:
            data = _small_file(files, GOLDEN_FILE, MAX_GOLDEN_BYTES)
            originals[GOLDEN_FILE] = stack.enter_context(store.stage(data))
            golden = _golden_of(data, base)
        kept_config = canonical(
            canonical_config(spec, weights.ranks, sorted(modules), base.name, transposed=base.family in TRANSPOSED)
        )
        if len(kept_config) > MAX_CONFIG_BYTES:
            # Else the engine, or the next registry, would refuse what this one accepted.
            raise AdapterRefused(
                Reason.TOO_LARGE,
                f"naming its modules takes more than {MAX_CONFIG_BYTES} bytes; adapt whole module kinds",
            )
        staged_config = stack.enter_context(store.stage(kept_config))
        staged_weights = stack.enter_context(store.stage(canonical_chunks(weights)))
        manifest = Manifest(
            staged_config.digest, staged_weights.digest, prompt_format or PromptFormat(), base.digest, golden
        )
        staged_manifest = stack.enter_context(store.stage(manifest.canonical()))
        yield Prepared(
            digest=staged_manifest.digest,
            manifest=manifest,
            base=base,
            bound_by=bound_by,
            rank=weights.rank,
            modules=tuple(weights.ranks),
            size_bytes=staged_weights.size_bytes,
            originals={name: blob.digest for name, blob in originals.items()},
            notes=spec.notes,
            staged=(*originals.values(), staged_config, staged_weights, staged_manifest),
        )


def bind(
    spec: AdapterSpec, bases: Sequence[BaseRecord], chosen: BaseRecord | None
) -> tuple[BaseRecord, BoundBy] | None:
    """The base that an adapter belongs to by its config alone, and what proved it: a digest or the recorded name.

    None when only the shapes of its weights can tell.
    Raises AdapterRefused(wrong_base) when what is recorded contradicts what is here or what was chosen.
    """
    named = [base for base in bases if spec.base_name and _answers_to(base, spec.base_name)]
    if spec.base_digest is not None:
        by_digest = next((base for base in bases if base.digest == spec.base_digest), None)
        if by_digest is None:
            raise _wrong_base(f"it was trained on the base {spec.base_digest[:12]}, which is not here; pull that base")
        if chosen is not None and chosen.digest != by_digest.digest:
            raise _wrong_base(f"it was trained on {by_digest.name}, not on {chosen.name}; publish it for that base")
        return by_digest, BoundBy.DIGEST
    if chosen is not None:
        if named and all(base.digest != chosen.digest for base in named):
            raise _wrong_base(f"its config names {named[0].name}, not {chosen.name}; publish it for that base")
        return chosen, BoundBy.DIGEST
    if named:
        return named[0], BoundBy.NAME
    if _HUB_ID.fullmatch(spec.base_name):
        # A path says where the training machine kept its base; an id of a hub, `gpt2` too, says which base it was.
        raise _wrong_base(
            f"its config names {spec.base_name!r}, and here is {', '.join(base.name for base in bases[:5])}; pull that "
            f"base, or say --base NAME if it is one of these under another name"
        )
    return None


def _by_shape(spec: AdapterSpec, weights: CanonicalWeights, bases: Sequence[BaseRecord]) -> BaseRecord:
    fitting: list[BaseRecord] = []
    refusals: list[AdapterRefused] = []
    for base in bases:
        try:
            check_shapes(weights, adaptable(base), spec)
            fitting.append(base)
        except AdapterRefused as refusal:
            refusals.append(refusal)
    if not fitting:
        raise refusals[0]
    if len(fitting) > 1:
        raise _wrong_base(
            f"it fits {', '.join(base.name for base in fitting[:5])} by its shapes; say which: --base NAME"
        )
    return fitting[0]


def _size_limit(base: BaseRecord, spec: AdapterSpec) -> int:
    """The most bytes of weights for this base; PEFT saves embedding and head whole beside a LoRA on them."""
    modules = adaptable(base)
    targets = spec.target_modules
    if targets is None or any(is_end(target) for target in targets):
        return size_limit(modules, [module for module in modules if is_end(module)])
    return size_limit(modules)


def _check_transposed(spec: AdapterSpec, base: BaseRecord) -> None:
    """PEFT goes by the module's kind and warns; here a config that says what this base is not is refused."""
    if spec.fan_in_fan_out and base.family not in TRANSPOSED:
        raise AdapterRefused(
            Reason.CONFIG_FIELD,
            f"adapter_config.json: fan_in_fan_out is true, which is for Conv1D bases such as GPT-2, and {base.name} is "
            f"none; set it to false if the adapter is for this base",
        )


def _check_copies(weights: CanonicalWeights, base: BaseRecord, root: Path) -> None:
    """What a file carries of the base must be the base's; it is then left out. Shapes were compared before."""
    if not weights.copies:
        return
    held = BaseWeights(root / base.folder)
    for module, copy in weights.copies.items():
        if not held.holds(module, copy):
            raise AdapterRefused(
                Reason.UNSUPPORTED,
                f"the file carries {module} whole, and it differs from the one of {base.name}: trained layers are not "
                f"part of an adapter here; train it as a LoRA, without modules_to_save",
            )


def _answers_to(base: BaseRecord, recorded: str) -> bool:
    """Whether a recorded name, id or path means this base: whole, or by its last component."""
    own = {name.casefold() for name in (base.name, *base.aliases)}
    own |= {name.rpartition("/")[2] for name in own}
    recorded = recorded.replace("\\", "/").rstrip("/").casefold()
    return recorded in own or recorded.rpartition("/")[2] in own


def write_folder(into: Path, contents: Mapping[str, bytes]) -> Path:
    """Write files into a folder, made if absent. Raises Conflict rather than replace a file that differs.

    InvalidRequest when the folder takes no files: it is the caller's, not the registry's.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            target = into / name
            if target.exists() and target.read_bytes() != data:
                raise Conflict(f"{target} exists and differs; choose an empty folder")
        for name, data in contents.items():
            staged = into / f".{name}.{os.getpid()}"
            staged.write_bytes(data)
            staged.replace(into / name)
    except OSError as error:
        raise unwritable(into, error) from error
    return into


def unwritable(into: Path, error: OSError) -> InvalidRequest:
    """The refusal of a folder that files were to be written to, with the disk's reason."""
    why = "it is not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
    return InvalidRequest(f"no files can be written to {into}: {why or error}; choose another folder", "into")


def _refuse_missing(files: Files) -> None:
    if WEIGHTS_FILE not in files and "adapter_model.bin" in files:
        raise AdapterRefused(
            Reason.NOT_SAFETENSORS, "adapter_model.bin is a pickle; save with safe_serialization=True (safetensors)"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise AdapterRefused(Reason.MISSING_FILE, f"{name} is missing; a version needs it as PEFT saves it")


def _small_file(files: Files, name: str, limit: int) -> bytes:
    source = files[name]
    if isinstance(source, Path):
        if not source.is_file():  # a named pipe would hang the read
            raise AdapterRefused(Reason.MISSING_FILE, f"{name} is not a regular file")
        with source.open("rb") as file:
            source = file.read(limit + 1)
    if len(source) > limit:
        raise AdapterRefused(Reason.TOO_LARGE, f"{name} has more than {limit} bytes; shorten it")
    return source


def _stage_limited(stack: ExitStack, store: BlobStore, source: Source, limit: int, spec: AdapterSpec) -> Staged:
    if isinstance(source, Path) and not source.is_file():
        raise AdapterRefused(Reason.MISSING_FILE, f"{WEIGHTS_FILE} is not a regular file")
    try:
        return stack.enter_context(store.stage(source, max_bytes=limit))
    except PayloadTooLarge:
        most = f"{WEIGHTS_FILE} has more than {limit} bytes, the most that an adapter can have here"
        if not any(is_end(name) for name in spec.target_modules or ()):
            # Without a LoRA on them PEFT saves embedding and head when it finds the vocabulary resized.
            most += "; where it holds the base's embedding, save with save_embedding_layers=False"
        raise AdapterRefused(Reason.TOO_LARGE, most) from None


def _format_of(data: bytes) -> PromptFormat:
    try:
        raw = read_strict(data)
    except ValueError as error:
        raise AdapterRefused(Reason.PROMPT_FORMAT, f"{FORMAT_FILE} cannot be read: {error}") from None
    return prompt_format_from_json(raw)


def _golden_of(data: bytes, base: BaseRecord) -> tuple[GoldenRow, ...]:
    rows = read_golden(data)
    apart = base.family in ENCODER_DECODERS
    check_golden(rows, vocab_size=base.vocab_size, max_positions=base.max_positions, apart=apart)
    return rows


def _wrong_base(why: str) -> AdapterRefused:
    return AdapterRefused(Reason.WRONG_BASE, f"the adapter does not belong here: {why}")
