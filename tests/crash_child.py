"""The program that test_adapters_crash kills: publishes, reports, promotes and rolls back, and acknowledges each on
standard output. Run as `python -m tests.crash_child HOME`."""

from __future__ import annotations

import os
import sys

from adapters.home import Home
from adapters.registry import Registry
from tests.adapter_factory import adapter_files, report

STEPS = ("published", "reported", "promoted", "rolled back")


def main(root: str) -> None:
    """Expects a home with sum@1 as champion; makes sum@2, makes it champion, and goes back."""
    registry = Registry.open(Home.find(root))
    one = registry.version("sum", 1)
    two = registry.publish("sum", adapter_files(2), who="child")
    _acknowledge("published")
    registry.add_report(report(two, one.digest))
    _acknowledge("reported")
    registry.promote("sum", two.number, who="child", expected_version=1)
    _acknowledge("promoted")
    registry.rollback("sum", who="child", reason="test", expected_version=2)
    _acknowledge("rolled back")


def _acknowledge(step: str) -> None:
    os.write(1, f"{step}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1])
