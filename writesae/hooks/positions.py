"""Which tokens are asked for.

Positions count the real tokens of the whole sequence, prompt and generated alike, from 0. Left padding does not
shift them; a sequence fed in pieces or decoded token by token keeps counting (`writesae.hooks.clock`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from writesae.hooks.scope import LOCK

Positions: TypeAlias = int | Sequence[int] | slice | Int[Tensor, "..."] | None

PAD = -1  # the position of a padding token


_beams: ContextVar[int] = ContextVar("beams", default=1)


@contextmanager
def several_of_each(n: int) -> Iterator[None]:
    """Each row of a batch becomes ``n`` rows beside each other, as in generation with beams, while the block runs."""
    token = _beams.set(n)
    try:
        yield
    finally:
        _beams.reset(token)


def beams() -> int:
    """How many rows each row of a batch has become, see `several_of_each`."""
    return _beams.get()


def row_of_each(n_rows: int, batch: int, what: str) -> Int[Tensor, " batch"]:
    """Which of ``n_rows`` things, one for all or one for each sequence, belongs to each row of a batch.

    Raises:
        ValueError: that many do not fit the batch.
    """
    n = _beams.get()
    if n_rows not in (1, batch) and n_rows * n != batch:
        raise ValueError(f"{what} for a batch of {batch}")
    return torch.arange(batch) // (batch // n_rows)


@dataclass
class PositionSet:
    """The positions that an edit was asked for, and which of them have been reached.

    Accepts None (every token), an int, a list, a slice with non-negative bounds, or an integer tensor: ``[n]`` for
    every sequence alike, ``[batch, n]`` for each its own.
    """

    asked: Positions
    wanted: Int[Tensor, "rows n"] | None = field(init=False, default=None)  # None: a slice or everything
    span: slice = field(init=False, default_factory=lambda: slice(0, None, 1))
    # Which of them each sequence has reached, by the number of sequences in the batch; a slice counts as one.
    reached: dict[int, Bool[Tensor, "batch n"]] = field(init=False, default_factory=dict)
    vouched: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        asked = self.asked
        if asked is None:
            return
        if isinstance(asked, slice):
            start, step = asked.start or 0, 1 if asked.step is None else asked.step
            if start < 0 or step < 1 or (asked.stop is not None and asked.stop <= start):
                raise ValueError(
                    f"positions={asked}: a slice needs 0 <= start < stop and step >= 1; it counts from the start"
                )
            self.span = slice(start, asked.stop, step)
            return
        if isinstance(asked, str):
            raise ValueError(f"positions={asked!r}: leave positions out, or give None, for every position")
        wanted = torch.as_tensor(asked, device="cpu")  # it is looked at here, before anything runs
        if wanted.dtype.is_floating_point or wanted.dtype == torch.bool or wanted.ndim > 2 or wanted.numel() == 0:
            raise ValueError(
                f"positions={asked!r}: give an int, a list of ints, a slice, an integer tensor [n] or [batch, n], "
                f"or None for every position"
            )
        if int(wanted.min()) < 0:
            raise ValueError(
                f"positions={asked!r}: positions count from 0 at the first token; the end moves while generating, "
                f"so negative ones have no meaning here"
            )
        self.wanted = wanted.long().reshape(-1 if wanted.ndim == 2 else 1, wanted.shape[-1] if wanted.ndim else 1)

    @property
    def distinct(self) -> int | None:
        """How many positions were asked for, the same number for every sequence; None for a slice or all."""
        if self.wanted is None:
            return None
        return min(len(set(row)) for row in self.wanted.tolist())

    def match(
        self, positions: Int[Tensor, "batch pos"]
    ) -> tuple[Bool[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Which tokens are meant, and for each the index of its position in what was asked (None for slices, all).

        ``positions`` and both answers are on the CPU: what follows from them must not wait for a device.
        """
        if self.wanted is None:
            p, s = positions, self.span
            hit = (p != PAD) & (p >= s.start) & ((p - s.start) % s.step == 0)
            hit = hit if s.stop is None else hit & (p < s.stop)
            self._note(hit.any(1, keepdim=True))
            return hit, None
        wanted = self._per_row(positions.shape[0])
        equal = positions[:, :, None] == wanted[:, None, :]
        self._note(equal.any(1))
        return equal.any(-1), equal.int().argmax(-1)

    def _per_row(self, batch: int) -> Int[Tensor, "batch n"]:
        assert self.wanted is not None
        rows, n = self.wanted.shape
        return self.wanted[row_of_each(rows, batch, f"positions [{rows}, {n}]")]

    def _note(self, which: Bool[Tensor, "batch n"]) -> None:
        with LOCK:  # several threads may run the edited model
            self.reached[len(which)] = self.reached.get(len(which), torch.zeros_like(which)) | which

    @property
    def ends(self) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """The first and the last position asked for, of each row; the last of an open slice is beyond all others."""
        if self.wanted is not None:
            return self.wanted.min(-1).values, self.wanted.max(-1).values
        last = torch.iinfo(torch.long).max if self.span.stop is None else self.span.stop - 1
        return torch.tensor([self.span.start]), torch.tensor([last])

    def outside(self, positions: Int[Tensor, "batch pos"]) -> tuple[bool, bool]:
        """Whether any of them comes before these tokens of a sequence, and whether any may come after."""
        real = positions != PAD
        begin = positions.masked_fill(~real, torch.iinfo(torch.long).max).min(-1).values
        first, last = (x[row_of_each(len(x), len(positions), f"positions {self.asked!r}")] for x in self.ends)
        return bool((first < begin).any()), bool((last > positions.max(-1).values).any())

    def check_within(self, lengths: Int[Tensor, " batch"]) -> None:
        """Raise IndexError unless every sequence (``lengths`` real tokens each) has the positions asked for."""
        lengths = lengths.cpu()
        if self.wanted is not None:
            last = self._per_row(len(lengths)).max(-1).values
        elif self.asked is not None:
            last = torch.full_like(lengths, (self.span.stop or self.span.start + 1) - 1)
        else:
            return
        for row in (last >= lengths).nonzero()[:1, 0].tolist():
            raise IndexError(
                f"position {int(last[row])} is out of range: sequence {row} has {int(lengths[row])} tokens "
                f"(positions 0 to {int(lengths[row]) - 1})"
            )

    def vouch(self) -> None:
        """Take every position as reached: a caller has checked them in another way."""
        self.vouched = True

    def missed(self) -> list[int]:
        """Positions asked for that a sequence that ran has not reached (of a slice: its start, if none of it was)."""
        if self.asked is None or self.vouched:
            return []
        asked = torch.tensor([[self.span.start]]) if self.wanted is None else self.wanted
        each = {batch: asked.repeat_interleave(batch // len(asked), 0) for batch in self.reached}
        return sorted({p for batch, reached in self.reached.items() for p in each[batch][~reached].tolist()})


def sent(x: Tensor | None, device: torch.device) -> Any:
    """From the CPU to a device, without waiting for what that has still to do."""
    return None if x is None else x.to(device, non_blocking=True)


def first_column(mask: Bool[Tensor, "batch pos"]) -> int | None:
    """The first token that any sequence has; None if there is none."""
    columns = mask.any(0).tolist()
    return columns.index(True) if True in columns else None
