"""Decides, step by step, which sequences run and on which rows and slots. Knows no tensors, no clock of its own.

Who starts, and in which order, is `admission`'s to say; here they get rows, steps and their endings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain

from serving.engine.admission import Admission
from serving.engine.beams import BeamSearch, moves, search_for
from serving.engine.breaker import Breaker
from serving.engine.fair import INPUT, OUTPUT
from serving.engine.kv import MIN_SHARED, Copy, RowTable, shared_prefix
from serving.engine.limits import Limits
from serving.engine.plan import NO_SLOT, Key, Loader, Outgoing, RowPlan, Sampled, StepPlan, StepResult
from serving.engine.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptLogprobs,
    State,
    Submit,
    Tokens,
)
from serving.engine.row_plans import decode_rows, prefill_row, prompts_in_turn
from serving.engine.sequence import Sequence
from serving.engine.shadows import Shadows, dropped
from serving.engine.slots import Placement, SlotTable


class Scheduler:
    """Admission, plans and endings of all sequences of one engine."""

    def __init__(self, limits: Limits, rows: RowTable, slots: SlotTable, loader: Loader, eos: frozenset[int]) -> None:
        self._limits, self._rows, self._slots, self._loader, self._eos = limits, rows, slots, loader, eos
        self.breaker = Breaker()
        self._admission = Admission(
            rows, slots, loader, self.breaker, queue_limit=limits.queue_limit, patience_s=limits.patience_s
        )
        self._waiting = self._admission.queue
        self._shadows = Shadows(rows, slots, self.breaker, self._waiting)
        self._running: dict[Key, Sequence] = {}
        self._tainted: list[int] = []
        self._copies: list[Copy] = []
        self.prompt_tokens = self.reused_tokens = 0

    @property
    def waiting(self) -> int:
        """Sequences not yet admitted, those with a loading adapter included."""
        return len(self._waiting)

    def waiting_by(self) -> dict[str, int]:
        """How many wait for each adapter; see Heartbeat."""
        return self._waiting.waiting_by()

    def oldest_wait_s(self, now: float) -> float:
        """How long the one has waited that waits longest."""
        oldest = self._waiting.oldest()
        return 0.0 if oldest is None else now - oldest.arrived_at

    @property
    def running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values lie in the cache."""
        return sum(s.computed for s in self._running.values())

    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running and not self._shadows

    def balanced(self) -> bool:
        """The books agree: rows held = sequences running, leases = running sequences with an adapter."""
        leased = sum(1 for s in self._running.values() if s.adapter is not None)
        return (
            self._rows.balanced()
            and self._admission.balanced()
            and self._admission.lent == sum(s.submit.shadow for s in self._running.values())
            and self._rows.held == sum(len(s.rows) for s in self._running.values())
            and self._slots.leases == leased
        )

    def submit(self, key: Key, submit: Submit, now: float) -> list[Event]:
        """Take a sequence in, or refuse it at once: the one ending then is in the answer."""
        if refusal := self._limits.refusal(submit, self._rows.rows):
            return [refusal]
        if submit.shadow:
            self._shadows.take(Sequence(key, submit, now))
            return []
        if refusal := self._admission.take(Sequence(key, submit, now), now):
            return [refusal]
        return []

    def cancel(self, key: Key) -> None:
        """Forget a sequence; nobody listens for its events any more."""
        self._admission.forget(key)
        self._shadows.remove(key)
        sequence = self._running.get(key)
        if sequence is not None:
            self._release(sequence)

    def expire(self, now: float) -> list[Outgoing]:
        """End the sequences whose deadline has passed."""
        events: list[Outgoing] = []
        for sequence in [*self._waiting.values(), *self._running.values()]:
            if now - sequence.arrived_at >= sequence.submit.deadline_s:
                why = "The deadline passed before the answer was complete."
                events.append((sequence.key, self._fail(sequence, "deadline_exceeded", why)))
        return events

    def admit(self, now: float) -> tuple[list[tuple[str, Placement]], list[Outgoing]]:
        """Give rows and slots to those who can have them.

        Returns the adapters to install before the next run, and endings of sequences that cannot be served.
        """
        endings = self._admission.look_ahead(now)
        for shadow in self._shadows.in_the_way(list(self._running.values())):
            self._release(shadow)
            endings.append((shadow.key, dropped(shadow)))
        installs: list[tuple[str, Placement]] = []
        live = self._admission.starts(self._running.values(), now)
        for sequence, placement in chain(live, self._shadows.starts(now)):
            if sequence.adapter is not None and placement is not None and placement.install:
                installs.append((sequence.adapter, placement))
            self._start(sequence, now)
        return installs, endings + self._shadows.refused()

    def _start(self, sequence: Sequence, now: float) -> None:
        lease = self._rows.acquire(sequence.scope if self._reuses(sequence) else None, sequence.submit.prompt)
        sequence.rows = [lease.row, *(self._rows.acquire().row for _ in range(sequence.width - 1))]
        sequence.computed = sequence.reused = lease.reused
        if lease.source is not None and lease.source != lease.row:
            self._copies.append(Copy(lease.source, lease.row, lease.reused))
        sequence.admitted_at = now
        sequence.state = State.PREFILL
        if sequence.width > 1:
            sequence.search = search_for(sequence.submit.sampling, self._eos, self._limits.forced_tokens)
        self._charge(sequence, INPUT * (len(sequence.submit.prompt) - sequence.computed))
        self._running[sequence.key] = sequence
        self._admission.lent += sequence.submit.shadow
        if sequence.adapter is not None:
            self.breaker.started(sequence.adapter, sequence.key, now)

    def _charge(self, sequence: Sequence, tokens: int) -> None:
        """Count what a sequence's tenant was given. A shadow is nobody's wish but the operator's."""
        if not sequence.submit.shadow:
            sequence.cost += tokens
            self._waiting.charge(sequence.scope, tokens)

    def _reuses(self, sequence: Sequence) -> bool:
        limits = self._limits
        submit = sequence.submit
        # Log-probabilities of a prompt need every position of it computed.
        whole = bool(limits.max_answer_len) or submit.sampling.prompt_logprobs is not None
        # What a shadow leaves behind would only push out what others come back to.
        return limits.prefix_reuse and submit.reuse and not whole and not submit.shadow

    def _share(self, sequence: Sequence) -> None:
        """Before a prompt's first chunk: start behind what a running sequence of its scope has computed, if more."""
        prompt = sequence.submit.prompt
        if self._reuses(sequence) and sequence.computed == sequence.reused:
            for other in self._running.values():
                if other is not sequence and other.computed > sequence.reused and other.scope == sequence.scope:
                    shared = min(shared_prefix(other.context, prompt), len(prompt) - 1)
                    if shared >= sequence.reused + MIN_SHARED:
                        self._copies.append(Copy(other.row, sequence.row, shared))
                        self._charge(sequence, INPUT * (sequence.reused - shared))
                        sequence.computed = sequence.reused = shared
        if sequence.computed == sequence.reused:
            self.prompt_tokens += len(prompt)
            self.reused_tokens += sequence.reused

    @property
    def prompt_room(self) -> int:
        """How many prompt tokens fit the next step."""
        decoding = sum(1 for s in self._running.values() if s.state is State.DECODE and not s.submit.shadow)
        return self._limits.prefill_budget(decoding)

    def plan(
        self, golden: tuple[RowPlan, ...] = (), unproven: Collection[str] = (), scrub: tuple[int, ...] = ()
    ) -> StepPlan:
        """The next step: a token for every decoding row, and prompt chunks within the budget.

        golden: rows that ride along (see Proofs), within the budget too. unproven: adapters whose sequences wait.
        scrub: rows of nobody that a fault spoilt.
        """
        rows = [
            row
            for s in self._running.values()
            if s.state is State.DECODE
            for row in decode_rows(s, self._slot(s), self._eos)
        ]
        budget = self.prompt_room - sum(row.length for row in golden)
        rows += golden
        for sequence in prompts_in_turn(self._running.values(), unproven):
            if budget <= 0:
                break
            self._share(sequence)
            # An encoder reads both ways: its prompt is computed whole.
            most = len(sequence.submit.prompt) if self._limits.max_answer_len else budget
            row = prefill_row(sequence, self._slot(sequence), self._eos, most)
            budget -= row.length
            rows.append(row)
        scrub, self._tainted = (*scrub, *self._tainted), []
        copies, self._copies = tuple(self._copies), []
        # Decode rows first and by cache row: the runner reads the cache as one prefix.
        return StepPlan(tuple(sorted(rows, key=lambda r: (bool(r.tokens), r.row))), scrub, copies)

    def _slot(self, sequence: Sequence) -> int:
        # Asked of the table in the very step that uses it: a remembered slot is another adapter's tomorrow.
        return NO_SLOT if sequence.adapter is None else self._slots.slot_of(sequence.adapter)

    def settle(self, plan: StepPlan, result: StepResult, now: float) -> list[Outgoing]:
        """Book a step's outcome: the events of each sequence in order, its ending last."""
        events: list[Outgoing] = []
        settled: set[Key] = set()  # a beam search has several rows in a step
        for row in plan.rows:
            sequence = self._running.get(row.key)
            if sequence is None or row.key in settled:  # cancelled while the step ran, or done
                continue
            settled.add(row.key)
            outcomes = [result.sampled.get(at) for at in sequence.used_rows]
            fault = next((found for found in outcomes if found is not None and found.fault is not None), None)
            if fault is not None:
                self._tainted += sequence.rows
                events.append((row.key, self._fault(sequence, fault, now)))
                continue
            sequence.computed += row.length
            self._charge(sequence, OUTPUT * sum(found is not None for found in outcomes))
            if sequence.search is not None:
                events += [(row.key, event) for event in self._advance(sequence, sequence.search, result, now)]
                continue
            sampled = outcomes[0]
            if row.row in result.scores:
                events.append((row.key, PromptLogprobs(sequence.submit.id, result.scores[row.row])))
            if sampled is not None:
                events += [(row.key, event) for event in self._accept(sequence, sampled, now)]
            elif not sequence.submit.sampling.max_tokens and sequence.computed == len(sequence.submit.prompt):
                sequence.first_token_at = now
                events.append((row.key, self._finish(sequence, FinishReason.LENGTH, now)))
        return events

    def _accept(self, sequence: Sequence, sampled: Sampled, now: float) -> Iterator[Event]:
        sampling = sequence.submit.sampling
        number = sequence.submit.id
        if sequence.state is State.PREFILL:
            sequence.state = State.DECODE
            sequence.first_token_at = now
        asked = sampled.token in sampling.stop_token_ids
        if not asked and sampled.token in self._eos and not sampling.ignore_eos:
            if sampling.prompt_logprobs is not None and sampled.logprob is not None:
                # Who scores a prompt counts on an entry for every token: the end of text is told of too.
                yield Tokens(number, (sampled.token,), (sampled.logprob,), sequence.timing(now))
            yield self._finish(sequence, FinishReason.STOP, now)
            return
        first = not sequence.output
        sequence.output.append(sampled.token)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        yield Tokens(number, (sampled.token,), logprobs, sequence.timing(now) if first else None)
        if asked or len(sequence.output) >= sampling.max_tokens:
            yield self._finish(sequence, FinishReason.STOP if asked else FinishReason.LENGTH, now)

    def _advance(self, sequence: Sequence, search: BeamSearch, result: StepResult, now: float) -> Iterator[Event]:
        """Beam search says nothing before it knows the whole answer."""
        number, sampling = sequence.submit.id, sequence.submit.sampling
        if sequence.state is State.PREFILL:
            sequence.state = State.DECODE
            sequence.first_token_at = now
        used = sequence.used_rows
        parents = search.advance([result.sampled[row].candidates for row in used])
        if not search.done:
            rows, copies = moves(parents, used, sequence.rows[len(used) :])
            self._copies += [Copy(source, target, sequence.computed) for source, target in copies]
            sequence.rows = [*rows, *(row for row in sequence.rows if row not in rows)]
            return
        if search.answer is None:
            yield self._fail(sequence, "engine_fault", "No token may follow.")
            return
        tokens = search.answer.tokens
        ended = tokens[-1] in search.rules.ends
        shown = tokens[:-1] if ended and tokens[-1] not in sampling.stop_token_ids else tokens
        if shown:
            yield Tokens(number, shown, (), sequence.timing(now))
        yield self._finish(sequence, FinishReason.STOP if ended else FinishReason.LENGTH, now)

    def proven(self, digest: str, now: float) -> None:
        """An adapter that was installed is in its slot, and nobody waits for that any more."""
        for sequence in self._running.values():
            if sequence.adapter == digest and not sequence.proven_at:
                sequence.proven_at = now

    def abandon(
        self, digest: str, message: str, code: str = "adapter_load_failed", retry_after_s: float | None = None
    ) -> list[Outgoing]:
        """An adapter could not be brought into its slot: end the sequences that lease it and empty the slot."""
        hit = [s for s in self._running.values() if s.adapter == digest]
        events: list[Outgoing] = [(s.key, self._fail(s, code, message, retry_after_s)) for s in hit]
        if self._slots.holds(digest):
            self._slots.forget(digest)
        return events

    def uses(self, digest: str) -> int:
        """How many sequences of this adapter wait or run."""
        return sum(s.adapter == digest for s in [*self._waiting.values(), *self._running.values()])

    def dismiss(self, digest: str, code: str, message: str) -> list[Outgoing]:
        """End all sequences of this adapter, those that wait and those that run."""
        hit = [s for s in [*self._waiting.values(), *self._running.values()] if s.adapter == digest]
        return [(s.key, self._fail(s, code, message)) for s in hit]

    def fail_all(self, code: str, message: str) -> list[Outgoing]:
        """End everything: the engine stops."""
        left = [*self._waiting.values(), *self._shadows.values(), *self._running.values()]
        return [*self._admission.endings(), *((s.key, self._fail(s, code, message)) for s in left)]

    def _fault(self, sequence: Sequence, found: Sampled, now: float) -> Failed:
        """End a sequence that could not be computed; its adapter is struck when it is to blame."""
        if found.numerics and sequence.adapter is not None:
            self.breaker.strike(sequence.adapter, now)
            return self._fail(sequence, "adapter_numerics", "The adapter's output is not finite.")
        return self._fail(sequence, "engine_fault", found.fault or "")

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> Finished:
        self._release(sequence)
        if sequence.adapter is not None:
            self.breaker.good(sequence.adapter, now)
        if not sequence.submit.shadow:
            self._admission.forecast.ended((now - sequence.admitted_at) * sequence.width, sequence.cost)
        return Finished(sequence.submit.id, reason, sequence.timing(now))

    def _fail(self, sequence: Sequence, code: str, message: str, retry_after_s: float | None = None) -> Failed:
        self._waiting.remove(sequence.key)
        self._shadows.remove(sequence.key)
        if sequence.key in self._running:
            self._release(sequence)
        sequence.state = State.FINISHED
        return Failed(sequence.submit.id, code, message, retry_after_s)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._admission.lent -= sequence.submit.shadow
        if sequence.adapter is not None:
            self.breaker.ended(sequence.adapter, sequence.key)
        if sequence.state is State.PREFILL and sequence.computed > sequence.reused:
            self._tainted += sequence.rows  # nobody has seen yet whether these numbers are finite
        if sequence.row in self._tainted or not self._reuses(sequence):
            for row in sequence.rows:
                self._rows.release(row)
        else:
            self._rows.release(sequence.row, sequence.scope, sequence.context)
        if sequence.adapter is not None:
            self._slots.release(sequence.adapter)
        sequence.state = State.FINISHED
