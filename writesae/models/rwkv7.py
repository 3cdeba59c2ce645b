"""RWKV-7 "Goose" in plain PyTorch: loads checkpoints of flash-linear-attention and of the authors.

Per head, with ``w`` the log decay of each key channel, ``kappa`` the removal key (of length 1) and ``a`` the in-context
learning rate (Peng et al. 2025, arXiv 2503.14456, eq. 14 to 17)::

    S_t = exp(w) ⊙ S_{t-1} - (kappa ⊙ a) (kappa^T S_{t-1}) + k v^T          o_t = S_t^T r

Outside of the state: the bonus ``(r · (r_k ⊙ k)) v`` of the token itself, a group norm, a gate. Every layer but the
first mixes the first layer's values into its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, past_state, recur
from writesae.models.gpu import fla_kernel
from writesae.models.rwkv import LoRA, RWKVBlock, RWKVConfig, RWKVFeedForward, RWKVModel, shift_of
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import RWKV7


@strict
class RWKV7Config(RWKVConfig):
    """Fields are flash-linear-attention's, and ``group_norm_eps`` (there ``head_dim * norm_eps``, else 64e-5)."""

    model_type = "rwkv7"

    head_dim: int | None = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    value_dim: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            if self.num_heads is None:
                raise ValueError("rwkv7 needs head_dim or num_heads")
            self.head_dim = self.hidden_size // self.num_heads
        self.num_heads = self.hidden_size // self.head_dim
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of head_dim={self.head_dim}")
        if not isinstance(self.value_dim, list):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers
        if any(d != self.value_dim[0] or d % self.num_heads for d in self.value_dim):
            raise ValueError(f"rwkv7 with value_dim={self.value_dim}: writesae needs one multiple of the heads for all")
        if self.intermediate_size is None:
            self.intermediate_size = 32 * math.ceil(self.hidden_size * (self.hidden_ratio or 4) / 32)
        if self.group_norm_eps is None:
            self.group_norm_eps = self.head_dim * self.norm_eps
        super().__post_init__(**kwargs)


