"""What is ours on objects that are not: one attribute, read and written here alone.

A transformers model, its cache and the functions of its modeling file are not our classes. What must stay with such an
object, also in its copies, is kept on it under one name, and found again by its type:

    =======================  ======================================================
    text model               `writesae.hooks.installing.Attachment`: clock, taps, points
    cache                    `writesae.hooks.clock.Fed`: what it has been fed
    function in a model file `writesae.hooks.dispatch.Native`: the function in whose place it stands
    =======================  ======================================================

Module hooks need no attribute: they are methods of our objects, which a deepcopy of a model copies with it.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

_NAME = "writesae"


def attach(to: Any, ours: object) -> None:
    """Keep ``ours`` on an object that is not ours, in the place of what was there."""
    setattr(to, _NAME, ours)


def attached_to(thing: object, kind: type[T]) -> T | None:
    """What of ours is on an object, None if there is nothing of that kind."""
    ours = getattr(thing, _NAME, None)
    return ours if isinstance(ours, kind) else None
