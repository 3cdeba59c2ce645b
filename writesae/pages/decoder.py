"""What the weights alone say about atoms: factors, the tokens they promote directly, the most similar atoms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence import Write
from writesae.recurrence.matrices import dense, leading, norm2, project

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

BLOCK = 2**24  # numbers worked on at once


@dataclass(frozen=True, eq=False)
class Decoder:
    """The atoms of an SAE, each as a key and a value of length 1.

    They are the factors of an atom of rank 1, and the leading singular pair of any other. Turning both signs gives the
    same atom.

    Attributes:
        key, value: the pair of each atom.
        share: the pair's share of the atom's squared norm; 1 for atoms of rank 1.
        norm: the norm of each atom.
    """

    key: Float[Tensor, "atom d_key"]
    value: Float[Tensor, "atom d_value"]
    share: Float[Tensor, " atom"]
    norm: Float[Tensor, " atom"]

    @classmethod
    @torch.no_grad()
    def of(cls, sae: WriteSAE) -> Decoder:
        """The atoms of an SAE, on the CPU."""
        atoms, length = sae.decoder, norm2(sae.decoder).sqrt()
        if isinstance(atoms, Write) and atoms.rank == 1:
            key, value = (F.normalize(x, dim=-1).cpu() for x in (atoms.key, atoms.value))
            return cls(key, value, torch.ones(len(length)), length.cpu())
        step = max(1, BLOCK // (sae.cfg.d_key * sae.cfg.d_value))
        parts = [leading(dense(atoms[some])) for some in torch.arange(len(length), device=length.device).split(step)]
        key, value = (torch.cat(part)[:, 0].cpu() for part in zip(*parts, strict=True))
        size = value.norm(dim=-1)
        share = (size / length.cpu().clamp_min(1e-30)).square().clamp(max=1)
        return cls(key, F.normalize(value, dim=-1), share, length.cpu())

    def turned(self, side: Float[Tensor, " atom"]) -> Decoder:
        """The same, with both signs of a pair turned where ``side`` is negative."""
        sign = torch.where(side < 0, -1.0, 1.0)[:, None]
        return Decoder(self.key * sign, self.value * sign, self.share, self.norm)


@torch.no_grad()
def direct_effect(
    model: HookedRecurrentModel, layer: int, head: int, value: Float[Tensor, "atom d_value"]
) -> Float[Tensor, "atom vocab"]:
    """``value W_O[head] W_U``: what one unit read out along a value adds to each logit, minus the mean over all tokens.

    The head's norm and gate, and everything after the layer except the output embedding, are left out (section 4 of
    the paper).
    """
    out = model.W_O(layer)[head].float() @ model.W_U.float()
    found = value.to(out) @ out
    return (found - found.mean(-1, keepdim=True)).cpu()


def extremes(
    effect: Float[Tensor, "atom vocab"], n: int
) -> tuple[Int[Tensor, "atom n"], Float[Tensor, "atom n"], Int[Tensor, "atom n"], Float[Tensor, "atom n"]]:
    """Tokens and values of the ``n`` largest effects per atom, then of the ``n`` smallest."""
    top, low = (effect.topk(min(n, effect.shape[-1]), largest=largest) for largest in (True, False))
    return top.indices, top.values, low.indices, low.values


@torch.no_grad()
def nearest(sae: WriteSAE, n: int) -> tuple[Int[Tensor, "atom n"], Float[Tensor, "atom n"]]:
    """For each atom the ``n`` others with the largest cosine of the matrices (Frobenius), and those cosines."""
    atoms, length = sae.decoder, norm2(sae.decoder).sqrt().clamp_min(1e-30)
    n = min(n, sae.cfg.n_atoms - 1)
    indices, values = [], []
    for some in torch.arange(sae.cfg.n_atoms, device=length.device).split(max(1, BLOCK // sae.cfg.n_atoms)):
        cosine = project(atoms[some], atoms) / (length[some, None] * length)
        cosine[torch.arange(len(some)), some] = -torch.inf
        best = cosine.topk(n)
        indices.append(best.indices.cpu())
        values.append(best.values.cpu())
    return torch.cat(indices), torch.cat(values)
