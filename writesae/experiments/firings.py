"""What each atom does over a text: how often it fires, how strongly, and how like the native write it is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence import Write
from writesae.saes.matrices import norm2
from writesae.saes.reading import BLOCK, encode_matrices, inputs, target_of

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

COLUMNS = ("cosine", "key_cosine", "value_cosine", "elsewhere")
"""Cosine to the native write; |cosine| of the factors alone; cosine to the write at a random token of the batch."""


def firings(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    windows: Int[Tensor, "n pos"],
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[tuple[Int[Tensor, " firing"], Float[Tensor, " firing"], Float[Tensor, "firing 4"]]]:
    """Every firing, a batch of windows after the other: the atom, its activation, and the `COLUMNS`.

    A firing is an atom active at a token, whether or not it is the strongest there.
    """
    layer, head = sae.cfg.layer, sae.cfg.head
    assert layer is not None and head is not None
    few: Any = model.logits_of_last(1)  # nobody wants them
    lengths = norm2(sae.decoder).sqrt()
    dense = sae.cfg.decoder == "dense"
    size = sae.cfg.d_key * sae.cfg.d_value if dense else sae.cfg.rank * (sae.cfg.d_key + sae.cfg.d_value)
    step = max(1, BLOCK // size)
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size].to(model.device)
        _, cache = model.run_with_cache(ids, names=inputs(model, layer), **few)
        values, indices = encode_matrices(sae, *target_of(cache, layer, head, sae.cfg.target))
        write = cache.write(layer)[:, :, head].to(sae.b_enc)
        row, pos, _ = at = (values > 0).nonzero(as_tuple=True)
        atom, n_tokens = indices[at], ids.numel()
        other = torch.randint(n_tokens, (len(atom),), generator=generator).to(row.device)
        parts = []
        for here in torch.arange(len(atom), device=row.device).split(step):
            atoms, length, native = sae.atom(atom[here]), lengths[atom[here]], write[row[here], pos[here]]
            random = write[other[here] // ids.shape[1], other[here] % ids.shape[1]]
            cosine, elsewhere = (atoms.inner(x) / (length * x.norm()).clamp_min(1e-30) for x in (native, random))
            parts.append(torch.stack([cosine, *_factor_cosines(atoms, native), elsewhere], -1))
        columns = torch.cat(parts) if parts else values.new_zeros(0, len(COLUMNS))
        yield atom.cpu(), values[at].float().cpu(), columns.float().cpu()


def _factor_cosines(atoms: Write, native: Write) -> tuple[Tensor, Tensor]:
    """|cosine| of keys and of values, NaN unless both are of rank 1."""
    if atoms.rank > 1 or native.rank > 1:
        nothing = native.key.new_full(native.shape, torch.nan)
        return nothing, nothing
    pairs = (atoms.key, native.key), (atoms.value, native.value)
    key, value = (torch.cosine_similarity(*pair, dim=-1, eps=1e-30).abs() for pair in pairs)
    return key, value


class Seen:
    """Counts over all firings, and of each atom ``most`` firings drawn at random."""

    PRUNE = 2**20  # firings, kept beyond those drawn so far

    def __init__(self, n_atoms: int, most: int) -> None:
        self.n_atoms, self.most, self.drawn = n_atoms, most, 0
        self.firings = torch.zeros(n_atoms, dtype=torch.long)
        self.total, self.largest = torch.zeros(n_atoms), torch.zeros(n_atoms)
        self.kept = [(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, len(COLUMNS)))]

    def add(self, atom: Tensor, activation: Tensor, columns: Tensor, priority: Tensor) -> None:
        self.firings += atom.bincount(minlength=self.n_atoms)
        self.total.index_add_(0, atom, activation)
        self.largest.scatter_reduce_(0, atom, activation, "amax")
        self.kept.append((atom, priority, columns))
        if sum(len(part[0]) for part in self.kept) > self.drawn + self.PRUNE:
            self._draw()

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Keep those of the lowest priorities, drawn once a firing: a fair sample, whatever the batches."""
        atom, priority, columns = (torch.cat(part) for part in zip(*self.kept, strict=True))
        order = priority.argsort()
        order = order[atom[order].argsort(stable=True)]
        counts = atom.bincount(minlength=self.n_atoms)
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[atom[order]]
        order = order[place < self.most]
        self.kept, self.drawn = [(atom[order], priority[order], columns[order])], len(order)
        return atom[order], columns[order]

    def medians(self) -> dict[str, Float[Tensor, " atom"]]:
        """Of each column, for each atom; NaN where it never fired."""
        import pandas as pd

        atom, columns = self._draw()
        medians = pd.DataFrame(columns.numpy(), columns=list(COLUMNS)).groupby(atom.numpy()).median()
        whole = medians.reindex(range(self.n_atoms))
        return {name: torch.tensor(whole[name].to_numpy(dtype=np.float32)) for name in COLUMNS}
