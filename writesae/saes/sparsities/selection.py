"""Which pre-activations are the largest: of each matrix, above a threshold, or of a batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.jobs.processes import ALONE, Processes


def largest(pre: Float[Tensor, "... n"], k: int) -> tuple[Int[Tensor, "... k"], Float[Tensor, "... k"]]:
    """The ``k`` largest of each matrix: their atoms, largest first, and 1 for each (0 where it is not active)."""
    values, indices = topk(pre, k)
    return indices, (values > 0).to(pre.dtype)


def topk(x: Float[Tensor, "... n"], k: int, groups_of: int = 4) -> tuple[Float[Tensor, "... k"], Int[Tensor, "... k"]]:
    """``x.topk(k)``, faster where ``k`` is small: the largest are in the ``k`` groups that have the largest maxima."""
    n = x.shape[-1]
    if n % groups_of or groups_of * k > n // 2:
        found = x.topk(k, -1)
        return found.values, found.indices
    groups = x.unflatten(-1, (groups_of, -1)).amax(-2).topk(k, -1, sorted=False).indices  # group j: j, j + n / 4, ...
    members = torch.arange(groups_of, device=x.device)[:, None] * (n // groups_of)
    candidates = (groups[..., None, :] + members).flatten(-2)
    found = x.gather(-1, candidates).topk(k, -1)
    return found.values, candidates.gather(-1, found.indices)


def above(
    pre: Float[Tensor, "... n"], threshold: Tensor | float
) -> tuple[Int[Tensor, "... m"], Float[Tensor, "... m"]]:
    """The atoms above a threshold, largest first; ``m`` is what the matrix with the most of them has (at least 1)."""
    m = max(1, int((pre > threshold).sum(-1).max()))
    values, indices = pre.topk(m, -1)
    return indices, (values > threshold).to(pre.dtype)


def batch_threshold(pre: Float[Tensor, "... n"], k: int, processes: Processes = ALONE) -> Float[Tensor, ""]:
    """A number above which ``k`` activations per matrix are left, on average over the batch (of all processes); never
    below 0. It is the first activation that is not kept."""
    count = processes.total(torch.tensor(float(pre[..., 0].numel()), device=pre.device))
    n_kept = k * int(count)
    best = processes.all(pre.flatten().topk(min(n_kept + 1, pre.numel())).values).sort(descending=True).values
    if n_kept >= len(best):
        return torch.zeros_like(best[0])
    return best[n_kept].clamp_min(0)
