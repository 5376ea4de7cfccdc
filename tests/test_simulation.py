"""The deciding parts under a simulator: thousands of worlds in which nothing may break, and six in which it must.

`python -m tests.simulate --seeds 100000` runs more of them; LORAPLANE_TEST_SEED moves the first seed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.simulate import broken, first_broken, main
from tests.simulation.mutants import MUTANTS

FIRST = int(os.environ.get("LORAPLANE_TEST_SEED", "0"))
LEAST, MOST, SECONDS = 1000, 5000, 75.0
FOUND_WITHIN = 1000


@pytest.mark.timeout(600)
def test_no_seed_breaks_an_invariant() -> None:
    """A thousand worlds at least, five thousand where they take no longer than the time for them."""
    begun, failures = time.monotonic(), []
    seed = FIRST
    while seed < FIRST + LEAST or (seed < FIRST + MOST and time.monotonic() - begun < SECONDS):
        if what := broken(seed):
            failures.append(f"{what}\n  replay: python -m tests.simulate --seed {seed} --trace")
        seed += 1
    print(f"seeds {FIRST} to {seed - 1} in {time.monotonic() - begun:.0f} s")
    assert failures == []


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        ("evicts_before_it_loads", "was evicted for nobody"),
        ("frees_what_is_used", "raised KeyError|do not balance|computed with"),
        ("cancelled_load_loads_for_ever", "still does not answer|outcome='deadline_exceeded'"),
        ("one_lock_for_all_loads", "nothing of its own is slow"),
        ("remembers_slots", "leases .* is computed with"),
        ("keeps_prefixes_by_name", r"should be Expected\("),
    ],
)
def test_a_planted_bug_is_found_within_a_thousand_seeds(mutant: str, words: str) -> None:
    found = first_broken(range(FIRST, FIRST + FOUND_WITHIN), MUTANTS[mutant])
    print(f"{mutant}: {found}")
    assert found is not None
    seed, what = found
    assert re.search(words, what)
    assert broken(seed, MUTANTS[mutant]) == what  # and it replays
    assert broken(seed) == ""  # without the bug the same world is sound


def test_every_mutant_is_looked_for() -> None:
    assert len(MUTANTS) == 6


def test_a_seed_is_the_same_world_in_every_process() -> None:
    """Python gives texts another hash in each process: no set of digests may decide on an order."""

    def trace(hash_seed: str) -> bytes:
        command = [sys.executable, "-m", "tests.simulate", "--seed", "7", "--trace"]
        root = Path(__file__).parent.parent
        found = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
        )
        return found.stdout.rpartition(b"\n{")[0]  # the last line says how many seconds it took

    first = trace("1")
    assert first.count(b"\n") > 20
    assert first == trace("2")


def test_a_failure_names_its_seed_and_how_to_replay_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "300", "--mutant", "remembers_slots"]) == 1
    told = capsys.readouterr().err
    seed = told.split()[1].rstrip(":")
    assert f"--seed {seed} --trace --mutant remembers_slots" in told
    assert main(["--seed", seed, "--trace", "--mutant", "remembers_slots"]) == 1
    replayed = capsys.readouterr()
    assert "healing" in replayed.out or "asks" in replayed.out
    assert told == replayed.err
