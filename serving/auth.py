"""Who may speak: API keys, compared as digests in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from adapters.errors import InvalidKey
from serving.config import KEY_PREFIX

_MAX_HEADER_CHARS = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """Who made a request, in a form that may be written down: `local`, or `key-` and 8 hex digits of its digest."""

    name: str


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
