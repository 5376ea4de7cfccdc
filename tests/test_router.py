"""Routing over replicas: the door over fake ones. No socket, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from serving.engine.request import Failed, Finished, Moved, Sampling, Tokens
from serving.link import Address
from serving.router import OneCopy
from tests.fakes import Submission, repeat_forever, say
from tests.fleet import FakeReplica, Fleet, ask, routed, run, until

X, Y, Z = "x" * 64, "y" * 64, "z" * 64
GREEDY = Sampling(max_tokens=8, temperature=0.0)


def test_one_request_ends_once_and_its_replica_is_told_which() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            events = await ask(router)
            assert [isinstance(e, Finished | Failed) for e in events] == [False] * (len(events) - 1) + [True]
            assert sum(len(r.submissions) for r in fleet.replicas.values()) == 1
            assert sum(view.sent for view in router.views()) == 1
            assert all(view.load == 0 for view in router.views())

    run(scenario())


def test_distinct_adapters_are_kept_apart_and_each_stays_where_it_is() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            digests = [c * 64 for c in "01234567"]
            for _ in range(5):
                for digest in digests:
                    await ask(router, digest)
            homes = [{s.adapter for s in r.submissions} for r in fleet.replicas.values()]
            assert homes[0].isdisjoint(homes[1])
            assert len(homes[0]) == len(homes[1]) == 4

    run(scenario())


def test_choices_of_a_request_go_to_one_replica_and_two_requests_to_two() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever), b=FakeReplica(script=repeat_forever))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            running = [asyncio.create_task(ask(router, None, prompt)) for prompt in ((1, 2), (3, 4)) for _ in range(4)]
            await until(lambda: sum(len(r.submissions) for r in fleet.replicas.values()) == 8)
            seen = [{s.prompt for s in r.submissions} for r in fleet.replicas.values()]
            assert sorted(map(len, seen)) == [1, 1]
            for replica in fleet.replicas.values():
                replica.gate.set()
            await asyncio.gather(*running)

    run(scenario())


def test_a_replica_that_dies_takes_its_own_streams_and_no_other() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever), b=FakeReplica(script=repeat_forever))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            running = [asyncio.create_task(ask(router, None, (n,))) for n in range(8)]
            await until(lambda: sum(len(r.submissions) for r in fleet.replicas.values()) == 8)
            a, b = fleet.replicas["a"], fleet.replicas["b"]
            assert len(a.submissions) == len(b.submissions) == 4
            a.die()
            b.gate.set()
            ends = [events[-1] for events in await asyncio.gather(*running)]
            assert [e.code for e in ends if isinstance(e, Failed)] == ["engine_lost"] * 4
            assert sum(isinstance(e, Finished) for e in ends) == 4
            assert isinstance((await ask(router))[-1], Finished)  # at once, by the other
            assert len(a.submissions) == 4

    run(scenario())


@pytest.mark.parametrize("code", ["queue_full", "adapter_capacity", "deadline_exceeded", "not_ready"])
def test_what_a_replica_refused_before_it_began_is_offered_to_the_other(code: str) -> None:
    def full(submission: Submission) -> Sequence[int | Failed]:
        return [Failed(0, code, "no", 1.0)]

    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=full), b=FakeReplica(script=say("yes")))
        async with routed(fleet) as router:
            for number in range(6):
                assert isinstance((await ask(router, None, (number,)))[-1], Finished)
            fleet.replicas["b"].script = full
            events = await ask(router)
            assert [e.code for e in events if isinstance(e, Failed)] == [code]
            assert len(events) == 1

    run(scenario())


@pytest.mark.parametrize("code", ["engine_lost", "engine_fault", "adapter_load_failed", "deadline_exceeded"])
def test_what_may_have_begun_is_not_sent_again(code: str) -> None:
    """A request that kills its engine would otherwise kill them all, one after the other."""

    async def scenario() -> None:
        script = lambda submission: [Failed(0, code, "no")]  # noqa: E731
        fleet = Fleet(a=FakeReplica(script=script), b=FakeReplica(script=script))
        async with routed(fleet) as router:
            assert [e.code for e in await ask(router) if isinstance(e, Failed)] == [code]
            assert sum(len(r.submissions) for r in fleet.replicas.values()) == 1

    run(scenario())


def test_an_engine_that_failed_after_its_first_token_is_not_asked_twice() -> None:
    async def scenario() -> None:
        script = lambda submission: [65, Failed(0, "not_ready", "stops")]  # noqa: E731
        fleet = Fleet(a=FakeReplica(script=script), b=FakeReplica(script=script))
        async with routed(fleet) as router:
            events = await ask(router)
            assert [type(e) for e in events] == [Tokens, Failed]

    run(scenario())


def test_without_a_replica_the_answer_is_not_ready() -> None:
    async def scenario() -> None:
        async with routed(Fleet()) as router:
            assert [e.code for e in await ask(router) if isinstance(e, Failed)] == ["not_ready"]
            assert (router.facts, router.heartbeat, router.heartbeat_age_s) == (None, None, float("inf"))
            assert isinstance(await router.warm(X, 60), Failed)

    run(scenario())


def test_closing_a_stream_frees_the_row_of_its_replica() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever, pause_s=0.001))
        async with routed(fleet) as router:
            stream = router.submit((1, 2), GREEDY, X, 0, 60.0, "t")
            assert isinstance(await anext(stream), Tokens)
            assert router.views()[0].load == 1 / 8
            await stream.aclose()
            assert fleet.replicas["a"].submissions[0].ended == "closed"
            assert router.views()[0].load == 0

    run(scenario())


@pytest.mark.parametrize("trouble", ["silent", "hung", "leaving"])
def test_a_replica_in_trouble_gets_nothing_while_another_answers(trouble: str) -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            match trouble:
                case "silent":
                    fleet.replicas["a"].heartbeat_age = 4.0
                case "hung":
                    fleet.replicas["a"].idle_s = 20.0
                case "leaving":
                    fleet.named.remove("a")
                    await until(lambda: any(view.leaving for view in router.views()))
            for number in range(6):
                await ask(router, None, (number,))
            assert len(fleet.replicas["a"].submissions) == 0
            # ... and the server as a whole is well: one replica is enough.
            assert router.heartbeat is not None
            assert router.heartbeat_age_s < 1
            assert router.heartbeat.idle_s < 1
            fleet.replicas["b"].die()
            assert isinstance((await ask(router))[-1], Finished)  # better than nobody

    run(scenario())


def test_a_replica_that_left_is_forgotten_once_it_is_gone_and_its_counters_stay() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            before = router.heartbeat
            assert before is not None
            fleet.named.remove("a")
            await until(lambda: any(view.leaving for view in router.views()))
            fleet.replicas["a"].die()
            await until(lambda: [view.name for view in router.views()] == ["b"])
            after = router.heartbeat
            assert after is not None
            assert (before.tokens, after.tokens) == (14, 14)
            assert (before.rows, after.rows) == (16, 8)
            await until(lambda: fleet.replicas["a"].ended)

    run(scenario())


def test_a_directory_that_cannot_be_read_changes_nothing() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica())
        async with routed(fleet) as router:
            asked = asyncio.Event()

            async def broken() -> Sequence[Address]:
                asked.set()
                raise ConnectionError("no answer")

            router._directory = broken
            await asyncio.wait_for(asked.wait(), 5)
            assert isinstance((await ask(router))[-1], Finished)
            assert not router.views()[0].leaving

    run(scenario())


def test_a_hot_adapter_lands_on_the_second_replica_too() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever), b=FakeReplica(script=repeat_forever))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            running = [asyncio.create_task(ask(router, X, (1,))) for _ in range(7)]
            await until(lambda: sum(bool(r.warmed) for r in fleet.replicas.values()) == 1)
            home = next(r for r in fleet.replicas.values() if r.submissions)
            copy = next(r for r in fleet.replicas.values() if r is not home)
            assert (list(copy.warmed), len(home.submissions)) == ([X], 7)
            for replica in fleet.replicas.values():
                replica.gate.set()
            await asyncio.gather(*running)

    run(scenario())


def test_warm_pin_and_drop_reach_every_replica() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            assert isinstance(await router.warm(X, 60.0), Moved)
            assert isinstance(await router.pin(Y, True), Moved)
            assert isinstance(await router.drop(Z, 5.0), Moved)
            for replica in fleet.replicas.values():
                assert (replica.warmed, replica.pinned, replica.dropped) == ({X: 60.0}, {Y}, [(Z, 5.0)])

    run(scenario())


def test_what_is_warmed_ahead_of_demand_is_warmed_on_one_replica_alone() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            assert isinstance(await OneCopy(router).warm(X, 30.0), Moved)
            assert sorted(list(r.warmed) for r in fleet.replicas.values()) == [[], [X]]
        async with routed(Fleet()) as router:
            assert isinstance(await OneCopy(router).warm(X, 30.0), Failed)

    run(scenario())


def test_a_replica_that_comes_later_is_told_what_is_warm_and_pinned() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica())
        async with routed(fleet) as router:
            await router.warm(X, 60.0)
            await router.warm(Z, 60.0)
            await router.pin(Y, True)
            await router.drop(Z, 1.0)
            late = fleet.replicas["b"] = FakeReplica()
            fleet.named.append("b")
            await until(lambda: late.pinned == {Y})
            assert list(late.warmed) == [X]
            assert 0 < late.warmed[X] <= 60.0

    run(scenario())


def test_a_pin_that_one_replica_refuses_is_held_by_none() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        fleet.replicas["b"].refusals[X] = Failed(0, "adapter_capacity", "all slots are pinned", 1.0)
        async with routed(fleet) as router:
            answer = await router.pin(X, True)
            assert isinstance(answer, Failed)
            assert answer.code == "adapter_capacity"
            assert fleet.replicas["a"].pinned == set()

    run(scenario())


def test_a_replica_that_dies_while_it_warms_does_not_spoil_the_answer_of_the_other() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        fleet.replicas["b"].refusals[X] = Failed(0, "engine_lost", "gone", 1.0)
        async with routed(fleet) as router:
            assert isinstance(await router.warm(X, 60.0), Moved)

    run(scenario())


def test_a_replica_that_was_away_when_an_adapter_was_unpinned_lets_it_go_when_it_is_back() -> None:
    """The simulator found it: a connection was broken for a moment when the unpin went round, the engine behind it kept
    its pin, and the sum of the heartbeats, which tells what all have pinned, hid it: a slot was lost for good."""

    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            await router.pin(X, True)
            fleet.replicas["b"].heartbeat_age = 4.0
            await until(lambda: not router._members["b"].greeted)
            await router.pin(X, False)
            assert (fleet.replicas["a"].pinned, fleet.replicas["b"].pinned) == (set(), {X})
            fleet.replicas["b"].heartbeat_age = 0.1
            await until(lambda: fleet.replicas["b"].pinned == set())

    run(scenario())


def test_a_replica_that_hangs_is_not_waited_for_and_is_told_when_it_comes_back() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            fleet.replicas["a"].heartbeat_age = 4.0
            await until(lambda: not router._members["a"].greeted)
            await router.warm(X, 60.0)
            await router.pin(Y, True)
            assert (fleet.replicas["a"].pinned, fleet.replicas["b"].pinned) == (set(), {Y})
            fleet.replicas["a"].heartbeat_age = 0.1
            await until(lambda: fleet.replicas["a"].pinned == {Y})
            assert list(fleet.replicas["a"].warmed) == [X]

    run(scenario())


def test_a_replica_that_falls_silent_after_it_was_asked_is_not_waited_for() -> None:
    async def scenario() -> None:
        asked = asyncio.Event()

        class Hangs(FakeReplica):
            async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
                asked.set()
                await asyncio.Event().wait()
                raise AssertionError

        fleet = Fleet(a=Hangs(), b=FakeReplica())
        async with routed(fleet) as router, asyncio.timeout(10):
            warming = asyncio.create_task(router.warm(X, 60.0))
            await asked.wait()
            fleet.replicas["a"].heartbeat_age = 4.0
            assert isinstance(await warming, Moved)
            assert list(fleet.replicas["b"].warmed) == [X]

    run(scenario())


def test_a_drop_reaches_a_replica_that_leaves_too() -> None:
    """It still computes for whoever began there."""

    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            fleet.named.remove("a")
            await until(lambda: any(view.leaving for view in router.views()))
            await router.drop(X, 1.0)
            assert [r.dropped for r in fleet.replicas.values()] == [[(X, 1.0)]] * 2

    run(scenario())


def test_a_sequence_that_a_stopping_server_ended_does_not_begin_elsewhere() -> None:
    """Those that waited for their first token were offered to the next replica, and nobody ended them there."""

    async def scenario() -> None:
        script = lambda submission: [Failed(0, "not_ready", "The server stops.", 2.0)]  # noqa: E731
        fleet = Fleet(a=FakeReplica(script=script), b=FakeReplica(script=script))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            waiting = asyncio.create_task(ask(router))
            await until(lambda: sum(len(r.submissions) for r in fleet.replicas.values()) == 1)
            router.fail_running("not_ready", "The server stops.")
            for replica in fleet.replicas.values():
                replica.gate.set()
            assert [e.code for e in await waiting if isinstance(e, Failed)] == ["not_ready"]
            assert sum(len(r.submissions) for r in fleet.replicas.values()) == 1

    run(scenario())


def test_a_server_that_stops_ends_the_streams_of_every_replica() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            router.fail_running("not_ready", "The server stops.")
            assert [r.failed for r in fleet.replicas.values()] == [["not_ready"]] * 2

    run(scenario())
