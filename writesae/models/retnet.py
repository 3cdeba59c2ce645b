"""RetNet in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head ``h``, counted from 0 (Sun et al. 2023, arXiv 2307.08621, eq. 6 and 8)::

    S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

Queries and keys are rotated by the token's place in its text, so that a read depends on how far back a key is. How much
a head forgets is fixed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, past_state, places, recur
from writesae.models.gpu import fla_kernel
from writesae.models.layers import Mixer, MixerBlock, SharedKeysConfig, turned
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import SIMPLE_GLA

BASE = 10_000.0  # of the rotations' periods


@strict
class RetNetConfig(SharedKeysConfig):
    model_type = "retnet"
    number_of_conv_states: ClassVar[int] = 1  # no convolution: how many tokens there were
    only: ClassVar[dict[str, Any]] = {
        "attn": None,
        "attnres_block_size": None,
        "feature_map": None,
        "hidden_act": "swish",
    }

    num_heads: int = 8
    expand_v: float | int = 2.0
    hidden_ratio: float | int | None = 2
    use_output_gate: bool = True
    fuse_norm: bool = True  # decides no more than the output norm's name

    def check_widths(self) -> None:
        super().check_widths()
        if self.use_short_conv:
            raise ValueError("retnet with use_short_conv=True: flash-linear-attention's has no convolution either")
        if (d_key := self.d_key // self.num_heads) % 2:
            raise ValueError(f"retnet rotates pairs of key channels, so each head needs an even number; got {d_key}")


def retention_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    log_decay: Float[Tensor, "batch pos head"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file, with any decay; `q` is scaled."""
    if kernel := fla_kernel("simple_gla", "chunk_simple_gla", q):
        return kernel(
            q=q, k=k, v=v, g=log_decay, scale=1.0, initial_state=initial_state, output_final_state=output_final_state
        )
    return recur(SIMPLE_GLA, dict(q=q, k=k, v=v, log_decay=log_decay), initial_state, output_final_state)


def rotated(
    x: Float[Tensor, "batch pos head d_key"], place: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos head d_key"]:
    """Channel ``i`` and ``i + d_key/2`` turned by the angle ``place / 10000^(2i/d_key)`` (RoFormer, arXiv 2104.09864,
    eq. 34, with the halves of a head as pairs)."""
    first, second = at_least_float32(x).chunk(2, -1)
    half = first.shape[-1]
    angle = place[..., None, None] * BASE ** -(torch.arange(half, device=x.device, dtype=first.dtype) / half)
    return torch.cat(turned(first, second, angle), -1).to(x.dtype)


class MultiScaleRetention(Mixer):
    def __init__(self, config: RetNetConfig, layer_idx: int):
        super().__init__(config, layer_idx, gated=config.use_output_gate, n_served=config.n_served)
        self.add_gated_norm(config)

    def make_gates(self, config: RetNetConfig) -> None:
        """None: decays are fixed."""

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        q, k, v = self.project(x, cache)
        place = places(x, mask, cache, self.layer_idx)
        head = torch.arange(self.num_heads, device=x.device, dtype=at_least_float32(x).dtype)
        decay = torch.log1p(-torch.exp2(-5 - head))
        log_decay = decay.expand(*x.shape[:2], -1).contiguous()
        if mask is not None:  # padding changes no state
            k, log_decay = k * mask, log_decay * mask
        q = rotated(q.unflatten(-1, (self.num_heads, -1)) * self.head_k_dim**-0.5, place)
        o, state = retention_recurrence(
            q=q,
            k=rotated(self.for_each_head(k), place),
            v=self.for_each_head(v),
            log_decay=log_decay,
            initial_state=past_state(cache, self.layer_idx),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.read_out(o, x, self.gated_norm)


class RetNetBlock(MixerBlock):
    mixer = MultiScaleRetention


class RetNetModel(RecurrentModel):
    config_class = RetNetConfig
    block = RetNetBlock


class RetNetForCausalLM(RecurrentForCausalLM):
    config_class = RetNetConfig
    stack = RetNetModel


__all__ = ["RetNetConfig", "RetNetForCausalLM", "RetNetModel", "retention_recurrence"]
