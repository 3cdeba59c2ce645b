"""Mamba-3 in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head, with a time step ``dt_t``, a decay ``a_t = exp(A_t dt_t)`` and a share ``lambda_t`` that all depend on the
token (Lahoti et al. 2026, arXiv 2603.15569)::

    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} v_{t-1}^T + lambda_t dt_t k_t v_t^T          o_t = S_t^T q_t

So what a token writes is a matrix of rank 2: what the token before left it to write (step 0), and its own (step 1).
Queries and keys are turned by angles that add up over the text, in proportion to ``dt``. Outside of the state stands
the skip ``D v``; then a gate, and before it a norm if asked for.

With several inputs and outputs per head (MIMO) a token has ``R`` keys and queries: it writes ``2 R`` terms, of values
``v_t * x_r``, and reads ``R`` times, ``o_t = sum_r w_tr * (S_t^T q_tr)``. The gate is then in the weights,
``w_tr = o_r * silu(z_t * z_r)``, which depend on the token alone. (``x_r``, ``z_r`` and ``o_r`` are learned.)
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

from writesae.models.common import (
    Block,
    RecurrentConfig,
    RecurrentForCausalLM,
    RecurrentModel,
    past_state,
    recur,
    running_total,
    with_past,
)  # fmt: skip
from writesae.models.gpu import fla_kernel
from writesae.models.layers import HeadNorm, turned
from writesae.recurrence import at_least_float32
from writesae.recurrence.rules import MAMBA3, MAMBA3_MIMO
from writesae.recurrence.write import wide


@strict
class Mamba3Config(RecurrentConfig):
    model_type = "mamba3"
    number_of_conv_states: ClassVar[int] = 3  # no convolution: the last token's key and value, and its angles
    only: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}

    num_hidden_layers: int = 48
    head_dim: int = 64
    num_heads: int | None = None  # always the one number that expand and head_dim allow
    state_size: int = 128
    expand: float | int = 2
    n_groups: int = 1
    rope_fraction: float = 0.5
    A_floor: float = 1e-4
    is_outproj_norm: bool = False
    is_mimo: bool = False
    mimo_rank: int = 4
    use_bias: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        if self.is_mimo and (self.is_outproj_norm or self.mimo_rank < 1):
            raise ValueError(
                f"mamba3 with is_mimo=True, mimo_rank={self.mimo_rank} and is_outproj_norm={self.is_outproj_norm}: "
                f"supported are a rank of 1 or more, and is_outproj_norm=False, since a norm between a token's reads "
                f"and their sum would make it depend on the memory otherwise than linearly"
            )
        heads, left = divmod(self.expand * self.hidden_size, self.head_dim)
        if left or self.num_heads not in (None, heads):
            raise ValueError(
                f"mamba3 with hidden_size={self.hidden_size} and expand={self.expand}: their product must be num_heads="
                f"{self.num_heads or int(heads)} times head_dim={self.head_dim}"
            )
        if self.n_groups < 1 or heads % self.n_groups:
            raise ValueError(f"mamba3 with n_groups={self.n_groups}: it must divide the number of heads, {int(heads)}")
        if self.rope_fraction not in (0.5, 1.0) or self.state_size % 2 or self.state_size * self.rope_fraction < 2:
            raise ValueError(
                f"mamba3 with rope_fraction={self.rope_fraction} and state_size={self.state_size}: half or all of an "
                f"even number of channels are turned (0.5 or 1.0), one pair or more"
            )
        self.num_heads = int(heads)
        super().__post_init__(**kwargs)


def mamba3_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head step d_key"],
    v: Float[Tensor, "batch pos head step d_value"],
    beta: Float[Tensor, "batch pos head step"],
    log_decay: Float[Tensor, "batch pos head"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """``S_t = exp(log_decay_t) S_{t-1} + sum_j beta_tj k_tj v_tj^T``, ``o_t = S_t^T q_t``.

    mamba-ssm's kernel makes keys of both steps itself, so it could not take what a hook makes of them. Nothing is
    erased, so flash-linear-attention's kernel can run the steps as heads, whose reads add up.
    """
    if kernel := fla_kernel("simple_gla", "chunk_simple_gla", q):
        n = k.shape[3]
        values = (beta[..., None] * v).to(v.dtype)
        if initial_state is not None:
            initial_state = F.pad(initial_state[:, :, None], (0, 0, 0, 0, 0, n - 1)).flatten(1, 2)
        o, state = kernel(
            q=q.repeat_interleave(n, 2), k=k.flatten(2, 3), v=values.flatten(2, 3),
            g=log_decay.repeat_interleave(n, 2), scale=1.0, initial_state=initial_state,
            output_final_state=output_final_state,
        )  # fmt: skip
        o = o.unflatten(2, (-1, n)).sum(3)
        return o, None if state is None else state.unflatten(1, (-1, n)).sum(2)
    values = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    return recur(MAMBA3, values, initial_state, output_final_state)


def mamba3_mimo_recurrence(
    q: Float[Tensor, "batch pos head read d_key"],
    k: Float[Tensor, "batch pos head step d_key"],
    v: Float[Tensor, "batch pos head step d_value"],
    beta: Float[Tensor, "batch pos head step"],
    log_decay: Float[Tensor, "batch pos head"],
    read_weights: Float[Tensor, "batch pos head read d_value"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The same with ``o_t = sum_r read_weights_tr * (S_t^T q_tr)``."""
    values = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay, read_weights=read_weights)
    return recur(MAMBA3_MIMO, values, initial_state, output_final_state)


