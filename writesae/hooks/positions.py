"""Which tokens: positions count the real tokens of the whole sequence, prompt and generated alike, from 0.

Left padding does not shift them; a sequence fed in pieces or decoded token by token keeps counting.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

Positions: TypeAlias = int | Sequence[int] | slice | Int[Tensor, "..."] | None

PAD = -1  # the position of a padding token


class Clock:
    """Knows which positions the tokens of the running forward pass have. One a model, told by `begin` before each pass.

    Costs nothing until somebody asks: `positions` works it out and keeps it for the pass.
    """

    def __init__(self, parameters: Sequence[str]):
        self.parameters = parameters  # names, in order, of what the model's forward takes
        self._call: dict[str, Any] = {}
        self._positions: Tensor | None = None
        # Tokens seen by caches that cannot tell (those of models without any attention layer).
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, text_model: nn.Module) -> Clock:
        return cls(list(inspect.signature(text_model.forward).parameters))

    def __reduce__(self) -> tuple[type[Clock], tuple[Sequence[str]]]:
        return Clock, (self.parameters,)  # copies and pickles of a model start anew

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self._call = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self._positions = None
        cache = self._call.get("past_key_values")
        self._past = self._length(cache) if cache is not None else 0
        if cache is not None and cache in self._seen:
            self._seen[cache] += self._shape()[1]

    def end(self) -> None:
        self._call = {}  # positions stay: gradient checkpointing runs layers again after the pass

    def positions(self) -> Int[Tensor, "batch pos"]:
        """The position of each token of the running pass; `PAD` for padding.

        Raises:
            ValueError: the attention mask does not say which tokens are padding.
        """
        if self._positions is None:
            self._positions = self._work_out()
        return self._positions

    def try_positions(self) -> Int[Tensor, "batch pos"] | None:
        """`positions`, or None where they cannot be known."""
        try:
            return self.positions()
        except ValueError:
            return None

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens of the running pass are padding; None if none is, or if that cannot be known."""
        if self._positions is None and self._call.get("attention_mask") is None:
            return None
        positions = self.try_positions()
        return positions == PAD if positions is not None and bool((positions == PAD).any()) else None

    def _shape(self) -> torch.Size:
        ids, embeds = self._call.get("input_ids"), self._call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ValueError("the text model was called with neither input_ids nor inputs_embeds")
        return tokens.shape[:2]

    def _length(self, cache: Any) -> int:
        try:
            return int(cache.get_seq_length())
        except ValueError:  # no attention layer in it
            return self._seen.setdefault(cache, 0)

    def _work_out(self) -> Tensor:
        batch, n_pos = self._shape()
        mask = self._call.get("attention_mask")
        total = self._past + n_pos
        if mask is None:
            ids = self._call.get("input_ids")
            device = (ids if ids is not None else self._call["inputs_embeds"]).device
            return torch.arange(self._past, total, device=device).expand(batch, n_pos)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != total:
            got = f"a tensor {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"positions need an attention mask [batch, {total}] over the whole sequence ({self._past} cached and "
                f"{n_pos} new tokens); got {got}. Pass a 2-D mask of that length, or none if nothing is padded."
            )
        real = mask.bool()
        return (real.long().cumsum(-1) - 1).masked_fill(~real, PAD)[:, -n_pos:]


@dataclass
class PositionSet:
    """The positions an edit was asked for, and which of them have come by.

    Accepts None (every token), an int, a list, a slice with non-negative bounds, or an integer tensor: ``[n]`` for
    every sequence alike, ``[batch, n]`` for each its own.
    """

    asked: Positions
    wanted: Int[Tensor, "rows n"] | None = field(init=False, default=None)  # None: a slice or everything
    span: slice = field(init=False, default_factory=lambda: slice(0, None, 1))
    # Which of them each sequence has reached, for batches of each size that came by; a slice counts as one.
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
        wanted = torch.as_tensor(asked)
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
        """Which tokens are meant, and for each the index of its position in what was asked (None for slices, all)."""
        if self.wanted is None:
            p, s = positions, self.span
            hit = (p != PAD) & (p >= s.start) & ((p - s.start) % s.step == 0)
            hit = hit if s.stop is None else hit & (p < s.stop)
            self._came_by(hit.any(1, keepdim=True))
            return hit, None
        wanted = self._per_row(positions.shape[0]).to(positions.device)
        equal = positions[:, :, None] == wanted[:, None, :]
        self._came_by(equal.any(1))
        return equal.any(-1), equal.int().argmax(-1)

    def _per_row(self, batch: int) -> Int[Tensor, "batch n"]:
        assert self.wanted is not None
        if self.wanted.shape[0] not in (1, batch):
            raise ValueError(f"positions [{self.wanted.shape[0]}, {self.wanted.shape[1]}] for a batch of {batch}")
        return self.wanted.expand(batch, -1)

    def _came_by(self, which: Bool[Tensor, "batch n"]) -> None:
        which = which.cpu()
        self.reached[len(which)] = self.reached.get(len(which), torch.zeros_like(which)) | which

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
        start = torch.tensor([[self.span.start]])
        return sorted(
            {
                p
                for batch, reached in self.reached.items()
                for p in (start.expand(batch, 1) if self.wanted is None else self._per_row(batch))[~reached].tolist()
            }
        )
