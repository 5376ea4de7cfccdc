"""What passes between a gateway and an engine: typed, self-contained, no objects of either side.

A gateway sends Submit and Cancel; an engine answers with Tokens and exactly one ending (Finished or Failed) for
each submitted sequence, and with a Heartbeat about once a second. One frame of a step carries the events of all
sequences of one gateway (`Events`). Warm, Pin, Unpin, Drop and Undrop say which adapters are kept and which must go:
each is answered once, by Moved or by Failed.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

BASE_LANE, OTHER_LANES = "base", "other"
LOAD_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class State(StrEnum):
    """A sequence's life. Only the scheduler moves it."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a sequence ended well. The gateway adds `stop` for stop strings, which it alone sees."""

    STOP = "stop"
    LENGTH = "length"


class Sampling(msgspec.Struct, frozen=True):
    """How to choose each next token.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. seed: any 64-bit integer; equal seeds give equal tokens,
    whatever shares the batch. logprobs None: none wanted; 0..20: the chosen token's, and that many alternatives;
    prompt_logprobs likewise for each token of the prompt but the first. max_tokens 0 computes the prompt alone.
    no_repeat_ngram_size 0 is off; else no run of so many tokens comes twice in prompt and answer (of an
    encoder-decoder, in the answer). num_beams above 1: beam search in place of drawing, of encoder-decoders only.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on the tokens before it other than through the model."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.no_repeat_ngram_size)


class Submit(msgspec.Struct, frozen=True, tag=True):
    """One sequence to generate. `id` is unique per gateway; `adapter` is a version's digest, None the base.

    choice: which of the n answers of a request this is; it is part of the random key.
    deadline_s: seconds from receipt after which the engine fails the sequence with `deadline_exceeded`.
    salt: the tenant; computed prefixes never pass from one to another. reuse False: compute the whole prompt.
    shadow: nobody waits for it: it runs only where its adapter lies in a slot already, on a row that no other sequence
    wants, else Failed(code='shadow_dropped'), which may also come while it runs.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    choice: int = 0
    deadline_s: float = 600.0
    salt: str = ""
    reuse: bool = True
    shadow: bool = False


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop generating sequence `id`; its row and lease are freed within two steps. No event answers it."""

    id: int


class Warm(msgspec.Struct, frozen=True, tag=True):
    """Bring an adapter to the host, and to a slot if one is empty; it stays on the host for ttl_s seconds at least.

    prove: of an adapter that has not proven itself here yet, also to a slot that nobody uses, so that it does.
    `id` is of the same numbers as Submit's, here and in the four below. Answered once it is there, or cannot be.
    """

    id: int
    digest: str
    ttl_s: float
    prove: bool = False


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Bring an adapter into a slot and leave it there until Unpin. Answered once it lies there.

    deadline_s: how long it may wait for a slot; then it is refused with `adapter_capacity`.
    """

    id: int
    digest: str
    deadline_s: float = 30.0


class Unpin(msgspec.Struct, frozen=True, tag=True):
    """Let the adapter's slot be given away again. Nothing happens to one that is not pinned."""

    id: int
    digest: str


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Forget an adapter on every tier of this engine: new sequences of it are refused with `adapter_unloaded`, those
    there are go on, after deadline_s seconds they are ended with that code, and then its bytes are freed."""

    id: int
    digest: str
    deadline_s: float


class Undrop(msgspec.Struct, frozen=True, tag=True):
    """Call a Drop off: the adapter's sequences are taken again at once, and no running one is ended for it. Who asked
    for the Drop is told where the adapter lies. What has gone already is loaded anew when it is asked for."""

    id: int
    digest: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First frame on a connection: proves that the gateway may speak here."""

    token: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token and of the most likely ones, (id, logprob), most likely first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


class LoadTimes(msgspec.Struct, frozen=True):
    """What bringing an adapter to its slot took, in seconds. source: the tier that it lay in: device, host, disk or
    store; `device` took nothing.

    queue_s: behind other loads; fetch_s: reading and verifying; host_s: making what slots hold of it; device_s: into
    the slot. bytes: of its tensors on the host.
    """

    source: str = "device"
    queue_s: float = 0.0
    fetch_s: float = 0.0
    host_s: float = 0.0
    device_s: float = 0.0
    bytes: int = 0


