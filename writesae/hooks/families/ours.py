"""Our own PyTorch models (`writesae.models`), whose mixers call their recurrence with the canonical quantities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from writesae.hooks.families.base import Family, KernelCall, as_given, of_heads
from writesae.hooks.families.registry import register
from writesae.hooks.quantities import PER_KEY, PER_VALUE, Quantity
from writesae.recurrence import rules

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


RWKV7 = Family(
    name="RWKV-7",
    rule=rules.RWKV7,
    mixers={"writesae.models.rwkv7": "RWKV7Attention"},
    kernels=("rwkv7_recurrence",),
    sizes=_SIZES,
    norms=("g_norm",),
    seen_at={"z": "gate", "v_mix": "v_mix"},
    call=CanonicalCall,
    letters={"q": "r, the receptance", "z": "g, which multiplies as it is", "o": "without the token's own bonus"},
)
register(RWKV7)

RWKV6 = Family(
    name="RWKV-6",
    rule=rules.RWKV6,
    mixers={"writesae.models.rwkv6": "RWKV6Attention"},
    kernels=("rwkv6_recurrence",),
    sizes=_SIZES,
    norms=("g_norm",),
    seen_at={"z": "gate"},
    call=CanonicalCall,
    letters={"q": "r, the receptance", "z": "g, which multiplies as it is", "o": "without the token's own bonus"},
)
register(RWKV6)

DELTANET = Family(
    name="DeltaNet",
    rule=rules.DELTA,
    mixers={"writesae.models.delta_net": "DeltaNet"},
    kernels=("delta_rule_recurrence",),
    sizes=_SIZES,
    norms=("o_norm",),
    call=CanonicalCall,
)
register(DELTANET)

GATED_DELTANET = Family(
    name="Gated DeltaNet of flash-linear-attention",
    rule=rules.GATED_DELTA,
    mixers={"writesae.models.gated_delta_net": "GatedDeltaNet"},
    kernels=("gated_delta_rule_recurrence",),
    sizes=_SIZES,
    norms=("o_norm",),
    call=CanonicalCall,
)
register(GATED_DELTANET)

KDA = Family(
    name="Kimi Delta Attention of flash-linear-attention",
    rule=rules.KIMI_DELTA,
    mixers={"writesae.models.kda": "KimiDeltaAttention"},
    kernels=("kda_recurrence",),
    sizes=_SIZES,
    norms=("o_norm",),
    call=CanonicalCall,
)
register(KDA)

COMBA = Family(
    name="Comba",
    rule=rules.COMBA,
    mixers={"writesae.models.comba": "Comba"},
    kernels=("comba_recurrence",),
    sizes=_SIZES,
    norms=("o_norm",),
    call=CanonicalCall,
    letters={"q": "q - D p", "kappa": "p"},
)
register(COMBA)

DELTA_PRODUCT = Family(
    name="Gated DeltaProduct",
    rule=rules.DELTA_PRODUCT,
    mixers={"writesae.models.gated_delta_product": "GatedDeltaProduct"},
    kernels=("delta_product_recurrence",),
    sizes=_SIZES,
    norms=("o_norm",),
    call=CanonicalCall,
    meanings={
        "k": Quantity("[batch, pos, head, step, d_key]", "where each step of a token writes, after any norm"),
        "v": Quantity("[batch, pos, head, step, d_value]", "what it writes"),
        "beta": Quantity("[batch, pos, head, step]", "how strongly it erases and writes"),
        "write": Quantity("Write [batch, pos, head]", "the native write: keys k, values what is left of each step's v"),
    },
    letters={"log_decay": "before a token's first step; 0 without a forget gate"},
)
register(DELTA_PRODUCT)

MAMBA3 = Family(
    name="Mamba-3",
    rule=rules.MAMBA3,
    mixers={"writesae.models.mamba3": "Mamba3"},
    kernels=("mamba3_recurrence",),
    sizes=_SIZES,
    norms=("norm",),
    seen_at={"z": "gate"},
    call=CanonicalCall,
    meanings={
        "k": Quantity("[batch, pos, head, step, d_key]", "where a token writes: B of the token before, then its own"),
        "v": Quantity("[batch, pos, head, step, d_value]", "what it writes: x of the token before, then its own"),
        "beta": Quantity("[batch, pos, head, step]", "how strongly it writes each of them"),
        "write": Quantity("Write [batch, pos, head]", "the native write: keys k, values beta v"),
    },
    letters={
        "q": "C, with its bias, rotated",
        "log_decay": "dt A",
        "o": "S^T C, without the skip D x",
        "z": "silu(z), which multiplies as it is",
    },
)
register(MAMBA3)

MAMBA3_MIMO = replace(
    MAMBA3,
    name="Mamba-3 with several inputs and outputs per head",
    rule=rules.MAMBA3_MIMO,
    mixers={"writesae.models.mamba3": "Mamba3MIMO"},
    kernels=("mamba3_mimo_recurrence",),
    norms=(),
    seen_at={},
    meanings={
        **MAMBA3.meanings,
        "q": Quantity("[batch, pos, head, read, d_key]", "what each read of a token reads the state with"),
        "read_weights": Quantity(
            "[batch, pos, head, read, d_value]", "what multiplies each read before they are added"
        ),
    },
    letters={
        "q": "C_r, with its bias, rotated",
        "k": "B_r",
        "v": "x * mimo_x_r",
        "log_decay": "dt A",
        "read_weights": "mimo_o_r * silu(z * mimo_z_r)",
        "o": "sum of the weighted reads, without the skip",
    },
)
register(MAMBA3_MIMO)

GDN2 = Family(
    name="Gated DeltaNet 2",
    rule=rules.GDN2,
    mixers={"writesae.models.gdn2": "GatedDeltaNet2"},
    kernels=("gdn2_recurrence",),
    sizes=_SIZES,
    norms=("o_norm",),
    call=CanonicalCall,
    meanings={
        "erase_gate": Quantity(PER_KEY, "b: how much of each key channel the erase reads"),
        "write_gate": Quantity(PER_VALUE, "w: how much of each value channel it writes"),
        "write": Quantity("Write [batch, pos, head]", "the native write, in factors: key k, value write_gate * v"),
    },
)
register(GDN2)

GLA = Family(
    name="Gated Linear Attention",
    rule=rules.GLA,
    mixers={"writesae.models.gla": "GatedLinearAttention"},
    kernels=("gla_recurrence",),
    sizes=_SIZES,
    norms=("g_norm_swish_gate", "g_norm"),
    call=CanonicalCall,
)
register(GLA)

HGRN2 = Family(
    name="HGRN2",
    rule=rules.GLA,
    mixers={"writesae.models.hgrn2": "HGRN2Attention"},
    kernels=("gla_recurrence",),
    sizes=_SIZES,
    call=CanonicalCall,
    letters={"k": "1 - f", "v": "i, the input"},
)
register(HGRN2)

GSA = Family(
    name="Gated Slot Attention",
    rule=rules.GLA,
    mixers={"writesae.models.gsa": "GatedSlotAttention"},
    kernels=("gla_recurrence",),
    sizes=("num_heads", "num_slots", "head_v_dim"),
    norms=("g_norm",),
    seen_at={"scores": "scores"},
    call=CanonicalCall,
    meanings={"scores": Quantity(PER_KEY, "what each slot's key has in common with the query")},
    letters={
        "q": "the softmax of scores",
        "k": "s, how much goes into each slot; a hook changes that of values, not of keys",
        "log_decay": "of each slot; likewise",
        "state": "of values; that of keys has no hook point",
    },
)
register(GSA)

RETNET = Family(
    name="RetNet",
    rule=rules.SIMPLE_GLA,
    mixers={"writesae.models.retnet": "MultiScaleRetention"},
    kernels=("retention_recurrence",),
    sizes=_SIZES,
    norms=("g_norm_swish_gate", "g_norm"),
    call=CanonicalCall,
    letters={"q": "query, rotated by its place and scaled", "k": "key, rotated by its place", "log_decay": "fixed"},
)
register(RETNET)

LINEAR_ATTENTION = Family(
    name="Linear attention",
    rule=rules.LINEAR_ATTENTION,
    mixers={"writesae.models.linear_attn": "LinearAttention"},
    kernels=("linear_attn_recurrence",),
    sizes=_SIZES,
    call=CanonicalCall,
    letters={"q": "the query's features, scaled", "k": "the key's features"},
)
register(LINEAR_ATTENTION)
