"""RWKV-6 "Finch" in plain PyTorch: loads checkpoints of flash-linear-attention and of the authors.

Per head, with ``w`` the log decay of each key channel (Peng et al. 2024, arXiv 2404.05892)::

    o_t = S_{t-1}^T r_t          S_t = exp(w_t) ⊙ S_{t-1} + k_t v_t^T

A token reads before it decays and writes. Outside of the state stands what it adds for itself, the bonus ``(r · (u ⊙
k)) v``, then a group norm and a gate. How much of the token before is mixed into a token depends on both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, past_state, recur
from writesae.models.gpu import fla_kernel
from writesae.models.layers import WidthsConfig
from writesae.models.rwkv import LerpLinear, RWKVBlock, RWKVConfig, RWKVFeedForward, RWKVModel, shift_of
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import RWKV6


@strict
class RWKV6Config(RWKVConfig, WidthsConfig):
    """Fields are flash-linear-attention's, and ``group_norm_eps`` (there ``norm_eps``, else 64e-5)."""

    model_type = "rwkv6"

    expand_k: float | int = 0.5
    hidden_ratio: float | int | None = 3.5
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 32 * math.ceil(int(self.hidden_size * (self.hidden_ratio or 3.5)) / 32)
        self.group_norm_eps = self.norm_eps if self.group_norm_eps is None else self.group_norm_eps
        super().__post_init__(**kwargs)


def rwkv6_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    log_decay: Float[Tensor, "batch pos head d_key"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file, without the bonus; `q` is the receptance."""
    if kernel := fla_kernel("rwkv6", "chunk_rwkv6", q):
        return kernel(
            r=q, k=k, v=v, w=log_decay, u=torch.zeros_like(q[0, 0]), scale=1.0,
            initial_state=initial_state, output_final_state=output_final_state,
        )  # fmt: skip
    return recur(RWKV6, dict(q=q, k=k, v=v, log_decay=log_decay), initial_state, output_final_state)


class RWKV6Attention(nn.Module):
    """Time mixing."""

    def __init__(self, config: RWKV6Config, layer_idx: int):
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, config.num_heads
        d, d_key, d_value, rank = config.hidden_size, config.d_key, config.d_value, config.proj_low_rank_dim
        self.head_k_dim, self.head_v_dim = d_key // self.num_heads, d_value // self.num_heads
        self.x_proj = nn.Sequential(LerpLinear(d, 5 * rank, own=True), nn.Tanh(), nn.Linear(5 * rank, d, bias=False))
        self.x_bias = nn.Parameter(torch.zeros(5, d))
        self.r_proj, self.k_proj, self.v_proj = LerpLinear(d, d_key), LerpLinear(d, d_key), LerpLinear(d, d_value)
        self.w_proj, self.g_proj = LerpLinear(d, d_key, config.gate_low_rank_dim), LerpLinear(d, d_value)
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, self.head_k_dim))
        self.gate = nn.Identity()  # named, so that hooks find what passes here
        self.g_norm = nn.GroupNorm(self.num_heads, d_value, eps=config.group_norm_eps or 0.0)
        self.o_proj = nn.Linear(d_value, d, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, first: None) -> tuple[Tensor, None]:
        x = x if mask is None else x * mask
        state = past_state(cache, self.layer_idx)
        shift = shift_of(x, cache, self.layer_idx)
        narrow = self.x_proj[1](self.x_proj[0](x, shift)).unflatten(-1, (5, 1, -1))  # one part for each projection ...
        each = (narrow * torch.eye(5, device=x.device, dtype=x.dtype)[..., None]).flatten(-2)  # ... and zeros around it
        mixes = (self.x_proj[2](each) + self.x_bias).unbind(-2)
        projections = (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj)
        r, w, k, v, g = (project(x, shift, mix) for project, mix in zip(projections, mixes, strict=True))
        log_decay, gate = -at_least_float32(w).exp(), self.gate(F.silu(g))
        if mask is not None:  # padding changes no state
            v, log_decay = v * mask, log_decay * mask

        r, k, v, log_decay = (y.unflatten(-1, (self.num_heads, -1)) for y in (r, k, v, log_decay))
        o, state = rwkv6_recurrence(
            q=r, k=k, v=v, log_decay=log_decay, initial_state=state, output_final_state=cache is not None
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        o = o + (r * k * self.bonus).sum(-1, keepdim=True) * v
        o = self.g_norm(o.flatten(0, 1).flatten(1)).unflatten(0, x.shape[:2])
        return self.o_proj(o * gate), first


class RWKV6FeedForward(RWKVFeedForward):
    def make(self, d: int, d_inner: int) -> None:
        self.key, self.receptance = (LerpLinear(d, d_out, own=True) for d_out in (d_inner, d))
        self.value = nn.Linear(d_inner, d, bias=False)

    def mixed(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.receptance(x, shift).sigmoid() * self.value(self.key(x, shift).relu().square())


class RWKV6Block(RWKVBlock):
    time_mixing, channel_mixing = RWKV6Attention, RWKV6FeedForward


class RWKV6Model(RWKVModel):
    config_class = RWKV6Config
    block = RWKV6Block


class RWKV6ForCausalLM(RecurrentForCausalLM):
    config_class = RWKV6Config
    stack = RWKV6Model


__all__ = ["RWKV6Config", "RWKV6ForCausalLM", "RWKV6Model", "rwkv6_recurrence"]
