"""Which tokens of a batch are meant: a token of one sequence is a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from writesae.hooks.positions import PAD


@dataclass(frozen=True, eq=False)
class Cells:
    """Tokens of a batch, sequence by sequence; indices are on the CPU, since layers may lie on several devices.

    Attributes:
        rows: the sequence of each.
        columns: its column in the pass, padding counted.
        positions: its position, padding not counted.
    """

    rows: Int[Tensor, " cell"]
    columns: Int[Tensor, " cell"]
    positions: Int[Tensor, " cell"]

    @classmethod
    def of(
        cls,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"] | None,
        positions: Sequence[int] | None = None,
    ) -> Cells:
        """The tokens at some positions of each sequence (negative ones count from its end); None: all that are real.

        Raises:
            IndexError: a sequence has no such position.
        """
        real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        own = (real.long().cumsum(-1) - 1).masked_fill(~real, PAD)
        if positions is None:
            rows, columns = (own != PAD).nonzero(as_tuple=True)
            return cls(rows, columns, own[rows, columns])
        lengths = real.sum(-1, keepdim=True)
        asked = torch.tensor(list(positions)).long().expand(len(ids), -1)
        asked = torch.where(asked < 0, asked + lengths, asked)
        if not asked.numel():
            raise ValueError("positions=[] asks for nothing: give positions, or None for all")
        for row, i in ((asked < 0) | (asked >= lengths)).nonzero()[:1].tolist():
            raise IndexError(
                f"position {list(positions)[i]} is out of range: sequence {row} has {int(lengths[row])} tokens "
                f"(positions 0 to {int(lengths[row]) - 1})"
            )
        columns = (own[:, None] == asked[:, :, None]).int().argmax(-1)
        rows = torch.arange(len(ids))[:, None].expand_as(columns)
        return cls(rows.flatten(), columns.flatten(), asked.flatten())

    def __len__(self) -> int:
        return len(self.rows)

    def of_pass(self, x: Tensor) -> Tensor:
        """What these tokens have of a quantity of the pass, ``[batch, pos, ...] -> [cell, ...]``."""
        return x[self.rows.to(x.device), self.columns.to(x.device)]
