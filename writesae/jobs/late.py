"""What rooms above give to objects of rooms below, which may not import them.

An SAE can show its page (``sae.show(53)``), though pages are made of SAEs. The face of the package, which may know
every room, says where such a function is; it is imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_GIVEN: dict[str, Callable[[], Callable[..., Any]]] = {}


def give(name: str, load: Callable[[], Callable[..., Any]]) -> None:
    """``given(name)`` is what ``load()`` returns; it is called when somebody asks."""
    _GIVEN[name] = load


def given(name: str) -> Callable[..., Any]:
    """The function given under a name; KeyError if there is none."""
    return _GIVEN[name]()
