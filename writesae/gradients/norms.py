"""The norm right behind the heads of a layer: what changes of its input do to what comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from writesae.recurrence.write import wide


@dataclass(frozen=True, eq=False)
class Norm:
    """The norm behind a layer's reads, as it was called in the pass.

    Attributes:
        module: the norm's module.
        inputs: ``o`` (and, where it is gated, ``z``), heads flattened or not, as the module takes them.
        output: what the module returned.
        gradient: the number's gradient with respect to that output.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor

    def rows(self, x: Tensor, shape: torch.Size, used: slice, head: int) -> Float[Tensor, "batch pos width"]:
        """The rows of an input or output that hold the head: only its own where each head is normalised by itself."""
        if self.output.shape[-1] == shape[-1]:
            return x.reshape(shape)[:, used, head]
        return x.reshape(*shape[:2], -1)[:, used]

    def effect(
        self, used: slice, head: int, shape: torch.Size, o_change: Float[Tensor, "batch used n d_value"]
    ) -> Float[Tensor, "batch n"]:
        """What each of ``n`` changes of a head's output would do to the number: exact in the norm, first order beyond.

        Args:
            used: the tokens (columns of the pass) of the changes.
            head: which head.
            shape: shape of ``hook_o``, ``[batch, pos, head, d_value]``.
            o_change: the changes, each by itself.
        """
        o, *gates = (self.rows(x, shape, used, head)[:, :, None] for x in self.inputs)
        before, gradient = (self.rows(x, shape, used, head)[:, :, None] for x in (self.output, self.gradient))
        rows, o_ndim = o.repeat(1, 1, o_change.shape[2], 1), self.inputs[0].ndim
        d = shape[-1]
        rows[..., slice(0, d) if o.shape[-1] == d else slice(head * d, (head + 1) * d)] += o_change.to(o.dtype)
        tail = self.inputs[0].shape[-1:] if self.inputs[0].shape[-1] == rows.shape[-1] else self.inputs[0].shape[-2:]
        lead = (1,) * (o_ndim - 1 - len(tail))
        flat = (x.expand(rows.shape).reshape(*lead, -1, *tail) for x in (rows, *gates))
        after = self.module(*flat).reshape(rows.shape)
        return ((after - before) * gradient).sum((1, 3))

    def at_fixed_scale(self) -> Tensor:
        """The gradient with respect to the input, with the norm's scale held fixed (its mean, if it has one, is not).

        Raises:
            ValueError: the module computes its scale in a way that is not known here (a fused kernel).
        """
        with torch.inference_mode(False), torch.enable_grad(), FixedScale():
            o = self.inputs[0].detach().clone().requires_grad_()
            y = self.module(o, *self.inputs[1:])
            (found,) = torch.autograd.grad(y, o, self.gradient)
        with torch.no_grad():
            parts = wide(self.gradient * (y - self.module(torch.zeros_like(o), *self.inputs[1:])))
            # Linear now, so that the input times its gradient is what the output (without a bias) contributes.
            left = float((wide(found * o).sum() - parts.sum()).abs())
            if left > max(1e-3, 16 * torch.finfo(o.dtype).eps) * float(parts.abs().sum()) + 1e-12:
                raise ValueError(
                    f"the scale of {type(self.module).__name__} can't be held fixed: it is not computed by functions "
                    f"of torch that are known here"
                )
        return found


class FixedScale(TorchFunctionMode):
    """While it is active, no gradient passes through the scale of a norm, nor through the factor ``sigmoid(x)`` of
    ``silu(x)`` (Gated Slot Attention has one before its norm)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rsqrt, Tensor.rsqrt):
            return func(args[0].detach())
        if func is F.silu and args[0].requires_grad:
            return args[0] * args[0].sigmoid().detach()
        if func is F.group_norm:
            return _group_norm(*args, **kwargs)
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:  # as torch names its arguments
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = (input.square().mean(dims, keepdim=True) + eps).rsqrt().detach()
    return input * scale if weight is None else input * scale * weight


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    centred = input - input.mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    y = _rms_norm(centred, normalized_shape, weight, eps)
    return y if bias is None else y + bias


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = input.unflatten(1, (num_groups, -1))
    centred = groups - groups.mean(-1, keepdim=True)
    y = (centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt().detach()).flatten(1, 2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
