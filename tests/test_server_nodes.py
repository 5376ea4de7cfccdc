"""Engine replicas on several Ray nodes, of a cluster that ran before the server and goes on after it. One machine here,
two nodes: to the gateway the second is another machine, reached over TCP."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.rayenv import QUIET
from tests.live_server import LiveServer, live_server, wait_for
from tests.test_server_replicas import by_replica, chat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent


@contextmanager
def ray_nodes(count: int, env: dict[str, str]) -> Iterator[str]:
    """The address of a cluster with so many nodes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes", str(count)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("no pipes")
    try:
        yield stdout.readline().strip()
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        stdin.close()
        process.wait(timeout=60)
        for left in psutil.wait_procs(family, timeout=15)[1]:
            left.kill()


def sockets(server: LiveServer) -> tuple[int, int]:
    """Connections of the gateway to engines: over unix sockets, over TCP."""
    replicas = {int(name.split("-")[0]) for name in by_replica(server, "engine_replica_connected")}
    tcp = {c.laddr.port for pid in replicas for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN"}
    mine = psutil.Process(server.process.pid).net_connections("tcp")
    far = sum(bool(c.raddr) and c.raddr.port in tcp and c.status == "ESTABLISHED" for c in mine)
    return len(replicas) - far, far


def test_replicas_on_two_nodes_answer_and_one_node_far_away_is_reached_over_tcp(tiny_base: Path) -> None:
    token = secrets.token_hex(32)
    env = {**os.environ, **QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    options: tuple[str, ...] = ("--dtype", "float32", "--max-rows", "8", "--replicas", "2")
    with ray_nodes(2, env) as address:
        with live_server(tiny_base, *options, "--ray", address, env=env) as server:
            wait_for(lambda: server.gauge("engine_replicas") == 2, 120, "both replicas")
            assert sockets(server) == (1, 1)
            with server.client() as client, ThreadPoolExecutor(8) as pool:

                def ask(number: int) -> Any:
                    return client.post("/v1/chat/completions", json=chat("base", f"{number}" * 9)).json()

                answers = list(pool.map(ask, range(16)))
                again = [ask(number) for number in range(16)]
            texts = [a["choices"][0]["message"]["content"] for a in answers]
            assert texts == [a["choices"][0]["message"]["content"] for a in again]
            assert all(count >= 2 for count in by_replica(server, "engine_replica_sequences_total").values())
        assert server.process.returncode == 0
        # The cluster is not ours: it is there still, without replicas of ours.
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        assert not any("ServeReplica" in process.name() for process in psutil.Process().children(recursive=True))
