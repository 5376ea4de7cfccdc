"""Puts an engine together from its configuration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from adapters.families import ENCODER_DECODERS, check_family
from adapters.golden import MAX_ROWS
from serving.disk_tier import DiskTier
from serving.engine.config import EngineConfig
from serving.engine.demand import Demand
from serving.engine.engine import Engine, Sink
from serving.engine.kv import RowTable
from serving.engine.limits import Limits
from serving.engine.lora import Slots
from serving.engine.model import Decoder, pick_device, pick_dtype
from serving.engine.reading import load_decoder
from serving.engine.request import EngineFacts
from serving.engine.runner import DecoderRunner, Runner, make_slots
from serving.engine.scheduler import Scheduler
from serving.engine.seq2seq import EncoderDecoder, load_encoder_decoder
from serving.engine.seq2seq_runner import Seq2SeqRunner
from serving.engine.slot_probe import Prover, slot_probe
from serving.engine.slots import SlotTable
from serving.loader import HostTier
from serving.packed_file import Target
from serving.store_tier import StoreTier
from serving.tiers import Tiers


def build_engine(config: EngineConfig, sink: Sink) -> Engine:
    """Load the base and make an engine that is ready to start. Takes seconds; raises BaseUnsupported."""
    check_family(config.family)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    # In a thread that ends: OpenMP keeps a pool for every thread that computed, and once the pools together have more
    # threads than there are cores it lets none of them spin at a barrier. A step then took 33 ms instead of 18.
    with ThreadPoolExecutor(1, thread_name_prefix="base-load") as once:
        once.submit(_use_threads, config.num_threads).result()
        base, runner, max_answer_len, prover, places = once.submit(_load, config, dtype, device).result()
    demand = Demand()
    rows, slots = RowTable(config.max_rows), SlotTable(config.slots, worth=demand.of)
    engines: list[Engine] = []
    tiers = _tiers(config, dtype, device, places)
    host = HostTier(
        tiers.bring,
        budget_bytes=config.host_bytes,
        workers=config.load_workers,
        negative_cache_s=config.negative_cache_s,
        wake=lambda: engines[0].wake(),
        begin=partial(_use_threads, 1),
        demand=demand,
        below=tiers,
    )
    limits = Limits(
        max_model_len=config.max_model_len,
        queue_limit=config.queue_limit,
        prefill_chunk=config.prefill_chunk,
        prefill_chunk_alone=config.prefill_chunk_alone,
        patience_s=config.patience_s,
        max_answer_len=max_answer_len,
        prefix_reuse=config.prefix_reuse,
        forced_tokens=base.forced_tokens if isinstance(base, EncoderDecoder) else 0,
    )
    scheduler = Scheduler(limits, rows, slots, host, frozenset(base.stop_token_ids))
    facts = EngineFacts(
        base_name=config.base_name,
        base_digest=config.base_digest,
        family=config.family,
        max_model_len=config.max_model_len,
        max_rows=config.max_rows,
        slots=config.slots,
        max_rank=config.max_rank,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        stop_token_ids=base.stop_token_ids,
        replica=config.replica,
        max_answer_len=max_answer_len,
    )
    engine = Engine(
        facts,
        runner,
        scheduler,
        rows,
        slots,
        host,
        sink,
        queue_limit=config.queue_limit,
        probe_after_s=config.probe_after_s,
        begin=partial(_use_threads, config.num_threads),
        prover=prover,
    )
    engines.append(engine)
    return engine


def _use_threads(count: int) -> None:
    """Compute with so many threads in this one. Threads that only load adapters keep no pool beside the engine's."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the process's figure at its first product: let that be now


def _tiers(config: EngineConfig, dtype: torch.dtype, device: torch.device, places: Slots) -> Tiers:
    """What adapters are read from. On a device, into memory that it copies from without a detour."""
    stage = partial(torch.empty, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else None
    target = Target(config.base_digest, str(dtype).removeprefix("torch."), places.kind)
    disk = DiskTier(Path(config.packed), target, budget_bytes=config.disk_bytes, stage=stage)
    return Tiers(disk, StoreTier(config, dtype), places.prepare, config.max_rank)


def _load(
    config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Decoder | EncoderDecoder, Runner, int, Prover, Slots]:
    """The base, its runner, the longest answer of an encoder-decoder (0 for the others), what looks at slots, and
    these."""
    folder, length, rows = Path(config.base_folder), config.max_model_len, config.max_rows
    # On the CPU a row that is never written costs nothing; on a device it costs as much as any other.
    spare = MAX_ROWS if device.type == "cpu" else 1
    if config.family in ENCODER_DECODERS:
        both = load_encoder_decoder(folder, dtype, device, length)
        slots = make_slots(both, config.slots, config.max_rank)
        reader = Seq2SeqRunner(both, rows, slots, spare)
        return both, reader, both.max_answer, slot_probe(both, slots, reader.logits, rows, spare), slots
    decoder = load_decoder(folder, dtype, device, length)
    slots = make_slots(decoder, config.slots, config.max_rank)
    runner = DecoderRunner(decoder, rows, slots, spare=spare)
    return decoder, runner, 0, slot_probe(decoder, slots, runner.logits, rows, spare), slots
