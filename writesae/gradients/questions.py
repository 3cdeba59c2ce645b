"""What a gradient can be asked about: numbers that are read off the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence import at_least_float32


@dataclass(frozen=True, eq=False)
class Logit:
    """The number to ask about: the logit of a token, or a difference of two logits.

    Attributes:
        token: token id, one for all sequences or one per sequence, ``[batch]``; or a text of one token, whose id the
            function that gets the question asks its model for.
        at: column of the pass, one for all sequences or one per sequence; -1 is the last.
        minus: token id (or ids, or text) whose logit is subtracted; None for none.
    """

    token: int | str | Int[Tensor, " batch"]
    at: int | Int[Tensor, " batch"] = -1
    minus: int | str | Int[Tensor, " batch"] | None = None

    def of(self, rows: slice | Int[Tensor, " n"]) -> Logit:
        """The same question about some of the sequences."""
        some = lambda x: x[rows] if isinstance(x, Tensor) and x.ndim else x  # noqa: E731
        return Logit(some(self.token), some(self.at), some(self.minus))

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The number of each sequence, in float32 or more. Raises IndexError for a token outside the vocabulary or a
        column that is not there."""
        batch, n_pos, n_vocab = logits.shape
        rows, at = columns_of(self.at, batch, n_pos, logits.device)
        token = lambda given: _of_rows(given, batch, 0, n_vocab - 1, "token id").to(logits.device)  # noqa: E731
        logit = lambda given: at_least_float32(logits[rows, at, token(given)])  # noqa: E731
        return logit(self.token) if self.minus is None else logit(self.token) - logit(self.minus)


@runtime_checkable
class Knows(Protocol):
    """What a question is asked of: a model with a tokenizer."""

    def to_single_token(self, token: str | int) -> int: ...


def in_ids(of: Any, model: Knows) -> Any:
    """A question with ids where it had texts; a text alone is the logit of that token. Others are as they were.

    Raises:
        ValueError: a text that is not one token.
    """
    question = Logit(of) if isinstance(of, str) else of
    if not isinstance(question, Logit):
        return question
    if isinstance(question.at, str):
        raise TypeError(f"at={question.at!r}: a column; for the difference of two logits, Logit(token, minus=other)")
    id_of = lambda x: model.to_single_token(x) if isinstance(x, str) else x  # noqa: E731
    return replace(question, token=id_of(question.token), minus=id_of(question.minus))


def columns_of(
    at: int | Int[Tensor, " batch"], batch: int, n_pos: int, device: torch.device
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Rows and columns of one token of each sequence. Raises IndexError for a column that is not there."""
    return torch.arange(batch, device=device), _of_rows(at, batch, -n_pos, n_pos - 1, "position").to(device)


def _of_rows(given: int | str | Tensor, batch: int, first: int, last: int, what: str) -> Tensor:
    if isinstance(given, str):
        raise TypeError(f"{what} {given!r}: only a model knows its id, model.to_single_token({given!r})")
    x = torch.as_tensor(given)
    bad = x[(x < first) | (x > last)]
    if bad.numel():
        raise IndexError(f"{what} {int(bad.flatten()[0])} is out of range: allowed are {first} to {last}")
    return x.expand(batch)
