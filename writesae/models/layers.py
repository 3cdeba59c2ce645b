"""What DeltaNet and Gated Linear Attention share: short convolutions, gated norm, gated MLP, the block around a mixer.

Module and field names are flash-linear-attention's (see `writesae.models.common`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from writesae.models.common import Block, RecurrentConfig, with_past
from writesae.recurrence import at_least_float32


def mlp_size(config: RecurrentConfig) -> int:
    """Inner size of the gated MLP where a config does not say it: flash-linear-attention's rule."""
    return 256 * math.ceil(int(config.hidden_size * (config.hidden_ratio or 4) * 2 / 3) / 256)


@strict
class WidthsConfig(RecurrentConfig):
    """Of models whose keys and values are so many times as wide as the residual stream."""

    num_heads: int = 4
    expand_k: float | int = 1.0
    expand_v: float | int = 1.0
    norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_widths()
        super().__post_init__(**kwargs)

    def check_widths(self) -> None:
        """Raise ``ValueError`` where heads cannot share the keys and values of a layer alike."""
        for name in ("expand_k", "expand_v"):
            width = self.hidden_size * getattr(self, name)
            if not math.isclose(width, round(width)) or round(width) % self.num_heads:
                raise ValueError(
                    f"{self.model_type} with hidden_size={self.hidden_size} and {name}={getattr(self, name)}: their "
                    f"product must be a multiple of num_heads={self.num_heads}"
                )

    @property
    def d_key(self) -> int:
        """Of all heads together."""
        return round(self.hidden_size * self.expand_k)

    @property
    def d_value(self) -> int:
        """Of all heads together."""
        return round(self.hidden_size * self.expand_v)


@strict
class MixerConfig(WidthsConfig):
    """Of models that may have short convolutions, and a gated MLP."""

    number_of_conv_states: ClassVar[int] = 3  # the last tokens' q, k and v, before their convolutions

    use_short_conv: bool = True
    conv_size: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_widths()
        if self.use_short_conv and self.conv_size < 2:
            raise ValueError(
                f"{self.model_type} with conv_size={self.conv_size}: 2 or more is needed (or use_short_conv=False)"
            )
        if self.intermediate_size is None:
            self.intermediate_size = mlp_size(self)
        if not self.use_short_conv:
            kwargs.pop("share_conv_kernel", None)  # in early configs, though there are no convolutions
        super().__post_init__(**kwargs)


