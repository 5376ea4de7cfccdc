"""Builds the CPU kernels once with the machine's compiler and keeps them; where that cannot be, says why.

    python -m serving.engine.kernels.load

builds them beside their source, for images that have no compiler where they run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("lanes.h", "cpu.cpp", "products.cpp"))
SWITCH = "LORAPLANE_KERNELS"  # "off" leaves everything to torch
_FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-mfma", *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "bf16")))
_log = structlog.get_logger()


class KernelsMissing(Exception):
    """This machine cannot run or build the kernels; the message says what it lacks."""


@functools.cache
def cpu_kernels() -> Any | None:
    """The operators as `torch.ops` offers them, or None, with the reason in the log, where torch must do.

    The first call on a machine compiles for some 20 s; the result is kept by content under the user's cache folder.
    """
    try:
        torch.ops.load_library(str(_library(_build)))
    except (KernelsMissing, OSError) as error:
        _log.info("kernels_off", reason=str(error))
        return None
    return torch.ops.loraplane


def _library(build: Callable[[Path], None]) -> Path:
    if os.environ.get(SWITCH, "auto") == "off":
        raise KernelsMissing(f"{SWITCH} is off")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not torch.cpu._is_avx512_bf16_supported():
        raise KernelsMissing("this CPU has no bfloat16 products of 512 bits")
    shipped = SOURCES[0].with_name(_name())
    return shipped if shipped.exists() else _built(_private_folder(), build)


def _name() -> str:
    """The library's file name: another for another source, torch or set of flags."""
    sources = "\0".join(source.read_text() for source in SOURCES)
    built_from = f"{sources}\0{torch.__version__}\0{_FLAGS}"
    return f"cpu-{hashlib.sha256(built_from.encode()).hexdigest()[:16]}.so"


def _built(folder: Path, build: Callable[[Path], None]) -> Path:
    library = folder / _name()
    if not library.exists():
        # Built aside and moved: a build that was killed, or runs twice, leaves nothing half made and no lock.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            build(Path(aside))
            os.replace(Path(aside) / "loraplane_cpu.so", library)
    return library


def _private_folder() -> Path:
    """Where libraries are kept. Raises KernelsMissing when others could put one there: what lies there is executed."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "loraplane" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError as error:
        raise KernelsMissing(f"{folder} cannot be used: {error.strerror}") from None
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise KernelsMissing(f"{folder} belongs to somebody else or is writable for others")
    return folder


def _build(folder: Path) -> None:
    from torch.utils import cpp_extension

    if not (shutil.which(os.environ.get("CXX", "c++")) and cpp_extension.is_ninja_available()):
        raise KernelsMissing("there is no C++ compiler with ninja; install g++ and ninja for faster steps")
    try:
        cpp_extension.load(
            "loraplane_cpu",
            [str(source) for source in SOURCES if source.suffix == ".cpp"],
            extra_cflags=list(_FLAGS),
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError, ImportError) as error:
        raise KernelsMissing(f"the kernels could not be built: {(str(error).splitlines() or [''])[0]}") from None


if __name__ == "__main__":
    _built(SOURCES[0].parent, _build)
