"""Who may speak: API keys, compared as digests in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from adapters.errors import InvalidKey
from serving.config import KEY_PREFIX

_MAX_HEADER_CHARS = 512

USER_HEADER = "x-loraplane-user"
_CLAIM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who made a request, in a form that may be written down: `local`, or `key-` and 8 hex digits of its digest.

    A client may add a name for itself (header X-Loraplane-User), as in `alice@local`: said, not proven.
    """

    name: str

    @property
    def tenant(self) -> str:
        """What was proven: whose caches this caller may share."""
        return self.name.rpartition("@")[2]

    def named(self, claimed: str | None) -> Caller:
        """The same caller under the name it gives itself, before what proved it; no name, no change."""
        if claimed is None or _CLAIM.fullmatch(claimed) is None:
            return self
        return Caller(f"{claimed}@{self.name}")


LOCAL = Caller("local")


class KeyRing:
    """The keys that open this server. Without any it is open to all who can reach it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    @property
    def is_open(self) -> bool:
        return not self._digests

    def caller(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises InvalidKey when keys are configured and none fits."""
        if self.is_open:
            return LOCAL
        scheme, _, key = (authorization or "")[:_MAX_HEADER_CHARS].partition(" ")
        presented = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, whole: the time taken tells nothing about which one was near.
        found = [hmac.compare_digest(presented, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise InvalidKey()
        return Caller(f"key-{presented.hex()[:8]}")


def new_key() -> str:
    """A fresh API key with 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)
