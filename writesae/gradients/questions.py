"""What a gradient can be asked about: numbers that are read off the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Logit:
    """The number to ask about: the logit of a token, or a difference of two logits.

    Attributes:
        token: token id, one for all sequences or one per sequence, ``[batch]``.
        at: column of the pass, one for all sequences or one per sequence; -1 is the last.
        minus: token id (or ids) whose logit is subtracted; None for none.
    """

    token: int | Int[Tensor, " batch"]
    at: int | Int[Tensor, " batch"] = -1
    minus: int | Int[Tensor, " batch"] | None = None

    def of(self, rows: slice | Int[Tensor, " n"]) -> Logit:
        """The same question about some of the sequences."""
        some = lambda x: x[rows] if isinstance(x, Tensor) and x.ndim else x  # noqa: E731
        return Logit(some(self.token), some(self.at), some(self.minus))

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The number of each sequence. Raises IndexError for a token outside the vocabulary or a column not there."""
        batch, n_pos, n_vocab = logits.shape
        rows, at = columns_of(self.at, batch, n_pos, logits.device)
        token = lambda given: _of_rows(given, batch, 0, n_vocab - 1, "token id").to(logits.device)  # noqa: E731
        found = logits[rows, at, token(self.token)]
        return found if self.minus is None else found - logits[rows, at, token(self.minus)]


def columns_of(
    at: int | Int[Tensor, " batch"], batch: int, n_pos: int, device: torch.device
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Rows and columns of one token of each sequence. Raises IndexError for a column that is not there."""
    return torch.arange(batch, device=device), _of_rows(at, batch, -n_pos, n_pos - 1, "position").to(device)


def _of_rows(given: int | Tensor, batch: int, first: int, last: int, what: str) -> Tensor:
    x = torch.as_tensor(given)
    bad = x[(x < first) | (x > last)]
    if bad.numel():
        raise IndexError(f"{what} {int(bad.flatten()[0])} is out of range: allowed are {first} to {last}")
    return x.expand(batch)
