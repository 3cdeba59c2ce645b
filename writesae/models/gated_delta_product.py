"""Gated DeltaProduct in plain PyTorch: loads flash-linear-attention's checkpoints.

Gated DeltaNet that takes several steps per token, each with a key, a value and a strength of its own (Siems et al.
2025, arXiv 2502.10297). From ``S = exp(g_t) S_{t-1}``, for each step ``j`` in turn::

    S <- S + beta_tj k_tj (v_tj - S^T k_tj)^T          and after the last          S_t = S,   o_t = S_t^T q_t

Decay is optional. The steps of a token together erase and write matrices of their number's rank, see `rules`.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, recur
from writesae.models.gated_delta_net import GatedDeltaNet
from writesae.models.gpu import fla_kernel
from writesae.models.layers import HeadSizeConfig, MixerBlock
from writesae.recurrence.rules import DELTA_PRODUCT


@strict
class GatedDeltaProductConfig(HeadSizeConfig):
    model_type = "gated_deltaproduct"

    use_output_gate: bool = True
    use_forget_gate: bool = False
    allow_neg_eigval: bool = False
    num_householder: int = 1

    def check_widths(self) -> None:
        super().check_widths()
        if self.num_householder < 1:
            raise ValueError(f"{self.model_type} with num_householder={self.num_householder}: 1 step or more is needed")

    @property
    def gated(self) -> bool:
        return self.use_output_gate

    @property
    def n_steps(self) -> int:
        """Steps per token."""
        return self.num_householder


def delta_product_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head step d_key"],
    v: Float[Tensor, "batch pos head step d_value"],
    beta: Float[Tensor, "batch pos head step"],
    log_decay: Float[Tensor, "batch pos head"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `q` is scaled, `q` and `k` are normalised."""
    if kernel := fla_kernel("gated_delta_product", "chunk_gated_delta_product", q):
        k, v, beta = (y.transpose(2, 3).flatten(1, 2) for y in (k, v, beta))  # their steps come one after the other
        return kernel(
            q=q, k=k, v=v, g=log_decay, beta=beta, num_householder=k.shape[1] // q.shape[1], scale=1.0,
            initial_state=initial_state, output_final_state=output_final_state,
        )  # fmt: skip
    values = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    return recur(DELTA_PRODUCT, values, initial_state, output_final_state)


class GatedDeltaProduct(GatedDeltaNet):
    def make_gates(self, config: Any) -> None:
        super().make_gates(config)
        self.b_proj = nn.Linear(config.hidden_size, config.n_steps * self.b_proj.out_features, bias=False)
        self.n_steps, self.forgets = config.n_steps, config.use_forget_gate
        if not self.forgets:
            del self.a_proj, self.A_log, self.dt_bias

    def init_weights_(self) -> None:
        if self.forgets:
            super().init_weights_()

    def in_steps(self, y: Float[Tensor, "batch pos *any"], d: int) -> Float[Tensor, "batch pos head step d"]:
        """Of the channels, which are those of the first step of all heads first, ``d`` to a head and step."""
        return y.flatten(2).unflatten(2, (self.n_steps, -1, d)).transpose(2, 3)

    def keys(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        return dict(q=q, k=self.in_steps(k, self.head_k_dim))

    def log_decay(self, x: Float[Tensor, "batch pos hidden"]) -> Float[Tensor, "batch pos head"]:
        if self.forgets:
            return super().log_decay(x)
        return torch.zeros(*x.shape[:2], self.num_heads, device=x.device)

    def gates(self, x: Float[Tensor, "batch pos hidden"]) -> dict[str, Tensor]:
        made = super().gates(x)
        return made | dict(beta=self.in_steps(made["beta"], 1)[..., 0])

    def inputs(self, x: Float[Tensor, "batch pos hidden"], cache: Cache | None) -> dict[str, Tensor]:
        made = super().inputs(x, cache)
        return made | dict(v=self.in_steps(made["v"], self.head_v_dim))

    def recurrence(self, **values: Any) -> tuple[Tensor, Tensor | None]:
        return delta_product_recurrence(**values)


class GatedDeltaProductBlock(MixerBlock):
    mixer = GatedDeltaProduct


class GatedDeltaProductModel(RecurrentModel):
    config_class = GatedDeltaProductConfig
    block = GatedDeltaProductBlock


class GatedDeltaProductForCausalLM(RecurrentForCausalLM):
    config_class = GatedDeltaProductConfig
    stack = GatedDeltaProductModel


__all__ = [
    "GatedDeltaProductConfig", "GatedDeltaProductForCausalLM", "GatedDeltaProductModel", "delta_product_recurrence",
]  # fmt: skip
