"""How pre-activations become activations: which atoms are active, and how strongly.

Letters: ``pre [..., n_atoms]``, activations ``a_i >= 0``.

    topk         a = ReLU(pre) of the k largest of each matrix                  (the paper, section 2)
    batch_topk   a = ReLU(pre) of the k B largest of a batch of B matrices      (Bussmann et al. 2024); for a matrix by
                 itself those above ``threshold``, the least that was active in training
    jumprelu     a = pre where pre > theta_i, learnt                            (Rajamanoharan et al. 2024b)
    gated        a = 1[pre > 0] ReLU(exp(r_i) (pre - b_enc) + b_mag)            (Rajamanoharan et al. 2024a)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.jobs.processes import ALONE, Processes


def largest(pre: Float[Tensor, "... n"], k: int) -> tuple[Int[Tensor, "... k"], Float[Tensor, "... k"]]:
    """TopK: the chosen atoms, largest first, and 1 for each (0 where it is not active)."""
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
    """A number above which ``k`` activations a matrix are left, on average over the batch (of all processes); never
    below 0. It is the first activation that is not kept."""
    count = processes.total(torch.tensor(float(pre[..., 0].numel()), device=pre.device))
    n_kept = k * int(count)
    best = processes.all(pre.flatten().topk(min(n_kept + 1, pre.numel())).values).sort(descending=True).values
    if n_kept >= len(best):
        return torch.zeros_like(best[0])
    return best[n_kept].clamp_min(0)


class JumpReLU(torch.autograd.Function):
    """``pre`` where it is above ``theta = exp(log_threshold)``, else 0.

    Gradients to the threshold are straight-through estimates with a rectangle of width ``bandwidth * theta``:
    ``d a / d theta = -theta K((pre - theta) / width) / width`` (Rajamanoharan et al. 2024b, eq. 11).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, log_threshold: Tensor, bandwidth: float) -> Tensor:
        theta = log_threshold.exp()
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return torch.where(pre > theta, pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pre, theta = ctx.saved_tensors
        near = _near(pre, theta, ctx.bandwidth)
        # d theta / d log_threshold = theta cancels the theta in the width.
        to_log = -(theta / ctx.bandwidth) * (near * grad).flatten(0, -2).sum(0)
        return grad * (pre > theta), to_log, None


class CountActive(torch.autograd.Function):
    """How many atoms are above their thresholds, ``[...]``; gradients, as in `JumpReLU`, go to thresholds only."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, log_threshold: Tensor, bandwidth: float) -> Tensor:
        theta = log_threshold.exp()
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre.dtype).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre, theta = ctx.saved_tensors
        near = _near(pre, theta, ctx.bandwidth)
        return None, -(near * grad[..., None]).flatten(0, -2).sum(0) / ctx.bandwidth, None


def _near(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return ((pre - theta).abs() <= bandwidth * theta / 2).to(pre.dtype)
