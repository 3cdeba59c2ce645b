"""JumpReLU: pre-activations above a threshold of each atom's own, learnt (Rajamanoharan et al. 2024b)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from writesae.saes.reconstruction import Batch
from writesae.saes.sparsities.base import SAE, Thresholds, register_sparsity


@register_sparsity("jumprelu")
class JumpReLU(Thresholds):
    def tensors(self, cfg: Any) -> dict[str, nn.Parameter | Tensor]:
        return {"log_threshold": nn.Parameter(torch.zeros(cfg.n_atoms))}

    def of_pre(self, sae: SAE, pre: Tensor, bandwidth: float) -> Tensor:
        return AboveThreshold.apply(pre, sae.log_threshold, bandwidth)  # type: ignore[return-value]

    def further_loss(self, sae: SAE, batch: Batch, bandwidth: float) -> tuple[Tensor, float]:
        """Active atoms per matrix, over ``k``."""
        n = batch.count()
        counts: Tensor = CountActive.apply(batch.encoding.all, sae.log_threshold, bandwidth)  # type: ignore[assignment]
        return counts.sum() / (n * sae.cfg.k), 0.0

    def set_threshold(self, sae: SAE, threshold: Tensor) -> None:
        sae.log_threshold.fill_(float(threshold.log()))

    def lead(self, sae: SAE, excess: Tensor) -> None:
        sae.log_threshold.add_(0.03 * excess)


class AboveThreshold(torch.autograd.Function):
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
    """How many atoms are above their thresholds, ``[...]``; gradients go to the thresholds only."""

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
