"""Which base families a runner of ours computes: the list of adapters/families.py, as the engine names it."""

from __future__ import annotations

from adapters.families import ENCODER_DECODERS, FAMILIES, check_family

__all__ = ["ENCODER_DECODERS", "FAMILIES", "check_family"]
