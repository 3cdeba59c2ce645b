"""A name that has to be one of several."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

Name = TypeVar("Name", bound=str)


def one_of(what: str, name: Name, allowed: Iterable[str]) -> Name:
    """The name, if it is allowed.

    Raises:
        ValueError: it is not; the message lists those that are, and the one that was probably meant.
    """
    allowed = list(allowed)
    if name in allowed:
        return name
    raise ValueError(f"no {what} {name!r}: allowed are {', '.join(allowed)}{meant(name, allowed)}")


def meant(name: str, allowed: Iterable[str], cutoff: float = 0.5) -> str:
    """``; did you mean 'this'?`` of the nearest name that is allowed; nothing if none is near."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
