"""A model made linear: what it computes on one text, with norms, gates, and attention patterns held as they were.

Every model here is made of maps that are linear in the residual stream (projections, convolutions, sums) and of factors
that stand beside them: the scale of a norm, a gate, an attention pattern. `Freezing` lets the model's own code run, and
holds those factors fixed: an activation function is its input times a factor (``silu(x) = x sigmoid(x)``), and of a
product of a gate and a value, the gate is held. What is left is homogeneous: nothing but biases is added. So the
gradient of what it computes, times what goes in, sums to what comes out, which is how relevance is propagated through
gated models (AttnLRP, Achtibat et al. 2024; attribution graphs, Ameisen et al. 2025).

A model that does something else to its stream is not made linear by this. Nobody takes that on trust: the sums are
checked (`writesae.methods.circuits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from writesae.gradients.norms import FixedScale

# Functions whose output is a factor, or part of one.
FACTORS = {
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.logsigmoid, torch.softmax, Tensor.softmax, F.softmax, F.softplus,
    torch.exp, Tensor.exp, torch.tanh, Tensor.tanh, F.tanh, torch.rsqrt, Tensor.rsqrt,
}  # fmt: skip
# Functions that are their input times a factor.
ACTIVATIONS = {F.silu, F.gelu, F.relu, torch.relu, Tensor.relu}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
QUOTIENTS = {torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide}
SQUARES = {torch.square, Tensor.square}
POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}
CHOICES = {torch.topk, Tensor.topk, torch.sort, Tensor.sort}  # of experts: values and places
NORMS = {F.group_norm, F.rms_norm, F.layer_norm}
# What leaves an activation an activation: it is then known as the gate of the product that follows.
SAME = {
    Tensor.to, Tensor.float, Tensor.type, Tensor.type_as, Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous,
    Tensor.unflatten, Tensor.flatten, torch.flatten,
}  # fmt: skip
GATE = "_writesae_gate"


class Freezing(TorchFunctionMode):
    """While it is active, no gradient passes through factors; given those of an earlier pass, they are as they were.

    Args:
        kept: the factors of an earlier pass (`Freezing.kept`), in the order in which they came: the pass is then that
            of the frozen model, whatever is changed in it. None: this pass makes them.
    """

    def __init__(self, kept: list[Tensor] | None = None):
        super().__init__()
        self.replays = kept is not None
        self.kept: list[Tensor] = list(kept or [])
        self.next, self.off = 0, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed in the block is none of the model's."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        """A factor: made, or as it was."""
        if self.replays:
            if self.next >= len(self.kept):
                raise RuntimeError("the frozen pass has more factors than the pass that it repeats")
            self.next += 1
            return self.kept[self.next - 1]
        self.kept.append(make().detach())
        return self.kept[-1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, args = kwargs or {}, tuple(args)
        run: Callable[[], Any] = lambda: func(*args, **kwargs)  # noqa: E731
        if self.off or not torch.is_grad_enabled():
            return run()
        if func in NORMS:
            with self:  # what it is made of comes by here
                return FixedScale().__torch_function__(func, types, args, kwargs)
        if func in FACTORS:
            return self.keep(run) if _live(args[0]) else run()
        if func in CHOICES and _live(args[0]):
            found = run()
            return type(found)([self.keep(lambda: found[0]), self.keep(lambda: found[1])])  # has values and indices
        if func in ACTIVATIONS:
            return self._activation(args[0], run)
        if func in PRODUCTS and len(args) == 2 and _live(args[0]) and _live(args[1]):
            return self._product(args[0], args[1], run)
        if func in QUOTIENTS and len(args) == 2 and _live(args[1]):
            return args[0] / self.keep(lambda: args[1])
        if (func in SQUARES or (func in POWERS and args[1] == 2)) and _live(args[0]):
            return args[0] * self.keep(lambda: args[0])
        if func is F.scaled_dot_product_attention:
            q, k, *rest = args
            return func(self.keep(lambda: q), self.keep(lambda: k), *rest, **kwargs)
        found = run()
        if func in SAME and args and getattr(args[0], GATE, False) and isinstance(found, Tensor):
            setattr(found, GATE, True)
        return found

    def _activation(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """``x`` times what the function is of it. The value is the function's own."""
        if not _live(x):
            return run()
        share = self.keep(lambda: torch.where(x == 0, torch.zeros_like(x), run() / x))
        found = x * share
        setattr(found, GATE, True)
        return found

    def _product(self, a: Tensor, b: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """A gate times a value. Where neither is known as a gate (RWKV-7's ``r k``), the product is a factor."""
        gates = getattr(a, GATE, False), getattr(b, GATE, False)
        if gates[0] == gates[1]:
            return self.keep(run)
        return self.keep(lambda: a) * b if gates[0] else a * self.keep(lambda: b)


def _live(x: Any) -> bool:
    """Whether the stream flows through a tensor."""
    return isinstance(x, Tensor) and x.requires_grad
