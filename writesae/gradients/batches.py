"""Many sequences, a few at a time: the graph of a backward pass holds what every layer computed for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

ROOM = 2**30  # bytes that a graph may take on a CPU; on an accelerator, half of what is free


def in_batches(model: nn.Module, n_rows: int, run: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
    """``run`` of all rows, as many at a time as the memory has room for.

    The first row goes alone. What its graph keeps, beside the weights, says how many fit.

    Args:
        model: whose backward passes ``run`` makes.
        n_rows: how many rows there are.
        run: does some rows, all alike in size.

    Yields:
        Which rows, and what ``run`` returned.
    """
    weights = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()._cdata  # views share it
        if storage not in weights:
            kept[storage] = max(kept.get(storage, 0), x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        first = run(slice(0, 1))
    yield slice(0, 1), first
    del first
    step = max(1, room(next(model.parameters()).device) // max(1, sum(kept.values())))
    for start in range(1, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        yield rows, run(rows)


def room(device: torch.device) -> int:
    """Bytes that a graph may take."""
    memory: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(memory, "mem_get_info"):
        return ROOM
    return max(ROOM, memory.mem_get_info(device)[0] // 2)