def rwkv7_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    log_decay: Float[Tensor, "batch pos head d_key"],
    kappa: Float[Tensor, "batch pos head d_key"],
    iclr: Float[Tensor, "batch pos head d_key"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `q` is the receptance."""
    if kernel := fla_kernel("rwkv7", "chunk_rwkv7", q):  # there, `a` reads and `b` writes
        return kernel(
            r=q, w=log_decay, k=k, v=v, a=-kappa, b=kappa * iclr, scale=1.0,
            initial_state=initial_state, output_final_state=output_final_state,
        )  # fmt: skip
    values = dict(q=q, k=k, v=v, log_decay=log_decay, kappa=kappa, iclr=iclr)
    return recur(RWKV7, values, initial_state, output_final_state)


class RWKV7Attention(nn.Module):
    """Time mixing."""

    x_r: Tensor
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor

    def __init__(self, config: RWKV7Config, layer_idx: int):
        super().__init__()
        self.layer_idx, self.n_layers = layer_idx, config.num_hidden_layers
        self.num_heads, self.head_k_dim = int(config.num_heads or 0), int(config.head_dim or 0)
        d, d_value = config.hidden_size, int(config.value_dim[layer_idx])  # type: ignore[index]
        self.head_v_dim = d_value // self.num_heads

        wide = self.head_k_dim / 64  # ranks that the config leaves open: fla's rule
        rank = lambda given, factor: given or max(32, round(factor * d**0.5 / 32) * 32)  # noqa: E731
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, d)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.r_k = nn.Parameter(torch.zeros(self.num_heads, self.head_k_dim))
        self.r_proj, self.k_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.v_proj, self.o_proj = nn.Linear(d, d_value, bias=False), nn.Linear(d_value, d, bias=False)
        self.w_lora = LoRA(d, d, rank(config.decay_low_rank_dim, 2.5 * wide), nn.Tanh())
        self.a_lora = LoRA(d, d, rank(config.a_low_rank_dim, 2.5 * wide))
        self.g_lora = LoRA(d, d_value, rank(config.gate_low_rank_dim, 5), nn.Sigmoid(), bias=False)
        if layer_idx > 0:
            self.v_lora = LoRA(d, d_value, rank(config.v_low_rank_dim, 1.7 * wide))
            self.v_mix = nn.Identity()  # named, so that hooks find what passes here
        self.gate = nn.Identity()
        self.g_norm = nn.GroupNorm(self.num_heads, d_value, eps=config.group_norm_eps or 0.0)

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None, v_first: Tensor | None
    ) -> tuple[Float[Tensor, "batch pos hidden"], Float[Tensor, "batch pos value"]]:
        x = x if mask is None else x * mask
        state = past_state(cache, self.layer_idx)
        shift = shift_of(x, cache, self.layer_idx)
        xr, xw, xk, xv, xa, xg = (
            torch.addcmul(x, shift, mix) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        log_decay = -math.exp(-0.5) * at_least_float32(self.w_lora(xw)).sigmoid()
        iclr = self.a_lora(xa).sigmoid()
        gate = self.gate(self.g_lora(xg))
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, self.v_mix(self.v_lora(xv).sigmoid()))
        eps = max(1e-12, torch.finfo(k.dtype).tiny)  # float16 has no 1e-12, and padding a key of zeros
        kappa = F.normalize(self._heads(k * self.k_k), dim=-1, eps=eps)
        k = k * (1 + (iclr - 1) * self.k_a)
        if mask is not None:
            v = v * mask

        r, k, v, log_decay, iclr = (self._heads(y) for y in (r, k, v, log_decay, iclr))
        o, state = rwkv7_recurrence(
            q=r,
            k=k,
            v=v,
            log_decay=log_decay,
            kappa=kappa,
            iclr=iclr,
            initial_state=state,
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        o = self.g_norm(o.flatten(0, 1).flatten(1)).unflatten(0, x.shape[:2])
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.o_proj((o + bonus.flatten(2)) * gate), v_first  # type: ignore[return-value]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def init_weights_(self) -> None:
        """The authors' initialisation (RWKV-LM, RWKV-v7/train_temp), which depends on depth and channel."""
        d, layer, n_layers = self.x_r.shape[-1], self.layer_idx, self.n_layers
        depth, to_go = layer / max(1, n_layers - 1), 1 - layer / n_layers
        n = torch.arange(d, dtype=torch.float32, device=self.k_k.device)
        linear = n / (d - 1) - 0.5
        zigzag = 2 * (n % self.head_k_dim) / (self.head_k_dim - 1) - 1
        zigzag = zigzag * zigzag.abs()
        powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
        for name, power in powers.items():
            init.copy_(getattr(self, name), (1 - (n / d) ** (power * to_go))[None, None])
        init.copy_(self.k_k, 0.71 - 0.1 * linear)
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        www = -6 + 6 * (n / (d - 1)) ** (1 + depth**0.3)
        init.copy_(self.w_lora.lora[2].bias, www + 0.5 + 2.5 * zigzag)  # type: ignore[arg-type]
        init.copy_(self.a_lora.lora[2].bias, -0.19 + 0.3 * zigzag + 0.4 * linear)  # type: ignore[arg-type]
        if layer > 0:
            wide = torch.linspace(-0.5, 0.5, self.v_proj.out_features, device=self.k_k.device)
            init.copy_(self.v_lora.lora[2].bias, 0.73 - 0.4 * wide)  # type: ignore[arg-type]
        init.constant_(self.g_norm.weight, ((layer + 1) / n_layers) ** 0.7)
        init.zeros_(self.g_norm.bias)
        init.orthogonal_(self.r_proj.weight)
        init.orthogonal_(self.k_proj.weight, gain=0.1)
        init.orthogonal_(self.v_proj.weight)
        init.zeros_(self.o_proj.weight)


class RWKV7FeedForward(RWKVFeedForward):
    def make(self, d: int, d_inner: int) -> None:
        self.x_k = nn.Parameter(torch.zeros(d))
        self.key, self.value = nn.Linear(d, d_inner, bias=False), nn.Linear(d_inner, d, bias=False)

    def mixed(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.value(self.key(torch.addcmul(x, shift, self.x_k)).relu().square())

    def init_weights_(self) -> None:
        d = len(self.x_k)
        init.copy_(
            self.x_k, 1 - (torch.arange(d, device=self.x_k.device) / d) ** ((1 - self.layer_idx / self.n_layers) ** 4)
        )
        init.orthogonal_(self.key.weight)
        init.zeros_(self.value.weight)


class RWKV7Block(RWKVBlock):
    time_mixing, channel_mixing = RWKV7Attention, RWKV7FeedForward


class RWKV7Model(RWKVModel):
    config_class = RWKV7Config
    block = RWKV7Block


class RWKV7ForCausalLM(RecurrentForCausalLM):
    config_class = RWKV7Config
    stack = RWKV7Model


__all__ = ["RWKV7Config", "RWKV7ForCausalLM", "RWKV7Model", "rwkv7_recurrence"]
