"""What a run leaves on disk: states to resume from, and PEFT folders to publish.

A state is resumed only when we wrote it, for this very run, and not a byte has changed since: a manifest beside it
names the run and every file's SHA-256, and is written last. So a state half-written by a killed process has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.prompts import prompt_format_to_json
from adapters.publish import CONFIG_FILE, FORMAT_FILE
from adapters.records import PromptFormat

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST = "loraplane-manifest.json"
FINISHED = "finished.json"
_PREFIX = "checkpoint-"


def seal(folder: Path, run_digest: str) -> None:
    """Write the manifest that makes a state resumable. Synced before it is there, so that it never lies."""
    _write_whole(folder / MANIFEST, {"run": run_digest, "files": _files(folder)})


def finish(folder: Path, adapter: Path, run_digest: str, facts: Mapping[str, object]) -> None:
    """Write down that a run was trained to its end: what came of it, and which bytes its adapter has."""
    _write_whole(folder / FINISHED, {"run": run_digest, "files": _files(adapter), "facts": dict(facts)})


def finished(folder: Path, adapter: Path, run_digest: str) -> Mapping[str, object] | None:
    """The facts of this run, trained to its end in this folder; None when it was not, or its adapter changed since."""
    try:
        record = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        owner, files, facts = record["run"], record["files"], record["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if owner != run_digest or not adapter.is_dir() or files != _files(adapter) or not isinstance(facts, dict):
        return None
    return facts


def fault(folder: Path, run_digest: str) -> str | None:
    """Why a state may not be resumed from; None when it may."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        declared = {str(k): str(v) for k, v in manifest["files"].items()}
        owner = manifest["run"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it was not finished"
    if owner != run_digest:
        return "it belongs to another run"
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}
    if set(present) != set(declared):
        return f"its files are not those that were written ({', '.join(sorted(set(present) ^ set(declared)))})"
    changed = [name for name, path in sorted(present.items()) if _digest(path) != declared[name]]
    return f"{', '.join(changed)} changed since it was written" if changed else None


def newest_state(folder: Path, run_digest: str, say: Callable[[str], None]) -> Path | None:
    """The latest state that may be resumed from. Later ones that may not are named and deleted."""
    for state in sorted(folder.glob(f"{_PREFIX}*"), key=step_of, reverse=True):
        problem = fault(state, run_digest)
        if problem is None:
            return state
        say(f"{state.name} is not used: {problem}")
        shutil.rmtree(state, ignore_errors=True)
    return None


def step_of(state: Path) -> int:
    """The step after which a state was saved; -1 for a folder that is none."""
    number = state.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else -1


def export(model: PeftModel, folder: Path, *, base_name: str, fmt: PromptFormat) -> Path:
    """Save the adapter as a PEFT folder that can be published: weights, config, prompt format; nothing else.

    The config names the base by its name in the registry instead of this machine's path to it. The folder appears
    whole or not at all.
    """
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(str(staged), safe_serialization=True, save_embedding_layers=False)
    (staged / "README.md").unlink(missing_ok=True)
    config = json.loads((staged / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (staged / FORMAT_FILE).write_text(json.dumps(prompt_format_to_json(fmt), indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(folder)
    return folder


def _write_whole(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file that is there whole or not at all, also after a power cut."""
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8") as out:
        json.dump(content, out, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    staged.replace(path)


def _files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path in it."""
    return {p.relative_to(folder).as_posix(): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
