"""A frozen base with a fresh LoRA adapter in it, in the number format that this machine is fast at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from adapters.errors import BaseUnsupported, ExtraMissing, RunInvalid
from adapters.families import decoder_start
from adapters.runs import LoraSpec

if TYPE_CHECKING:
    from peft import PeftModel

# Beyond this the attention scores of a whole sequence are too large to be written out.
_EAGER_LENGTH = 512


def wants_bf16(setting: Literal["auto"] | bool) -> bool:
    """Whether to compute in bfloat16. `auto`: where the machine has instructions for it, since emulation is slower."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private names of torch: without them this machine counts as one that has no such instructions.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in probes)


def use_all_cores() -> int:
    """Give torch the cores that this process may run on, and return their number. OMP_NUM_THREADS has the last word."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or allowed)
    torch.set_num_threads(max(1, threads))
    return max(1, threads)


def load_with_lora(folder: Path, lora: LoraSpec, *, bf16: bool, max_length: int, seed: int) -> PeftModel:
    """The base of a saved folder, frozen, with a new adapter whose first values the seed decides.

    The adapter's own weights stay float32, whatever the base computes in: small updates would be lost in bfloat16.
    Raises BaseUnsupported when it is no language model, RunInvalid when the targets fit none of its modules.
    """
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ExtraMissing("train", "training") from error
    disable_progress_bar()  # a bar of ours tells what happens
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise RunInvalid(f"max_length {max_length} exceeds the base's {positions} positions")
    # On a CPU the plain formula is half again as fast as the fused kernel for short sequences, backward included.
    attention = "eager" if not torch.cuda.is_available() and max_length <= _EAGER_LENGTH else "sdpa"
    apart = bool(config.is_encoder_decoder)
    kind = AutoModelForSeq2SeqLM if apart else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            folder,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, OSError) as error:
        raise BaseUnsupported(f"the base in {folder.name} cannot be trained: {str(error).splitlines()[0]}") from error
    set_seed(seed)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if apart else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
    )
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise RunInvalid(f"lora.targets {targets}: {str(error).splitlines()[0]}") from error
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # The loop runs in autocast, which brings the adapter's weights to the inputs' format; PEFT would bring
            # the inputs to the weights' format instead, which is slower.
            module.cast_input_dtype_enabled = False
    return adapted


def begin_of(model: PeftModel) -> tuple[int, ...]:
    """What the decoder of an encoder-decoder is fed before an answer; nothing where prompt and answer are one text.

    Raises BaseUnsupported when the base names no start.
    """
    config = model.config
    if not config.is_encoder_decoder:
        return ()
    return decoder_start(config.decoder_start_token_id, getattr(model.generation_config, "forced_bos_token_id", None))
