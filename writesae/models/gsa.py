"""Gated Slot Attention in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head two memories of the same slots, with ``g`` the log decay of each slot (Zhang et al. 2024, arXiv 2409.07146)::

    K_t = exp(g_t) ⊙ K_{t-1} + s_t k_t^T          scores_t = K_t q_t
    V_t = exp(g_t) ⊙ V_{t-1} + s_t v_t^T          o_t = V_t^T softmax(scores_t)

where ``s = 1 - exp(g)`` is what a slot gives up. The memory of values is Gated Linear Attention whose key channels are
the slots: it is what is hooked, edited and stored. The memory of keys makes its reads, through a softmax, so outputs
are not linear in what is written there: it has no hook points of its own, and is kept beside, in the cache.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, past_state
from writesae.models.feature_maps import FEATURES
from writesae.models.gla import gla_recurrence
from writesae.models.layers import Mixer, MixerBlock, SharedKeysConfig
from writesae.recurrence import at_least_float32
from writesae.recurrence.kernels import value_reads

FEATURE_MAPS = {"swish": lambda _: nn.SiLU(), **{name: FEATURES[name][0] for name in ("relu", "t2r")}}
NORM_EPS = 1e-5  # of the reads: flash-linear-attention does not tell that norm of the config's norm_eps


@strict
class GSAConfig(SharedKeysConfig):
    model_type = "gsa"
    only: ClassVar[dict[str, Any]] = {
        "attn": None,
        "attnres_block_size": None,
        "clamp_max": None,
        "clamp_min": None,
        "hidden_act": "swish",
        "use_norm": True,
        "use_output_gate": False,
    }

    num_slots: int | None = 64
    gate_logit_normalizer: float | int = 8
    feature_map: str = "swish"

    def check_widths(self) -> None:
        super().check_widths()
        if self.d_value != self.hidden_size:
            raise ValueError(f"gsa with expand_v={self.expand_v}: its norm is of hidden_size channels; allowed is 1")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"gsa with feature_map={self.feature_map!r}: allowed are {', '.join(FEATURE_MAPS)}")


class ReadNorm(nn.RMSNorm):
    """RMS norm of what all heads read, after an activation."""

    def forward(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        return super().forward(F.silu(x))


class GatedSlotAttention(Mixer):
    def __init__(self, config: GSAConfig, layer_idx: int):
        super().__init__(config, layer_idx, gated=False, n_served=config.n_served)
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.feature_map = FEATURE_MAPS[config.feature_map](self.head_k_dim)
        self.scores = nn.Identity()  # named, so that hooks find what passes here
        self.g_norm = ReadNorm(config.d_value, eps=NORM_EPS, elementwise_affine=bool(config.elementwise_affine))

    def make_gates(self, config: GSAConfig) -> None:
        self.num_slots = config.num_slots or self.head_k_dim
        self.f_proj = nn.Linear(config.hidden_size, self.num_heads // self.n_served * self.num_slots, bias=False)

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        x = x if mask is None else x * mask
        q, k, v = self.project(x, cache)
        if hasattr(self, "q_conv1d"):
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        log_decay = F.logsigmoid(at_least_float32(self.f_proj(x))) / self.gate_logit_normalizer
        if mask is not None:  # padding changes no state
            log_decay = log_decay * mask
        k, v, log_decay = map(self.for_each_head, (k, v, log_decay))
        q, k, v = self.feature_map(q.unflatten(-1, (self.num_heads, -1))), self.feature_map(k), F.silu(v)
        s = -torch.expm1(log_decay)

        keys = past_state(cache, self.layer_idx, state_idx=1)
        keys = keys if keys is None else keys.clone()  # the cache's own is overwritten, which gradients would notice
        scores, keys = value_reads(q, s, k, log_decay, keys)
        o, state = gla_recurrence(
            q=self.scores(scores).softmax(-1).to(x.dtype),
            k=s.to(x.dtype),
            v=v,
            log_decay=log_decay,
            initial_state=past_state(cache, self.layer_idx),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
            cache.update_recurrent_state(keys, self.layer_idx, state_idx=1)
        return self.o_proj(self.g_norm(o.flatten(2)))


class GSABlock(MixerBlock):
    mixer = GatedSlotAttention


class GSAModel(RecurrentModel):
    config_class = GSAConfig
    block = GSABlock


class GSAForCausalLM(RecurrentForCausalLM):
    config_class = GSAConfig
    stack = GSAModel


__all__ = ["GSAConfig", "GSAForCausalLM", "GSAModel"]
