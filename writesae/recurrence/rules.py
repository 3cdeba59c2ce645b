"""Update rules: what enters each one, and the recurrence and the write that it makes of that.

A rule is all of an architecture that its memory depends on. Models of ours run it, adapters read it off another
model's kernel, and a store rebuilds states by it without any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.recurrence.kernels import chunked, stretches
from writesae.recurrence.spec import Read, Recurrence
from writesae.recurrence.write import Write, at_least_float32, in_terms

Get: TypeAlias = Callable[[str], Tensor]
"""Gives a canonical quantity by its name, ``[batch, pos, head, ...]``."""


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: what sites and stores call it, e.g. ``"gated_delta"``.
        inputs: the quantities that enter it, in firing order.
        recurrence: decay, erase and reads, from canonical quantities.
        write: the native write, from canonical quantities.
        decay_per_key: ``log_decay`` is ``[batch, pos, head, d_key]``, one number per key channel.
        delta_rank: rank of what a token's state gains beyond its decay, for each term of its write: 1 if the erase
            writes along the key or nothing is erased, otherwise 2.
        strength: where the erase writes along the key, ``a = strength k``: this number ``[batch, pos, head]``, from
            canonical quantities. See `kernels.chunked`.
        reads_before: a token reads before it decays and writes, as its `Recurrence` says.
        reads: those of its inputs that only read the state.
    """

    name: str
    inputs: tuple[str, ...]
    recurrence: Callable[[Get], Recurrence]
    write: Callable[[Get], Write]
    decay_per_key: bool = False
    delta_rank: int = 1
    strength: Callable[[Get], Tensor] | None = None
    reads_before: bool = False
    reads: tuple[str, ...] = ("q",)

    def run(
        self, get: Get, initial_state: Float[Tensor, "batch head d_key d_value"] | None = None
    ) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"]]:
        """Outputs and final state of the recurrence, from canonical quantities (`kernels.chunked`)."""
        outputs, S = [], initial_state
        for here in stretches(*map(get, self.inputs)):
            some = lambda quantity, here=here: get(quantity)[here]  # noqa: E731
            strength = None if self.strength is None else self.strength(some)
            o, S = chunked(self.recurrence(some), self.write(some), S, strength=strength)
            outputs.append(o)
        assert S is not None
        return torch.cat(outputs, 1), S

    def first_read(self, read: Read) -> Read:
        """Which read first sees an edit: the one asked for, or the next where a token reads before it writes."""
        return "next" if self.reads_before else read

    @property
    def state_inputs(self) -> tuple[str, ...]:
        """The inputs that writes and states depend on: all but those that only read."""
        return tuple(quantity for quantity in self.inputs if quantity not in self.reads)

    def check_reads_once(self, what: str) -> None:
        """Raise ValueError for ``what`` that needs one read vector per token, where a token has several."""
        if "read_weights" in self.inputs:
            raise ValueError(
                f"{what} takes the one vector that a token reads its state with, and a token of {self.name} reads it "
                f"several times, each read with weights of its own: choose a layer of another architecture"
            )


def delta_recurrence(get: Get, log_decay: Tensor) -> Recurrence:
    """Decay first, then erase what the key finds: ``a = -beta k`` and ``b = exp(log_decay) k``."""
    k, decay = get("k"), log_decay.exp()
    b = k * (decay if decay.ndim == k.ndim else decay[..., None])
    return Recurrence(get("q"), log_decay, a=k * -get("beta")[..., None], b=b)


def nothing_erased(get: Get) -> Recurrence:
    """Decay, and no erase."""
    return Recurrence(get("q"), get("log_decay"))


def write_with_strength(get: Get) -> Write:
    """``k (beta v)^T``"""
    return Write(get("k"), get("beta")[..., None] * get("v"))


def plain_write(get: Get) -> Write:
    """``k v^T``"""
    return Write(get("k"), get("v"))


def _write_of_steps(get: Get) -> Write:
    """``sum_j k_j (beta_j v_j)^T`` over a token's steps."""
    return in_terms(get("k"), get("beta")[..., None] * get("v"))


def _gated_delta(get: Get) -> Recurrence:
    return delta_recurrence(get, get("log_decay"))


def _delta(get: Get) -> Recurrence:
    return delta_recurrence(get, torch.zeros_like(get("beta")))


def _linear_attention(get: Get) -> Recurrence:
    return Recurrence(get("q"), torch.zeros_like(get("k")[..., 0]))


def _comba(get: Get) -> Recurrence:
    return Recurrence(get("q"), get("log_decay"), a=get("k") * -get("beta")[..., None], b=get("kappa"))