@strict
class SharedKeysConfig(MixerConfig):
    """Of models where several heads may share keys and values, and that have short convolutions only if asked for."""

    num_kv_heads: int | None = None
    use_short_conv: bool = False
    elementwise_affine: bool | None = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_heads % (self.num_kv_heads or 1):
            raise ValueError(
                f"{self.model_type}: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        super().__post_init__(**kwargs)

    @property
    def n_served(self) -> int:
        """Heads that share a key."""
        return self.num_heads // (self.num_kv_heads or self.num_heads)


@strict
class HeadSizeConfig(MixerConfig):
    """Of models whose heads have a size of their own, whatever the hidden size; several may share queries and keys."""

    only: ClassVar[dict[str, Any]] = {"attn": None, "attnres_block_size": None, "hidden_act": "swish"}

    num_heads: int = 6
    num_v_heads: int | None = None
    head_dim: int = 256
    expand_v: float | int = 2.0

    def check_widths(self) -> None:
        if (self.num_v_heads or self.num_heads) % self.num_heads:
            raise ValueError(
                f"{self.model_type}: num_v_heads={self.num_v_heads} is not a multiple of num_heads={self.num_heads}"
            )
        if not math.isclose(self.head_dim * self.expand_v, round(self.head_dim * self.expand_v)):
            raise ValueError(
                f"{self.model_type} with head_dim={self.head_dim} and expand_v={self.expand_v}: their product must be "
                f"a whole number"
            )

    @property
    def d_key(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def d_value(self) -> int:
        return (self.num_v_heads or self.num_heads) * round(self.head_dim * self.expand_v)

    @property
    def gated(self) -> bool:
        """Whether reads go through an output gate."""
        raise NotImplementedError


class ShortConvolution(nn.Conv1d):
    """A causal convolution of each channel over the last ``size`` tokens; a cache holds those before the call."""

    def __init__(self, n_channels: int, size: int, state_idx: int):
        super().__init__(n_channels, n_channels, size, groups=n_channels, bias=False)
        self.state_idx = state_idx

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch pos channel"], cache: Cache | None, layer: int
    ) -> Float[Tensor, "batch pos channel"]:
        x = with_past(x, self.kernel_size[0] - 1, cache, layer, self.state_idx)
        return super().forward(x.mT).mT


def turned(
    first: Float[Tensor, "*lead d"], second: Float[Tensor, "*lead d"], angle: Float[Tensor, "*#lead d"]
) -> tuple[Float[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
    """Pairs of numbers, as points of a plane, turned by an angle in radians."""
    sin, cos = angle.sin(), angle.cos()
    return first * cos - second * sin, second * cos + first * sin


class GatedRMSNorm(nn.Module):
    """``norm(o, z)``: RMS norm of each head, times ``gate(z)``; in float32, like flash-linear-attention's."""

    def __init__(
        self, d_value: int, eps: float, elementwise_affine: bool = True, gate: Callable[[Tensor], Tensor] = F.silu
    ):
        super().__init__()
        self.eps, self.gate = eps, gate
        self.weight = nn.Parameter(torch.ones(d_value)) if elementwise_affine else None

    def forward(
        self, o: Float[Tensor, "batch pos head d_value"], z: Float[Tensor, "batch pos head d_value"]
    ) -> Float[Tensor, "batch pos head d_value"]:
        x, z = at_least_float32(o), at_least_float32(z)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return (F.rms_norm(x, x.shape[-1:], weight, self.eps) * self.gate(z)).to(o.dtype)

    def init_weights_(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)  # type: ignore[arg-type]


class HeadNorm(nn.Module):
    """RMS norm of each head, with a weight for each channel of them all."""

    def __init__(self, n_heads: int, d_value: int, eps: float):
        super().__init__()
        self.n_heads, self.eps = n_heads, eps
        self.weight = nn.Parameter(torch.ones(n_heads * d_value))

    def forward(self, o: Float[Tensor, "*lead channel"]) -> Float[Tensor, "*lead channel"]:
        x = at_least_float32(o).unflatten(-1, (self.n_heads, -1))
        return (F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(x.dtype)).to(o.dtype)

    def init_weights_(self) -> None:
        init.ones_(self.weight)  # type: ignore[arg-type]


class GatedMLP(nn.Module):
    def __init__(self, d: int, d_inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, d_inner, bias=False), nn.Linear(d, d_inner, bias=False)
        self.down_proj = nn.Linear(d_inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixer(nn.Module):
    """Projections to q, k, v, with their convolutions, and from the reads back, through a gate if there is one.

    Subclasses add the projections for the recurrence's gates (`make_gates`) and compute the recurrence in between. They
    are called as ``mixer(x, mask, cache)``. ``n_served`` heads share k and v, of which there are ``config.n_steps`` per
    token if it has any.
    """

    def __init__(self, config: Any, layer_idx: int, gated: bool, n_served: int = 1):
        super().__init__()
        self.layer_idx, self.num_heads, self.n_served = layer_idx, config.num_heads, n_served
        self.head_k_dim, self.head_v_dim = config.d_key // config.num_heads, config.d_value // config.num_heads
        n_steps = getattr(config, "n_steps", 1)
        d, d_q, d_k = config.hidden_size, config.d_key, config.d_key * n_steps // n_served
        d_v, d_o = config.d_value * n_steps // n_served, config.d_value
        self.q_proj, self.k_proj = nn.Linear(d, d_q, bias=False), nn.Linear(d, d_k, bias=False)
        self.v_proj, self.o_proj = nn.Linear(d, d_v, bias=False), nn.Linear(d_o, d, bias=False)
        self.make_gates(config)
        self.g_proj = nn.Linear(d, d_o, bias=False) if gated else None
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(d_q, config.conv_size, state_idx=0)
            self.k_conv1d = ShortConvolution(d_k, config.conv_size, state_idx=1)
            self.v_conv1d = ShortConvolution(d_v, config.conv_size, state_idx=2)

    def make_gates(self, config: Any) -> None:
        """Add the projections for what the recurrence needs beside q, k and v."""
        raise NotImplementedError

    def project(self, x: Float[Tensor, "batch pos hidden"], cache: Cache | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[batch, pos, channel]``, after their convolutions if there are any, before any activation."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if hasattr(self, "q_conv1d"):
            q, k, v = (
                conv(y, cache, self.layer_idx)
                for conv, y in ((self.q_conv1d, q), (self.k_conv1d, k), (self.v_conv1d, v))
            )
        return q, k, v

    def make_norm(self, eps: float, elementwise_affine: bool = True) -> nn.Module:
        norm = nn.RMSNorm if self.g_proj is None else GatedRMSNorm
        return norm(self.head_v_dim, eps=eps, elementwise_affine=elementwise_affine)

    def for_each_head(self, y: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos head d"]:
        """What heads share (k, v), or its decay, copied for each of them."""
        return y.unflatten(-1, (self.num_heads // self.n_served, -1)).repeat_interleave(self.n_served, 2)

    def add_gated_norm(self, config: Any) -> None:
        """The norm of the reads under the name that flash-linear-attention gives it; `gated_norm` finds it."""
        self.norm_name = "g_norm_swish_gate" if config.use_output_gate and config.fuse_norm else "g_norm"
        self.add_module(self.norm_name, self.make_norm(config.norm_eps, bool(config.elementwise_affine)))

    @property
    def gated_norm(self) -> nn.Module:
        return self.get_submodule(self.norm_name)

    def read_out(
        self, o: Float[Tensor, "batch pos head d_value"], x: Float[Tensor, "batch pos hidden"], norm: nn.Module
    ) -> Float[Tensor, "batch pos hidden"]:
        """The mixer's output, from its reads and its input."""
        o = norm(o) if self.g_proj is None else norm(o, self.g_proj(x).unflatten(-1, (self.num_heads, -1)))
        return self.o_proj(o.flatten(2))


class MixerBlock(Block):
    """Norm, mixer, norm, gated MLP."""

    mixer: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = self.mixer(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, first: None) -> tuple[Tensor, None]:
        x = x + self.attn(self.attn_norm(x), mask, cache)
        return x + self.mlp(self.mlp_norm(x)), None
