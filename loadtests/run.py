"""A load test in one command: find a server or start one, let locust ask, check every answer, tell.

    python -m loadtests.run [--url U] [--users 8] [--seconds 30] [--json]

Without --url it takes the server that holds the home, or starts one on a free port and stops it after. A table for
people, and as the last line one JSON object for programmes. Exit code 0 only if every answer was whole and right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapters.home import Home
from loadtests.figures import Outcome, outcome, show
from loadtests.processes import Child, ServerFailed, ServerProcess, interruptible, is_ready, loraplane

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# Answers under way when the time is up may end, so that none is cut by us and taken for the server's fault.
_STOP_TIMEOUT_S = 30
_LOCUST_FAILED_REQUESTS = 1  # its exit code when requests failed; the samples say which


class LoadTestFailed(Exception):
    """The test itself could not be made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test; returns the exit code: 0 all right, 1 some answer was not, 2 no test could be made."""
    options = _options(argv)
    try:
        with interruptible(), _server(options.url, Home.find(options.home), not options.json) as url:
            found = load(
                url,
                users=options.users,
                seconds=options.seconds,
                exponent=options.zipf,
                max_tokens=options.max_tokens,
                seed=options.seed,
                models=options.models,
            )
    except (LoadTestFailed, ServerFailed) as error:
        print(f"error[loadtest]: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error[interrupted]: stopped", file=sys.stderr)
        return 130
    if not options.json:
        show(found)
    print(json.dumps(found.to_json(), allow_nan=False), flush=True)
    return 0 if found.good else 1


def load(
    url: str,
    *,
    users: int,
    seconds: float,
    exponent: float = 1.0,
    max_tokens: int = 32,
    seed: int = 0,
    models: str = "",
) -> Outcome:
    """Run locust headless against `url`. models: comma-separated ids, empty for all. Raises LoadTestFailed."""
    asked = ["--seed", str(seed), "--zipf", str(exponent), "--max-tokens", str(max_tokens)]
    samples, code = drive(url, users, seconds, [*asked, *(["--models", models] if models else [])])
    found = outcome(samples, url, users)
    if found.good and code:
        # Its own count and ours must not part: a failure that we have no name for is a failure.
        raise LoadTestFailed("locust counted failures that the checks did not")
    return found


def drive(url: str, users: int, seconds: float, options: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """What locust's users came to, and its exit code. options: of the locustfile. Raises LoadTestFailed.

    seconds: after which nothing more is asked; what is under way then may end.
    """
    with tempfile.TemporaryDirectory(prefix="loraplane-load-") as folder:
        result, log = Path(folder) / "samples.json", Path(folder) / "locust.log"
        command = [
            sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary",
            "--host", url, "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{math.ceil(seconds)}s",
            "--stop-timeout", str(_STOP_TIMEOUT_S), "--loglevel", "WARNING", *options, "--result", str(result),
        ]  # fmt: skip
        # locust imports the file by its path; its own imports of this package need the folder above it.
        with (
            log.open("w", encoding="utf-8") as out,
            Child(
                command,
                stdout=out,
                stderr=out,
                env={
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, (str(LOCUSTFILE.parents[1]), os.environ.get("PYTHONPATH")))
                    )
                },
            ) as locust,
        ):
            try:
                code = locust.popen.wait(timeout=seconds + _STOP_TIMEOUT_S + 60)
            except subprocess.TimeoutExpired:
                raise LoadTestFailed(f"locust did not end; {_tail(log)}") from None
        if code not in (0, _LOCUST_FAILED_REQUESTS) or not result.is_file():
            raise LoadTestFailed(f"locust ended with code {code}; {_tail(log)}")
        samples: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
        return samples, code


@contextlib.contextmanager
def _server(url: str | None, home: Home, chatty: bool) -> Iterator[str]:
    """The URL to test: the one given, that of the home's server, or that of a server started for this test."""
    if url is not None:
        if not is_ready(url.rstrip("/")):
            raise LoadTestFailed(f"no server is ready at {url}")
        yield url.rstrip("/")
        return
    note = home.server()
    if note is not None:
        if not is_ready(note.url):
            raise LoadTestFailed(f"the server at {note.url} is not ready; try again in a moment")
        yield note.url
        return
    say = print if chatty else (lambda *_, **__: None)
    pulled = subprocess.run(
        loraplane("models", "pull", "--home", str(home.root)), capture_output=True, text=True, check=False
    )
    if pulled.returncode:
        raise LoadTestFailed(pulled.stderr.strip().splitlines()[-1] if pulled.stderr.strip() else "no base")
    with tempfile.TemporaryDirectory(prefix="loraplane-serve-") as folder:
        say("starting a server for this test ...", flush=True)
        server = ServerProcess(home, Path(folder) / "serve.log")
        try:
            found = server.ready()
            say(f"it is ready at {found}", flush=True)
            yield found
        finally:
            server.stop()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "its last words: " + " / ".join(lines[-4:])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="a running server; default: that of the home, or one started for the test")
    parser.add_argument("--home", type=Path, help="default $LORAPLANE_HOME or ~/.loraplane")
    parser.add_argument("--users", type=int, default=8, help="callers at the same time (default 8)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to ask (default 30)")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the models' popularity; 0: all alike")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds ask the same")
    parser.add_argument("--models", default="", help="comma-separated ids; default: all that the server lists")
    parser.add_argument("--json", action="store_true", help="the JSON line only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
