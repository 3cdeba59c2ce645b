"""Gated Linear Attention in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head, with ``g`` the log decay of each key channel (Yang et al. 2023, arXiv 2312.06635, eq. 3)::

    S_t = exp(g_t) ⊙ S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

Nothing is erased, only forgotten.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, past_state, recur
from writesae.models.gpu import fla_kernel
from writesae.models.layers import Mixer, MixerBlock, SharedKeysConfig
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import GLA

GATE_RANK = 16
GATE_NORMALIZER = 16  # log decays are divided by it: at rest a channel keeps 2^(-1/16) of itself per token


@strict
class GLAConfig(SharedKeysConfig):
    model_type = "gla"
    only: ClassVar[dict[str, Any]] = {
        "attn": None,
        "attnres_block_size": None,
        "feature_map": None,
        "hidden_act": "swish",
        "share_conv_kernel": False,
        "use_gk": True,
        "use_gv": False,
    }

    expand_k: float | int = 0.5
    use_output_gate: bool = True
    fuse_norm: bool = True  # decides no more than the output norm's name
    clamp_min: float | None = None


def gla_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    log_decay: Float[Tensor, "batch pos head d_key"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `q` is scaled."""
    if kernel := fla_kernel("gla", "chunk_gla", q):
        return kernel(
            q=q, k=k, v=v, g=log_decay, scale=1.0, initial_state=initial_state, output_final_state=output_final_state
        )
    return recur(GLA, dict(q=q, k=k, v=v, log_decay=log_decay), initial_state, output_final_state)


class GatedLinearAttention(Mixer):
    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__(config, layer_idx, gated=config.use_output_gate, n_served=config.n_served)
        self.clamp_min = config.clamp_min
        self.add_gated_norm(config)

    def make_gates(self, config: GLAConfig) -> None:
        d, d_key = config.hidden_size, config.d_key // self.n_served  # decays are shared as keys are
        self.gk_proj = nn.Sequential(nn.Linear(d, GATE_RANK, bias=False), nn.Linear(GATE_RANK, d_key))

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        x = x if mask is None else x * mask
        state = past_state(cache, self.layer_idx)
        q, k, v = self.project(x, cache)
        if hasattr(self, "q_conv1d"):
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        log_decay = F.logsigmoid(at_least_float32(self.gk_proj(x))) / GATE_NORMALIZER
        if self.clamp_min is not None:
            log_decay = log_decay.clamp_min(self.clamp_min)
        if mask is not None:  # padding changes no state
            k, log_decay = k * mask, log_decay * mask

        q = q.unflatten(-1, (self.num_heads, -1)) * self.head_k_dim**-0.5
        k, v, log_decay = map(self.for_each_head, (k, v, log_decay))
        o, state = gla_recurrence(
            q=q, k=k, v=v, log_decay=log_decay, initial_state=state, output_final_state=cache is not None
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.read_out(o, x, self.gated_norm)


class GLABlock(MixerBlock):
    mixer = GatedLinearAttention


class GLAModel(RecurrentModel):
    config_class = GLAConfig
    block = GLABlock


class GLAForCausalLM(RecurrentForCausalLM):
    config_class = GLAConfig
    stack = GLAModel


__all__ = ["GLAConfig", "GLAForCausalLM", "GLAModel", "gla_recurrence"]
