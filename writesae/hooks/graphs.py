"""Hooks of ours and graphs of torch.compile.

torch.compile does not look at a module's hooks again once a graph is made: one made with nothing attached would go on
with nothing, silently. So all that a graph knows of us is `RUNNING.attached`, which says for the pass under way whether
anything is attached to its model. If not, the graph is as it would be without us. If so, another graph stops at each of
our hooks, which run outside of it, and as they always do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch

from writesae.hooks.scope import LOCK

REASON = "writesae looks here whether anything is attached to the model; compile without fullgraph=True"


@dataclass
class Running:
    """Passes under way.

    Attributes:
        attached: how many of them are of a model with something attached.
        passes: for each model that runs, the threads in which it does, and whether something is attached there. A pass
            that Ctrl-C ended stays in it until its model runs again or is gone (torch runs no hooks then). Until that,
            and while another thread runs with something attached, graphs only stop more often than needed.
    """

    attached: int = 0
    passes: WeakKeyDictionary[Any, dict[int, bool]] = field(default_factory=WeakKeyDictionary)


RUNNING = Running()


def outside_graphs(fn: Callable[..., Any], otherwise: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
    """``fn``. In a graph, it runs outside of it while anything is attached; else ``otherwise`` is in its place."""
    outside = torch.compiler.disable(fn, reason=REASON)

    def seen(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        return outside(*args, **kwargs) if RUNNING.attached else otherwise(*args, **kwargs)

    # torch.compile gives up on code that it had to compile often, and would take all that is made here for the same.
    seen.__code__ = seen.__code__.replace(co_name=fn.__name__)
    return functools.update_wrapper(seen, fn)


def begin(text_model: Any, attached: bool) -> None:
    """A pass begins, of a model with or without something attached."""
    with LOCK:
        RUNNING.passes.setdefault(text_model, {})[get_ident()] = attached
        _count()


def end(text_model: Any) -> None:
    """Its pass is over, or has failed, maybe before it began for us."""
    with LOCK:
        threads = RUNNING.passes.get(text_model, {})
        threads.pop(get_ident(), None)
        if not threads:
            RUNNING.passes.pop(text_model, None)
        _count()


def _count() -> None:
    RUNNING.attached = sum(attached for threads in RUNNING.passes.values() for attached in threads.values())
