"""The model under check, the tokens it is run on, and what its dtype lets one expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.hooks import install
from writesae.hooks.detached import detached
from writesae.hooks.residual import stream_in
from writesae.model import HookedRecurrentModel
from writesae.model.continuing import cache_argument, positions_behind
from writesae.models.arguments import arguments_of
from writesae.recurrence import memory_dtype

KEEP = 4
"""Logits are compared at so many last tokens: they depend on all that came before, and a vocabulary may be large."""

PREFILL, PIECES, DECODE, PADDED = "prefill", "pieces", "decode", "left padding"
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
    _bare: dict[str, Tensor] = field(default_factory=dict)

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
        use_cache = cache_argument(self.model.hf_model) in arguments
        if not torch.is_grad_enabled():  # a cache lets no gradient through
            use_cache |= any(self.dtype in tap.family.needs_memory for tap in self.model.taps)
        out = self.model.hf_model(input_ids=ids, use_cache=use_cache, **self.of_last, **arguments)
        return out.logits[:, -KEEP:].float()

    def fed(self, pieces: Sequence[int]) -> Float[Tensor, "keep vocab"]:
        """The same in pieces of these lengths, with a cache."""
        found = [self.logits(ids, **more)[0] for ids, more in self.pieces(pieces)]
        return torch.cat(found)[-KEEP:]

    def pieces(self, lengths: Sequence[int]) -> Iterator[tuple[Int[Tensor, "1 piece"], dict[str, Any]]]:
        """The tokens in pieces, and the arguments that go with each: one cache, and positions where the model takes
        them (some models count from 0 in every piece unless told)."""
        hf_model, start = self.model.hf_model, 0
        cache = {cache_argument(hf_model): self.model.new_cache(self.ids)}
        places = positions_behind(torch.ones_like(self.ids)) if "position_ids" in arguments_of(hf_model) else None
        for n in lengths:
            here = slice(start, start + n)
            more = {} if places is None else {"position_ids": places[:, here]}
            yield self.ids[:, here], {**cache, **more}
            start += n

    def gets_wrong(self, mode: str) -> bool:
        """The model that nobody wrapped gets this mode wrong: it would begin each piece with an empty memory
        (`Family.forgets`), or take padding for tokens (`Family.ignores_padding`)."""
        families = [tap.family for tap in self.model.taps]
        if mode == PADDED:
            return any(family.ignores_padding for family in families)
        return mode == PIECES and any(family.forgets for family in families)

    def unwrapped(self, mode: str = PREFILL) -> Float[Tensor, "keep vocab"]:
        """What the model says that nobody wrapped, kept from the first time on; of a mode that it `gets_wrong`, its
        prefill."""
        if self.gets_wrong(mode):
            return self.unwrapped()
        if mode not in self._unwrapped:
            with detached(self.model.hf_model):
                self._unwrapped[mode] = self.run(mode)
        return self._unwrapped[mode]

    def bare(self, mode: str = PREFILL) -> Float[Tensor, "keep vocab"]:
        """What the model says with nothing attached, kept from the first time on."""
        if mode not in self._bare:
            self._bare[mode] = self.run(mode)
        return self._bare[mode]

    def from_run_to_run(self, mode: str) -> float:
        """How far the unwrapped model is from itself: 0, but for kernels that sum in any order."""
        with detached(self.model.hf_model):
            return largest(self.run(mode) - self.unwrapped(mode))

    # --- what the dtype lets one expect -------------------------------------------------------------------------------

    def nudged(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch keep vocab"]:
        """Logits of the unwrapped model if what enters each layer is off by up to one unit in the last place, at
        random, in each row by itself."""
        generator = torch.Generator().manual_seed(self.seed)

        def nudge(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            x = stream_in(args, kwargs)
            off = self.eps * (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
            new = (x.to(memory_dtype(x)) * (1 + off)).to(x.dtype)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        hf_model, layers = self.model.hf_model, install(self.model.hf_model).layers
        with detached(hf_model), ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(nudge, with_kwargs=True).remove)
            return self.logits(ids)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the logits of a token: what an effect is measured against."""
        return float(self.unwrapped().std(-1).mean())

    @cached_property
    def rounding(self) -> float:
        """By how much rounding moves a logit of the unwrapped model, at most: one unit in the last place at each layer
        (`nudged`), or the same tokens fed in another way."""
        native = self.unwrapped()
        found = [self.nudged(self.ids)[0], *(self.unwrapped(mode) for mode in MODES[1:])]
        return max(largest(logits - native) for logits in found)

    @property
    def tolerance(self) -> float:
        """How far logits may be from those of another way to the same numbers: a few times what rounding does."""
        return 8 * self.rounding

    @property
    def kernel_tolerance(self) -> float:
        """The same for what one recurrence gives, as a share of its largest value. On a CPU it is computed in float32,
        and rounded once. GPU kernels round within it, to the model's dtype or, of float32, to TF32, which has 10 bits;
        so does, in half precision, the code of some families (`Family.rounds_within`).
        """
        on_cpu = self.model.device.type == "cpu"
        if self.dtype in (torch.float32, torch.float64):
            return 1e-4 if on_cpu else 4e-3
        return max(2 if on_cpu else 8, *(tap.family.rounds_within for tap in self.model.taps)) * self.eps


def largest(x: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(x.abs().max())


def of_the_largest(difference: Float[Tensor, "batch pos head ..."], value: Tensor) -> list[float]:
    """For each head, the largest difference as a share of the head's largest value."""
    size = value.abs().amax((0, 1, *range(3, value.ndim)))
    return (difference.abs().amax((0, 1, *range(3, value.ndim))) / size.clamp_min(1e-3 * size.max() + 1e-30)).tolist()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode while the block runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
