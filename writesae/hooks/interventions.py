"""Edits of what a layer writes into its state, as small objects that say *what*; `intervene` says where and when.

Every edit is a matrix ``E_t`` added to the state of some heads after the token's own write. It is computed from the
model's own write at that token; several edits of one token add up. So ``Delete`` twice subtracts the write twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.positions import Positions, PositionSet, row_of_each
from writesae.hooks.sites import Site
from writesae.jobs.arguments import check_names
from writesae.recurrence import Read, Recurrence, Write, at_least_float32, memory_dtype
from writesae.recurrence.dynamics import delta_of


@dataclass(frozen=True)
class Moment:
    """What an edit can see: the heads it edits, over the tokens of one call.

    Attributes:
        write: the native write, leading dimensions ``[batch, pos, head]``.
        recurrence: decay, erase and reads of the same heads and tokens.
        index: for each token, its place among the positions asked for (None where these are all tokens, or a slice).
        state: the state before the token; only for edits with ``needs_state``, which get one token at a time.
        delta_rank: rank of this family's deltas, see `delta_of`.
    """

    write: Write
    recurrence: Recurrence
    index: Int[Tensor, "batch pos"] | None = None
    state: Float[Tensor, "batch head d_key d_value"] | None = None
    delta_rank: int = 1

    def target(self, name: str) -> Write | Float[Tensor, "batch pos head d_key d_value"]:
        """The native write, the delta, or the state after the token's own write: what an SAE was trained on."""
        if name == "write":
            return self.write
        assert self.state is not None, f"target {name!r} needs the state"
        delta = delta_of(self.recurrence, self.write, self.state, rank=self.delta_rank)
        if name == "delta":
            return delta
        decay = at_least_float32(self.recurrence.log_decay[:, 0]).exp()
        decay = decay[..., None, None] if decay.ndim == 2 else decay[..., None]
        return decay.unsqueeze(1) * self.state.unsqueeze(1) + delta.dense()


@dataclass(frozen=True)
class Intervention(ABC):
    """What to do to the writes of one layer.

    Attributes:
        layer: a recurrent layer (``model.sites``).
        head: a value head, several, or None for all.
    """

    layer: int
    head: int | Sequence[int] | None = None

    def __new__(cls, *_: Any, **named: Any) -> Any:
        check_names(cls, named)
        return super().__new__(cls)

    @property
    def fitted(self) -> Any:
        """The SAE that has to fit the model (an `AttachableSAE`); None if there is none."""
        return None

    @property
    def needs_state(self) -> bool:
        """True: `edit` is called one token at a time, and sees the state."""
        return False

    @property
    def replaces(self) -> bool:
        """True: the native write is left out, and what `edit` returns is written instead."""
        return False

    @abstractmethod
    def edit(self, now: Moment) -> Write | None:
        """What to write, ``[batch, pos, head]``; None for nothing. Positions not asked for are dropped later."""

    def made(self, now: Moment) -> Write | None:
        """`edit`, where the layer is and in the dtype of its memory: whatever dtype and device an SAE has."""
        write, own = self.edit(now), now.write.value
        return None if write is None else write.to(own.device, memory_dtype(own))

    def places(self, positions: Positions, read: Read) -> tuple[PositionSet, PositionSet | None]:
        """The tokens whose writes are edited, and those whose reads alone are (None: every read that sees them)."""
        return PositionSet(positions), None

    def check(self, site: Site, positions: PositionSet) -> None:
        """Raise IndexError or ValueError unless this can be done at ``site`` and ``positions``."""
        heads = self.heads(site)
        for head in heads:
            site.check_head(head)
        if len(set(heads)) < max(len(heads), 1):
            raise ValueError(f"head={self.head!r} at layer {site.layer}: give each head once, or None for all")

    def heads(self, site: Site) -> list[int]:
        if self.head is None:
            return list(range(site.n_heads))
        return list(self.head) if isinstance(self.head, Sequence) else [self.head]


@dataclass(eq=False)
class Attached:
    """An intervention in force: what, at which positions, and which read first sees it; or which reads alone."""

    what: Intervention
    heads: list[int]
    positions: PositionSet
    read: Read
    targets: PositionSet | None = None

    @property
    def places(self) -> list[PositionSet]:
        """All positions that it is about."""
        return [self.positions] if self.targets is None else [self.positions, self.targets]

    def __deepcopy__(self, _memo: object) -> Attached:
        return self  # copies of a cache know what was hidden for it


