"""A number after each write of a layer was changed by itself: what follows is replayed, what comes before is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from writesae.futures.replay import Replayer
from writesae.hooks import Intervention
from writesae.hooks.interventions import Moment
from writesae.hooks.sites import Head
from writesae.methods.questions import Metric
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write


def replay_writes(
    model: HookedRecurrentModel,
    ids: Int[Tensor, "1 pos"],
    layer: int,
    at: Int[Tensor, " n"],
    change: Callable[[Write], Write],
    metric: Metric,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Heads, positions and the number, some writes at a time.

    Args:
        model, ids: what is run.
        layer: whose writes.
        at: their positions.
        change: given the native writes there ``[1, n, head]``, what is added to each.
        metric: the number.
        batch_size: rows run at once.
    """
    replayer = Replayer(model, [Head(layer, 0)], horizon=None, stride=8, rows=batch_size)
    native = replayer.native(ids)
    added = change(native.cache.write(layer)[0:1, at])
    n_heads = added.shape[2]
    own = torch.eye(n_heads, device=ids.device)  # of each condition, one head

    def edits(some: Tensor) -> list[Intervention]:
        here = added[0, some][:, None].expand(len(some), n_heads, n_heads) * own
        return [_OfEachHead(layer, write=Write(here.key.flatten(0, 1), here.value.flatten(0, 1), here.rank))]

    for some, logits in replayer.replay(native, torch.zeros_like(at), at, n_heads, edits):
        value = metric(logits.flatten(0, 1)).view(len(some), n_heads).float().cpu()
        heads = torch.arange(n_heads).expand(value.shape)
        yield heads, at[some].cpu()[:, None].expand(value.shape), value


@dataclass(frozen=True, kw_only=True)
class _OfEachHead(Intervention):
    """Add another write to each sequence and head, ``[batch, head]``."""

    write: Write

    def edit(self, now: Moment) -> Write:
        return self.write[:, None].expand(*now.write.shape)
