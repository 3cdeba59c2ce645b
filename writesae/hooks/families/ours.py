"""Our own PyTorch models (`writesae.models`), whose mixers call their recurrence with the canonical quantities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from writesae.hooks.families.base import Family, Get, KernelCall, as_given, of_heads
from writesae.hooks.families.gdn import delta_rule, strength_write
from writesae.recurrence import Recurrence, Write

_SIZES = ("num_heads", "head_k_dim", "head_v_dim")


class CanonicalCall(KernelCall):
    """A call of ``..._recurrence(q=, ..., initial_state=, output_final_state=)``, all ``[batch, pos, head, ...]``."""

    def canonical(self, quantity: str, heads: Sequence[int] | None) -> Tensor:
        return of_heads(self.arguments[quantity], heads, self.arguments["q"].shape[2])

    @property
    def initial_state(self) -> Tensor | None:
        return self.arguments.get("initial_state")

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        changed = {name: as_given(value, self.arguments[name]) for name, value in self.changed.items()}
        o, state = native(**self.arguments | changed)
        return o.to(self.arguments["q"].dtype), state


def _rwkv7(get: Get) -> Recurrence:
    return Recurrence(get("q"), get("log_decay"), a=get("kappa") * get("iclr"), b=-get("kappa"))


def _delta_net(get: Get) -> Recurrence:
    return delta_rule(get, torch.zeros_like(get("beta")))


def _gla(get: Get) -> Recurrence:
    return Recurrence(get("q"), get("log_decay"))


def _write(get: Get) -> Write:
    return Write(get("k"), get("v"))


RWKV7 = Family(
    name="RWKV-7",
    rule="rwkv7",
    mixers={"writesae.models.rwkv7": "RWKV7Attention"},
    kernels=("rwkv7_recurrence",),
    sizes=_SIZES,
    inputs=("q", "k", "v", "log_decay", "kappa", "iclr"),
    norms=("g_norm",),
    seen_at={"z": "gate", "v_mix": "v_mix"},
    decay_per_key=True,
    delta_rank=2,
    call=CanonicalCall,
    recurrence=_rwkv7,
    write=_write,
    letters={"q": "r, the receptance", "z": "g, which multiplies as it is", "o": "without the token's own bonus"},
)

DELTANET = Family(
    name="DeltaNet",
    rule="delta",
    mixers={"writesae.models.delta_net": "DeltaNet"},
    kernels=("delta_rule_recurrence",),
    sizes=_SIZES,
    inputs=("q", "k", "v", "beta"),
    norms=("o_norm",),
    call=CanonicalCall,
    recurrence=_delta_net,
    write=strength_write,
)

GLA = Family(
    name="Gated Linear Attention",
    rule="gla",
    mixers={"writesae.models.gla": "GatedLinearAttention"},
    kernels=("gla_recurrence",),
    sizes=_SIZES,
    inputs=("q", "k", "v", "log_decay"),
    norms=("g_norm_swish_gate", "g_norm"),
    decay_per_key=True,
    call=CanonicalCall,
    recurrence=_gla,
    write=_write,
)