def in_turn(get: Get, x: Float[Tensor, "batch pos head step d"]) -> Float[Tensor, "batch pos head step d"]:
    """What a token's steps write of ``x``, one after the other: ``y_j = beta_j (x_j - sum_{i<j} (k_i . k_j) y_i)``."""
    k, x, beta = at_least_float32(get("k")), at_least_float32(x), at_least_float32(get("beta"))[..., None, None]
    made = x[..., :0, :]
    for j in range(x.shape[-2]):
        now = slice(j, j + 1)
        found = k[..., now, :] @ k[..., :j, :].mT @ made
        made = torch.cat([made, beta[..., j, :, :] * (x[..., now, :] - found)], -2)
    return made


def _delta_product(get: Get) -> Recurrence:
    k, decay = get("k"), get("log_decay").exp()[..., None, None]
    return Recurrence(get("q"), get("log_decay"), a=k, b=-decay * in_turn(get, k))


def _write_in_turn(get: Get) -> Write:
    return in_terms(get("k"), in_turn(get, get("v")))


def _gdn2(get: Get) -> Recurrence:
    k, log_decay = get("k"), get("log_decay")
    return Recurrence(get("q"), log_decay, a=k, b=-log_decay.exp() * get("erase_gate") * k)


def _gated_write(get: Get) -> Write:
    return Write(get("k"), get("write_gate") * get("v"))


def _one(get: Get) -> Tensor:
    return torch.ones_like(get("k")[..., 0])


def _minus_beta(get: Get) -> Tensor:
    return -get("beta")


def _several_reads(get: Get) -> Recurrence:
    return Recurrence(get("q"), get("log_decay"), read_weights=get("read_weights"))


def _rwkv6(get: Get) -> Recurrence:
    return Recurrence(get("q"), get("log_decay"), reads_before=True)


def _rwkv7(get: Get) -> Recurrence:
    return Recurrence(get("q"), get("log_decay"), a=get("kappa") * get("iclr"), b=-get("kappa"))


_WITH_STRENGTH = ("q", "k", "v", "beta", "log_decay")

GATED_DELTA = Rule("gated_delta", _WITH_STRENGTH, _gated_delta, write_with_strength, strength=_minus_beta)
KIMI_DELTA = Rule(
    "kimi_delta", _WITH_STRENGTH, _gated_delta, write_with_strength, decay_per_key=True, strength=_minus_beta
)
COMBA = Rule("comba", (*_WITH_STRENGTH, "kappa"), _comba, write_with_strength, strength=_minus_beta)
DELTA_PRODUCT = Rule("delta_product", _WITH_STRENGTH, _delta_product, _write_in_turn, strength=_one)
GDN2 = Rule(
    "gdn2",
    ("q", "k", "v", "log_decay", "erase_gate", "write_gate"),
    _gdn2,
    _gated_write,
    decay_per_key=True,
    strength=_one,
)
MAMBA2 = Rule("mamba2", _WITH_STRENGTH, nothing_erased, write_with_strength)
MAMBA1 = Rule("mamba1", _WITH_STRENGTH, nothing_erased, write_with_strength, decay_per_key=True)
MAMBA3 = Rule("mamba3", _WITH_STRENGTH, nothing_erased, _write_of_steps)
MAMBA3_MIMO = Rule(
    "mamba3_mimo", (*_WITH_STRENGTH, "read_weights"), _several_reads, _write_of_steps, reads=("q", "read_weights")
)
DELTA = Rule("delta", ("q", "k", "v", "beta"), _delta, write_with_strength, strength=_minus_beta)
GLA = Rule("gla", ("q", "k", "v", "log_decay"), nothing_erased, plain_write, decay_per_key=True)
SIMPLE_GLA = Rule("simple_gla", ("q", "k", "v", "log_decay"), nothing_erased, plain_write)
LINEAR_ATTENTION = Rule("linear_attention", ("q", "k", "v"), _linear_attention, plain_write)
RWKV6 = Rule("rwkv6", ("q", "k", "v", "log_decay"), _rwkv6, plain_write, decay_per_key=True, reads_before=True)
RWKV7 = Rule(
    "rwkv7", ("q", "k", "v", "log_decay", "kappa", "iclr"), _rwkv7, plain_write, decay_per_key=True, delta_rank=2
)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        GATED_DELTA,
        KIMI_DELTA,
        COMBA,
        DELTA_PRODUCT,
        GDN2,
        MAMBA1,
        MAMBA2,
        MAMBA3,
        MAMBA3_MIMO,
        DELTA,
        GLA,
        SIMPLE_GLA,
        LINEAR_ATTENTION,
        RWKV6,
        RWKV7,
    )
}
"""Every rule that is known, by name; `writesae.hooks.register` adds the rule of a family from elsewhere."""
