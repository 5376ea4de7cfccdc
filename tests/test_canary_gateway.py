"""Canaries and shadows through the whole edge: real app and registry, a fake engine that can be made to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.canaries import Arm, CanaryLimits, Sticky
from adapters.errors import AdapterLoadFailed, InvalidRequest, StoreFailed
from adapters.home import Home
from adapters.prompts import Message
from adapters.records import MoveAction, PromptFormat
from adapters.registry import Registry
from serving.api.app import build_app, build_gateway
from serving.commands import ChatCommand, Wishes
from serving.config import load_settings
from serving.engine.request import Event, Failed
from serving.keeper import CanaryKeeper
from tests.fakes import EOS, ByteTokenizer, FakeEngine, Submission
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio
LIMITS = CanaryLimits(min_requests=20, min_shadow_tokens=40, min_agreement=0.6)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Pair:
    """An edge with sum@1 as champion and sum@2 beside it, whose engine answers for each as told."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.first, self.second = case.publish("sum", 1), case.publish("sum", 2, promote=False)
        self.keeper = CanaryKeeper(case.registry.canaries, case.gateway.tally, "one")
        self.says: dict[str | None, Callable[[], Sequence[int | Failed]]] = {}
        case.engine.script = self._script

    def _script(self, submission: Submission) -> Sequence[int | Failed]:
        says = self.says.get(submission.adapter)
        return [*b"fine words", EOS] if says is None else says()

    def begin(self, percent: float = 50, **options: Any) -> None:
        self.case.registry.canaries.set_canary("sum", 2, percent, who="ann", **{"limits": LIMITS, **options})

    async def ask(
        self, client: httpx.AsyncClient, count: int, model: str = "sum", first: int = 0
    ) -> list[httpx.Response]:
        """So many requests, each of a user of its own."""
        body = {"model": model, "prompt": "hello", "max_tokens": 12}
        return [
            await client.post("/v1/completions", json={**body, "user": f"u{user}"})
            for user in range(first, first + count)
        ]

    def actions(self) -> list[MoveAction]:
        return [move.action for move in self.case.registry.history("sum")]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(make_case(tmp_path))


@pytest.fixture
async def client(pair: Pair) -> AsyncIterator[httpx.AsyncClient]:
    async with pair.case.client() as client:
        yield client


def arms(answers: Sequence[httpx.Response]) -> list[str]:
    return [answer.headers["x-adapter-arm"] for answer in answers]


async def test_each_answer_names_its_arm_and_the_weights_of_that_arm(pair: Pair, client: httpx.AsyncClient) -> None:
    pair.begin()
    answers = await pair.ask(client, 60)
    assert set(arms(answers)) == {"champion", "canary"}
    for answer in answers:
        version = pair.second if answer.headers["x-adapter-arm"] == "canary" else pair.first
        assert answer.headers["x-adapter-digest"] == version.digest == answer.json()["adapter_digest"]
        assert answer.json()["adapter_arm"] == answer.headers["x-adapter-arm"]
        assert answer.json()["model"] == version.id
    chunk = (await client.post("/v1/completions", json={"model": "sum", "prompt": "x", "stream": True})).text
    assert '"adapter_arm":"c' in chunk


async def test_without_a_canary_and_for_a_named_version_there_is_no_arm(pair: Pair, client: httpx.AsyncClient) -> None:
    before = await pair.ask(client, 3)
    pair.begin()
    named = await pair.ask(client, 30, "sum@1")
    assert all("x-adapter-arm" not in answer.headers for answer in before + named)
    assert {answer.json()["model"] for answer in named} == {"sum@1"}
    assert "adapter_arm" not in named[0].json()


