"""Kimi Delta Attention in plain PyTorch: loads flash-linear-attention's checkpoints. (Transformers' own: Kimi Linear.)

Gated DeltaNet whose decay is one number per key channel (Kimi Linear, arXiv 2510.26692, eq. 1)::

    S_t = (I - beta_t k_t k_t^T) (exp(g_t) ⊙ S_{t-1}) + beta_t k_t v_t^T          o_t = S_t^T q_t

with ``g_t = -exp(A_log) softplus(f_t + dt_bias)``, or where there is a lower bound
``lower_bound sigmoid(exp(A_log) (f_t + dt_bias))``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, recur
from writesae.models.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from writesae.models.gpu import fla_kernel
from writesae.models.layers import GatedRMSNorm, HeadSizeConfig, MixerBlock
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import KIMI_DELTA


@strict
class KDAConfig(GatedDeltaNetConfig):
    model_type = "kda"
    only: ClassVar[dict[str, Any]] = HeadSizeConfig.only

    num_heads: int = 16
    head_dim: int = 128
    expand_v: float | int = 1.0
    safe_gate: bool = False  # chooses a kernel, and needs a lower bound
    lower_bound: float | int | None = None

    def check_widths(self) -> None:
        super().check_widths()
        if not self.use_gate:
            raise ValueError("kda with use_gate=False: flash-linear-attention's always has a gate")
        if self.safe_gate and self.lower_bound is None:
            raise ValueError("kda with safe_gate=True needs a lower_bound, for example -5.0")
        if self.lower_bound is not None and self.lower_bound >= 0:
            raise ValueError(f"kda with lower_bound={self.lower_bound}: log decays lie below 0; allowed is less than 0")


def kda_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    beta: Float[Tensor, "batch pos head"],
    log_decay: Float[Tensor, "batch pos head d_key"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `q` is scaled, `q` and `k` are normalised."""
    if kernel := fla_kernel("kda", "chunk_kda", q):
        return kernel(
            q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, initial_state=initial_state,
            output_final_state=output_final_state,
        )  # fmt: skip
    values = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    return recur(KIMI_DELTA, values, initial_state, output_final_state)


class KimiDeltaAttention(GatedDeltaNet):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.lower_bound = getattr(config, "lower_bound", None)
        d, rank = config.hidden_size, self.head_v_dim
        self.g_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, config.d_value))
        self.o_norm = GatedRMSNorm(self.head_v_dim, config.norm_eps, gate=torch.sigmoid)

    def make_gates(self, config: Any) -> None:
        super().make_gates(config)
        del self.a_proj
        heads, d = config.num_v_heads or config.num_heads, config.hidden_size
        rank, n_channels = config.d_value // heads, heads * config.head_dim
        self.f_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, n_channels, bias=False))
        self.dt_bias = nn.Parameter(torch.zeros(n_channels))

    def log_decay(self, x: Float[Tensor, "batch pos hidden"]) -> Float[Tensor, "batch pos head d_key"]:
        f = (at_least_float32(self.f_proj(x)) + self.dt_bias).unflatten(-1, (len(self.A_log), -1))
        rate = self.A_log.float().exp()[:, None]
        return -rate * F.softplus(f) if self.lower_bound is None else self.lower_bound * (rate * f).sigmoid()

    def recurrence(self, **values: Any) -> tuple[Tensor, Tensor | None]:
        return kda_recurrence(**values)


class KDABlock(MixerBlock):
    mixer = KimiDeltaAttention


class KDAModel(RecurrentModel):
    config_class = KDAConfig
    block = KDABlock


class KDAForCausalLM(RecurrentForCausalLM):
    config_class = KDAConfig
    stack = KDAModel


__all__ = ["KDAConfig", "KDAForCausalLM", "KDAModel", "kda_recurrence"]
