"""What leaves the host when the budget is full, and what stays."""

from __future__ import annotations

from adapters.errors import AdapterLoadFailed
from serving.engine.lora import HostAdapter
from serving.engine.plan import Load
from serving.load_workers import DISK, STORE
from tests.tiers_case import TierCase, adapter_of, digest_of

KIB = 1 << 10
ONE, TWO, THREE = (digest_of(n) for n in (1, 2, 3))


def test_a_newcomer_is_verified_before_anything_goes() -> None:
    def read(digest: str) -> HostAdapter:
        if digest == TWO:
            raise AdapterLoadFailed("rotten")
        return adapter_of(digest)

    case = TierCase(read, budget_bytes=4096)
    case.load(ONE)
    assert case.load(TWO) == [Load.FAILED]
    assert case.tier.digests() == (ONE,)
    case.load(THREE)
    assert case.tier.digests() == (THREE,)


def test_the_popular_the_small_and_the_slow_to_load_stay() -> None:
    """Each pair differs in one thing; the second of each goes."""
    sizes = {digest_of(4): 8 * KIB}
    slow = digest_of(5)
    case = TierCase(lambda digest: adapter_of(digest, sizes.get(digest, 4 * KIB)), budget_bytes=28 * KIB)
    asked, unasked, small, large, late, soon = (digest_of(n) for n in (1, 2, 3, 4, 5, 6))
    for digest in (asked, unasked, small, large, late, soon):
        case.tier.want(digest)
        case.tier.poll()
        case.workers.run(DISK)
        task = case.workers.waiting[STORE].popleft()
        case.workers.waiting[STORE].clear()

        def read(digest: str) -> HostAdapter:
            case.time += 4.0 if digest == slow else 1.0
            return adapter_of(digest, sizes.get(digest, 4 * KIB))

        case._read = read
        task()
        case.tier.poll()
        case.tier.take(digest)
        for _ in range(9 if digest == asked else 1 if digest == unasked else 3):
            case.tier.demand.note(digest)
    case.tier._budget = 16 * KIB
    case.tier.poll()
    assert set(case.tier.digests()) >= {asked, slow}
    assert not set(case.tier.digests()) & {unasked, large}


def slowly(case: TierCase) -> TierCase:
    """The same, with loads that take a second: what is quick to have again is worth nothing."""

    def read(digest: str) -> HostAdapter:
        case.time += 1.0
        return adapter_of(digest)

    case._read = read
    return case


def test_what_somebody_waits_for_goes_last() -> None:
    case = slowly(TierCase(budget_bytes=2 * 4096))
    case.load(ONE)
    case.tier.take(ONE)
    for _ in range(100):
        case.tier.demand.note(ONE)
    case.load(TWO, THREE)
    assert set(case.tier.digests()) == {TWO, THREE}


def test_what_is_kept_stays_whatever_comes() -> None:
    case = slowly(TierCase(budget_bytes=2 * 4096))
    case.load(ONE)
    assert case.tier.keep(ONE)
    for n in range(10, 30):
        case.tier.demand.note(digest_of(n))
        assert case.load(digest_of(n)) == [Load.READY]
        case.time += 60.0
    assert case.tier.want(ONE).load is Load.READY
    case.tier.release(ONE)
    case.load(TWO, THREE)
    assert ONE not in case.tier.digests()


def test_what_need_not_go_since_a_larger_one_goes_stays() -> None:
    size = {ONE: 1 * KIB, TWO: 8 * KIB, THREE: 4 * KIB}
    case = TierCase(lambda digest: adapter_of(digest, size[digest]), budget_bytes=9 * KIB)
    for digest in (ONE, TWO):
        case.load(digest)
        case.tier.take(digest)
    case.load(THREE)
    assert set(case.tier.digests()) == {ONE, THREE}


def test_an_adapter_larger_than_the_budget_is_served_alone() -> None:
    case = TierCase(lambda digest: adapter_of(digest, 64 * KIB), budget_bytes=4 * KIB)
    assert case.load(ONE) == [Load.READY]
    assert case.tier.digests() == (ONE,)
