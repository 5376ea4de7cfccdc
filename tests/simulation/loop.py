"""An asyncio loop in which nothing is real: time is a number, sockets are pipes, threads take as long as told.

One loop, one seed, one order of events: whatever happens in it happens again.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import socket
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any

from serving.load_workers import BUILD, DISK, STORE, STORE_WORKERS, WRITE, Task

FOREVER = float("inf")
Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Stuck(Exception):
    """Nothing is left that could ever happen, and somebody still waits."""


class _NoFiles(selectors.BaseSelector):
    """Waiting for files moves the clock and nothing else."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self._keys[fileobj] = key = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck
        self.now += max(0.0, timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class SimLoop(asyncio.SelectorEventLoop):
    """The loop of one run. delay_s: of what passes through a pipe, and of a short job in a thread."""

    def __init__(self, rng: random.Random) -> None:
        self._idle = _NoFiles()
        super().__init__(self._idle)
        self._rng = rng
        self._listening: dict[str, Served] = {}
        self.pipes: list[SimPipe] = []

    def time(self) -> float:
        return self._idle.now

    def delay_s(self) -> float:
        """Mostly a moment, at times long enough for much to happen meanwhile."""
        return self._rng.choice((0.0005, 0.001, 0.001, 0.002, 0.02))

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """A short job in a thread, such as a look into the registry: done at some time, heard of at a later one."""
        future = self.create_future()

        def work() -> None:
            try:
                result, error = func(*args), None
            except Exception as raised:
                result, error = None, raised
            self.call_later(self.delay_s(), tell, result, error)

        def tell(result: Any, error: Exception | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        self.call_later(self.delay_s(), work)
        return future

    # -- sockets ------------------------------------------------------------------------------------------------

    def listen(self, path: str, served: Served) -> None:
        """Let connections to this path be served."""
        self._listening[path] = served

    def unlisten(self, path: str) -> None:
        """Refuse connections to this path."""
        self._listening.pop(path, None)

    async def create_unix_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.Protocol], path: str, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        await asyncio.sleep(self.delay_s())
        served = self._listening.get(path)
        if served is None:
            raise ConnectionRefusedError(path)
        near, reader = protocol_factory(), asyncio.StreamReader(loop=self)
        far = asyncio.StreamReaderProtocol(reader, served, loop=self)
        ours, theirs = SimPipe(self, near, path), SimPipe(self, far, path)
        ours.peer, theirs.peer = theirs, ours
        self.pipes += [ours, theirs]
        far.connection_made(theirs)
        near.connection_made(ours)
        return ours, near


class SimPipe(asyncio.Transport):
    """One end of a connection. What is written arrives in order, in pieces, after a while; or not, once it is cut."""

    def __init__(self, loop: SimLoop, protocol: asyncio.Protocol, path: str) -> None:
        super().__init__()
        self._loop, self._protocol, self.path = loop, protocol, path
        self.peer = self
        self._closed = False
        self._deaf = self._lost = False
        self._last = 0.0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return _UnixSocket if name == "socket" else default

    def is_closing(self) -> bool:
        return self._closed

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            return
        rest = bytes(data)
        if len(rest) > 8 and self._loop._rng.random() < 0.05:
            cut = self._loop._rng.randrange(1, len(rest))
            self._later(self.peer._hear, rest[:cut])
            rest = rest[cut:]
        self._later(self.peer._hear, rest)

    def _later(self, call: Callable[..., None], *args: Any) -> None:
        # Strictly later than what was sent before: a heap of equal times has no order.
        self._last = max(self._loop.time() + self._loop.delay_s(), self._last + 1e-7)
        self._loop.call_at(self._last, call, *args)

    def _hear(self, data: bytes) -> None:
        if not self._deaf:
            self._protocol.data_received(data)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._later(self.peer._lose)
            self._loop.call_soon(self._lose)

    def abort(self) -> None:
        """Cut the connection, as the death of a process does: what is under way is lost."""
        self.peer._deaf = True
        self.close()

    def _lose(self) -> None:
        self._closed = self._deaf = True
        if not self._lost:
            self._lost = True
            self._loop.pipes.remove(self)
            self._protocol.connection_lost(None)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _UnixSocket:
    """What is asked of a socket below a transport."""

    family = socket.AF_UNIX


class SimWorkers:
    """Threads that load adapters, by pool: see Workers. duration_s: how long a task of a pool takes for an adapter."""

    def __init__(self, loop: SimLoop, workers: int, duration_s: Callable[[str, str], float]) -> None:
        self._loop, self._duration_s = loop, duration_s
        self._room = {DISK: workers, STORE: STORE_WORKERS, BUILD: workers, WRITE: 1}
        self._waiting: dict[str, list[Task]] = {pool: [] for pool in self._room}
        self._hanging: list[tuple[str, Task]] = []
        self._closed = False
        self.loads = 0  # tasks under way or queued that are part of a load
        self.done: list[str] = []  # whose loads came on since this was last emptied

    def submit(self, pool: str, task: Task) -> None:
        """See Workers."""
        if not self._closed:
            self.loads += pool != WRITE
            self._waiting[pool].append(task)
            self._begin(pool)

    def _begin(self, pool: str) -> None:
        while self._waiting[pool] and self._room[pool]:
            self._room[pool] -= 1
            task = self._waiting[pool].pop(0)
            seconds = self._duration_s(pool, _digest_of(task))
            if seconds == FOREVER:
                self._hanging.append((pool, task))
            else:
                self._loop.call_later(seconds, self._finish, pool, task)

    def release(self) -> None:
        """Let tasks go on that hang."""
        hanging, self._hanging = self._hanging, []
        for pool, task in hanging:
            self._loop.call_later(self._loop.delay_s(), self._finish, pool, task)

    def _finish(self, pool: str, task: Task) -> None:
        if not self._closed:
            self._room[pool] += 1
            self.loads -= pool != WRITE
            if pool != WRITE:
                self.done.append(_digest_of(task))
            task()
            self._begin(pool)

    def close(self) -> None:
        """See Workers."""
        self._closed = True


def _digest_of(task: Task) -> str:
    """Whose task it is: each is a call about an adapter, or about something that names one."""
    if not isinstance(task, partial):
        raise TypeError(f"a task that names nobody: {task}")
    about = task.args[0]
    return about if isinstance(about, str) else str(about.digest)
