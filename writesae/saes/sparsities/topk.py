"""TopK: the ``k`` largest of each matrix (the paper, section 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from writesae.jobs.processes import ALONE, Processes
from writesae.saes.sparsities.base import SAE, Choosing, register_sparsity
from writesae.saes.sparsities.selection import largest


@register_sparsity("topk")
class TopK(Choosing):
    def choose(self, sae: SAE, pre: Tensor, *, over_batch: bool, processes: Processes = ALONE) -> tuple[Tensor, Tensor]:
        return largest(pre, sae.cfg.k)

    def width(self, cfg: Any) -> int:
        return cfg.k
