"""Run simulated worlds: `python -m tests.simulate --seeds 100000`; a failure replays by `--seed N --trace`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

from tests.simulation.mutants import MUTANTS
from tests.simulation.plan import Plan
from tests.simulation.registry import SimRegistry
from tests.simulation.replica import Parts
from tests.simulation.weights import Broken
from tests.simulation.world import World

Mutant = Callable[[SimRegistry], Parts]


def _sound(registry: SimRegistry) -> Parts:
    return Parts()


def broken(seed: int, parts: Mutant = _sound, trace: Callable[[str], None] | None = None) -> str:
    """What does not hold in this seed's world; empty when all does."""
    try:
        World(Plan.draw(seed), parts, trace).run()
    except Broken as found:
        return str(found)
    return ""


def first_broken(seeds: Sequence[int], parts: Mutant = _sound) -> tuple[int, str] | None:
    """The first of these seeds whose world breaks, and how."""
    for seed in seeds:
        if what := broken(seed, parts):
            return seed, what
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 when a world broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seed", type=int, help="this world alone")
    parser.add_argument("--trace", action="store_true", help="tell what happens in it")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with a historic bug planted")
    options = parser.parse_args(arguments)
    parts = MUTANTS[options.mutant] if options.mutant else _sound
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    begun, failures = time.monotonic(), 0
    for done, seed in enumerate(seeds, 1):
        what = broken(seed, parts, print if options.trace else None)
        if what:
            failures += 1
            planted = f" --mutant {options.mutant}" if options.mutant else ""
            print(
                f"seed {seed}: {what}\n  replay: python -m tests.simulate --seed {seed} --trace{planted}",
                file=sys.stderr,
            )
            if options.mutant:
                break
        if done % 1000 == 0:
            print(f"{done} worlds, {failures} broken, {time.monotonic() - begun:.0f} s", flush=True)
    print(json.dumps({"worlds": done, "broken": failures, "seconds": round(time.monotonic() - begun, 1)}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
