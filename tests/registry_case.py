"""What the registry's tests share: publishing, promoting, and doing many things at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from adapters.records import AdapterVersion
from adapters.registry import Registry
from tests.adapter_factory import (
    adapter_files,
    policy,
    report,
)

T = TypeVar("T")


def publish(registry: Registry, seed: int = 0, name: str = "sum", **options: Any) -> AdapterVersion:
    return registry.publish(name, adapter_files(seed), who="tester", **options)


def promoted(registry: Registry, seed: int, name: str = "sum") -> AdapterVersion:
    """A version that went through the gate."""
    version = publish(registry, seed, name)
    registry.set_policy(name, policy(), "tester")
    summary = registry.adapter(name)
    champion = None if summary.champion is None else registry.version(name, summary.champion).digest
    registry.add_report(report(version, champion))
    registry.promote(name, version.number, who="tester")
    return version


def at_once(jobs: list[Callable[[], T]]) -> list[T | Exception]:
    """Run jobs on threads that start together; each one's value or exception."""
    barrier = threading.Barrier(len(jobs))
    results: list[T | Exception] = [RuntimeError("did not run")] * len(jobs)

    def work(index: int, job: Callable[[], T]) -> None:
        barrier.wait()
        try:
            results[index] = job()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
