"""Sparsities in which each atom has a threshold of its own, learnt: JumpReLU and Gated."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from writesae.recurrence.matrices import Matrices
from writesae.saes.reconstruction import Activations, Batch, DenseActivations
from writesae.saes.sparsities.base import SAE, Sparsity, register_sparsity
from writesae.saes.sparsities.selection import batch_threshold


class Thresholds(Sparsity):
    """A sparsity in which each atom has a threshold of its own, learnt. A subclass has `of_pre`, `set_threshold`,
    and usually `further_loss` and `lead`."""

    chooses = False

    @abstractmethod
    def of_pre(self, sae: SAE, pre: Float[Tensor, "... n_atoms"], bandwidth: float) -> Float[Tensor, "... n_atoms"]:
        """Activations of all atoms. ``bandwidth`` is for straight-through gradients, see `WriteSAE.loss`."""

    @abstractmethod
    def set_threshold(self, sae: SAE, threshold: Float[Tensor, ""]) -> None:
        """Let every atom be active where its pre-activation without bias is above ``threshold``."""

    def activate(self, sae: SAE, pre: Tensor) -> Tensor:
        return self.of_pre(sae, pre, 0.5)

    def sparsify(self, sae: SAE, pre: Tensor, over_batch: bool = False) -> tuple[Tensor, Tensor]:
        found = self.activate(sae, pre)
        values, indices = found.topk(max(1, int((found > 0).sum(-1).max())), -1)
        return values, indices

    def activations(self, sae: SAE, batch: Batch, *, over_batch: bool, bandwidth: float) -> Activations:
        return DenseActivations(self.of_pre(sae, batch.encoding.all, bandwidth))

    def initialise(self, sae: SAE, x: Matrices) -> None:
        """Thresholds with which ``k`` atoms per matrix are active."""
        sae.b_enc.zero_()
        self.set_threshold(sae, batch_threshold(sae.pre(x), sae.cfg.k).clamp_min(1e-12))


@register_sparsity("jumprelu")
class JumpReLU(Thresholds):
    """Pre-activations above a threshold of each atom's own (Rajamanoharan et al. 2024b)."""

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


@register_sparsity("gated")
class Gated(Thresholds):
    """One path decides whether an atom is active, another how strongly (Rajamanoharan et al. 2024a)."""

    def tensors(self, cfg: Any) -> dict[str, nn.Parameter | Tensor]:
        return {"r_mag": nn.Parameter(torch.zeros(cfg.n_atoms)), "b_mag": nn.Parameter(torch.zeros(cfg.n_atoms))}

    def of_pre(self, sae: SAE, pre: Tensor, bandwidth: float) -> Tensor:
        strength = (sae.r_mag.exp() * (pre - sae.b_enc) + sae.b_mag).relu()
        temperature = sae.cfg.gate_temperature
        return strength * (torch.sigmoid(pre / temperature) if temperature else (pre > 0).to(pre.dtype))

    def further_loss(self, sae: SAE, batch: Batch, bandwidth: float) -> tuple[Tensor, Tensor]:
        """The sum of the gates, in the data's scale; and the error of what they alone reconstruct with the decoder as
        it is, since a hard gate passes no gradient."""
        n, gates = batch.count(), DenseActivations(batch.encoding.all.relu())
        alone = batch.error2_of_frozen(gates).sum() / batch.power
        return gates.values.sum() / (n * batch.power).sqrt(), alone

    def set_threshold(self, sae: SAE, threshold: Tensor) -> None:
        sae.b_enc.fill_(-float(threshold))

    def lead(self, sae: SAE, excess: Tensor) -> None:
        sae.b_enc.sub_(0.03 * excess * sae.b_enc.abs().mean())


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
