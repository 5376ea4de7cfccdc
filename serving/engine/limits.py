"""The figures that bound an engine's scheduler, and the sequences that they rule out."""

from __future__ import annotations

from dataclasses import dataclass

from serving.engine.request import Failed, Submit, answer_room


@dataclass(frozen=True, slots=True)
class Limits:
    """The figures that bound a scheduler. prefill_chunk: tokens of a step in which prompts join
    decode rows, these included, though never less than a quarter of it for prompts: so a long prompt costs the streams
    beside it the same, however many they are.

    max_answer_len: of an encoder-decoder (see EngineFacts), whose prompts are computed whole; else 0.
    forced_tokens: tokens that each of its answers begins with unseen. prefix_reuse: whether a prompt may start behind
    what another of its scope has computed already.
    """

    max_model_len: int
    queue_limit: int
    prefill_chunk: int
    prefill_chunk_alone: int
    patience_s: float = 2.0
    max_answer_len: int = 0
    prefix_reuse: bool = True
    forced_tokens: int = 0

    def prefill_budget(self, decoding: int) -> int:
        """How many prompt tokens may join a step with so many decode rows."""
        if not decoding:
            return self.prefill_chunk_alone
        return max(self.prefill_chunk - decoding, -(-self.prefill_chunk // 4))

    def refusal(self, submit: Submit, rows: int) -> Failed | None:
        """Why no engine of these figures, with so many rows, could ever compute this sequence."""
        sampling, beams = submit.sampling, submit.sampling.num_beams
        if not submit.prompt:
            return Failed(submit.id, "invalid_value", "The prompt is empty.")
        if self.max_answer_len and (not sampling.max_tokens or sampling.prompt_logprobs is not None):
            return Failed(submit.id, "invalid_value", "An encoder-decoder gives its prompt no log-probabilities.")
        if not 0 <= sampling.max_tokens <= answer_room(len(submit.prompt), self.max_model_len, self.max_answer_len):
            both = f"{len(submit.prompt)} prompt tokens and {sampling.max_tokens} new ones"
            return Failed(submit.id, "context_length_exceeded", f"{both} do not fit {self.max_model_len}.")
        if beams > 1 and not (self.max_answer_len and beams <= rows):
            return Failed(submit.id, "invalid_value", f"No beam search of width {beams} here.")
        return None
