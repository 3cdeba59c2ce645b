"""Hook points: small modules, children of the mixer or layer they watch, that carry one named quantity each.

Being modules, they are seen by everything that sees modules: `HookedRecurrentModel.hooks`, torch's own
``register_forward_hook``, nnsight's ``trace``. Nothing is computed for a point nobody listens to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from writesae.hooks.names import name_of
from writesae.hooks.positions import PositionSet
from writesae.hooks.scope import EVERYBODY, LOCK, Owner
from writesae.recurrence import Write

Value: TypeAlias = Tensor | Write
V = TypeVar("V", Tensor, Write)
HookFn: TypeAlias = Callable[[Any, "HookPoint"], Any]

STATE_SHOWN: ContextVar[tuple[PositionSet | None, Tensor | None]] = ContextVar("state_shown", default=(None, None))
"""Of the state that is being shown in this thread or task: who asked for it, and the position of each row."""


class TupleWrite(Write, tuple):
    """A `Write` that is a named tuple too: tools that narrow what they show to some rows look into tuples."""

    _fields = ("key", "value", "rank")

    def __new__(cls, key: Tensor, value: Tensor, rank: int = 1) -> TupleWrite:
        return tuple.__new__(cls, (key, value, rank))


class HookPoint(nn.Module):
    """The identity on one quantity, with a name.

    Attributes:
        name: full name, e.g. ``blocks.9.mixer.hook_k``; see `writesae.hooks.names`.
        layer: index of the layer.
        quantity: short name, e.g. ``k``.
    """

    def __init__(self, layer: int, quantity: str):
        super().__init__()
        self.layer = layer
        self.quantity = quantity
        self.name = name_of(quantity, layer)

    def forward(self, value: Value) -> Value:
        return value

    @property
    def positions(self) -> Int[Tensor, " rows"] | None:
        """While ``hook_state`` fires: the position of each row that is shown."""
        return STATE_SHOWN.get()[1]

    @property
    def request(self) -> PositionSet | None:
        """While ``hook_state`` fires: who asked for the state that is shown."""
        return STATE_SHOWN.get()[0]

    @property
    def listening(self) -> bool:
        """Whether anybody would see the value or its gradient: a hook, or nnsight in the middle of a trace."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return bool(hooks) or self.traced  # asked for every point in every pass, so quick

    @property
    def traced(self) -> bool:
        """Whether a tool that replaced `forward` sees the value. nnsight leaves its forward in place between traces,
        and then says that none is active; whatever else stands there is taken to look always."""
        forward = self.__dict__.get("forward")
        if forward is None:
            return False
        active = getattr(getattr(forward, "state", None), "active", None)
        return active is None or active()[0] is not None

    def fire(self, value: V) -> tuple[V, bool]:
        """Show ``value`` to the hooks. Returns the value to go on with, and whether it was changed.

        A hook changes the value by returning another one, or in place. Within an nnsight trace that may ask for
        gradients, the model goes on with the very tensor that was shown, as if changed.

        Raises:
            TypeError, ValueError: a hook returned another kind, shape or dtype; the message names hook and shapes.
        """
        goes_on = False
        if isinstance(value, Tensor) and value.requires_grad and self.traced:
            goes_on = True
            value = value.view_as(value)  # the model may use the tensor elsewhere, too
        before = [_mark(t) for t in _tensors(value)]
        shown = TupleWrite(value.key, value.value, value.rank) if isinstance(value, Write) and self.traced else value
        after = self(shown)
        if after is not shown:
            self._check(value, after)
            return _plain(after), True
        return value, goes_on or any(_marked(t, mark) for t, mark in zip(_tensors(value), before, strict=True))

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
            dtypes = {got.key.dtype, got.value.dtype} - {given.key.dtype}
            if dtypes:
                raise ValueError(
                    f"a hook on {self.name} returned a Write in {dtypes.pop()}; expected {given.key.dtype}: use "
                    f".to(value.key.dtype)"
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

    def add_hook(self, fn: HookFn, dir: str = "fwd", owner: Owner = EVERYBODY) -> torch.utils.hooks.RemovableHandle:
        """Attach ``fn(value, hook)``; it returns a new value, or None to leave it.

        Args:
            fn: the function.
            dir: "bwd": it gets the gradient of the value in each backward pass, and may return another.
            owner: in whose threads and tasks it acts.
        """
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir={dir!r}: allowed are 'fwd' (the value) and 'bwd' (its gradient)")
        shown = fn if dir == "fwd" else functools.partial(_on_gradient, fn)

        def hook(point: Any, _args: Any, value: Value) -> Any:
            new = shown(value, point) if owner.here else None
            if new is not None and new is not value:
                point._check(value, new)  # here, or the next function would be given it
            return new

        with LOCK:  # torch counts its hooks without one
            return self.register_forward_hook(hook)

    def extra_repr(self) -> str:
        return self.name


def _on_gradient(fn: HookFn, value: Value, point: HookPoint) -> Tensor:
    """Have ``fn`` called with the gradient of what the model goes on with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{point.name} carries a Write, which has no gradient of its own; ws.gradient computes it")
    if not value.requires_grad:
        raise ValueError(
            f"no gradient will reach {point.name}: run the model outside torch.no_grad(), with weights or inputs that "
            f"require gradients"
        )
    value = value.view_as(value)
    value.register_hook(lambda gradient: fn(gradient, point))
    return value


def to_show(x: Tensor) -> Tensor:
    """A copy: hooks may write in place, and models may use the tensor for something else (a skip). But gradients are
    wanted of the tensor that the model goes on with."""
    return x if x.requires_grad else x.clone()


def _plain(value: Any) -> Any:
    """A `Write` of no further kind."""
    return Write(value.key, value.value, value.rank) if isinstance(value, TupleWrite) else value


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
