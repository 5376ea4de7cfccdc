"""Which base families a runner of ours computes. Known without torch, so that a wrong base is refused at once."""

from __future__ import annotations

from adapters.errors import BaseUnsupported

DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2"})
ENCODER_DECODERS = frozenset({"t5", "bart"})
FAMILIES = DECODERS | ENCODER_DECODERS


def check_family(family: str) -> None:
    """Raises BaseUnsupported when no runner of ours computes this family."""
    if family not in FAMILIES:
        served = ", ".join(sorted(FAMILIES))
        raise BaseUnsupported(f"no runner computes bases of the {family!r} family; served are: {served}")
