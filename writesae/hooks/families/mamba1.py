"""Mamba-1: Mamba itself, FalconMamba, Jamba, Zamba.

    h_t[c, n] = exp(dt_c A_cn) h_{t-1}[c, n] + B_n (dt_c x_c)          o_t[c] = sum_n C_n h_t[c, n],   y = o + D x

so that, in the letters of `writesae.recurrence`, **a head is a channel**, with a state of one column ``[d_key, 1]``:
read ``C`` and key ``B``, which all channels share, value ``x_c``, ``beta`` is ``dt_c``, and a decay ``dt_c A_cn`` per
key channel. (No two channels have the same decay, so they cannot be columns of one state.) The model keeps its states
as ``[batch, channel, d_key]``.

``B`` and ``C`` are expanded, not copied, for the channels asked for, and decays made for these alone. What the function
does beside its recurrence stays outside the memory: the skip ``D x`` and the gate ``silu(z)``.

Zamba has several groups of channels with a ``B`` and ``C`` of their own, and calls its function for each in turn. These
calls are seen as one, of all channels (`Family.calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.hooks.families.base import Family, KernelCall, as_given
from writesae.hooks.families.gdn import modeling
from writesae.hooks.families.registry import register
from writesae.recurrence import at_least_float32, rules

_SEQUENCES = ("hidden_states", "dt", "B", "C")


class SelectiveScan(KernelCall):
    """Calls of ``mamba_selective_scan(hidden_states [batch, channel, pos], dt [batch, channel, pos],
    A [channel, d_key], B [batch, d_key, pos], C, D [channel], z [batch, channel, pos], delta_bias [channel], ...)``,
    one for each group of channels. It returns the outputs, and the final state only if told to; it begins at zero.

    Here all groups are side by side and tokens come second: ``hidden_states`` and ``dt [batch, pos, channel]``, ``B``
    and ``C [batch, pos, group, d_key]``.

    Attributes:
        parts: the arguments of each call as they came.
    """

    bias = "delta_bias"
    softplus = "delta_softplus"

    def __init__(self, family: Family, arguments: dict[str, Any]):
        self.parts: list[dict[str, Any]] = arguments.get("parts") or [arguments]
        super().__init__(family, self._joined())
        if self.parts[0].get("D") is not None:  # now: a hook may change x in place
            self.skips = [part["hidden_states"] * self.per_token(part["D"]) for part in self.parts]
        else:
            self.skips = []

    def _joined(self) -> dict[str, Any]:
        of = lambda name: [part[name] for part in self.parts]  # noqa: E731
        joined: dict[str, Any] = {name: _side_by_side(list(map(self.tokens, of(name))), -1) for name in _SEQUENCES[:2]}
        joined |= {name: torch.stack(list(map(self.tokens, of(name))), 2) for name in ("B", "C")}
        joined["A"] = _side_by_side(of("A"), 0)
        for name, dim in ((self.bias, 0), (self.state_argument, 1)):
            given = self.parts[0].get(name) is not None
            joined[name] = _side_by_side(of(name), dim) if given else None
        return joined

    def dt(self) -> Tensor:
        """As the native function makes it, dtype and all."""
        dt, bias = self.arguments["dt"], self.arguments[self.bias]
        dt = dt if bias is None else dt + bias.to(dt.dtype)
        return F.softplus(dt) if self.parts[0].get(self.softplus) else dt

    def canonical(self, quantity: str, heads: Sequence[int] | None) -> Tensor:
        x = self.arguments["hidden_states"]
        n_channels = x.shape[2]
        if quantity in ("q", "k"):
            shared = at_least_float32(self.arguments["C" if quantity == "q" else "B"])
            served = n_channels // shared.shape[2]
            if heads is not None and (shared.shape[2] > 1):
                return shared[:, :, [h // served for h in heads]]
            n = n_channels if heads is None else len(heads)
            each = shared.unsqueeze(3).expand(*shared.shape[:3], n // shared.shape[2], shared.shape[3])
            return each.flatten(2, 3)  # of one group: a view
        if quantity == "v":
            return at_least_float32(_of(x, heads))[..., None]
        dt = at_least_float32(_of(self.dt(), heads))
        if quantity == "beta":
            return dt
        A = self.arguments["A"].float()
        return dt[..., None] * (A if heads is None else A[list(heads)])

    @property
    def sequences(self) -> tuple[str, ...]:
        return _SEQUENCES

    @property
    def initial_state(self) -> Tensor | None:
        state = self.arguments[self.state_argument]
        return None if state is None else state[..., None]

    @property
    def begins_natively(self) -> bool:
        """The native function begins at this state."""
        return self.arguments[self.state_argument] is None

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        # The native function ties dt to decays, B and C to all channels, and it knows no state but zero.
        if not self.begins_natively or self.changed.keys() - {"v"}:
            return self.compute()
        v = self.changed.get("v")
        pieces = [None] * len(self.parts) if v is None else self._apart(v[..., 0], 2)
        returned = []
        for part, piece in zip(self.parts, pieces, strict=True):
            arguments = {**part, "D": self.no_skip(part), "z": None}
            if piece is not None:
                x = as_given(self.to_native(piece), part["hidden_states"])
                arguments |= {"hidden_states": x, "B": part["B"].to(x.dtype), "C": part["C"].to(x.dtype)}
            returned.append(native(**arguments))
        return self.from_native(returned)

    def _apart(self, x: Tensor, dim: int) -> list[Tensor]:
        """What belongs to each call."""
        return list(x.split([part["hidden_states"].shape[1] for part in self.parts], dim))

    def result(self, o: Tensor, state: Tensor | None) -> Any:
        """What the mixer expects back, of each call if it makes several."""
        outputs = [self.to_native(piece) for piece in self._apart(o[..., 0], 2)]
        for i, part in enumerate(self.parts):
            if self.skips:
                outputs[i] = outputs[i] + self.skips[i]
            if part.get("z") is not None:
                outputs[i] = outputs[i] * F.silu(part["z"])
        results = self.with_states(outputs, None if state is None else self._apart(state[..., 0], 1))
        return results[0] if len(results) == 1 else results

    @staticmethod
    def blank(arguments: dict[str, Any]) -> Any:
        """Something of the kind that a call returns, to be filled in."""
        x, A = arguments["hidden_states"], arguments["A"]
        y = x.new_empty(x.shape, dtype=torch.float32)
        return (y, x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)) if arguments.get("return_last_state") else y

    # What is particular to a scan of many tokens; `StateUpdate` says it of one.

    def tokens(self, x: Tensor) -> Tensor:
        """An argument with its tokens second, ``[batch, pos, ...]``."""
        return x.mT

    def to_native(self, x: Tensor) -> Tensor:
        """The way back."""
        return x.mT

    def per_token(self, D: Tensor) -> Tensor:
        return D[:, None]

    def no_skip(self, part: dict[str, Any]) -> Tensor | None:
        """What the native function takes as ``D`` to leave the skip out."""
        return None

    def from_native(self, returned: list[Any]) -> tuple[Tensor, Tensor | None]:
        with_state = self.parts[0].get("return_last_state")
        outputs = [found[0] if with_state else found for found in returned]
        o = _side_by_side([self.tokens(y) for y in outputs], -1)[..., None]
        return o, _side_by_side([S for _, S in returned], 1)[..., None] if with_state else None

    def with_states(self, outputs: list[Tensor], states: list[Tensor] | None) -> list[Any]:
        if not self.parts[0].get("return_last_state"):
            return outputs
        assert states is not None
        return list(zip(outputs, states, strict=True))


class StateUpdate(SelectiveScan):
    """Calls of ``mamba_selective_state_update(state [batch, channel, d_key], hidden_states [batch, channel], dt, A, B
    [batch, d_key], C, ...)``: a scan of one token, whose state is updated in place."""

    state_argument = "state"
    bias = "dt_bias"
    softplus = "dt_softplus"
    given = False  # the state is not the cache's own: it must stay as it is, also for a backward pass

    def start_from(self, state: Tensor) -> None:
        super().start_from(state)
        self.given = True

    @property
    def begins_natively(self) -> bool:
        return not self.given

    def tokens(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)

    def to_native(self, x: Tensor) -> Tensor:
        return x.squeeze(1)

    def per_token(self, D: Tensor) -> Tensor:
        return D

    def no_skip(self, part: dict[str, Any]) -> Tensor | None:
        D = part.get("D")
        return None if D is None else torch.zeros_like(D)

    def from_native(self, returned: list[Any]) -> tuple[Tensor, Tensor | None]:
        states = [part["state"] for part in self.parts]  # now those after the token
        return _side_by_side([self.tokens(y) for y in returned], -1)[..., None], _side_by_side(states, 1)[..., None]

    def with_states(self, outputs: list[Tensor], states: list[Tensor] | None) -> list[Any]:
        assert states is not None
        if not self.given:
            for part, state in zip(self.parts, states, strict=True):
                part["state"].copy_(state)
        return [y.to(part["hidden_states"].dtype) for y, part in zip(outputs, self.parts, strict=True)]

    @staticmethod
    def blank(arguments: dict[str, Any]) -> Tensor:
        return torch.empty_like(arguments["hidden_states"])


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    """The parts as one tensor; a single one is itself."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _of(x: Tensor, heads: Sequence[int] | None) -> Tensor:
    return x if heads is None else x[:, :, list(heads)]


def _call(family: Family, arguments: dict[str, Any]) -> KernelCall:
    first = (arguments.get("parts") or [arguments])[0]
    return (StateUpdate if "state" in first else SelectiveScan)(family, arguments)


MAMBA1 = Family(
    name="Mamba",
    rule=rules.MAMBA1,
    mixers={
        modeling("mamba"): "MambaMixer",
        modeling("falcon_mamba"): "FalconMambaMixer",
        modeling("jamba"): "JambaMambaMixer",
        modeling("zamba"): "ZambaMambaMixer",
    },
    kernels=("mamba_selective_scan", "mamba_selective_state_update"),
    helpers=("causal_conv1d_fn", "causal_conv1d_update"),
    fused=("mamba_inner_fn",),
    sizes=("intermediate_size", "ssm_state_size", 1),
    columns=True,
    calls="n_mamba_heads",
    forgets=("mamba_selective_scan",),
    call=_call,
    letters={
        "q": "C, of all channels",
        "k": "B, of all channels",
        "v": "x for the memory, one number per channel; the skip D x keeps its own",
        "beta": "dt, which only writes here",
        "log_decay": "dt A",
        "o": "C h, without the skip D x and before the gate",
    },
)
register(MAMBA1)
