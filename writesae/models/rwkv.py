"""What RWKV models are made of: config rules, the token before, projections, the block of two mixers.

Module and field names are flash-linear-attention's (see `writesae.models.common`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from writesae.models.common import Block, RecurrentConfig, RecurrentModel, with_past


@strict
class RWKVConfig(RecurrentConfig):
    """The fields that both have."""

    only: ClassVar[dict[str, Any]] = {"attn": None, "hidden_act": "sqrelu"}
    number_of_conv_states: ClassVar[int] = 2  # the last token, as time mixing and as channel mixing saw it

    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    group_norm_eps: float | None = None


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


class LerpLinear(nn.Module):
    """A projection of ``x + shift * mix``, a token mixed with the one before; ``mix`` is given, or its own ``mu``."""

    def __init__(self, d_in: int, d_out: int, rank: int | None = None, own: bool = False):
        super().__init__()
        self.linear = LoRA(d_in, d_out, rank, nn.Tanh()) if rank else nn.Linear(d_in, d_out, bias=False)
        if own:
            self.mu = nn.Parameter(torch.zeros(d_in))

    def forward(self, x: Tensor, shift: Tensor, mix: Tensor | None = None) -> Tensor:
        return self.linear(torch.addcmul(x, shift, self.mu if mix is None else mix))


def layer_norm(config: Any) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class RWKVFeedForward(nn.Module):
    """Channel mixing: of a token and the one before it."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx, self.n_layers = layer_idx, config.num_hidden_layers
        self.make(config.hidden_size, int(config.intermediate_size or 0))

    def make(self, d: int, d_inner: int) -> None:
        """Make the projections."""
        raise NotImplementedError

    def mixed(self, x: Tensor, shift: Tensor) -> Tensor:
        """What comes of the tokens, and of what they lack of those before them."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x if mask is None else x * mask
        return self.mixed(x, shift_of(x, cache, self.layer_idx, state_idx=1))


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
