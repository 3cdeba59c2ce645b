"""Texts cut into windows: tokens that are read together, from an empty memory, and never cross from text to text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

Texts = str | Iterable[str] | Int[Tensor, "n pos"]
"""A text, several, or token ids, one text a row."""


class Window(NamedTuple):
    """One window by itself: which text it is of, which token of that text it begins with, and its tokens."""

    document: int
    start: int
    tokens: Int[Tensor, " n_pos"]


def each_window(
    model: HookedRecurrentModel, texts: Texts | Iterable[str | Int[Tensor, " _"]], context: int
) -> Iterator[Window]:
    """Windows one after the other, of texts that need not fit into memory at once.

    Unlike those of `Windows`, the last of a text may be shorter than ``context``, so that every token is in one.
    """
    for document, text in enumerate([texts] if isinstance(texts, str) else texts):
        if len(text):
            row = model.to_tokens(text)[0][0]
            for start in range(0, len(row), context):
                yield Window(document, start, row[start : start + context])


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of ``context`` tokens each.

    Attributes:
        tokens: their token ids.
        document: which text each is of.
        start: which token of that text it begins with.
        longest: tokens of the longest text.
    """

    tokens: Int[Tensor, "n context"]
    document: Int[Tensor, " n"]
    start: Int[Tensor, " n"]
    longest: int = 0

    @classmethod
    def cut(cls, model: HookedRecurrentModel, texts: Texts, context: int) -> Windows:
        """Cut each text into windows; the remainder at its end is dropped. See `enough` for short texts."""
        rows = [model.to_tokens(text)[0][0] for text in ([texts] if isinstance(texts, str) else texts)]
        return cls.of_rows(rows, context)

    @classmethod
    def of_rows(cls, rows: Sequence[Int[Tensor, " _"]], context: int) -> Windows:
        """The same, from texts that are token ids already."""
        numbers = [len(row) // context for row in rows]
        parts = [row[: n * context].reshape(n, context) for row, n in zip(rows, numbers, strict=True)]
        return cls(
            torch.cat(parts) if parts else torch.empty(0, context, dtype=torch.long),
            torch.arange(len(rows)).repeat_interleave(torch.tensor(numbers, dtype=torch.long)),
            torch.cat([torch.arange(n) * context for n in numbers]) if numbers else torch.empty(0, dtype=torch.long),
            max(map(len, rows), default=0),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> int:
        """Tokens per window."""
        return self.tokens.shape[1]

    def __getitem__(self, index: slice | Tensor) -> Windows:
        return Windows(self.tokens[index], self.document[index], self.start[index], self.longest)

    def enough(self, n: int = 1, *, of: str = "the text", lower: str = "context") -> Windows:
        """Itself, if there are ``n`` windows at least.

        Args:
            n: how many are needed.
            of: what was cut, for the message.
            lower: the arguments that would ask for less, for the message.

        Raises:
            ValueError: there are fewer; the message has the numbers.
        """
        if len(self) < n:
            raise ValueError(
                f"{of} makes {len(self)} windows of {self.context} tokens (the longest text has {self.longest}), and "
                f"{n} {'is' if n == 1 else 'are'} needed: give more or longer text, or lower {lower}"
            )
        return self

    def spread(self, max_tokens: int | None) -> Windows:
        """As many as ``max_tokens`` allows, evenly spread over all of them; None for all."""
        wanted = min(len(self), at_most(max_tokens, self.context))
        return self[torch.arange(wanted) * len(self) // max(wanted, 1)]

    def draw(self, n: int, generator: torch.Generator) -> Windows:
        """``n`` of them at random, none twice."""
        return self[torch.randperm(len(self), generator=generator)[:n]]


def at_most(max_tokens: int | None, context: int) -> int:
    """How many windows ``max_tokens`` allows; ValueError if not one."""
    if max_tokens is not None and max_tokens < context:
        raise ValueError(f"max_tokens={max_tokens} is less than one window of {context} tokens")
    return sys.maxsize if max_tokens is None else max_tokens // context


def together(rows: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "batch n_pos"], dict[str, Tensor]]:
    """Rows of tokens as a batch, padded on the left, and the ``attention_mask`` to give the model, if it needs one."""
    n_pos = max(map(len, rows))
    ids = torch.stack([F.pad(row, (n_pos - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (n_pos - len(row), 0)) for row in rows])
    return ids, {} if bool(mask.all()) else {"attention_mask": mask}
