"""Gated DeltaNet 2 in plain PyTorch: a model around flash-linear-attention's layer, which has none there.

Kimi Delta Attention whose strength is two gates, ``b`` for the erase, of each key channel, and ``w`` for the write, of
each value channel ("Decoupling Erase and Write in Linear Attention", https://github.com/NVlabs/GatedDeltaNet-2)::

    S_t = (I - k_t (b_t ⊙ k_t)^T) (exp(g_t) ⊙ S_{t-1}) + k_t (w_t ⊙ v_t)^T          o_t = S_t^T q_t

With ``b = w = beta`` it is Kimi Delta Attention. Several heads of values may share queries, keys, decays and erase
gates.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, recur
from writesae.models.gpu import fla_kernel
from writesae.models.kda import KimiDeltaAttention
from writesae.models.layers import HeadSizeConfig, MixerBlock
from writesae.recurrence.rules import GDN2


@strict
class GDN2Config(HeadSizeConfig):
    """Fields are those of `KDAConfig` but for its lower bound: the arguments of flash-linear-attention's layer."""

    model_type = "gdn2"

    num_heads: int = 16
    head_dim: int = 128
    expand_v: float | int = 1.0
    norm_eps: float = 1e-5
    allow_neg_eigval: bool = False  # erase gates up to 2

    @property
    def gated(self) -> bool:
        return True


def gdn2_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    log_decay: Float[Tensor, "batch pos head d_key"],
    erase_gate: Float[Tensor, "batch pos head d_key"],
    write_gate: Float[Tensor, "batch pos head d_value"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `erase_gate` and `write_gate` are its ``b`` and ``w``, `q` is scaled, `q`
    and `k` are normalised."""
    if kernel := fla_kernel("gdn2", "chunk_gdn2", q):
        return kernel(
            q=q, k=k, v=v, g=log_decay, b=erase_gate, w=write_gate, scale=1.0, initial_state=initial_state,
            output_final_state=output_final_state,
        )  # fmt: skip
    values = dict(q=q, k=k, v=v, log_decay=log_decay, erase_gate=erase_gate, write_gate=write_gate)
    return recur(GDN2, values, initial_state, output_final_state)


class GatedDeltaNet2(KimiDeltaAttention):
    def make_gates(self, config: Any) -> None:
        d, heads, d_key, d_value = config.hidden_size, config.num_heads, config.d_key, config.d_value
        rank = round(config.head_dim * config.expand_v)
        self.f_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, d_key, bias=False))
        self.b_proj, self.w_proj = nn.Linear(d, d_key, bias=False), nn.Linear(d, d_value, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(d_key))

    def gates(self, x: Float[Tensor, "batch pos hidden"]) -> dict[str, Tensor]:
        erase = self.b_proj(x).sigmoid().unflatten(-1, (-1, self.head_k_dim)) * self.beta_max
        write = self.w_proj(x).sigmoid().unflatten(-1, (-1, self.head_v_dim))
        return dict(log_decay=self.of_values(self.log_decay(x)), erase_gate=self.of_values(erase), write_gate=write)

    def recurrence(self, **values: Any) -> tuple[Tensor, Tensor | None]:
        return gdn2_recurrence(**values)


class GDN2Block(MixerBlock):
    mixer = GatedDeltaNet2


class GDN2Model(RecurrentModel):
    config_class = GDN2Config
    block = GDN2Block


class GDN2ForCausalLM(RecurrentForCausalLM):
    config_class = GDN2Config
    stack = GDN2Model


__all__ = ["GDN2Config", "GDN2ForCausalLM", "GDN2Model", "gdn2_recurrence"]
