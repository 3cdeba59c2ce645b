"""What RWKV-6 and RWKV-7 share: the token before, low-rank projections, the block of time mixing and channel mixing.

Module and field names are flash-linear-attention's (see `writesae.models.common`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from writesae.models.common import Block, RecurrentModel, with_past


def shift_of(
    x: Float[Tensor, "batch pos hidden"], cache: Cache | None, layer: int, state_idx: int = 0
) -> Float[Tensor, "batch pos hidden"]:
    """What each token lacks of the one before it, zeros before the first: shares of it are mixed in."""
    return with_past(x, 1, cache, layer, state_idx)[:, :-1] - x


class LoRA(nn.Module):
    """A low-rank projection with a nonlinearity in its middle, and usually a bias."""

    def __init__(self, d_in: int, d_out: int, rank: int, activation: nn.Module | None = None, bias: bool = True):
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(d_in, rank, bias=False), activation or nn.Identity(), nn.Linear(rank, d_out, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)

    def init_weights_(self) -> None:
        first, last = self.lora[0].weight, self.lora[2].weight
        init.zeros_(first)  # type: ignore[arg-type]
        init.orthogonal_(last, gain=0.1 * max(1.0, math.sqrt(last.shape[1] / last.shape[0])))  # type: ignore[arg-type, operator, union-attr]


def layer_norm(config: Any) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class RWKVBlock(Block):
    """``first`` is what the first layer hands on to all: RWKV-7's values, nothing in RWKV-6."""

    time_mixing: ClassVar[type[nn.Module]]
    channel_mixing: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        if config.norm_first and layer_idx == 0:
            self.pre_norm = layer_norm(config)
        self.attn_norm, self.ffn_norm = layer_norm(config), layer_norm(config)
        self.attn, self.ffn = self.time_mixing(config, layer_idx), self.channel_mixing(config, layer_idx)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "pre_norm"):
            x = self.pre_norm(x)
        mixed, first = self.attn(self.attn_norm(x), mask, cache, first)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x), mask, cache), first


class RWKVModel(RecurrentModel):
    make_norm = staticmethod(layer_norm)
