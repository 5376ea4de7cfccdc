"""What figures were had on: the machine by its features, so that a reader can compare it with another."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
_GIB = 1 << 30


def machine() -> dict[str, object]:
    """Cores, instruction sets, memory, libraries, and how busy it was when asked."""
    flags = _cpu_flags()
    return {
        "arch": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / _GIB),
        "load_1min": round(os.getloadavg()[0], 2),
        **{flag: flag in flags for flag in _FLAGS},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def described(found: dict[str, object]) -> str:
    """A machine in a line, for people."""
    best = next((f for f in reversed(_FLAGS) if found[f]), "no wide vectors")
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    return (
        f"{found['cores']} cores of {found['arch']} with {best.replace('_', '-')}, {found['memory_gib']} GiB{gpu}, "
        f"torch {found['torch']}; load {found['load_1min']} at the start"
    )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
