"""Sparsities that choose atoms by rank: TopK and BatchTopK."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.jobs.processes import ALONE, Processes
from writesae.recurrence.matrices import Matrices
from writesae.saes.reconstruction import Activations, Batch
from writesae.saes.sparsities.base import SAE, Sparsity, register_sparsity
from writesae.saes.sparsities.selection import above, batch_threshold, largest


class Choosing(Sparsity):
    """A sparsity that chooses atoms by rank; their activations are ``ReLU(pre)``. A subclass says which: `choose`."""

    chooses = True

    @abstractmethod
    def choose(
        self, sae: SAE, pre: Float[Tensor, "... n_atoms"], *, over_batch: bool, processes: Processes = ALONE
    ) -> tuple[Int[Tensor, "... m"], Float[Tensor, "... m"]]:
        """The atoms chosen, largest first, and 1 for each that is active, else 0."""

    def activate(self, sae: SAE, pre: Tensor) -> Tensor:
        values, indices = self.sparsify(sae, pre)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def sparsify(self, sae: SAE, pre: Tensor, over_batch: bool = False) -> tuple[Tensor, Tensor]:
        indices, active = self.choose(sae, pre, over_batch=over_batch)
        return pre.gather(-1, indices).relu() * active, indices

    def activations(self, sae: SAE, batch: Batch, *, over_batch: bool, bandwidth: float) -> Activations:
        pre = batch.encoding.chosen_from()
        return batch.chosen(*self.choose(sae, pre, over_batch=over_batch, processes=batch.processes))

    def reset_atoms(self, sae: SAE, atoms: Tensor) -> None:
        sae.b_enc[atoms] = 0


@register_sparsity("topk")
class TopK(Choosing):
    """The ``k`` largest of each matrix (the paper, section 2)."""

    def choose(self, sae: SAE, pre: Tensor, *, over_batch: bool, processes: Processes = ALONE) -> tuple[Tensor, Tensor]:
        return largest(pre, sae.cfg.k)

    def width(self, cfg: Any) -> int:
        return cfg.k


@register_sparsity("batch_topk")
class BatchTopK(Choosing):
    """The largest of a whole batch, ``k`` per matrix on average (Bussmann et al. 2024).

    A matrix by itself is read by ``threshold``: its atoms above that are active.
    """

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
