"""Gated DeltaNet in plain PyTorch: loads flash-linear-attention's checkpoints. (Transformers' own are Qwen3.5 and kin.)

Per head (Yang et al. 2024, arXiv 2412.06464, eq. 10)::

    S_t = exp(g_t) (S_{t-1} - beta_t k_t (S_{t-1}^T k_t)^T) + beta_t k_t v_t^T          o_t = S_t^T q_t

with ``g_t = -exp(A_log) softplus(a_t + dt_bias)``. Several heads of values may share queries and keys.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, past_state, recur
from writesae.models.delta_net import NORMS
from writesae.models.gpu import fla_kernel
from writesae.models.layers import HeadSizeConfig, Mixer, MixerBlock
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import GATED_DELTA


@strict
class GatedDeltaNetConfig(HeadSizeConfig):
    model_type = "gated_deltanet"
    only: ClassVar[dict[str, Any]] = {**HeadSizeConfig.only, "output_gate_activation": "swish"}

    use_gate: bool = True
    allow_neg_eigval: bool = False

    @property
    def gated(self) -> bool:
        return self.use_gate


def gated_delta_rule_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    beta: Float[Tensor, "batch pos head"],
    log_decay: Float[Tensor, "batch pos head"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `q` is scaled, `q` and `k` are normalised."""
    if kernel := fla_kernel("gated_delta_rule", "chunk_gated_delta_rule", q):
        return kernel(
            q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, initial_state=initial_state,
            output_final_state=output_final_state,
        )  # fmt: skip
    values = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    return recur(GATED_DELTA, values, initial_state, output_final_state)


class GatedDeltaNet(Mixer):
    """Of Gated DeltaNet, and what those that follow from it share: they say what is theirs in `keys`, `gates`,
    `log_decay` and `recurrence`."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx, gated=config.gated)
        self.num_heads = config.num_v_heads or config.num_heads  # of values, and so of states
        self.head_v_dim = config.d_value // self.num_heads
        self.beta_max = 2.0 if getattr(config, "allow_neg_eigval", False) else 1.0
        self.o_norm = self.make_norm(config.norm_eps)

    def make_gates(self, config: Any) -> None:
        heads = config.num_v_heads or config.num_heads
        self.a_proj, self.b_proj = (nn.Linear(config.hidden_size, heads, bias=False) for _ in "ab")
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))

    def init_weights_(self) -> None:
        init.uniform_(self.A_log, 0.0, math.log(16))  # type: ignore[arg-type]
        init.uniform_(self.dt_bias, math.log(math.expm1(0.001)), math.log(math.expm1(0.1)))  # type: ignore[arg-type]

    def log_decay(self, x: Float[Tensor, "batch pos hidden"]) -> Float[Tensor, "batch pos head ..."]:
        return -self.A_log.float().exp() * F.softplus(at_least_float32(self.a_proj(x)) + self.dt_bias)

    def recurrence(self, **values: Any) -> tuple[Tensor, Tensor | None]:
        return gated_delta_rule_recurrence(**values)

    def keys(
        self, q: Float[Tensor, "batch pos key_head d_key"], k: Float[Tensor, "batch pos key_head d_key"]
    ) -> dict[str, Tensor]:
        """What the recurrence takes at length 1, before it is made so."""
        return dict(q=q, k=k)

    def gates(self, x: Float[Tensor, "batch pos hidden"]) -> dict[str, Tensor]:
        """What enters the recurrence beside q, k and v, ``[batch, pos, head, ...]``: where all of it is 0, a token
        changes no state."""
        return dict(beta=self.b_proj(x).sigmoid() * self.beta_max, log_decay=self.log_decay(x))

    def of_values(self, y: Float[Tensor, "batch pos key_head *any"]) -> Float[Tensor, "batch pos head *any"]:
        """What a key head has, copied for each head of values that it serves."""
        return y.repeat_interleave(self.num_heads // y.shape[2], 2)

    def inputs(self, x: Float[Tensor, "batch pos hidden"], cache: Cache | None) -> dict[str, Tensor]:
        """q, k and v as they enter it, and what else it wants at length 1."""
        q, k, v = (F.silu(y) for y in self.project(x, cache))
        keys = self.keys(*(y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k)))
        made = {name: NORMS["l2"](at_least_float32(y)).to(v.dtype) for name, y in keys.items()}
        made["q"] = made["q"] * self.head_k_dim**-0.5
        made = {name: self.of_values(y) for name, y in made.items()}
        return made | dict(v=v.unflatten(-1, (self.num_heads, -1)))

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        x = x if mask is None else x * mask
        state = past_state(cache, self.layer_idx)
        values, gates = self.inputs(x, cache), self.gates(x)
        if mask is not None:  # padding changes no state
            gates = {name: (y.flatten(2) * mask).view_as(y) for name, y in gates.items()}
        o, state = self.recurrence(**values, **gates, initial_state=state, output_final_state=cache is not None)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.read_out(o, x, self.o_norm)


class GatedDeltaNetBlock(MixerBlock):
    mixer = GatedDeltaNet


class GatedDeltaNetModel(RecurrentModel):
    config_class = GatedDeltaNetConfig
    block = GatedDeltaNetBlock


class GatedDeltaNetForCausalLM(RecurrentForCausalLM):
    config_class = GatedDeltaNetConfig
    stack = GatedDeltaNetModel


__all__ = ["GatedDeltaNetConfig", "GatedDeltaNetForCausalLM", "GatedDeltaNetModel", "gated_delta_rule_recurrence"]
