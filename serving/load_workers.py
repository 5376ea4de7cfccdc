"""Where loads run: a few threads for each kind of work, so that none of them waits behind another kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

DISK, STORE, BUILD, WRITE = "disk", "store", "build", "write"
STORE_WORKERS = 16  # they wait for the network, mostly

Task = Callable[[], None]


class Workers(Protocol):
    """Runs tasks that never raise, each beside the caller."""

    def submit(self, pool: str, task: Task) -> None:
        """Run a task by and by, after those of the same pool before it. Dropped once closed."""

    def close(self) -> None:
        """Begin no task any more."""


class ThreadWorkers:
    """Threads by pool: `disk` and `build` as many as told, many for the `store`, and one that writes.

    begin: called once in each thread, before its first task.
    """

    def __init__(self, workers: int, begin: Callable[[], None] | None = None) -> None:
        sizes: Mapping[str, int] = {DISK: workers, STORE: STORE_WORKERS, BUILD: workers, WRITE: 1}
        self._pools = {
            name: ThreadPoolExecutor(size, thread_name_prefix=f"adapter-{name}", initializer=begin)
            for name, size in sizes.items()
        }
        self._closed = False

    def submit(self, pool: str, task: Task) -> None:
        """See Workers."""
        try:
            self._pools[pool].submit(task)
        except RuntimeError:  # closed while a load was between two pools
            if not self._closed:
                raise

    def close(self) -> None:
        """See Workers. Does not wait: a store may take for ever."""
        self._closed = True
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
