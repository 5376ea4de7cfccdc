"""Oracle storm: thousands of requests over 200 adapters through 8 slots, and no answer that is not its digest's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.oracle_storm import ADAPTERS, Shelf, Storm


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.delenv("LORAPLANE_DATABASE_URL", raising=False)
    return Shelf.open(tmp_path)


def _storm(shelf: Shelf, total: int, kill_every: int) -> None:
    seed = int(os.environ.get("LORAPLANE_TEST_SEED", "1"))
    storm = Storm(shelf, seed)
    for name in storm.names * 3:
        shelf.publish(name)
    beat = storm.run(total, kill_every=kill_every)
    print(f"seed {seed}: {dict(storm.outcomes)}, {dict(storm.happened)}")
    shelf.registry.close()
    assert storm.wrong == []
    assert storm.outcomes.total() == total
    assert set(storm.outcomes) <= {"complete", "cancelled", "not found", "adapter_load_failed", "engine_lost"}
    assert storm.outcomes["complete"] > 0.8 * total
    assert storm.outcomes["cancelled"] > 0.02 * total
    assert storm.happened["evictions"] > 0.05 * total
    assert storm.happened["loads"] > ADAPTERS
    assert storm.happened["reused tokens"] > total
    # Back to the baseline (C8).
    assert (beat.running, beat.waiting, beat.loading, beat.kv_tokens_used) == (0, 0, 0, 0)
    # An engine that was just killed holds no slots yet.
    assert [slot.digest for slot in beat.slots if slot.leases] == []


def test_ten_thousand_requests_over_oracles_get_only_their_own_digests_answers(shelf: Shelf) -> None:
    _storm(shelf, 10_000, kill_every=3_000)
    assert len(shelf.oracles) >= ADAPTERS - 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_requests_over_oracles_get_only_their_own_digests_answers(shelf: Shelf) -> None:
    _storm(shelf, 100_000, kill_every=10_000)
    assert len(shelf.oracles) == ADAPTERS