class Mamba3(nn.Module):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx, self.A_floor, self.rank = layer_idx, config.A_floor, config.mimo_rank if config.is_mimo else 1
        self.num_heads, self.head_k_dim, self.head_v_dim = config.num_heads, config.state_size, config.head_dim
        heads, d_groups = self.num_heads, config.n_groups * self.rank * self.head_k_dim
        d_inner = heads * self.head_v_dim
        n_angles = int(config.state_size * config.rope_fraction) // 2
        self.parts = [d_inner, d_inner, d_groups, d_groups, heads, heads, heads, n_angles]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.parts), bias=config.use_bias)
        self.B_norm, self.C_norm = (nn.RMSNorm(self.head_k_dim, eps=config.norm_eps) for _ in "BC")
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(heads, self.rank, self.head_k_dim)) for _ in "BC")
        self.dt_bias, self.D = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.ones(heads))
        self.gate = nn.SiLU()  # named, so that hooks find what passes here
        if config.is_outproj_norm:
            self.norm = HeadNorm(heads, config.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(d_inner, config.hidden_size, bias=config.use_bias)

    def init_weights_(self) -> None:
        init.uniform_(self.dt_bias, math.log(math.expm1(0.001)), math.log(math.expm1(0.1)))  # type: ignore[arg-type]
        for ones in (self.D, self.B_bias, self.C_bias):
            init.ones_(ones)  # type: ignore[arg-type]

    def keys(
        self, y: Float[Tensor, "batch pos channel"], norm: nn.Module, bias: Tensor, angle: Tensor
    ) -> Float[Tensor, "batch pos head r d_key"]:
        """Queries or keys of each head: normalised, shared by the heads of a group, with a bias of their own, and the
        first pairs of channels turned by ``angle [batch, pos, head, pair]``."""
        x = norm(y.unflatten(-1, (self.rank, -1, self.head_k_dim))).transpose(2, 3)
        x = at_least_float32(x).repeat_interleave(self.num_heads // x.shape[2], 2) + bias
        return self.turned(x, angle[..., None, :]).to(y.dtype)

    def turned(self, x: Tensor, angle: Tensor) -> Tensor:
        """Neighbours are a pair."""
        pairs, rest = x.tensor_split([2 * angle.shape[-1]], -1)
        first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack(turned(first, second, angle), -1).flatten(-2)
        return torch.cat([pairs, rest], -1)

    def steps(
        self, y: Float[Tensor, "batch pos head r d"], cache: Cache | None, state_idx: int
    ) -> Float[Tensor, "batch pos head step d"]:
        """Of the token before, zeros before the first, and of the token itself."""
        before = with_past(y.flatten(2), 1, cache, self.layer_idx, state_idx)[:, :-1]
        return torch.cat([before.view_as(y), y], 3)

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        z, v, k, q, dt, A, share, angle = self.in_proj(x).split(self.parts, -1)
        z, v = (y.unflatten(-1, (self.num_heads, 1, -1)) for y in (z, v))
        dt, share = F.softplus(at_least_float32(dt) + self.dt_bias), at_least_float32(share).sigmoid()
        if mask is not None:  # padding takes no time and leaves nothing
            v, dt = v * mask[..., None, None], dt * mask
        log_decay = -dt * F.softplus(at_least_float32(A)).clamp_min(self.A_floor)
        turns = math.pi * at_least_float32(angle).tanh()[..., None, :] * dt[..., None]
        total = running_total(wide(turns.flatten(2)), cache, self.layer_idx, state_idx=2)
        angle = total.remainder(2 * math.pi).to(turns.dtype).view_as(turns)
        q, k = self.keys(q, self.C_norm, self.C_bias, angle), self.keys(k, self.B_norm, self.B_bias, angle)
        k = k if mask is None else k * mask[..., None, None]
        beta = torch.stack([(1 - share) * dt * log_decay.exp(), share * dt], -1)
        o, state = self.read(
            z,
            v,
            cache,
            q=q,
            k=self.steps(k, cache, state_idx=0),
            beta=beta.repeat_interleave(self.rank, -1),
            log_decay=log_decay,
            initial_state=past_state(cache, self.layer_idx),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.out_proj(o)

    def read(
        self, z: Tensor, v: Tensor, cache: Cache | None, q: Tensor, **rest: Any
    ) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch head d_key d_value"] | None]:
        """What the heads give, skip, norm and gate included, for ``z`` and ``v [batch, pos, head, 1, d_value]``; and
        the final state."""
        z = self.gate(z)
        o, state = mamba3_recurrence(q=q[:, :, :, 0], v=self.steps(v, cache, state_idx=1), **rest)
        o = (o + v[:, :, :, 0] * self.D[:, None]).flatten(2)
        o = self.norm(o) if hasattr(self, "norm") else o
        return o * z.flatten(2), state


class Mamba3MIMO(Mamba3):
    """With several inputs and outputs per head. Their gates and the sum are weights of the reads."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = config.num_heads, self.rank, config.head_dim
        self.mimo_x, self.mimo_z, self.mimo_o = (nn.Parameter(torch.ones(shape)) for _ in "xzo")

    def init_weights_(self) -> None:
        super().init_weights_()
        for x, value in ((self.mimo_x, 1 / self.rank), (self.mimo_z, 1.0), (self.mimo_o, 1 / self.rank)):
            init.constant_(x, value)  # type: ignore[arg-type]

    def turned(self, x: Tensor, angle: Tensor) -> Tensor:
        """A channel and the one half of all channels on are a pair."""
        n = angle.shape[-1]
        (first, others), (second, rest) = (half.tensor_split([n], -1) for half in x.chunk(2, -1))
        first, second = turned(first, second, angle)
        return torch.cat([first, others, second, rest], -1)

    def read(self, z: Tensor, v: Tensor, cache: Cache | None, q: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
        gate, v = self.gate(z * self.mimo_z), v * self.mimo_x
        v_steps, weights = self.steps(v, cache, state_idx=1), gate * self.mimo_o
        o, state = mamba3_mimo_recurrence(q=q, v=v_steps, read_weights=weights, **rest)
        skip = gate * (v * (self.mimo_o * self.D[:, None, None]))
        return (o + skip.sum(3)).flatten(2), state


class Mamba3Block(Block):
    """Norm and mixer, no MLP."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = (Mamba3MIMO if config.is_mimo else Mamba3)(config, layer_idx)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, first: None) -> tuple[Tensor, None]:
        return x + self.mixer(self.norm(x), mask, cache), None


class Mamba3Model(RecurrentModel):
    config_class = Mamba3Config
    base_model_prefix = "backbone"
    block, final_norm = Mamba3Block, "norm_f"


class Mamba3ForCausalLM(RecurrentForCausalLM):
    config_class = Mamba3Config
    base_model_prefix = "backbone"
    stack = Mamba3Model
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}


__all__ = ["Mamba3Config", "Mamba3ForCausalLM", "Mamba3Model", "mamba3_mimo_recurrence", "mamba3_recurrence"]
