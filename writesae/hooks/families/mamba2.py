"""Mamba-2: Mamba-2 itself, Bamba, Zamba2, Falcon-H1, Nemotron-H, Granite-4 (GraniteMoeHybrid).

    S_t = exp(dt A) S_{t-1} + B (dt x)^T          o_t = S_t^T C,   then  y_t = o_t + D x_t

so that, in the letters of `writesae.recurrence`: decay ``exp(dt A)`` with one number per head, no erase, write
``B (dt x)^T``, read ``C``. Several heads share a group's ``B`` and ``C``. The model keeps the state as ``S^T``,
``[batch, head, head_dim, state]``.

The skip ``D x`` passes the memory by, so it is left out of the native call and added to what comes of the read: an edit
of ``v`` changes what the memory gets and not the skip. ``beta`` (dt) is how strongly a token writes; the decay that
comes from the same dt is a quantity of its own, ``log_decay``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hooks.families.base import Family, KernelCall, as_given, of_heads
from writesae.hooks.families.gdn import modeling
from writesae.hooks.families.registry import register
from writesae.recurrence import rules
from writesae.recurrence.kernels import chunked

_ARGUMENT = {"q": "C", "k": "B", "v": "hidden_states"}


class ChunkScan(KernelCall):
    """A call of ``mamba2_chunk_scan(hidden_states [batch, pos, head, head_dim], dt [batch, pos, head], A [head],
    B [batch, pos, group, state], C, ...)``, which returns the outputs, and the final state only if told to."""

    state_argument = "initial_states"

    def __init__(self, family: Family, arguments: dict[str, Any]):
        super().__init__(family, arguments)
        self.skip = self._skip()  # now: a hook may change x in place

    def sequence(self, name: str) -> Tensor:
        """An argument, ``[batch, pos, head or group, ...]``."""
        return self.arguments[name]

    def per_head(self, name: str) -> Tensor:
        """A parameter, ``[head]``."""
        return self.arguments[name]

    def dt(self) -> Tensor:
        """As the native function makes it, dtype and all."""
        dt = self.sequence("dt")
        if self.arguments.get("dt_bias") is not None:
            dt = dt + self.per_head("dt_bias").to(dt.dtype)
        if self.arguments.get("dt_softplus"):
            dt = F.softplus(dt)
        return dt.clamp(*self.arguments["dt_limit"]) if "dt_limit" in self.arguments else dt

    def canonical(self, quantity: str, heads: Sequence[int] | None) -> Tensor:
        n_heads = self.sequence("hidden_states").shape[2]
        if quantity in _ARGUMENT:
            return of_heads(self.sequence(_ARGUMENT[quantity]), heads, n_heads)
        dt = of_heads(self.dt(), heads, n_heads)
        if quantity == "beta":
            return dt
        A = self.per_head("A").float()
        return dt * (A if heads is None else A[list(heads)])

    @property
    def sequences(self) -> tuple[str, ...]:
        return (*_ARGUMENT.values(), "dt")

    @property
    def initial_state(self) -> Tensor | None:
        state = self.arguments.get(self.state_argument)
        return None if state is None else state.mT

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # as the torch function returns them

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        if {"beta", "log_decay"} & self.changed.keys():  # the native function ties these two, and A to heads
            return chunked(self.recurrence(), self.write(), self.initial_state)
        arguments: dict[str, Any] = self.arguments | {"D": self.no_skip(), "z": None}
        changed = dict(self.changed)
        if "q" in changed or "k" in changed:  # of as many groups as heads, both
            changed |= {"q": self.get("q"), "k": self.get("k")}
        for quantity, value in changed.items():
            name = _ARGUMENT[quantity]
            arguments[name] = self.to_native(as_given(value, arguments[name]))
        return self.from_native(native(**arguments))

    # What is particular to a scan of many tokens; `StepUpdate` says it of one.

    def _skip(self) -> Tensor | None:
        D = self.arguments.get("D")
        return None if D is None else D[..., None] * self.arguments["hidden_states"].float()

    def no_skip(self) -> Tensor | None:
        """What the native function takes as ``D`` to leave the skip out."""
        return None

    def to_native(self, value: Tensor) -> Tensor:
        return value

    def from_native(self, returned: Any) -> tuple[Tensor, Tensor | None]:
        o, state = returned if self.arguments.get("return_final_states") else (returned, None)
        return o, None if state is None else state.mT

    def result(self, o: Tensor, state: Tensor | None) -> Any:
        y = o if self.skip is None else (o + self.skip).to(o.dtype)
        y = y.contiguous()  # Falcon-H1 takes a view
        if not self.arguments.get("return_final_states"):
            return y
        assert state is not None
        return y, state.mT


class StepUpdate(ChunkScan):
    """A call of ``mamba2_selective_state_update(state, hidden_states [batch, head, head_dim], dt, A, B [batch, group,
    state], C, ...)``: a scan of one token, where all that belongs to a head is spread over its ``head_dim`` (and
    ``state``), and the state is updated in place. It knows no limits of dt: where a model has any (the lower one is 0
    or 0.001 in those there are), decoding and prefill differ in the model itself, and so they do here."""

    state_argument = "state"
    given = False  # the state is not the cache's own: it must stay as it is, also for a backward pass

    def start_from(self, state: Tensor) -> None:
        super().start_from(state)
        self.given = True

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        if self.given:
            return chunked(self.recurrence(), self.write(), self.initial_state)
        return super().run(native)

    def sequence(self, name: str) -> Tensor:
        x = self.arguments[name].unsqueeze(1)
        return x[..., 0] if name == "dt" else x

    def per_head(self, name: str) -> Tensor:
        x = self.arguments[name]
        return x[:, 0, 0] if name == "A" else x[:, 0]

    def _skip(self) -> Tensor | None:
        D = self.arguments.get("D")
        return None if D is None else self.arguments["hidden_states"] * D

    def no_skip(self) -> Tensor | None:
        D = self.arguments.get("D")
        return None if D is None else torch.zeros_like(D)  # mamba-ssm's step fails without a D

    def to_native(self, value: Tensor) -> Tensor:
        return value.squeeze(1)

    def from_native(self, returned: Any) -> tuple[Tensor, Tensor | None]:
        return returned.unsqueeze(1), self.initial_state

    def result(self, o: Tensor, state: Tensor | None) -> Tensor:
        assert state is not None
        if not self.given:
            self.arguments["state"].copy_(state.mT)
        y = o.squeeze(1).to(self.arguments["hidden_states"].dtype)
        y = y if self.skip is None else (y + self.skip).to(y.dtype)
        z = self.arguments.get("z")
        return (y if z is None else (y * F.silu(z)).to(y.dtype)).contiguous()


def _call(family: Family, arguments: dict[str, Any]) -> KernelCall:
    return (StepUpdate if "state" in arguments else ChunkScan)(family, arguments)


MAMBA2 = Family(
    name="Mamba-2",
    rule=rules.MAMBA2,
    mixers={
        modeling("mamba2"): "Mamba2Mixer",
        modeling("bamba"): "BambaMixer",
        modeling("zamba2"): "Zamba2MambaMixer",
        modeling("falcon_h1"): "FalconH1Mixer",
        modeling("nemotron_h"): "NemotronHMamba2Mixer",
        modeling("granitemoehybrid"): "GraniteMoeHybridMambaLayer",
    },
    kernels=("mamba2_chunk_scan", "mamba2_selective_state_update"),
    helpers=("causal_conv1d_fn", "causal_conv1d_update"),
    fused=("mamba2_split_conv1d_scan_combined",),
    sizes=("num_heads", "ssm_state_size", "head_dim"),
    norms=("norm",),
    transposed=True,
    call=_call,
    letters={
        "q": "C",
        "k": "B",
        "v": "x for the memory; the skip D x keeps its own",
        "beta": "dt, which only writes here",
        "log_decay": "dt A",
        "o": "S^T C, without the skip D x",
    },
)
register(MAMBA2)
