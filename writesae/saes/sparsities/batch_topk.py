"""BatchTopK: the largest of a whole batch, ``k`` per matrix on average (Bussmann et al. 2024).

A matrix by itself is read by ``threshold``: its atoms above that are active.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from writesae.jobs.processes import ALONE, Processes
from writesae.recurrence.matrices import Matrices
from writesae.saes.sparsities.base import SAE, Choosing, register_sparsity
from writesae.saes.sparsities.selection import above, batch_threshold


@register_sparsity("batch_topk")
class BatchTopK(Choosing):
    calibrated = ("threshold",)

    def tensors(self, cfg: Any) -> dict[str, Tensor]:
        return {"threshold": torch.tensor(float("nan"))}

    def choose(self, sae: SAE, pre: Tensor, *, over_batch: bool, processes: Processes = ALONE) -> tuple[Tensor, Tensor]:
        threshold = batch_threshold(pre, sae.cfg.k, processes) if over_batch else sae.threshold
        if bool(torch.isnan(threshold)):
            raise ValueError(
                "this batch_topk SAE has no threshold yet to read single matrices with: sae.calibrate(data) finds it, "
                "or encode(x, over_batch=True) chooses over x"
            )
        return above(pre, threshold)

    def calibrate(self, sae: SAE, x: Matrices) -> float:
        sae.threshold.copy_(batch_threshold(sae.pre(x), sae.cfg.k))
        return float(sae.threshold)
