"""Parts of a run that futures share: rows of a cache, the layers below an edit, and what they give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from writesae.hooks.installing import stack_of
from writesae.model import HookedRecurrentModel


def rows_of(cache: Any, rows: Int[Tensor, " row"]) -> Any:
    """Some rows of a cache as a cache of their own; what is not taken is not copied."""
    parts = [part for layer in cache.layers for part in vars(layer).values()]
    parts += [x for part in parts if isinstance(part, dict) for x in part.values()]
    parts += [x for part in parts if isinstance(part, list | tuple) for x in part]
    taken = copy.deepcopy(cache, {id(x): x for x in parts if isinstance(x, Tensor)})
    taken.reorder_cache(rows)
    return taken


def layers_below(model: HookedRecurrentModel, layer: int) -> list[nn.Module]:
    """The layers that run before one; none where the stack is not a plain list."""
    _, stack = stack_of(model.hf_model)
    below, rest = list(stack.children())[:layer], list(stack.children())[layer:]
    return below if isinstance(stack, nn.ModuleList) and not any(x is y for x in below for y in rest) else []


def map_tensors(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``fn`` of every tensor in what a layer gives."""
    if isinstance(x, tuple | list):
        return type(x)(map_tensors(fn, part) for part in x)
    return fn(x) if isinstance(x, Tensor) else x


def by_token(x: Any, shape: Sequence[int]) -> bool:
    """Whether everything in a layer's output is one thing per token, so that rows and pieces can be taken."""
    if isinstance(x, tuple | list):
        return type(x) in (tuple, list) and all(by_token(part, shape) for part in x)
    return x is None or (isinstance(x, Tensor) and x.ndim >= 2 and x.shape[:2] == tuple(shape))
