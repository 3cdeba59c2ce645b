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
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no {what} {name!r}: allowed are {', '.join(allowed)}{meant}")