async def test_a_caller_keeps_its_arm_across_gateways_and_restarts(
    pair: Pair, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    pair.begin(30)
    before = arms(await pair.ask(client, 40))
    # Another process on the same home: nothing but the registry's files is shared.
    registry = Registry.open(Home.find(tmp_path))
    settings = load_settings()
    gateway, metrics = build_gateway(FakeEngine(), registry, registry.base(), ByteTokenizer(), settings)
    app = build_app(gateway, registry, settings, metrics)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as other:
        assert arms(await pair.ask(other, 40)) == before
    registry.close()
    assert set(before) == {"champion", "canary"}


async def test_with_keys_a_caller_is_its_key_unless_it_names_a_user(tmp_path: Path) -> None:
    keys = [f"lp_{at:02d}{'k' * 20}" for at in range(24)]
    pair = Pair(make_case(tmp_path, api_keys=",".join(keys)))
    pair.begin(sticky=Sticky.KEY)
    found: dict[str, set[str]] = {}
    async with pair.case.client() as client:
        for key in keys:
            for user in ("ann", "bob", "eve"):
                body = {"model": "sum", "prompt": "x", "max_tokens": 1, "user": user}
                answer = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
                found.setdefault(key, set()).add(answer.headers["x-adapter-arm"])
    assert all(len(seen) == 1 for seen in found.values())
    assert {arm for seen in found.values() for arm in seen} == {"champion", "canary"}


async def _fails(pair: Pair) -> None:
    pair.says[pair.second.digest] = lambda: [Failed(1, "adapter_numerics", "planted")]


async def _is_slow(pair: Pair) -> None:
    """Only the figures say so: no test waits for a slow canary."""
    real = pair.case.gateway.tally.ended

    def ended(record: Any) -> None:
        slow = record.taken is not None and record.taken.arm is Arm.CANARY
        real(replace(record, first_token_s=3.0 if slow else 0.05))

    pair.case.gateway.tally.ended = ended  # type: ignore[method-assign]


async def _disagrees(pair: Pair) -> None:
    pair.case.registry.canaries.set_shadow("sum", 2, 100, who="ann")
    pair.says[pair.second.digest] = lambda: [*b"gibberish!", EOS]


@pytest.mark.parametrize(("plant", "word"), [(_fails, "errors"), (_is_slow, "latency"), (_disagrees, "quality")])
async def test_a_canary_at_fault_is_rolled_back_with_the_reason_in_the_history(
    pair: Pair, client: httpx.AsyncClient, plant: Callable[[Pair], Any], word: str
) -> None:
    pair.begin()
    await plant(pair)
    await pair.ask(client, 130)
    await idle(pair)
    await pair.keeper.tick()
    told = pair.case.registry.history("sum")[0]
    assert (told.action, told.who) == (MoveAction.CANARY_ROLLBACK, "loraplane")
    assert f"no longer: {word}: " in told.why
    assert pair.keeper.rolled_back == 1
    after = await pair.ask(client, 30)
    assert {answer.json()["model"] for answer in after} == {"sum@1"}
    assert [answer.status_code for answer in after] == [200] * 30


async def test_below_the_minimum_counts_nothing_is_rolled_back(pair: Pair, client: httpx.AsyncClient) -> None:
    pair.begin(limits=CanaryLimits(min_requests=1000))
    await _fails(pair)
    statuses = [answer.status_code for answer in await pair.ask(client, 60)]
    await pair.keeper.tick()
    assert statuses.count(503) > 15
    assert pair.actions()[0] is MoveAction.CANARY


async def test_a_promotion_in_between_wins_over_the_roll_back(pair: Pair, client: httpx.AsyncClient) -> None:
    """The keeper has read the figures and decided; before it writes, somebody promotes the canary by hand."""
    pair.begin()
    await _fails(pair)
    await pair.ask(client, 130)
    decided = pair.case.registry.canaries.roll_back

    def late(*args: Any, **options: Any) -> Any:
        pair.case.registry.promote("sum", 2, who="bob", force=True, reason="I know better")
        return decided(*args, **options)

    pair.case.registry.canaries.roll_back = late  # type: ignore[method-assign]
    await pair.keeper.tick()
    assert pair.keeper.rolled_back == 0
    assert pair.actions()[0] is MoveAction.FORCED
    assert pair.case.registry.resolve("sum").number == 2


async def test_figures_of_two_gateways_are_judged_together(
    pair: Pair, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Neither gateway has enough of its own; the second to keep its figures sees them all."""
    pair.begin(limits=CanaryLimits(min_requests=40))
    await _fails(pair)
    case = pair.case
    gateway, _ = build_gateway(case.engine, case.registry, case.registry.base(), ByteTokenizer(), case.settings)
    app = build_app(gateway, case.registry, case.settings, case.metrics)
    await pair.ask(client, 60)
    await pair.keeper.tick()
    assert pair.actions()[0] is MoveAction.CANARY
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as other:
        await pair.ask(other, 60, first=60)
    await CanaryKeeper(case.registry.canaries, gateway.tally, "two").tick()
    assert pair.actions()[0] is MoveAction.CANARY_ROLLBACK


async def test_figures_that_cannot_be_kept_are_kept_later(pair: Pair, client: httpx.AsyncClient) -> None:
    pair.begin()
    await pair.ask(client, 10)
    real = pair.case.registry.canaries.add_figures

    def broken(*_: object) -> None:
        raise StoreFailed("planted")

    pair.case.registry.canaries.add_figures = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(StoreFailed):
        await pair.keeper.tick()
    pair.case.registry.canaries.add_figures = real  # type: ignore[method-assign]
    await pair.keeper.tick()
    report = pair.case.registry.canaries.report("sum")
    assert report.champion.requests + report.canary.requests == 10


# -- shadows -----------------------------------------------------------------------------------------------------


async def idle(pair: Pair) -> None:
    """Wait until every shadow has ended."""
    async with asyncio.timeout(20):
        while pair.case.gateway.shadowing.running:
            await asyncio.sleep(0)


def shadow(pair: Pair, percent: float = 100) -> None:
    pair.case.registry.canaries.set_shadow("sum", 2, percent, who="ann")


async def test_a_shadow_computes_the_same_prompt_beside_and_is_never_shown(
    pair: Pair, client: httpx.AsyncClient
) -> None:
    pair.says[pair.second.digest] = lambda: [*b"fine things", EOS]
    plain = (await pair.ask(client, 1))[0].json()
    shadow(pair)
    answer = (await pair.ask(client, 1))[0]
    await idle(pair)
    live, beside = pair.case.engine.submissions[-2:]
    assert (live.adapter, live.shadow, beside.adapter, beside.shadow) == (
        pair.first.digest,
        False,
        pair.second.digest,
        True,
    )
    assert live.prompt == beside.prompt
    assert live.sampling == beside.sampling
    told = answer.json()
    assert told["choices"] == plain["choices"]
    assert told["usage"] == plain["usage"]
    assert "x-adapter-arm" not in answer.headers
    await pair.keeper.tick()
    figures = pair.case.registry.canaries.report("sum").shadow
    # "fine " is common to both, then "w" against "t".
    assert (figures.shadows, figures.compared, figures.agreed, figures.gap) == (1, 6, 5, 0.0)


async def test_so_many_percent_of_the_requests_have_a_shadow(pair: Pair, client: httpx.AsyncClient) -> None:
    shadow(pair, 25)
    await pair.ask(client, 200)
    await idle(pair)
    assert 25 <= sum(s.shadow for s in pair.case.engine.submissions) <= 80


@pytest.mark.parametrize("fault", ["failed", "dropped", "raises", "hangs"])
async def test_whatever_befalls_a_shadow_the_live_answer_goes_on(
    pair: Pair, client: httpx.AsyncClient, fault: str
) -> None:
    shadow(pair)
    pair.case.gateway.shadowing._grace_s = 0.05
    plain = [*b"fine words", EOS]

    def script(submission: Submission) -> Sequence[int | Failed]:
        if not submission.shadow:
            return plain
        if fault == "raises":
            raise RuntimeError("planted")
        return [Failed(1, "shadow_dropped" if fault == "dropped" else "engine_fault", "planted")]

    async def hang(number: int, submission: Submission) -> AsyncIterator[Event]:
        if submission.shadow:
            await asyncio.Event().wait()
        async for event in plainly(number, submission):
            yield event

    pair.case.engine.script, plainly = script, pair.case.engine._events
    if fault == "hangs":
        pair.case.engine._events = hang  # type: ignore[method-assign]
    answers = await pair.ask(client, 3)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == ["fine words"] * 3
    await idle(pair)
    assert pair.case.engine.running == 0
    await pair.keeper.tick()
    figures = pair.case.registry.canaries.report("sum").shadow
    seen = (figures.shadows, figures.dropped, figures.failed)
    assert seen == {"failed": (0, 0, 3), "raises": (0, 0, 3), "dropped": (0, 3, 0), "hangs": (3, 0, 0)}[fault]


async def test_a_shadow_whose_format_the_template_refuses_costs_the_live_answer_nothing(tmp_path: Path) -> None:
    """As templates do that take no system turn: what a candidate's format asks for is no fault of the caller's."""

    class Strict(ByteTokenizer):
        def chat(self, messages: Sequence[Message], fmt: PromptFormat, *, continue_final: bool = False) -> list[int]:
            if fmt.system:
                raise InvalidRequest("The base's chat template refuses these messages: no system turn", "messages")
            return super().chat(messages, fmt, continue_final=continue_final)

    case = make_case(tmp_path)
    case.publish("sum", 1)
    case.publish("sum", 2, promote=False, fmt=PromptFormat(system="Be brief."))
    case.registry.canaries.set_shadow("sum", 2, 100, who="ann")
    case.gateway.renderer = Strict()
    body = {"model": "sum", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    async with case.client() as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json().get("model")) == (200, "sum@1")
    assert not any(submission.shadow for submission in case.engine.submissions)
    await CanaryKeeper(case.registry.canaries, case.gateway.tally, "one").tick()
    assert case.registry.canaries.report("sum").shadow.failed == 1


async def test_a_live_answer_that_leaves_takes_its_shadow_along(pair: Pair) -> None:
    shadow(pair)
    pair.case.gateway.shadowing._grace_s = 0.0
    pair.says = dict.fromkeys([pair.first.digest, pair.second.digest], lambda: [ord("a")] * 200)
    answer = await pair.case.gateway.chat(ChatCommand(Wishes("sum", max_tokens=200), (Message("user", "x"),)))
    answer.close()
    await idle(pair)
    assert pair.case.engine.running == 0
    assert pair.case.gateway.admission.inflight == 0


async def test_more_shadows_than_allowed_are_dropped_not_queued(pair: Pair, client: httpx.AsyncClient) -> None:
    shadow(pair)
    pair.case.gateway.shadowing._most = 1
    pair.case.engine.gate.clear()
    asked = asyncio.ensure_future(asyncio.gather(*(_one(client, at) for at in range(4))))
    async with asyncio.timeout(20):
        while pair.case.engine.running < 5:
            await asyncio.sleep(0)
    assert sum(s.shadow for s in pair.case.engine.submissions) == 1
    pair.case.engine.gate.set()
    assert all(answer.status_code == 200 for answer in await asked)
    await idle(pair)


async def _one(client: httpx.AsyncClient, user: int) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "sum", "prompt": "x", "user": f"u{user}"})


async def test_scored_prompts_and_choices_beyond_the_first_have_no_shadow(
    pair: Pair, client: httpx.AsyncClient
) -> None:
    shadow(pair)
    body = {"model": "sum", "prompt": ["one", "two"], "n": 2, "max_tokens": 2, "temperature": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert sum(s.shadow for s in pair.case.engine.submissions) == 1
    scored = {"model": "sum", "prompt": "one", "echo": True, "logprobs": 1, "max_tokens": 2}
    assert (await client.post("/v1/completions", json=scored)).status_code == 200
    await idle(pair)
    assert sum(s.shadow for s in pair.case.engine.submissions) == 1


async def test_what_is_tried_is_kept_warm_and_what_cannot_be_is_no_matter(pair: Pair) -> None:
    pair.begin()
    asked: list[tuple[str, int]] = []

    async def warm(name: str, number: int, ttl_s: float) -> None:
        asked.append((name, number))
        raise AdapterLoadFailed("planted")

    keeper = CanaryKeeper(pair.case.registry.canaries, pair.case.gateway.tally, warm=warm)
    await keeper.keep_warm()
    shadow(pair)
    await keeper.keep_warm()
    assert asked == [("sum", 2)] * 2
