"""Annotations are checked while the tests run: by jaxtyping's import hook, but where it would cost most and say least.

The hook decorates every function. A function inside another is decorated anew each time the outer one runs, which takes
a few milliseconds; one without arrays among its annotations has no shapes to compare, and yet keeps a record of them at
every call. So the first is left as it is, and the second goes to beartype alone. All others, which are those with
shapes, are jaxtyping's as before. And what runs by the thousand in a test is checked at its first calls there.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation

jaxtyped = jaxtyping.jaxtyped
CHECKED = 32  # calls of a function that are checked in each test
calls: Counter[FunctionType] = Counter()  # in this test, see conftest.py


def sparing(fn: Any = None, *, typechecker: Any) -> Any:
    """In the place of `jaxtyping.jaxtyped`, which the import hook puts above every function and class."""
    if fn is None:
        return functools.partial(sparing, typechecker=typechecker)
    if not isinstance(fn, FunctionType):
        return jaxtyped(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        return fn
    hints = {name: resolved(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    if any(has_arrays(hint) for hint in hints.values()):
        return at_first(fn, jaxtyped(fn, typechecker=typechecker))
    return at_first(fn, without_shapes(fn, hints)) if hints else fn


def at_first(fn: FunctionType, checked: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked at its first calls in a test, unless jaxtyping is switched off."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if not torch.compiler.is_compiling():  # which would compile anew at each count
            if calls[fn] >= CHECKED:
                return fn(*args, **kwargs)
            calls[fn] += 1
        return checked(*args, **kwargs)

    return call


def without_shapes(fn: FunctionType, hints: dict[str, Any]) -> Callable[..., Any]:
    """What beartype makes of a function, with jaxtyping's error."""
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    copy.__annotations__ = hints
    checked = beartype(copy)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            return checked(*args, **kwargs)
        except BeartypeCallHintViolation as error:
            raise jaxtyping.TypeCheckError(f"{fn.__module__}.{fn.__qualname__}: {error}") from error

    return call


def resolved(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation that is text, as what it means; `Any` where its names are only there for type checkers."""
    try:
        return get_type_hints(type("", (), {"__annotations__": {"x": hint}}), names)["x"]
    except Exception:  # a name that is not there, or a shape that can't be read
        return Any


def has_arrays(hint: Any) -> bool:
    """Whether shapes are part of an annotation."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(has_arrays(part) for part in get_args(hint))