@dataclass(frozen=True)
class Delete(Intervention):
    """Take the native write out of the state. Decay and erase stay."""

    @property
    def replaces(self) -> bool:
        return True

    def edit(self, now: Moment) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Add(Intervention):
    """Add ``scale * write`` to the state of every head asked for.

    Attributes:
        write: what to add. Leading dimensions broadcast to ``[batch, positions asked]``: none for the same everywhere,
            ``[n]`` for one per position, ``[batch, 1]`` for one per sequence.
        scale: the write is multiplied by it: a number, one for each row of the batch ``[batch]``, or for each row and
            position asked for ``[batch, n]``.
        relative: if True, the write is first scaled to the native write's Frobenius norm at each token and head, so
            that ``scale=3`` adds three times as much as the model writes there (paper, section 4). Whatever size
            ``write`` has is lost then: strengths go into ``scale``.
    """

    write: Write
    scale: float | int | Float[Tensor, "batch *n"] = 1.0
    relative: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.write, Write):
            got = f"a {type(self.write).__name__}"
            raise TypeError(f"write= is a Write, as cache.write(layer)[0, 5, head], or ws.Write(key, value); got {got}")
        if not isinstance(self.scale, Real | Tensor):
            raise TypeError(f"scale={self.scale!r}: give a number, or a tensor [batch] or [batch, n]")

    def check(self, site: Site, positions: PositionSet) -> None:
        super().check(site, positions)
        if (self.write.d_key, self.write.d_value) != (site.d_key, site.d_value):
            raise ValueError(
                f"a write of {self.write.d_key} x {self.write.d_value} does not fit layer {site.layer}, whose states "
                f"are {site.d_key} x {site.d_value}"
            )
        lead, scales = self.write.shape, self._scales.shape
        if len(scales) > 2 or scales[-1] not in (1, positions.distinct):
            raise ValueError(
                f"scale has shape {list(torch.as_tensor(self.scale).shape)} at positions={positions.asked!r}: give a "
                f"number, one for each row of the batch [batch], or [batch, n] for n different positions"
            )
        if len(lead) > 2 or (lead and lead[-1] != 1 and lead[-1] != positions.distinct):
            raise ValueError(
                f"a write with leading dimensions {list(lead)} at positions={positions.asked!r}: give none (the same "
                f"write everywhere), [n] (one per position: a list of n different ones), [batch, 1] (one per sequence) "
                f"or [batch, n]"
            )

    def edit(self, now: Moment) -> Write:
        write = self.write.to(now.write.key.device).to(now.write.key.dtype)
        if self.relative:
            write = write * (1 / write.norm().clamp_min(1e-30))
        write = _place(write, now) * self._at_each(now)
        return write * now.write.norm() if self.relative else write

    @property
    def _scales(self) -> Float[Tensor, "..."]:
        """``[rows, positions]``, one of each if it does not depend on them."""
        x = torch.as_tensor(self.scale) * 1.0
        return x.reshape(-1, 1) if x.ndim < 2 else x

    def _at_each(self, now: Moment) -> float | int | Float[Tensor, "batch pos 1"]:
        """The scale of each token, for all heads."""
        if not isinstance(self.scale, Tensor):
            return self.scale
        table = self._scales.to(now.write.key)
        return table[entries(table.shape[0], table.shape[1], now, f"scale {list(self.scale.shape)}")][..., None]


@dataclass(frozen=True, kw_only=True)
class Replace(Add):
    """Write ``scale * write`` instead of the native write; arguments as for `Add`."""

    @property
    def replaces(self) -> bool:
        return True


def _place(write: Write, now: Moment) -> Write:
    """A write with leading dimensions ``[]``, ``[n]``, ``[batch, 1]`` or ``[batch, n]``, for all tokens and heads."""
    table = write[(None,) * (2 - len(write.shape))]
    rows, n = table.shape
    index = entries(rows, n, now, f"a write with leading dimensions {list(write.shape)}")
    return table[index][:, :, None].expand(*now.write.shape)


def entries(rows: int, n: int, now: Moment, what: str) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch pos"]]:
    """Where each token's entry is in a table ``[rows, n]``: a row for each sequence, a column for each position."""
    batch, n_pos, _ = now.write.shape
    of_each, device = row_of_each(rows, batch, what), now.write.key.device
    if n == 1 or now.index is None:
        return of_each[:, None].to(device), torch.zeros(batch, n_pos, dtype=torch.long, device=device)
    return of_each[:, None].to(device), now.index


def some_of(heads: Sequence[int], n_heads: int) -> tuple[int, ...] | None:
    """Heads, or None if these are all."""
    return None if list(heads) == list(range(n_heads)) else tuple(heads)
