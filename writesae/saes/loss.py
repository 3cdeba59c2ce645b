"""What training minimises: the reconstruction error, dead atoms revived, and what the sparsity adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.saes.reconstruction import Batch
from writesae.saes.sparsities.base import SAE, Sparsity


@dataclass(frozen=True)
class SAELoss:
    """The reconstruction of one batch of matrices with leading dimensions ``...``. Those up to ``aux`` carry gradients.

    Attributes:
        loss: ``nmse + aux_weight * aux + sparsity_weight * penalty (+ gate, for gated)``: what training minimises.
        nmse: the normalised MSE: squared error over squared norm, both summed over the batch (about the mean, if
            centred); 0 is perfect, 1 as bad as reconstructing nothing.
        aux: the same ratio for what is left, reconstructed by dead atoms; 0 if none is dead.
        penalty: for jumprelu active atoms per matrix over ``k``; for gated the gates' sum, in the data's scale.
        error2: ``[...]`` squared error of each matrix.
        norm2: ``[...]`` squared norm of each.
        cosine: ``[...]`` cosine of each to its strongest atom; 0 where no atom is active.
        fired: ``[n_atoms]`` how many matrices each atom was active in.
        n_dead: atoms that were dead when the batch came.
    """

    loss: Float[Tensor, ""]
    nmse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    error2: Float[Tensor, "..."]
    norm2: Float[Tensor, "..."]
    cosine: Float[Tensor, "..."]
    fired: Int[Tensor, " n_atoms"]
    n_dead: int

    @property
    def l0(self) -> float:
        """Mean number of active atoms."""
        return float(self.fired.sum()) / self.error2.numel()


def loss_of(
    sae: SAE,
    sparsity: Sparsity,
    batch: Batch,
    *,
    dead: Bool[Tensor, "n_atoms"] | None,
    aux_weight: float,
    aux_k: int,
    sparsity_weight: float | Tensor,
    bandwidth: float,
    over_batch: bool,
) -> SAELoss:
    """See `WriteSAE.loss`, which makes the batch."""
    active = sparsity.activations(sae, batch, over_batch=over_batch, bandwidth=bandwidth)
    found2, left = batch.error2(active)
    nmse = found2.sum() / batch.power
    nothing = torch.zeros_like(nmse)

    aux = nothing
    n_dead = 0 if dead is None else int(dead.sum())
    if sparsity.chooses and dead is not None and n_dead and aux_weight:
        readings = batch.encoding.chosen_from().masked_fill(~dead, -torch.inf)
        revived = batch.sparse(readings.topk(min(aux_k, n_dead), -1).indices)
        aux2 = batch.revived_error2(revived, active, found2, left)
        aux = aux2.sum() / batch.processes.total(found2.sum()).clamp_min(1e-30)
    penalty, further = (nothing + x for x in sparsity.further_loss(sae, batch, bandwidth))
    loss = nmse + aux_weight * aux + sparsity_weight * penalty + further
    with torch.no_grad():
        cosine = batch.cosine(active)
    fired = active.fired(batch.n_atoms)
    return SAELoss(loss, nmse, aux, penalty, found2.detach(), batch.whole2.detach(), cosine, fired, n_dead)
