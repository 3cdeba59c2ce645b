"""What `HookedRecurrentModel.intervene` and `hooks` return: something to open with ``with``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Block(AbstractContextManager[Any]):
    """Attaches something while a ``with`` block runs, as often as it is opened, one block after the other.

    It does nothing by itself: one that goes without ever having been opened says so in a RuntimeWarning.

    Args:
        name: of the method that made it, for messages.
        new: makes what attaches it, once.
    """

    def __init__(self, name: str, new: Callable[[], AbstractContextManager[Any]]):
        self._name, self._new = name, new
        self._running: AbstractContextManager[Any] | None = None
        self._used = False

    def __enter__(self) -> Any:
        self._used = True
        if self._running is not None:
            raise RuntimeError(
                f"this block of model.{self._name}(...) is open already: call model.{self._name}(...) again for another"
            )
        self._running = self._new()
        try:
            return self._running.__enter__()
        except BaseException:
            self._running = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        running, self._running = self._running, None
        return None if running is None else running.__exit__(kind, error, traceback)

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: a block around each call of ``fn``."""
        self._used = True

        @functools.wraps(fn)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._new():
                return fn(*args, **kwargs)

        return within

    def __del__(self) -> None:
        if not getattr(self, "_used", True):
            warnings.warn(
                f"model.{self._name}(...) was called and its block never opened, so nothing was attached: write "
                f"with model.{self._name}(...): ...",
                RuntimeWarning,
                stacklevel=2,
            )


def block(method: Callable[P, AbstractContextManager[Any]]) -> Callable[P, Block]:
    """For a method that `contextlib.contextmanager` has made: it returns a `Block`."""

    @functools.wraps(method)
    def made(*args: P.args, **kwargs: P.kwargs) -> Block:
        return Block(method.__name__, lambda: method(*args, **kwargs))

    return made
