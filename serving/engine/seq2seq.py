"""A frozen encoder-decoder base (T5 and BART families) as its runner wants it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import BaseUnsupported
from adapters.families import check_family, decoder_start
from serving.engine.linear import FrozenLinear
from serving.engine.lora import Site
from serving.engine.ops import Activation, Norm, Ops, pick_ops


@dataclass(frozen=True, slots=True)
class Linear:
    """A fused linear and the number of its site, under which adapters change it."""

    product: FrozenLinear
    site: int


@dataclass(frozen=True, slots=True)
class Block:
    """Encoder or decoder layer. In the decoder `cross_q` reads the tokens and `cross_kv` the encoder's output.

    The norms lie before each part (T5) or after its sum (BART): see EncoderDecoder.norm_after.
    """

    attention_norm: Norm
    qkv: Linear
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    cross_norm: Norm | None = None
    cross_q: Linear | None = None
    cross_kv: Linear | None = None
    cross_out: Linear | None = None

    def linears(self) -> list[Linear]:
        """Its linears, whatever their order."""
        every = (self.qkv, self.out, self.cross_q, self.cross_kv, self.cross_out, self.up, self.down)
        return [linear for linear in every if linear is not None]


@dataclass(frozen=True, slots=True)
class Stack:
    """Encoder or decoder. positions: (positions, width) learned, or None; first_norm: of the embeddings (BART).

    distance_bias: (heads, 2 * length - 1) added to the scores by key position - query position, or None.
    """

    blocks: tuple[Block, ...]
    positions: Tensor | None
    first_norm: Norm | None
    last_norm: Norm | None
    distance_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class EncoderDecoder:
    """A whole base. scale: of the scores; head_scale: of the decoder's output before the head; head_bias: (vocab,)."""

    embedding: Tensor
    embedding_scale: float
    encoder: Stack
    decoder: Stack
    head: FrozenLinear
    head_scale: float
    head_bias: Tensor | None
    heads: int
    dim: int
    scale: float
    norm_after: bool
    activation: Activation
    ops: Ops
    sites: tuple[Site, ...]
    max_input: int
    max_output: int
    start_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def forced_tokens(self) -> int:
        """How many tokens every answer begins with unseen."""
        return len(self.start_token_ids) - 1

    @property
    def max_answer(self) -> int:
        """How long an answer may be: what is forced takes room beside it."""
        return self.max_output - self.forced_tokens

    def site_biases(self) -> list[Tensor | None]:
        """The bias of each site's fused linear, in the order of the sites."""
        found = {
            linear.site: linear.product.bias
            for block in (*self.encoder.blocks, *self.decoder.blocks)
            for linear in block.linears()
        }
        return [found[site] for site in range(len(self.sites))]


def load_encoder_decoder(folder: Path, dtype: torch.dtype, device: torch.device, max_model_len: int) -> EncoderDecoder:
    """The base in a folder, for inputs and outputs of up to `max_model_len` tokens each.

    Raises BaseUnsupported for a family or activation that the runner does not compute.
    """
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    check_family(str(model.config.model_type))
    parts = _Parts(model, dtype, device)
    return (_bart if model.config.model_type == "bart" else _t5)(parts, max_model_len)


