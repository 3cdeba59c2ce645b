"""Gated: one path decides whether an atom is active, another how strongly (Rajamanoharan et al. 2024a)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from writesae.saes.reconstruction import Batch, DenseActivations
from writesae.saes.sparsities.base import SAE, Thresholds, register_sparsity


@register_sparsity("gated")
class Gated(Thresholds):
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
