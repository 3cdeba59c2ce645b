"""The model under check, the tokens it is run on, and what its dtype lets one expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from writesae.hooks.detached import detached
from writesae.model import HookedRecurrentModel
from writesae.model.continuing import cache_argument, positions_behind
from writesae.models.arguments import arguments_of

KEEP = 4
"""Logits are compared at so many last tokens: they depend on all that came before, and a vocabulary may be large."""

PREFILL, PIECES, DECODE, PADDED = "prefill", "in pieces", "token by token", "padded on the left"
MODES = (PREFILL, PIECES, DECODE, PADDED)
PADDING = 5


@dataclass
class Subject:
    """A model under check.

    Attributes:
        model: the wrapped model.
        ids: tokens, ``[1, pos]``.
        layers: the recurrent layers that are looked into.
        seed: of everything random.
    """

    model: HookedRecurrentModel
    ids: Int[Tensor, "1 pos"]
    layers: Sequence[int]
    seed: int = 0
    _unwrapped: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_pos(self) -> int:
        return self.ids.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the model, as transformers has it."""
        return self.model.hf_model.dtype

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def of_last(self) -> dict[str, Any]:
        """The argument that leaves out the logits that nobody looks at."""
        return self.model.logits_of_last(KEEP)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, mode: str = PREFILL) -> Float[Tensor, "keep vocab"]:
        """Logits of the last tokens, the sequence fed in one of `MODES`, with all that is attached."""
        n = self.n_pos
        if mode == PIECES:
            return self.fed([n // 2, 1, n - n // 2 - 1 - KEEP, KEEP])
        if mode == DECODE:
            return self.fed([n - KEEP, *[1] * KEEP])
        if mode == PADDED:
            padding = self.ids.new_zeros(1, PADDING)
            mask = torch.cat([padding, torch.ones_like(self.ids)], 1)
            return self.logits(torch.cat([padding, self.ids], 1), attention_mask=mask)[0]
        return self.logits(self.ids)[0]

    def logits(self, ids: Int[Tensor, "batch pos"], **arguments: Any) -> Float[Tensor, "batch keep vocab"]:
        """Logits of the last tokens of some sequences."""
        arguments = {"use_cache": False, **self.of_last, **arguments}
        return self.model.hf_model(input_ids=ids, **arguments).logits[:, -KEEP:].float()

    def fed(self, pieces: Sequence[int]) -> Float[Tensor, "keep vocab"]:
        """The same in pieces of these lengths, with a cache."""
        found = [self.logits(ids, **more)[0] for ids, more in self.pieces(pieces)]
        return torch.cat(found)[-KEEP:]

    def pieces(self, lengths: Sequence[int]) -> Iterator[tuple[Int[Tensor, "1 piece"], dict[str, Any]]]:
        """The tokens in pieces, and the arguments that go with each: one cache, and positions where the model takes
        them (some models count from 0 in every piece unless told)."""
        hf_model, start = self.model.hf_model, 0
        cache = {cache_argument(hf_model): DynamicCache(config=self.model.config), "use_cache": True}
        places = positions_behind(torch.ones_like(self.ids)) if "position_ids" in arguments_of(hf_model) else None
        for n in lengths:
            here = slice(start, start + n)
            more = {} if places is None else {"position_ids": places[:, here]}
            yield self.ids[:, here], {**cache, **more}
            start += n

    def unwrapped(self, mode: str = PREFILL) -> Float[Tensor, "keep vocab"]:
        """What the model says that nobody wrapped, kept from the first time on."""
        if mode not in self._unwrapped:
            with detached(self.model.hf_model):
                self._unwrapped[mode] = self.run(mode)
        return self._unwrapped[mode]

    def from_run_to_run(self, mode: str) -> float:
        """How far the unwrapped model is from itself: 0, but for kernels that sum in any order."""
        with detached(self.model.hf_model):
            return largest(self.run(mode) - self.unwrapped(mode))

    # --- what the dtype lets one expect -------------------------------------------------------------------------------

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the logits of a token: what an effect is measured against."""
        return float(self.unwrapped().std(-1).mean())

    @cached_property
    def rounding(self) -> float:
        """By how much logits of the unwrapped model differ when the same tokens are fed in another way, at most."""
        native = self.unwrapped()
        return max(largest(self.unwrapped(mode) - native) for mode in MODES[1:])

    @property
    def noise(self) -> float:
        """The typical size of such a difference."""
        native = self.unwrapped()
        return max(float((self.unwrapped(mode) - native).square().mean().sqrt()) for mode in MODES[1:])

    @property
    def tolerance(self) -> float:
        """How far logits may be from those of another way to the same numbers: a few times `rounding`, and at least
        what one rounding of the largest logit in this dtype comes to."""
        return 4 * max(self.rounding, self.eps * largest(self.unwrapped()))

    @property
    def kernel_tolerance(self) -> float:
        """The same for what one recurrence gives, as a share of its largest value: a few units in the last place of
        the dtype. float32 sums many terms, and an accelerator may multiply float32 in TF32, which has 10 bits."""
        if self.dtype in (torch.float32, torch.float64):
            return 1e-4 if self.model.device.type == "cpu" else 4e-3
        return 8 * self.eps


def largest(x: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(x.abs().max())


def of_the_largest(difference: Float[Tensor, "batch pos head ..."], value: Tensor) -> list[float]:
    """For each head, the largest difference as a share of the head's largest value."""
    size = value.abs().amax((0, 1, *range(3, value.ndim)))
    return (difference.abs().amax((0, 1, *range(3, value.ndim))) / size.clamp_min(1e-3 * size.max() + 1e-30)).tolist()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode while the block runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