class _Parts:
    """A transformers model taken apart, and the sites numbered as its linears are taken."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.config: Any = model.config
        self.dtype, self.device = dtype, device
        self.forced: int | None = getattr(model.generation_config, "forced_bos_token_id", None)
        self.sites: list[Site] = []
        # T5 keeps some weights in float32 whatever it is asked; here one dtype computes all.
        self._state: dict[str, Tensor] = {k: v.detach() for k, v in model.state_dict().items()}

    def take(self, name: str) -> Tensor:
        found = self._state.pop(name, None)
        if found is None:
            raise BaseUnsupported(f"the base has no tensor {name!r}")
        return found.to(self.device, self.dtype)

    def linear(self, prefix: str, *names: str) -> Linear:
        weights = [self.take(f"{prefix}{n}.weight") for n in names]
        biases = [self.take(f"{prefix}{n}.bias") for n in names if f"{prefix}{n}.bias" in self._state]
        product = FrozenLinear(torch.cat(weights), torch.cat(biases) if biases else None)
        widths = tuple(int(w.shape[0]) for w in weights)
        self.sites.append(Site(tuple(prefix + n for n in names), product.in_features, widths))
        return Linear(product, len(self.sites) - 1)

    def norm(self, prefix: str, eps: float) -> Norm:
        bias = self.take(f"{prefix}.bias") if f"{prefix}.bias" in self._state else None
        return Norm(self.take(f"{prefix}.weight"), eps, 0.0, bias)

    def stop_token_ids(self) -> tuple[int, ...]:
        eos = self.config.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)

    def start_token_ids(self) -> tuple[int, ...]:
        return decoder_start(self.config.decoder_start_token_id, self.forced)


def _t5(parts: _Parts, length: int) -> EncoderDecoder:
    """T5 and FLAN-T5 (Raffel et al. 2020): RMSNorm before each part, unscaled scores, a bias by distance."""
    config = parts.config
    activation = {
        (False, "relu"): Activation.RELU,
        (True, "gelu_new"): Activation.GATED_TANH_GELU,
        (True, "silu"): Activation.GATED_SILU,
    }.get((bool(config.is_gated_act), str(config.dense_act_fn)))
    if activation is None:
        raise BaseUnsupported(f"feed-forward {config.feed_forward_proj!r} is not served")
    eps = float(config.layer_norm_epsilon)
    ups = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)

    def block(prefix: str, cross: bool) -> Block:
        attention, last = f"{prefix}layer.0.", f"{prefix}layer.{2 if cross else 1}."
        more: dict[str, Any] = {}
        if cross:
            middle = f"{prefix}layer.1."
            more = {
                "cross_norm": parts.norm(f"{middle}layer_norm", eps),
                "cross_q": parts.linear(f"{middle}EncDecAttention.", "q"),
                "cross_kv": parts.linear(f"{middle}EncDecAttention.", "k", "v"),
                "cross_out": parts.linear(f"{middle}EncDecAttention.", "o"),
            }
        return Block(
            attention_norm=parts.norm(f"{attention}layer_norm", eps),
            qkv=parts.linear(f"{attention}SelfAttention.", "q", "k", "v"),
            out=parts.linear(f"{attention}SelfAttention.", "o"),
            mlp_norm=parts.norm(f"{last}layer_norm", eps),
            up=parts.linear(f"{last}DenseReluDense.", *ups),
            down=parts.linear(f"{last}DenseReluDense.", "wo"),
            **more,
        )

    def stack(name: str, count: int) -> Stack:
        cross = name == "decoder"
        table = parts.take(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        buckets = _buckets(
            length, not cross, int(config.relative_attention_num_buckets), int(config.relative_attention_max_distance)
        )
        return Stack(
            blocks=tuple(block(f"{name}.block.{i}.", cross) for i in range(count)),
            positions=None,
            first_norm=None,
            last_norm=parts.norm(f"{name}.final_layer_norm", eps),
            distance_bias=table[buckets.to(parts.device)].T.contiguous(),
        )

    encoder, decoder = stack("encoder", int(config.num_layers)), stack("decoder", int(config.num_decoder_layers))
    return EncoderDecoder(
        embedding=parts.take("shared.weight"),
        embedding_scale=1.0,
        encoder=encoder,
        decoder=decoder,
        head=FrozenLinear(parts.take("lm_head.weight")),
        head_scale=float(config.d_model) ** -0.5 if config.scale_decoder_outputs else 1.0,
        head_bias=None,
        heads=int(config.num_heads),
        dim=int(config.d_kv),
        scale=1.0,
        norm_after=False,
        activation=activation,
        ops=pick_ops(parts.dtype, parts.device),
        sites=tuple(parts.sites),
        max_input=length,
        max_output=length,
        start_token_ids=parts.start_token_ids(),
        stop_token_ids=parts.stop_token_ids(),
        dtype=parts.dtype,
        device=parts.device,
    )


def _buckets(length: int, both_ways: bool, count: int, farthest: int) -> Tensor:
    """(2 * length - 1,) T5's bucket of each distance key - query from 1 - length to length - 1.

    Half of a direction's buckets are exact, the rest grow with the logarithm to `farthest` (Raffel et al. 2020, 2.1).
    """
    distance = torch.arange(1 - length, length)
    offset = torch.zeros_like(distance)
    if both_ways:
        count //= 2
        offset = (distance > 0).long() * count
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    return offset + torch.where(distance < exact, distance, far)


def _bart(parts: _Parts, length: int) -> EncoderDecoder:
    """BART (Lewis et al. 2020): LayerNorm after each sum, learned positions from the third row on."""
    config = parts.config
    activation = {"gelu": Activation.GELU, "relu": Activation.RELU, "gelu_new": Activation.TANH_GELU}.get(
        str(config.activation_function)
    )
    if activation is None:
        raise BaseUnsupported(f"activation {config.activation_function!r} is not served for this family")
    heads = int(config.decoder_attention_heads)
    if config.encoder_attention_heads != heads:
        raise BaseUnsupported("an encoder and a decoder with different numbers of heads are not served")
    eps = 1e-5  # torch's default, which the family uses

    def block(prefix: str, cross: bool) -> Block:
        more: dict[str, Any] = {}
        if cross:
            more = {
                "cross_norm": parts.norm(f"{prefix}encoder_attn_layer_norm", eps),
                "cross_q": parts.linear(f"{prefix}encoder_attn.", "q_proj"),
                "cross_kv": parts.linear(f"{prefix}encoder_attn.", "k_proj", "v_proj"),
                "cross_out": parts.linear(f"{prefix}encoder_attn.", "out_proj"),
            }
        return Block(
            attention_norm=parts.norm(f"{prefix}self_attn_layer_norm", eps),
            qkv=parts.linear(f"{prefix}self_attn.", "q_proj", "k_proj", "v_proj"),
            out=parts.linear(f"{prefix}self_attn.", "out_proj"),
            mlp_norm=parts.norm(f"{prefix}final_layer_norm", eps),
            up=parts.linear(prefix, "fc1"),
            down=parts.linear(prefix, "fc2"),
            **more,
        )

    def stack(name: str, count: int) -> Stack:
        return Stack(
            blocks=tuple(block(f"model.{name}.layers.{i}.", name == "decoder") for i in range(count)),
            positions=parts.take(f"model.{name}.embed_positions.weight")[2:],
            first_norm=parts.norm(f"model.{name}.layernorm_embedding", eps),
            last_norm=None,
            distance_bias=None,
        )

    encoder, decoder = stack("encoder", int(config.encoder_layers)), stack("decoder", int(config.decoder_layers))
    dim = int(config.d_model) // heads
    most = min(length, int(config.max_position_embeddings))
    bias = parts.take("final_logits_bias")[0]
    return EncoderDecoder(
        embedding=parts.take("model.shared.weight"),
        embedding_scale=config.d_model**0.5 if config.scale_embedding else 1.0,
        encoder=encoder,
        decoder=decoder,
        head=FrozenLinear(parts.take("lm_head.weight")),
        head_scale=1.0,
        head_bias=bias if bool(bias.any()) else None,
        heads=heads,
        dim=dim,
        scale=dim**-0.5,
        norm_after=True,
        activation=activation,
        ops=pick_ops(parts.dtype, parts.device),
        sites=tuple(parts.sites),
        max_input=most,
        max_output=most,
        start_token_ids=parts.start_token_ids(),
        stop_token_ids=parts.stop_token_ids(),
        dtype=parts.dtype,
        device=parts.device,
    )


def tokens_of(slots: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """A slot for each flat token, of rows with these slots and lengths."""
    return [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
