"""How well an SAE does on samples."""

from __future__ import annotations

import torch

from writesae.recurrence.matrices import Matrices
from writesae.saes.autoencoder import Autoencoder
from writesae.saes.training.data import check_data, pieces


@torch.no_grad()
def evaluate(sae: Autoencoder, data: Matrices, batch_size: int = 4096) -> dict[str, float]:
    """How well an SAE does on samples; batch_topk by its threshold, if it has one.

    Returns:
        ``nmse``: the normalised MSE, summed squared error over summed squared norm; where data are centred that is the
        FVU (fraction of variance unexplained).
        ``mse``: mean squared error of one number.
        ``cosine``: of the strongest atom to the matrix (less the mean, if centred), mean over samples;
        ``cosine_p10``: a tenth of the samples have less. ``l0``: active atoms per sample. ``alive``: share of atoms
        active at least once. ``n``: samples.
    """
    check_data(sae.cfg, data)
    over_batch = not sae.sparsity.ready(sae)
    outs = [sae.loss(piece, over_batch=over_batch) for piece in pieces(data, batch_size)]
    cosine, errors = (
        torch.cat([x.flatten() for x in xs]) for xs in zip(*((o.cosine, o.error2) for o in outs), strict=True)
    )
    fired = torch.stack([out.fired for out in outs]).sum(0)
    n = len(cosine)
    return {
        "nmse": float(errors.sum() / sum(out.norm2.sum() for out in outs)),
        "mse": float(errors.mean()) / (sae.cfg.d_key * sae.cfg.d_value),
        "cosine": float(cosine.mean()),
        "cosine_p10": float(cosine.kthvalue(max(1, n // 10)).values),
        "l0": int(fired.sum()) / n,
        "alive": int((fired > 0).sum()) / sae.cfg.n_atoms,
        "n": n,
    }
