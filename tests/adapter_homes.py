"""A real Postgres server that a test run starts for itself."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import pytest

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name)) or [
    Path(found).resolve().parent for found in [shutil.which("initdb")] if found
]
_START_S = 60.0


class _Identity(TypedDict, total=False):
    """Keyword arguments of Popen: who runs the server."""

    user: int
    group: int
    extra_groups: list[int]


@contextmanager
def postgres() -> Iterator[str]:
    """A fresh Postgres on a unix socket only, as a user that is not root; yields the URL of an empty database.

    Skips the test when the server's programs or the driver are absent.
    """
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    if not _BINARIES:
        pytest.skip("no Postgres server is installed")
    programs = _BINARIES[-1]
    identity = _identity()
    folder = Path(tempfile.mkdtemp(prefix="lp-pg-"))
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "test", "-A", "trust", "-E", "UTF8", "--no-sync"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=120,
            **identity,
        )
        with (folder / "log").open("wb") as log:
            # A child of ours rather than pg_ctl's: it is waited for at the end, whatever init does with orphans.
            server = subprocess.Popen(
                [
                    programs / "postgres",
                    "-D",
                    folder / "data",
                    "-k",
                    folder,
                    "-c",
                    "listen_addresses=",
                    "-c",
                    "fsync=off",
                ],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **identity,
            )
        try:
            _await(server, folder)
            yield f"postgresql://test@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once, without a checkpoint
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fresh_schema(url: str) -> str:
    """The URL of a new, empty schema in the database: as good as a new database, and made at once."""
    import psycopg

    name = f"t{secrets.token_hex(8)}"
    with psycopg.connect(url) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    return f"{url}&options=-csearch_path%3D{name}"


def _await(server: subprocess.Popen[bytes], folder: Path) -> None:
    """Poll until the server takes connections."""
    import psycopg

    deadline = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(f"host={folder} user=test dbname=postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Postgres did not start: {(folder / 'log').read_text()}") from None
            time.sleep(0.05)


def _identity() -> _Identity:
    """Postgres refuses to run as root: some other user of this machine, or nothing when we are not root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    pytest.skip("only root exists here, and Postgres does not run as root")
