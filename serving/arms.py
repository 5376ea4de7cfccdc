"""Which arm of a canary a request takes, and whether a shadow computes beside it. Nothing is remembered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adapters.canaries import Arm, Route, Shadow, Split, Sticky, alias_id, takes
from adapters.records import AdapterVersion, PromptFormat


@dataclass(frozen=True, slots=True)
class Lot:
    """What a request is drawn by. key: empty where callers need none. request: its id, for those who have neither."""

    user: str = ""
    key: str = ""
    request: str = ""

    def sticky(self, how: Sticky) -> str:
        """What stays the same for one caller; nothing does for a caller without key and user."""
        if how is Sticky.USER and self.user:
            return f"user:{self.user}"
        return f"key:{self.key}" if self.key else f"request:{self.request}"


@dataclass(frozen=True, slots=True)
class Taken:
    """The arm that a request took, and of which canary."""

    trial: str
    arm: Arm


@dataclass(frozen=True, slots=True)
class Beside:
    """A version that computes unseen beside a live answer, and for which trial."""

    trial: str
    digest: str
    prompt_format: PromptFormat


def draw(route: Route, lot: Lot) -> tuple[AdapterVersion, Taken | None, Beside | None]:
    """The version that answers a request, the arm that this is, and who computes beside it.

    The same caller finds the same arm in every gateway and after every restart: nothing is remembered.
    """
    split = route.split
    if split is None:
        return route.version, None, None
    if split.canary is not None:
        taken = Taken(split.canary.id, Arm.CHAMPION)
        if route.canary is not None:
            canary = split.canary
            if takes(alias_id(split), lot.sticky(canary.sticky), canary.id, canary.percent):
                return route.canary, replace(taken, arm=Arm.CANARY), None
        return route.version, taken, _beside(split, split.shadow, route.shadow, lot)
    return route.version, None, _beside(split, split.shadow, route.shadow, lot)


def _beside(split: Split, shadow: Shadow | None, version: AdapterVersion | None, lot: Lot) -> Beside | None:
    """Shadows are drawn request by request: nobody sees them, and their figures should be of all callers."""
    if shadow is None or version is None:
        return None
    if not takes(alias_id(split), f"request:{lot.request}", shadow.id, shadow.percent):
        return None
    return Beside(shadow.id, version.digest, version.prompt_format)
