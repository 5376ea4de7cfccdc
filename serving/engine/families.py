"""The base families that a runner of ours computes, as the engine's rooms ask for them. The list is in `adapters`."""

from __future__ import annotations

from adapters.families import FAMILIES, check_family

__all__ = ["FAMILIES", "check_family"]
