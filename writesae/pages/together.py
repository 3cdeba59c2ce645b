"""Which atoms fire together: pairs counted while texts are read, and the closest of each atom."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.saes.activity.firings import first_of_each
from writesae.saes.activity.reading import Codes

NEAR = 4  # tokens: how far apart firings of an SAE with one active atom a token may be, to be together
LEAST = 3  # firings together, to be listed


class Together:
    """Counts of pairs of atoms that fire at the same token; where one atom a token is active, within `NEAR` tokens.

    Args:
        n_atoms: of the SAE.
        near: how many tokens apart; 0: the same token.
    """

    def __init__(self, n_atoms: int, near: int) -> None:
        self.n_atoms, self.near = n_atoms, near
        self.pairs, self.counts = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)

    def add(self, codes: Codes) -> None:
        """Count a batch of windows."""
        atoms, fires = codes.indices.cpu(), codes.values.cpu() > 0
        found = []
        for apart in range(self.near + 1):
            n = atoms.shape[1] - apart
            if n < 1:
                break
            one, other = (x[:, :n, :, None] for x in (atoms, fires)), (x[:, apart:, None, :] for x in (atoms, fires))
            (a, on), (b, also) = one, other
            both = on & also & (a != b)
            a, b = (x.expand_as(both)[both] for x in (a, b))
            found.append(a * self.n_atoms + b)
            if apart:  # at the same token, both orders are there
                found.append(b * self.n_atoms + a)
        self.pairs, which = torch.cat([self.pairs, *found]).unique(return_inverse=True)
        old = torch.cat([self.counts, torch.ones(len(which) - len(self.counts), dtype=torch.long)])
        self.counts = torch.zeros(len(self.pairs), dtype=torch.long).index_add_(0, which, old)

    def closest(self, firings: Int[Tensor, " atom"], n: int) -> tuple[Int[Tensor, "atom n"], Int[Tensor, "atom n"]]:
        """For each atom ``a`` the ``n`` others ``b`` with the largest ``n_ab / sqrt(n_a n_b)``, and ``n_ab``, how many
        pairs of firings that is; -1 and 0 where fewer were together at least `LEAST` times."""
        often = self.counts >= LEAST
        a, b, count = self.pairs[often] // self.n_atoms, self.pairs[often] % self.n_atoms, self.counts[often]
        cosine: Float[Tensor, " pair"] = count / (firings[a].float() * firings[b].float()).sqrt().clamp_min(1e-30)
        order = first_of_each(a, -cosine, n)
        a, b, count = a[order], b[order], count[order]
        place = torch.arange(len(a)) - torch.searchsorted(a, a)  # of each pair among those of its atom
        others, counts = torch.full((self.n_atoms, n), -1), torch.zeros(self.n_atoms, n, dtype=torch.long)
        others[a, place], counts[a, place] = b, count
        return others, counts
