"""Hook points: small modules, children of the mixer they watch, that carry one named quantity each.

Being modules, they are seen by everything that sees modules: `HookedRecurrentModel.hooks`, torch's own
``register_forward_hook``, nnsight's ``trace``. Nothing is computed for a point nobody listens to.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from writesae.recurrence import Write

Value: TypeAlias = Tensor | Write
HookFn: TypeAlias = Callable[[Any, "HookPoint"], Any]


class HookPoint(nn.Module):
    """The identity on one quantity, with a name.

    Attributes:
        name: full name, e.g. ``blocks.9.mixer.hook_k``.
        layer: index of the layer.
        quantity: short name, e.g. ``k``.
    """

    def __init__(self, layer: int, quantity: str):
        super().__init__()
        self.layer = layer
        self.quantity = quantity
        self.name = f"blocks.{layer}.mixer.hook_{quantity}"

    def forward(self, value: Value) -> Value:
        return value

    @property
    def listening(self) -> bool:
        """Whether anybody would see the value or its gradient: a hook, or a tool that replaced `forward` (nnsight)."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        return any(hooks) or "forward" in self.__dict__

    def fire(self, value: Value) -> tuple[Value, bool]:
        """Show ``value`` to the hooks. Returns the value to go on with, and whether it was changed.

        A hook changes the value by returning another one, or in place.

        Raises:
            TypeError, ValueError: a hook returned another kind, shape or dtype; the message names hook and shapes.
        """
        before = [_mark(t) for t in _tensors(value)]
        after = self(value)
        if after is not value:
            self._check(value, after)
            return after, True
        return value, any(_marked(t, mark) for t, mark in zip(_tensors(value), before, strict=True))

    def _check(self, given: Value, got: object) -> None:
        if isinstance(given, Write):
            if not isinstance(got, Write):
                raise TypeError(
                    f"a hook on {self.name} returned {_describe(got)}; return a Write, or None to read only"
                )
            if (got.shape, got.d_key, got.d_value) != (given.shape, given.d_key, given.d_value):
                raise ValueError(
                    f"a hook on {self.name} returned {_describe(got)}; expected {_describe(given)}, any rank"
                )
            return
        if not isinstance(got, Tensor):
            raise TypeError(f"a hook on {self.name} returned {_describe(got)}; return a tensor, or None to read only")
        if got.shape != given.shape:
            raise ValueError(f"a hook on {self.name} returned shape {list(got.shape)}; expected {list(given.shape)}")
        if got.dtype != given.dtype:
            raise ValueError(
                f"a hook on {self.name} returned {got.dtype}; expected {given.dtype}: use .to(value.dtype)"
            )

    def add_hook(self, fn: HookFn) -> torch.utils.hooks.RemovableHandle:
        """Attach ``fn(value, hook)``; it returns a new value, or None to leave it."""
        return self.register_forward_hook(
            lambda point, _args, value: fn(value, point)  # type: ignore[arg-type]
        )

    def extra_repr(self) -> str:
        return self.name


def _tensors(value: Value) -> tuple[Tensor, ...]:
    return (value.key, value.value) if isinstance(value, Write) else (value,)


def _mark(x: Tensor) -> int | Tensor:
    """Something that tells later whether ``x`` was written in place (inference tensors count no versions)."""
    return x.clone() if x.is_inference() else x._version


def _marked(x: Tensor, mark: int | Tensor) -> bool:
    return not torch.equal(x, mark) if isinstance(mark, Tensor) else x._version != mark


def _describe(value: object) -> str:
    if isinstance(value, Write):
        return f"Write({list(value.shape)}, d_key={value.d_key}, d_value={value.d_value})"
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {list(value.shape)}"
    return f"{type(value).__name__} {' '.join(repr(value).split())}"[:80]


def unknown_name(name: object, known: Iterable[str]) -> UnknownHookError:
    """The error for a hook name that does not exist, with the nearest that do."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known[:3]
    return UnknownHookError(f"no hook point named {name!r}; nearest: {', '.join(near)} (all: model.hook_names)")


class UnknownHookError(KeyError):
    """No hook point of that name (a KeyError that prints its message as written, not its repr)."""

    def __str__(self) -> str:
        return str(self.args[0])
