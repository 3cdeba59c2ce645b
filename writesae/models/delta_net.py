"""DeltaNet in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head (Yang et al. 2024, arXiv 2406.06484, eq. 1)::

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T          o_t = S_t^T q_t

Nothing decays. A write first takes out what its key reads, in so far as ``beta`` is near 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, past_state, recur
from writesae.models.gpu import fla_kernel
from writesae.models.layers import Mixer, MixerBlock, MixerConfig
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import DELTA

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}
NORMS = {
    "l2": lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt(),  # as in fla's kernels
    "sum": lambda x: F.normalize(x, p=1.0, dim=-1, eps=1e-6),
}


@strict
class DeltaNetConfig(MixerConfig):
    model_type = "delta_net"
    only: ClassVar[dict[str, Any]] = {
        "attn": None,
        "attnres_block_size": None,
        "hidden_act": "swish",
        "norm_first": False,
        "share_conv_kernel": False,
        "use_output_norm": True,
    }

    num_heads: int = 16
    use_gate: bool = False
    use_beta: bool = True
    allow_neg_eigval: bool = False
    qk_activation: str = "silu"
    qk_norm: str = "l2"

    def __post_init__(self, **kwargs: Any) -> None:
        for name, known in (("qk_activation", ACTIVATIONS), ("qk_norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"delta_net with {name}={getattr(self, name)!r}: allowed are {', '.join(known)}")
        super().__post_init__(**kwargs)


def delta_rule_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    beta: Float[Tensor, "batch pos head"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `q` is scaled, `q` and `k` are normalised."""
    if kernel := fla_kernel("delta_rule", "chunk_delta_rule", q):
        return kernel(
            q=q, k=k, v=v, beta=beta, scale=1.0, initial_state=initial_state, output_final_state=output_final_state
        )
    return recur(DELTA, dict(q=q, k=k, v=v, beta=beta), initial_state, output_final_state)


class DeltaNet(Mixer):
    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__(config, layer_idx, gated=config.use_gate)
        self.activation, self.norm = ACTIVATIONS[config.qk_activation], NORMS[config.qk_norm]
        self.beta_max = 2.0 if config.allow_neg_eigval else 1.0
        self.o_norm = self.make_norm(config.norm_eps)

    def make_gates(self, config: DeltaNetConfig) -> None:
        self.b_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False) if config.use_beta else None

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        x = x if mask is None else x * mask
        state = past_state(cache, self.layer_idx)
        q, k, v = self.project(x, cache)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (self.activation(q), self.activation(k), F.silu(v)))
        q, k = (self.norm(at_least_float32(y)).to(v.dtype) for y in (q, k))
        beta = torch.ones_like(q[..., 0]) if self.b_proj is None else self.b_proj(x).sigmoid()
        beta = beta * self.beta_max if mask is None else beta * self.beta_max * mask  # padding changes no state

        o, state = delta_rule_recurrence(
            q=q * self.head_k_dim**-0.5,
            k=k,
            v=v,
            beta=beta,
            initial_state=state,
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.read_out(o, x, self.o_norm)


class DeltaNetBlock(MixerBlock):
    mixer = DeltaNet


class DeltaNetModel(RecurrentModel):
    config_class = DeltaNetConfig
    block = DeltaNetBlock


class DeltaNetForCausalLM(RecurrentForCausalLM):
    config_class = DeltaNetConfig
    stack = DeltaNetModel


__all__ = ["DeltaNetConfig", "DeltaNetForCausalLM", "DeltaNetModel", "delta_rule_recurrence"]