class Timing(msgspec.Struct, frozen=True):
    """Where a sequence's time went, in seconds. `source`: which tier the adapter came from.

    reused: prompt tokens whose keys and values were there already. load: of its adapter, if this sequence waited
    for that. device_s: until the adapter lay in its slot and had proven to; prefill_s begins after it.
    """

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    source: str = "device"
    reused: int = 0
    load: LoadTimes | None = None
    device_s: float = 0.0


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """New tokens of one sequence, in order. The first event of a sequence carries `timing`."""

    id: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    timing: Timing | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """Log-probabilities of the next tokens of a prompt, in order; the first is of the prompt's second token.

    They come in parts, all of them before the sequence's first token.
    """

    id: int
    logprobs: tuple[TokenLogprob, ...]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The good ending. Tokens that came with it were sent before, in a Tokens event of the same frame."""

    id: int
    reason: FinishReason
    timing: Timing


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The bad ending: `code` is a code of `adapters.errors`. Before the first token it becomes an HTTP status."""

    id: int
    code: str
    message: str
    retry_after_s: float | None = None


class Moved(msgspec.Struct, frozen=True, tag=True):
    """Answers Warm, Pin, Unpin, Drop and Undrop. tier: where the adapter lies now: device, host, or `gone`.

    bytes: of its tensors; after Drop, what was freed on all tiers. load: of a load that was waited for.
    """

    id: int
    digest: str
    tier: str
    bytes: int = 0
    load: LoadTimes | None = None


Event = Tokens | PromptLogprobs | Finished | Failed
Told = Event | Moved


class SlotState(msgspec.Struct, frozen=True):
    """What lies in one device slot."""

    digest: str
    leases: int
    rank: int


class SetAsideState(msgspec.Struct, frozen=True):
    """An adapter that the engine does not ask for a while. reason: numerics, slot_contents, no_effect or
    golden_mismatch; seconds: until the next request may try it, 0 when one may; times: how often so far."""

    digest: str
    reason: str
    seconds: float
    times: int


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """An engine's condition, about once a second.

    idle_s: seconds since a token was decoded or an idle probe passed. Counters only grow until the engine restarts;
    prompt_tokens: of all prompts that were begun; reused_tokens: how many of these lay in the cache already.
    load_histograms: by source, how many loads took at most each of LOAD_BUCKETS_S, and all of them last. evicted: by
    tier. healed: damaged files of the disk tier that were made anew. waiting_by: how many wait for an adapter, of
    those with the most by digest, for the base (BASE_LANE) and for all others (OTHER_LANES). oldest_wait_s: of who
    waits longest.
    """

    running: int
    waiting: int
    loading: int
    rows: int
    kv_tokens_used: int
    kv_tokens_total: int
    slots: tuple[SlotState, ...]
    slots_total: int
    host_digests: tuple[str, ...]
    host_bytes: int
    host_bytes_limit: int
    idle_s: float
    steps: int
    tokens: int
    loads: dict[str, int]
    load_seconds: dict[str, float]
    evictions: int
    queue_limit: int
    prompt_tokens: int = 0
    reused_tokens: int = 0
    quarantined: tuple[str, ...] = ()
    set_aside: tuple[SetAsideState, ...] = ()
    disk_count: int = 0
    disk_bytes: int = 0
    disk_bytes_limit: int = 0
    pinned: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    dropping: tuple[str, ...] = ()
    load_histograms: dict[str, tuple[int, ...]] = {}
    evicted: dict[str, int] = {}
    healed: int = 0
    waiting_by: dict[str, int] = {}
    oldest_wait_s: float = 0.0


class Events(msgspec.Struct, frozen=True, tag=True):
    """All events of one step for one gateway: one frame, whatever the number of sequences."""

    events: tuple[Told, ...]


class EngineFacts(msgspec.Struct, frozen=True, tag=True):
    """First frame from the engine: what it holds and where its limits are.

    max_model_len: tokens of prompt and answer together; of an encoder-decoder the prompt's alone, and max_answer_len
    bounds its answers.
    """

    base_name: str
    base_digest: str
    family: str
    max_model_len: int
    max_rows: int
    slots: int
    max_rank: int
    dtype: str
    device: str
    stop_token_ids: tuple[int, ...]
    replica: str = ""
    max_answer_len: int = 0

    def room(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt of this length may have."""
        return answer_room(prompt_tokens, self.max_model_len, self.max_answer_len)


def answer_room(prompt_tokens: int, max_model_len: int, max_answer_len: int) -> int:
    """Tokens left for an answer. max_answer_len 0: prompt and answer share one context."""
    if not max_answer_len:
        return max(0, max_model_len - prompt_tokens)
    return max_answer_len if prompt_tokens <= max_model_len else 0


Keep = Warm | Pin | Unpin | Drop | Undrop
ToEngine = Hello | Submit | Cancel | Keep
FromEngine = EngineFacts | Heartbeat | Events
