"""For whom something attached to a model acts.

A model may run in several threads and asyncio tasks at once. What belongs to one call (the hooks of `run_with_cache`
and `run_with_hooks`) acts in that call alone. What a ``with`` block attaches acts

* for every thread, if the block runs in the main thread outside of any task: so a notebook or script may hand the
  edited model to threads, as ``generate`` with a streamer does;
* otherwise for its own thread or task alone, and for the tasks and `asyncio.to_thread` calls started in the block: so
  threads and requests of a server do not see each other's edits.

Both are one rule: an `Owner` is in force in the contexts (`contextvars`) that it was entered in, or everywhere.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

LOCK = threading.RLock()  # held for the moment in which something is attached or taken away


@dataclass(eq=False)
class Owner:
    """A call or a block that has something attached.

    Attributes:
        everywhere: it acts in every thread and task.
        begun, passes: forward passes of the model for which it is in force, and the complete ones among them.
        foreign: those, meanwhile, for which it is not, in threads that have attached nothing themselves.
    """

    everywhere: bool = False
    begun: int = 0
    passes: int = 0
    foreign: int = 0

    @property
    def here(self) -> bool:
        """Whether it is in force in the running thread and task."""
        return self.everywhere or self in _owners.get()

    def note(self, complete: bool) -> None:
        """A forward pass of the model has begun, or is complete, in the running thread and task."""
        if self.here:
            self.begun += not complete
            self.passes += complete
        elif not _owners.get():
            self.foreign += 1

    def __deepcopy__(self, _memo: object) -> Owner:
        return self  # what a copy of a model has attached goes when the block ends, as in the model itself


EVERYBODY = Owner(everywhere=True)

_owners: ContextVar[frozenset[Owner]] = ContextVar("owners", default=frozenset())
_private: set[Owner] = set()  # those in force that do not act everywhere


def owners() -> frozenset[Owner]:
    """Those entered in the running thread and task."""
    return _owners.get()


def private() -> set[Owner]:
    """Those in force anywhere that act for some threads or tasks only."""
    return _private


def in_main_thread_alone() -> bool:
    """Whether the running code is the main thread's, and no task's or call's that keeps what it attaches to itself."""
    if any(not owner.everywhere for owner in _owners.get()):
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        return asyncio.current_task() is None
    except RuntimeError:  # no loop runs
        return True


@contextmanager
def owning(everywhere: bool) -> Iterator[Owner]:
    """An owner that is in force while the block runs."""
    owner = Owner(everywhere)
    _owners.set(_owners.get() | {owner})
    if not everywhere:
        _private.add(owner)
    try:
        yield owner
    finally:
        _owners.set(_owners.get() - {owner})  # no token: a generator may be closed in another context
        _private.discard(owner)
        owner.everywhere = False


class Owned(Generic[T]):
    """Things attached to one place, each with its owner, in the order in which they came.

    The tuple is replaced, never changed: another thread may be walking it.
    """

    def __init__(self) -> None:
        self._items: tuple[tuple[Owner, T], ...] = ()

    def here(self) -> list[T]:
        """Those in force in the running thread and task."""
        return [item for owner, item in self._items if owner.here]

    def all(self) -> list[T]:
        """Those of every thread and task."""
        return [item for _, item in self._items]

    def __reduce__(self) -> tuple[type[Owned], tuple[()]]:
        return Owned, ()  # a pickle is opened where no block runs

    def __deepcopy__(self, _memo: object) -> Owned[T]:
        made = Owned[T]()
        made._items = self._items
        return made

    def __bool__(self) -> bool:
        return bool(self._items) and any(owner.here for owner, _ in self._items)

    @contextmanager
    def added(self, item: T, owner: Owner) -> Iterator[None]:
        """``item`` is among them while the block runs, whatever else comes and goes."""
        pair = (owner, item)
        with LOCK:
            self._items = (*self._items, pair)
        try:
            yield
        finally:
            with LOCK:
                self._items = tuple(other for other in self._items if other is not pair)
