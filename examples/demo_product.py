"""How the demo uses the product: as anybody would, by the command `loraplane` and over HTTP."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from adapters.home import Home
from loadtests.processes import Child, ServerProcess, loraplane
from loadtests.profiles import Target, targets_of
from loadtests.sse import Answer, StreamCheck, Violation
from loadtests.truth import Truth

GATE_REFUSES = 6  # the exit code that `loraplane --help` documents
_TIMEOUT_S = 120.0
_KEPT_LINES = 400

OnLine = Callable[[str], None]


class CommandFailed(Exception):
    """A command of the product ended with an exit code other than 0. said: its last line on stderr."""

    def __init__(self, words: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"loraplane {' '.join(words[:3])} ended with code {code}: {said}")
        self.code, self.said = code, said


@dataclass(frozen=True, slots=True)
class Told:
    """What a command printed on stdout, line by line."""

    lines: tuple[str, ...]

    @property
    def document(self) -> Any:
        """Its one JSON document, as most commands print with --json."""
        return json.loads("\n".join(self.lines))

    @property
    def last(self) -> Any:
        """Its last line, where it prints one JSON object a line."""
        return json.loads(self.lines[-1])


@dataclass
class Product:
    """Loraplane on one home: commands, and the server once it runs."""

    home: Home
    server: ServerProcess | None = None
    url: str = ""

    def run(self, *words: str, on_line: OnLine = lambda _: None) -> Told:
        """Run a command to its end. on_line: gets every line as it comes, of stdout and stderr alike.

        Raises CommandFailed. Ctrl-C ends the command, and all that it started, first.
        """
        command = loraplane(*words, "--home", str(self.home.root))
        out: list[str] = []
        said = ""
        with Child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            for line, is_answer in _lines(child.popen):
                on_line(line)
                if is_answer:
                    out.append(line)
                elif line.strip():
                    said = line.strip()
            code = child.popen.wait()
        if code:
            raise CommandFailed(words, code, said)
        return Told(tuple(out))

    def start_server(self, log: Path) -> None:
        """Begin to start a server on a free port, unless one holds this home already."""
        note = self.home.server()
        if note is not None:
            self.url = note.url
            return
        self.server = ServerProcess(self.home, log)

    def wait_for_server(self) -> str:
        """Its URL, once it takes requests. Raises loadtests.processes.ServerFailed."""
        if self.server is not None:
            self.url = self.server.ready()
        return self.url

    def stop(self) -> None:
        """End our server, and everything that it started."""
        if self.server is not None:
            self.server.stop()
            self.server = None

    def client(self) -> httpx.Client:
        """A client of the server, with the key of the environment if there is one."""
        key = os.environ.get("LORAPLANE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT_S, trust_env=False)

    def get(self, path: str) -> Any:
        """A path of the server as JSON. Raises httpx.HTTPError."""
        with self.client() as client:
            return client.get(path).raise_for_status().json()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send JSON, get JSON. Raises httpx.HTTPError."""
        with self.client() as client:
            return client.post(path, json=dict(body)).raise_for_status().json()

    def find(self, path: str) -> Any | None:
        """The same; None where there is nothing."""
        try:
            return self.get(path)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                return None
            raise

    def truth(self) -> Truth:
        """What the registry says that answers must be made with."""
        return Truth(self.get, self.get("/v1/models")["data"][0]["base_digest"])

    def target(self, model: str) -> Target:
        """The model id as something to ask. Raises LookupError when the server does not list it."""
        found = next((t for t in targets_of(self.get("/v1/models")) if t.id == model), None)
        if found is None:
            raise LookupError(f"{model} is not among the models that the server lists")
        return found


@dataclass
class Streaming:
    """One chat under way in a thread of its own; look at it while it runs, `join` it for the answer.

    begun_s, ended_s: moments of the monotonic clock.
    """

    product: Product
    model: str
    prompt: str
    max_tokens: int
    ignore_eos: bool = False
    gate: threading.Barrier | None = None
    begun_s: float = 0.0
    ended_s: float = 0.0
    answer: Answer | None = None
    violations: tuple[Violation, ...] = ()
    error: str = ""
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.check = StreamCheck(self.max_tokens, time.monotonic)
        self._truth = self.product.truth()
        self._target = self.product.target(self.model)
        # A daemon: Ctrl-C must not wait for an answer.
        self._thread = threading.Thread(target=self._stream, name=f"stream-{self.model}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> Answer:
        """The whole answer, every promise about it checked. Raises RuntimeError when none came."""
        while self._thread.is_alive():
            self._thread.join(0.1)  # in bits, so that Ctrl-C is heard
        if self.answer is None:
            raise RuntimeError(f"{self.model}: {self.error or 'no answer'}")
        return self.answer

    def _stream(self) -> None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            before = self._truth.before(self._target)
            with self.product.client() as client:
                if self.gate is not None:
                    self.gate.wait(timeout=_TIMEOUT_S)
                self.check = StreamCheck(self.max_tokens, time.monotonic)
                self.begun_s = time.monotonic()
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    if self.check.opened(response.status_code, response.headers, lambda: response.read().decode()):
                        for chunk in response.iter_raw():
                            self.check.feed(chunk)
                self.ended_s = time.monotonic()
            answer = self.check.end()
            found = list(answer.violations)
            if answer.named is not None:
                found += self._truth.violations(self._target, before, answer.named)
            self.violations, self.answer = tuple(found), answer
        except (httpx.HTTPError, threading.BrokenBarrierError) as error:
            self.error = f"{type(error).__name__} {error}"


def together(product: Product, asks: Sequence[tuple[str, str, int]]) -> list[Streaming]:
    """Send all (model, prompt, max_tokens) at the same moment; they stream side by side."""
    gate = threading.Barrier(len(asks))
    return [Streaming(product, model, prompt, tokens, gate=gate) for model, prompt, tokens in asks]


def _lines(process: subprocess.Popen[str]) -> Iterator[tuple[str, bool]]:
    """Every line of a process as it comes, and whether it came on stdout."""
    lines: queue.Queue[tuple[str, bool] | None] = queue.Queue(_KEPT_LINES)
    streams = [(process.stdout, True), (process.stderr, False)]
    for stream, is_answer in streams:
        threading.Thread(target=_pump, args=(stream, is_answer, lines), daemon=True).start()
    open_streams = len(streams)
    while open_streams:
        try:
            line = lines.get(timeout=0.2)  # in bits, so that Ctrl-C is heard
        except queue.Empty:
            continue
        if line is None:
            open_streams -= 1
        else:
            yield line


def _pump(stream: IO[str] | None, is_answer: bool, lines: queue.Queue[tuple[str, bool] | None]) -> None:
    try:
        for line in stream or ():
            lines.put((line.rstrip("\n"), is_answer))
    except ValueError:
        pass  # closed by us while it was read
    lines.put(None)


@contextmanager
def whole(product: Product) -> Iterator[Product]:
    """The product for one story: however it ends, nothing that it started goes on running."""
    try:
        yield product
    finally:
        product.stop()


def figure(report: Mapping[str, Any], against: str, metric: str) -> Mapping[str, Any]:
    """A paired difference of a report's JSON. Raises LookupError."""
    found = next((d for d in report["differences"] if d["against"] == against and d["metric"] == metric), None)
    if found is None:
        raise LookupError(f"the report of {report['adapter']}@{report['number']} compares nothing with {against}")
    return dict(found)
