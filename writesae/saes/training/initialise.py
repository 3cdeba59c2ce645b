"""Atoms are initialised from samples, not from random numbers: before training, and dead ones again during it."""

from __future__ import annotations

import torch
from torch import Tensor

from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import Matrices, dense, norm2
from writesae.saes.autoencoder import Autoencoder
from writesae.saes.dictionary import Dictionary, Samples
from writesae.saes.training.data import pieces


@torch.no_grad()
def initialise(sae: Autoencoder, pool: Matrices, random: torch.Generator, rounds: int = 8) -> None:
    """Set all atoms, the encoder and thresholds from a pool of samples.

    k-means++ in rounds: each sets a share of the atoms to samples that those before reconstruct badly. Atoms of states
    are set to what single tokens wrote: the leading parts of states are much alike, so that many atoms at once would
    reconstruct the same thing many times over.
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
        initialise_atoms(sae, atoms, pool, chosen)
        if rounds > 1:
            best = torch.cat([sae.pre(x)[:, atoms].amax(-1).cpu() for x in pieces(pool, 1024)])
            left2 = torch.minimum(left2, size2 - best.relu().square())
    few = next(pieces(pool, 2048))
    sae.sparsity.initialise(sae, few)
    if (encoder := sae.own_encoder) is not None:
        _scale(sae, encoder, few)
        sae.sparsity.initialise(sae, few)


@torch.no_grad()
def initialise_atoms(sae: Autoencoder, atoms: Tensor, pool: Matrices, chosen: Tensor, strength: float = 1.0) -> None:
    """Set some atoms, encoder and decoder alike, to the leading parts of samples (of states: of what was written).

    ``strength`` is the norm of what an encoder of its own reads them with: 1 overshoots where others have learnt less.
    """
    device, atoms_of, encoder = sae.b_enc.device, sae.dictionary, sae.own_encoder
    for which, piece in zip(atoms.split(256), chosen.to(device).split(256), strict=True):
        if isinstance(pool, States):
            x = pool.gain[piece // pool.shape[1], piece % pool.shape[1]]
        else:
            x = pool[piece] if sae.mean is None else dense(pool[piece]) - sae.mean
        samples = Samples(x, sae.cfg.rank)
        atoms_of.set_to(which, samples)
        if encoder is not None:
            encoder.set_to_read(which, samples, atoms_of, strength)
    sae.sparsity.reset_atoms(sae, atoms)


def _scale(sae: Autoencoder, encoder: Dictionary, x: Matrices) -> None:
    """Scale the encoder so that reconstructions have the right size: ``k`` atoms that are alike overshoot."""
    whole = sae.loss(x)
    encoder.scale(0.5)
    # The error is N - 2 c P + c^2 Q in the scale c, now known at c = 0, 1/2 and 1.
    at_1, at_half = (float((out.error2 - out.norm2).sum()) for out in (whole, sae.loss(x)))
    Q = 2 * (at_1 - 2 * at_half)
    P = (Q - at_1) / 2
    encoder.scale(2 * min(1.0, P / Q) if P > 0 and Q > 0 else 2)
