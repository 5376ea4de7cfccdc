"""Peers under way: transformers and PEFT as a worker that is asked in JSON lines, vLLM as a server over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.closed_loop import connect
from loadtests.peer_env import interpreter
from loadtests.processes import Child

ROOT = Path(__file__).parent.parent
_VLLM_DEADLINE_S = 600.0
_POLL_S = 0.2
_KV_GIB = 2


class PeerFailed(Exception):
    """A peer that is installed could not do what it was asked."""


class Worker:
    """A module of ours as a process that answers JSON lines. It runs only while it is asked something.

    python: of the environment that it is to run in; module: what it runs, by default transformers and PEFT.
    """

    def __init__(self, python: Path, log: Path, module: str = "loadtests.peer_worker") -> None:
        self._log = log
        self._err = log.open("w", encoding="utf-8")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._child = Child(
            [str(python), "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._err,
            env={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._paused = False

    def ask(self, **asked: object) -> dict[str, Any]:
        """The answer. Raises PeerFailed with what the peer says, or with its last words when it died."""
        into, out = self._child.popen.stdin, self._child.popen.stdout
        if into is None or out is None:
            raise PeerFailed("the worker has no pipes")
        self._child.resume()
        try:
            into.write(json.dumps(asked) + "\n")
            into.flush()
            line = out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerFailed(f"it ended: {last_words(self._log)}")
        # Its threads may spin for a while, or for ever, in the time of whoever is measured next.
        self._child.pause()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(str(answer["error"]))
        return answer

    def stop(self) -> None:
        """End it."""
        into, out = self._child.popen.stdin, self._child.popen.stdout
        self._child.resume()
        # It ends by itself when nobody can ask any more; a loop that catches SIGTERM might not.
        for pipe in (into, out):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._child.stop()
        self._err.close()


class WorkerCase:
    """Decode steps of the worker's model. adapters: one for each row of a mixed batch; None: what is active."""

    def __init__(self, name: str, worker: Worker, rows: int, adapters: Sequence[str] | None = None) -> None:
        self.name, self.rows = name, rows
        self._worker, self._adapters = worker, adapters

    def steps(self, count: int) -> list[float]:
        """See Case."""
        adapters = None if self._adapters is None else list(self._adapters)
        found: list[float] = self._worker.ask(do="steps", rows=self.rows, adapters=adapters, count=count)["seconds"]
        return found


class VllmServer:
    """`vllm serve` on a free port. lora_modules: PEFT folders, which it serves by their folders' names; none: LoRA off.

    The settings are those that its own documents recommend for a CPU, on the cores that we may use.
    """

    def __init__(
        self, environment: Path, base: Path, lora_modules: Sequence[Path], log: Path, *, context: int, rank: int
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log, self._out = log, log.open("w", encoding="utf-8")
        command = vllm_command(interpreter(environment), base, lora_modules, port, context=context, rank=rank)
        self.child = Child(command, stdout=self._out, stderr=self._out, env=vllm_environment(environment))

    def wait(self) -> None:
        """Return once it takes requests. Raises PeerFailed."""
        deadline = time.monotonic() + _VLLM_DEADLINE_S
        while time.monotonic() < deadline:
            if not self.child.running:
                raise PeerFailed(f"vLLM ended with code {self.child.popen.returncode}: {last_words(self._log)}")
            if _healthy(self.url):
                self.child.look()
                return
            time.sleep(_POLL_S)
        raise PeerFailed(f"vLLM was not ready within {_VLLM_DEADLINE_S:g} s: {last_words(self._log)}")

    def stop(self) -> None:
        """End it and everything it started."""
        self.child.stop()
        self._out.close()


def vllm_command(
    python: Path, base: Path, lora_modules: Sequence[Path], port: int, *, context: int, rank: int
) -> list[str]:
    """The command line of a vLLM server."""
    found = [
        str(python.with_name("vllm")), "serve", str(base), "--served-model-name", "base", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "bfloat16", "--max-model-len", str(context), "--max-num-seqs", "32",
    ]  # fmt: skip
    if lora_modules:
        count = str(len(lora_modules))
        found += ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", str(rank)]
        found += ["--lora-modules", *(f"{folder.name}={folder}" for folder in lora_modules)]
    return found


def vllm_environment(environment: Path) -> dict[str, str]:
    """What vLLM reads from its environment. It asks for Intel's OpenMP by name in its log; its package brings it."""
    cores = sorted(os.sched_getaffinity(0))
    whole = cores == [*range(cores[0], cores[-1] + 1)]
    found = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}" if whole else ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    openmp = environment / "lib" / "libiomp5.so"
    if openmp.is_file():
        found["LD_PRELOAD"] = os.pathsep.join(filter(None, (str(openmp), os.environ.get("LD_PRELOAD"))))
    return found


def free_port() -> int:
    """A port of this machine's loopback that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(log: Path) -> str:
    """The last lines of a log, in one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:600] or "it said nothing"


def _healthy(url: str) -> bool:
    connection = connect(url)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
