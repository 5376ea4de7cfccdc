"""Stands in for `loraplane serve`: holds the home, says /ready, and has a child of its own that ignores SIGTERM."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from adapters.home import Home, ServerNote

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    options = argparse.ArgumentParser()
    for name in ("--host", "--port", "--home", "--fail"):
        options.add_argument(name)
    given = options.parse_args()
    if given.fail:
        print("some noise")
        print(f"error[base_missing]: {given.fail}")
        sys.exit(4)
    server = HTTPServer((given.host, int(given.port)), Ready)
    grandchild = subprocess.Popen([sys.executable, "-c", STUBBORN])
    (Path(given.home) / "pids").write_text(f"{os.getpid()} {grandchild.pid}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    lock = Home.find(given.home).hold(ServerNote(f"http://127.0.0.1:{server.server_address[1]}", os.getpid()))
    try:
        server.serve_forever()
    finally:
        lock.release()


if __name__ == "__main__":
    main()
