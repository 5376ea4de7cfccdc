"""A tiny random Llama and adapters for it, made on the spot: the oracle is transformers + PEFT in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIALS = ("<pad>", "<s>", "</s>")
VOCAB = len(SPECIALS) + 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_config() -> LlamaConfig:
    """Two layers, grouped heads, a head width that is not hidden / heads."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def save_tiny_base(folder: Path, seed: int = 0) -> Path:
    """Save the tiny base in float32; wide random weights, so that greedy answers are not all alike."""
    return save_random(tiny_config(), folder, seed)


def save_random(config: PretrainedConfig, folder: Path, seed: int) -> Path:
    """Save a random decoder-only model of a configuration, with the byte tokenizer."""
    torch.manual_seed(seed)
    return _save(AutoModelForCausalLM.from_config(config), folder)


def save_random_seq2seq(config: PretrainedConfig, folder: Path, seed: int, forced: int | None = None) -> Path:
    """Save a random encoder-decoder, with the byte tokenizer. forced: the token that each answer begins with."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config)
    # The configuration's own forced_bos_token_id is not saved any more: generation has a configuration of its own.
    model.generation_config.forced_bos_token_id = forced
    # T5 does not scale its scores: wider weights saturate them, and float32 then decides at random.
    return _save(model, folder, width=0.1)


def _save(model: PreTrainedModel, folder: Path, width: float = 0.2) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, width)
            else:  # norms and biases: not the ones and zeros that would hide a mistake
                parameter.add_(torch.randn_like(parameter) * (0.1 if "bias" in name else 0.05))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text has ids, and random ids make half characters often."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIALS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.chat_template = TEMPLATE
    return fast


def save_adapter(
    base: Path,
    folder: Path,
    seed: int,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] = ALL_LINEAR,
    rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, int] | None = None,
    scale: float = 0.2,
    fan_in_fan_out: bool = False,
    dora: bool = False,
    seq2seq: bool = False,
) -> Path:
    """Save a random PEFT adapter whose B is not zero, so that its answers differ from the base's."""
    torch.manual_seed(seed)
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_rslora=rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        fan_in_fan_out=fan_in_fan_out,
        use_dora=dora,
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_magnitude_vector" in name:  # it begins as the norm of the base's rows
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0.0, scale)
    peft.save_pretrained(folder)
    return folder


class Oracle:
    """transformers + PEFT, one adapter at a time, float32."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary) for a whole sequence at once."""
        return self._model(input_ids=torch.tensor([list(ids)])).logits[0]

    def greedy(self, prompt: Sequence[int], count: int, eos: frozenset[int] = frozenset()) -> list[int]:
        """The next `count` tokens, the whole sequence computed anew for each: slow and obvious."""
        ids = list(prompt)
        for _ in range(count):
            token = int(self.logits(ids)[-1].argmax())
            if token in eos:
                break
            ids.append(token)
        return ids[len(prompt) :]
