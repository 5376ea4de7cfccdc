"""What Ray reads from the environment, some of it at import: set before `serving.deployment` is imported."""

from __future__ import annotations

import os
import re
import secrets
import socket

from adapters.errors import ConfigInvalid

_REACH_S = 5.0

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ten rounds a second took 4 % of a core from the engine; a dead replica is found within half a second still.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray's handler prints a stack trace on every SIGTERM and takes the signal from ours.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}


def check_address(address: str) -> None:
    """Raises ConfigInvalid unless this is HOST:PORT and somebody listens there.

    Ray itself asks an address where nobody is for minutes, and says nothing meanwhile. Its `auto` is whatever cluster
    was started last on this machine, somebody else's perhaps: it is not taken.
    """
    host, _, port = address.rpartition(":")
    if re.fullmatch(r"[A-Za-z0-9._-]+:[0-9]{1,5}", address) is None or not 0 < int(port) < 65536:
        raise ConfigInvalid(f"--ray {address[:100]!r} is no HOST:PORT of a Ray cluster, as `ray start --head` tells it")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ConfigInvalid(f"no Ray cluster answers at {address} ({error.strerror or error})") from None


def prepare(*, ours: bool = True) -> None:
    """Nothing reported, nothing repeated on the terminal, and token authentication with a token of this run.

    ours False: for a cluster that runs already, whose token (RAY_AUTH_TOKEN, or Ray's own file) is the operator's to
    give; whether it asks for one is its own affair.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if ours:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
