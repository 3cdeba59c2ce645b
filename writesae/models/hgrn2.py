"""HGRN2 in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head, with a forget gate ``f_t`` in (0, 1) for each key channel (Qin et al. 2024, arXiv 2404.07904, eq. 4)::

    S_t = f_t ⊙ S_{t-1} + (1 - f_t) i_t^T          o_t = S_t^T q_t

So the key is what is forgotten: it is Gated Linear Attention with ``k = 1 - exp(log_decay)``. Each layer's gates lie
above a lower bound of its own, which grows from layer to layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentConfig, RecurrentForCausalLM, RecurrentModel, past_state
from writesae.models.gla import gla_recurrence
from writesae.models.layers import MixerBlock, mlp_size
from writesae.recurrence import at_least_float32


@strict
class HGRN2Config(RecurrentConfig):
    model_type = "hgrn2"
    only: ClassVar[dict[str, Any]] = {
        "attn": None,
        "attnres_block_size": None,
        "hidden_act": "swish",
        "use_short_conv": False,
    }
    num_heads: int | None = None
    expand_ratio: int | None = 128
    conv_size: int = 4  # of convolutions that there are not
    use_lower_bound: bool = True
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        if self.expand_ratio is None and self.num_heads is None:
            raise ValueError("hgrn2 needs expand_ratio or num_heads")
        self.expand_ratio = self.expand_ratio or self.hidden_size // int(self.num_heads or 1)
        self.num_heads = self.hidden_size // self.expand_ratio
        if self.num_heads * self.expand_ratio != self.hidden_size:
            raise ValueError(f"hgrn2: hidden_size={self.hidden_size} is not a multiple of {self.expand_ratio}")
        if self.intermediate_size is None:
            self.intermediate_size = mlp_size(self)
        super().__post_init__(**kwargs)


class HGRN2Attention(nn.Module):
    """The mixer."""

    def __init__(self, config: HGRN2Config, layer_idx: int):
        super().__init__()
        d = config.hidden_size
        self.layer_idx, self.num_heads = layer_idx, int(config.num_heads or 0)
        self.head_k_dim = self.head_v_dim = d // self.num_heads
        self.q_proj, self.f_proj, self.i_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.g_norm = nn.RMSNorm(d, eps=config.norm_eps, elementwise_affine=bool(config.elementwise_affine))

    def forward(
        self,
        x: Float[Tensor, "batch pos hidden"],
        mask: Tensor | None,
        cache: Cache | None,
        bounds: Float[Tensor, "layer hidden"] | None,
    ) -> Float[Tensor, "batch pos hidden"]:
        """``bounds``: each layer's lower bound of the forget gates; None for 0."""
        log_decay = F.logsigmoid(at_least_float32(self.f_proj(x)))
        if bounds is not None and self.layer_idx > 0:
            least = bounds[self.layer_idx]
            log_decay = torch.logaddexp(least.log(), torch.log1p(-least) + log_decay)
        k = -torch.expm1(log_decay)
        if mask is not None:  # padding changes no state
            k, log_decay = k * mask, log_decay * mask
        values = dict(q=F.silu(self.q_proj(x)) * self.head_k_dim**-0.5, k=k.to(x.dtype), v=self.i_proj(x))
        values["log_decay"] = log_decay
        o, state = gla_recurrence(
            **{name: value.unflatten(-1, (self.num_heads, -1)) for name, value in values.items()},
            initial_state=past_state(cache, self.layer_idx),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.o_proj(self.g_norm(o.flatten(2)))


class HGRN2Block(MixerBlock):
    mixer = HGRN2Attention

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.attn(self.attn_norm(x), mask, cache, first)
        return x + self.mlp(self.mlp_norm(x)), first


class HGRN2Model(RecurrentModel):
    config_class = HGRN2Config
    block = HGRN2Block

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        if config.use_lower_bound:
            self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, config.hidden_size))

    def before_layers(self) -> Float[Tensor, "layer hidden"] | None:
        """Each layer's lower bound of the forget gates; None for none."""
        if not hasattr(self, "lower_bounds"):
            return None
        shares = self.lower_bounds.softmax(0, dtype=torch.float)
        return shares.cumsum(0) - shares[0]

    def init_weights_(self) -> None:
        if hasattr(self, "lower_bounds"):
            init.zeros_(self.lower_bounds)  # type: ignore[arg-type]


class HGRN2ForCausalLM(RecurrentForCausalLM):
    config_class = HGRN2Config
    stack = HGRN2Model


__all__ = ["HGRN2Config", "HGRN2ForCausalLM", "HGRN2Model"]
