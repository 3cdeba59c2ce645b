"""Zeros added to what a layer computes, to differentiate by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from writesae.gradients.norms import Norm
from writesae.hooks.scope import Owner
from writesae.model import HookedRecurrentModel


class Probe:
    """Zeros added to what a layer reads and to what its norm returns, to get gradients with respect to them."""

    def __init__(self, stack: ExitStack, model: HookedRecurrentModel, layer: int, owner: Owner):
        self.owner = owner
        self.tensors: list[Tensor] = []  # of the reads; of the norm
        self.norm = model.norm(layer)
        self.call: tuple[tuple[Tensor, ...], Tensor] | None = None
        self.read: Tensor | None = None
        stack.enter_context(model.hooks([(f"blocks.{layer}.mixer.hook_o", lambda value, hook: self._read(value))]))
        if self.norm is not None:
            stack.enter_context(_removed(self.norm.register_forward_hook(self._called)))

    def _read(self, value: Tensor) -> Tensor:
        self.read = value.detach()
        return self._add(value)

    def _add(self, value: Tensor) -> Tensor:
        self.tensors.append(torch.zeros_like(value).requires_grad_())
        return value + self.tensors[-1]

    def _called(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.owner.here:  # another thread runs the model
            return None
        self.call = (tuple(x.detach() for x in args), output.detach())
        return self._add(output)

    def gradients(self, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Norm | None]:
        """What `LayerGradient` holds of them."""
        norm = None
        if self.norm is not None and self.call is not None:
            norm = Norm(self.norm, *self.call, of(self.tensors[1]))
        return of(self.tensors[0]), norm


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
