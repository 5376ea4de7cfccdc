"""What operators and misfortune do while requests run: one thing at a random time each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from adapters.errors import LoraplaneError
from adapters.records import InFlight
from tests.simulation.registry import SimName

if TYPE_CHECKING:
    from tests.simulation.world import World

Operation = Callable[[str, SimName], Coroutine[Any, Any, object]]


class Operators:
    """Everybody who is not a client of this world."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self._gentle: list[Operation] = [self.publish, self.promote, self.promote, self.roll_back]
        self._rough: list[Operation] = [
            *(self.trouble_store, self.trouble_store, self.kill, self.cut, self.warm, self.pin, self.drop),
            *(self.retire, self.revoke, self.revoke_by_mistake),
        ]

    async def act(self, after_s: float) -> None:
        """One deed, unless the world is being healed by then. What is refused is refused by name."""
        world, rng = self._world, self._rng
        await asyncio.sleep(after_s)
        if not world.stormy:
            return
        deed = rng.choice(self._gentle if world.plan.patient else self._gentle + self._rough)
        name = rng.choice(sorted(world.registry.names))
        world.say(f"{deed.__name__} {name}")
        try:
            world.say(f"{deed.__name__} {name}: {await deed(name, world.registry.names[name])}")
        except LoraplaneError as error:
            world.say(f"{deed.__name__} {name}: {error.reason_code}")

    def _number(self, held: SimName) -> int:
        return self._rng.randint(1, len(held.versions))

    def _drops(self, digest: str) -> None:
        """It is taken out of service, until who knows when."""
        self._world.happened.dropped.add(digest)
        self._world.happened.restored.pop(digest, None)

    async def publish(self, name: str, held: SimName) -> object:
        return self._world.publish(name)

    async def promote(self, name: str, held: SimName) -> object:
        warm = self._rng.random() < 0.7
        return await self._world.flips.promote(name, self._number(held), who="sim", reason="sim", force=True, warm=warm)

    async def roll_back(self, name: str, held: SimName) -> object:
        return await self._world.flips.rollback(name, who="sim")

    async def warm(self, name: str, held: SimName) -> object:
        return await self._world.flips.warm(name, self._number(held), self._rng.choice((0.05, 3.0)))

    async def pin(self, name: str, held: SimName) -> object:
        number, flips = self._number(held), self._world.flips
        try:
            told = await flips.pin(name, number, True, who="sim")
            await asyncio.sleep(self._rng.choice((0.05, 1.0)))
        finally:
            await flips.pin(name, number, False, who="sim")
        return told

    async def retire(self, name: str, held: SimName) -> object:
        number = self._number(held)
        self._drops(held.versions[number - 1].digest)
        deadline_s = self._rng.choice((0.0, 0.1, 1.0))
        return await self._world.flips.retire(name, number, who="sim", reason="sim", deadline_s=deadline_s)

    async def revoke(self, name: str, held: SimName) -> object:
        number = self._number(held)
        self._drops(held.versions[number - 1].digest)
        in_flight = self._rng.choice(list(InFlight))
        return await self._world.flips.revoke(name, number, who="sim", reason="sim", in_flight=in_flight)

    async def revoke_by_mistake(self, name: str, held: SimName) -> object:
        """And restore it a moment later, while what ran goes on: from then on it is to be served."""
        number, flips, happened = self._number(held), self._world.flips, self._world.happened
        digest = held.versions[number - 1].digest
        alone = digest not in happened.dropped
        happened.dropped.add(digest)
        told = await flips.revoke(name, number, who="sim", reason="sim", in_flight=InFlight.FINISH)
        await asyncio.sleep(self._rng.choice((0.02, 0.05, 0.5)))
        await flips.restore(name, number, who="sim", reason="a mistake")
        if alone:
            happened.restored[digest] = self._world.loop.time()
        return told

    async def drop(self, name: str, held: SimName) -> object:
        version = self._rng.choice(held.versions)
        self._drops(version.digest)
        return await self._world.door.drop(version.digest, self._rng.choice((0.0, 0.1, 1.0)))

    async def trouble_store(self, name: str, held: SimName) -> object:
        rng, world = self._rng, self._world
        content = world.store.contents[rng.choice(held.versions).digest]
        world.happened.troubled.add(content.digest)
        match rng.randrange(4):
            case 0:
                content.fails = 2
            case 1:
                content.rotten = not content.rotten
            case 2:
                content.slow_s = rng.choice((0.2, 1.0))
            case _:
                content.stuck = True
        return content

    async def kill(self, name: str, held: SimName) -> object:
        world = self._world
        at = self._rng.randrange(len(world.replicas))
        world.happened.lost = True
        world.replicas[at].kill()
        await asyncio.sleep(self._rng.choice((0.01, 0.3)))
        return world.replace(at)

    async def cut(self, name: str, held: SimName) -> object:
        world = self._world
        if not world.loop.pipes:
            return "no connection"
        world.happened.lost = True
        pipe = self._rng.choice(world.loop.pipes)
        pipe.abort()
        return f"the connection to {pipe.path} breaks"
