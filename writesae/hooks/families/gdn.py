"""Gated DeltaNet: Qwen3.5, Qwen3.5-MoE, Qwen3-Next, OLMo-Hybrid, Qwen4-Exp.

    S_t = (I - beta k k^T) exp(g) S_{t-1} + k (beta v)^T          o_t = S_t^T q / sqrt(d_key),   q, k of length 1

so that, in the letters of `writesae.recurrence`: decay ``exp(g)``, erase write ``a = -beta k``, erase read
``b = exp(g) k``, write ``k (beta v)^T``. A key head serves ``n_heads / n_key_heads`` consecutive value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from writesae.hooks.families.base import SSM, Family, KernelCall, as_given, of_heads
from writesae.hooks.families.registry import register
from writesae.recurrence import rules

_ARGUMENT = {"q": "query", "k": "key", "v": "value", "beta": "beta", "log_decay": "g"}
_RAW = {"q_raw": "query", "k_raw": "key"}


class GatedDeltaCall(KernelCall):
    """A call of ``*_gated_delta_rule(query, key, value, g, beta, ...)`` or ``*_kimi_delta_attention(...)``."""

    def set(self, quantity: str, value: Tensor) -> None:
        if quantity not in _RAW:
            return super().set(quantity, value)
        new = {name: value if name == quantity else self.canonical(name, None) for name in _RAW}  # all with all heads
        self.arguments = self.arguments | {
            _RAW[name]: x.to(self.arguments[_RAW[name]].dtype) for name, x in new.items()
        }

    def canonical(self, quantity: str, heads: Sequence[int] | None) -> Tensor:
        if quantity in _RAW:
            return of_heads(self.arguments[_RAW[quantity]], heads, self.arguments["value"].shape[2])
        then = {"q": lambda x: self._normalised(x) * self._scale, "k": self._normalised}.get(quantity, lambda x: x)
        return of_heads(self.arguments[_ARGUMENT[quantity]], heads, self.arguments["value"].shape[2], then)

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.arguments.get("use_qk_l2norm_in_kernel", False):
            return x
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)

    @property
    def _scale(self) -> float:
        return self.arguments["query"].shape[-1] ** -0.5

    @property
    def sequences(self) -> tuple[str, ...]:
        return tuple(_ARGUMENT.values())

    @property
    def initial_state(self) -> Tensor | None:
        return self.arguments.get("initial_state")

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
            argument = _ARGUMENT[quantity]
            arguments[argument] = as_given(value, arguments[argument]) if quantity in ("q", "k", "v") else value
        o, state = native(**arguments)
        return o.to(dtype), state


def modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


GATED_DELTANET = Family(
    name="Gated DeltaNet",
    rule=rules.GATED_DELTA,
    mixers={
        modeling("qwen3_5"): "Qwen3_5GatedDeltaNet",
        modeling("qwen3_5_moe"): "Qwen3_5MoeGatedDeltaNet",
        modeling("qwen3_next"): "Qwen3NextGatedDeltaNet",
        modeling("olmo_hybrid"): "OlmoHybridGatedDeltaNet",
        modeling("qwen4_exp"): "Qwen4ExpTextGatedDeltaNet",
    },
    kernels=("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    helpers=("causal_conv1d_fn", "causal_conv1d_update"),
    sizes=("num_v_heads", "head_k_dim", "head_v_dim"),
    raw=("q_raw", "k_raw"),
    norms=("norm", "o_norm"),
    call=GatedDeltaCall,
    aliases=SSM
    | {"q": "q_raw", "k": "k_raw", "ssm_C": "q_raw", "ssm_B": "k_raw", "ssm_write": "beta"}
    | {"recurrence_out": "o", "gate_input": "z"},
)
register(GATED_DELTANET)
