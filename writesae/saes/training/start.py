"""Where training starts from, and where dead atoms start anew: samples, not random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import Matrices, dense, norm2, unit_norm
from writesae.saes.sae import WriteSAE
from writesae.saes.sparsity import batch_threshold
from writesae.saes.training.data import pieces, rank_parts


@torch.no_grad()
def start(sae: WriteSAE, pool: Matrices, random: torch.Generator, rounds: int = 8) -> None:
    """Set all atoms, the encoder and thresholds from a pool of samples.

    k-means++ in rounds: each starts a share of the atoms from samples that those before reconstruct badly. Atoms of
    states start from what single tokens wrote: the leading parts of states are much alike, so that many atoms at once
    would reconstruct the same thing many times over.
    """
    n_atoms = sae.cfg.n_atoms
    if isinstance(pool, States):
        size2, rounds = pool.gain.norm().square().flatten().cpu(), 1
    else:
        size2 = norm2(pool if sae.mean is None else dense(pool) - sae.mean).cpu()
    left2 = size2
    for atoms in torch.arange(n_atoms).chunk(rounds):
        enough = int((left2 > 1e-12).sum()) >= len(atoms)
        chosen = torch.multinomial(left2.clamp_min(1e-12), len(atoms), replacement=not enough, generator=random)
        start_atoms(sae, atoms, pool, chosen)
        if rounds > 1:
            best = torch.cat([sae.pre(x)[:, atoms].amax(-1).cpu() for x in pieces(pool, 1024)])
            left2 = torch.minimum(left2, size2 - best.relu().square())
    few = next(pieces(pool, 2048))
    _start_thresholds(sae, few)
    if sae.cfg.encoder != "tied":
        _start_scale(sae, few)
        _start_thresholds(sae, few)


@torch.no_grad()
def start_atoms(sae: WriteSAE, atoms: Tensor, pool: Matrices, chosen: Tensor, strength: float = 1.0) -> None:
    """Set some atoms, encoder and decoder alike, to the leading parts of samples (of states: of what was written).

    ``strength`` is the norm of what an encoder of its own reads them with: 1 overshoots where others have learnt less.
    """
    device = sae.b_enc.device
    for which, piece in zip(atoms.split(256), chosen.to(device).split(256), strict=True):
        if isinstance(pool, States):
            x = pool.gain[piece // pool.shape[1], piece % pool.shape[1]]
        else:
            x = pool[piece] if sae.mean is None else dense(pool[piece]) - sae.mean
        if sae.cfg.decoder == "dense":
            sae.A_dec[which] = dense(unit_norm(x))
        if sae.cfg.decoder == "factored" or sae.cfg.encoder == "bilinear":
            v, w = rank_parts(x, sae.cfg.rank)
            for name, rows in (("V_dec", v), ("W_dec", w), ("V_enc", strength * v), ("W_enc", w)):
                if hasattr(sae, name):
                    getattr(sae, name)[which] = rows.reshape(-1, *getattr(sae, name).shape[1:])
        if sae.cfg.encoder == "dense":
            sae.A_enc[which] = strength * dense(sae.decoder[which])
    if sae.cfg.chooses:
        sae.b_enc[atoms] = 0


def _start_scale(sae: WriteSAE, x: Matrices) -> None:
    """Scale the encoder so that reconstructions have the right size: ``k`` atoms that are alike overshoot."""
    encoder = next(getattr(sae, name) for name in ("V_enc", "A_enc") if hasattr(sae, name))
    whole = sae.loss(x)
    encoder.mul_(0.5)
    # The error is N - 2 c P + c^2 Q in the scale c, now known at c = 0, 1/2 and 1.
    at_1, at_half = (float((out.error2 - out.norm2).sum()) for out in (whole, sae.loss(x)))
    Q = 2 * (at_1 - 2 * at_half)
    P = (Q - at_1) / 2
    encoder.mul_(2 * min(1.0, P / Q) if P > 0 and Q > 0 else 2)


def _start_thresholds(sae: WriteSAE, x: Matrices) -> None:
    """Where they are learnt: such that ``k`` atoms a matrix are active at the start."""
    if sae.cfg.chooses:
        return
    sae.b_enc.zero_()
    threshold = batch_threshold(sae.pre(x), sae.cfg.k).clamp_min(1e-12)
    if sae.cfg.sparsity == "jumprelu":
        sae.log_threshold.fill_(float(threshold.log()))
    else:
        sae.b_enc.fill_(-float(threshold))
