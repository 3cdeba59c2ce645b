"""Gated DeltaNet: Qwen3.5, Qwen3.5-MoE, Qwen3-Next, OLMo-Hybrid, Qwen4-Exp.

    S_t = exp(g) (I - beta k k^T) S_{t-1} + k (beta v)^T          o_t = S_t^T q / sqrt(d_key),   q, k of length 1

so that, in the letters of `writesae.recurrence`: decay ``exp(g)``, erase write ``a = -beta exp(g) k``, erase read
``b = k``, write ``k (beta v)^T``. A key head serves ``n_heads / n_key_heads`` consecutive value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from writesae.hooks.families.base import Family, KernelCall
from writesae.recurrence import Recurrence, Write, at_least_float32

_ARGUMENT = {"q": "query", "k": "key", "v": "value", "beta": "beta", "log_decay": "g"}


class GatedDeltaCall(KernelCall):
    """A call of ``*_gated_delta_rule(query, key, value, g, beta, ...)``."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.changed: dict[str, Tensor] = {}
        self.known: dict[tuple[str, tuple[int, ...] | None], Tensor] = {}
        self.n_heads = arguments["value"].shape[2]
        self.heads_per_key = self.n_heads // arguments["key"].shape[2]

    def get(self, quantity: str, heads: Sequence[int] | None = None) -> Tensor:
        if quantity in self.changed:
            value = self.changed[quantity]
            return value if heads is None else value[:, :, list(heads)]
        key = (quantity, None if heads is None else tuple(heads))
        if key not in self.known:
            self.known[key] = self._canonical(quantity, heads)
        return self.known[key]

    def _canonical(self, quantity: str, heads: Sequence[int] | None) -> Tensor:
        x = self.arguments[_ARGUMENT[quantity]]
        if quantity in ("q", "k"):
            if heads is not None:
                x = x[:, :, [h // self.heads_per_key for h in heads]]
            x = at_least_float32(x)
            if self.arguments.get("use_qk_l2norm_in_kernel", False):
                x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
            if quantity == "q":
                x = x * self._scale
            if heads is None and self.heads_per_key > 1:
                x = x.repeat_interleave(self.heads_per_key, 2)
            return x
        return at_least_float32(x if heads is None else x[:, :, list(heads)])

    @property
    def _scale(self) -> float:
        return self.arguments["query"].shape[-1] ** -0.5

    def set(self, quantity: str, value: Tensor) -> None:
        self.changed[quantity] = value

    @property
    def initial_state(self) -> Tensor | None:
        return self.arguments.get("initial_state")

    def recurrence(self, heads: Sequence[int] | None = None) -> Recurrence:
        return _recurrence({name: self.get(name, heads) for name in ("q", "k", "beta", "log_decay")})

    def write(self, heads: Sequence[int] | None = None) -> Write:
        return _write({name: self.get(name, heads) for name in ("k", "v", "beta")})

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        if not self.changed:
            return native(**self.arguments)
        arguments, dtype = dict(self.arguments), self.arguments["query"].dtype
        changed = dict(self.changed)
        if "q" in changed or "k" in changed:  # these are normalised and expanded already, so both must go in like that
            changed["q"] = self.get("q") / self._scale
            changed["k"] = self.get("k")
            arguments["use_qk_l2norm_in_kernel"] = False
        for quantity, value in changed.items():
            # A GPU kernel wants one dtype for q, k, v; the torch function computes in float32 whatever it gets.
            as_given = value.is_cuda and quantity in ("q", "k", "v")
            arguments[_ARGUMENT[quantity]] = value.to(dtype) if as_given else value
        o, state = native(**arguments)
        return o.to(dtype), state


def _recurrence(values: Mapping[str, Tensor]) -> Recurrence:
    k, g = values["k"], values["log_decay"]
    return Recurrence(values["q"], g, a=k * -(values["beta"] * g.exp())[..., None], b=k)


def _write(values: Mapping[str, Tensor]) -> Write:
    return Write(values["k"], values["beta"][..., None] * values["v"])


def _dims(mixer: nn.Module) -> tuple[int, int, int]:
    return int(mixer.num_v_heads), int(mixer.head_k_dim), int(mixer.head_v_dim)  # type: ignore[arg-type]


def _modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


GATED_DELTANET = Family(
    name="Gated DeltaNet",
    rule="gated_delta",
    mixers={
        _modeling("qwen3_5"): "Qwen3_5GatedDeltaNet",
        _modeling("qwen3_5_moe"): "Qwen3_5MoeGatedDeltaNet",
        _modeling("qwen3_next"): "Qwen3NextGatedDeltaNet",
        _modeling("olmo_hybrid"): "OlmoHybridGatedDeltaNet",
        _modeling("qwen4_exp"): "Qwen4ExpTextGatedDeltaNet",
    },
    kernels=("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    helpers=("causal_conv1d_fn", "causal_conv1d_update"),
    inputs=("q", "k", "v", "beta", "log_decay"),
    gate_norms=("norm", "o_norm"),
    dims=_dims,
    call=GatedDeltaCall,
    recurrence=_recurrence,
    write=_write,
)
