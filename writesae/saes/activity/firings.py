"""What each atom does over a text: how often it fires, how strongly, and how like the native write it is there."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from writesae.hooks.names import inputs
from writesae.hooks.positions import PAD
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write
from writesae.recurrence.matrices import norm2
from writesae.saes.activity.reading import BLOCK, Codes, codes_of
from writesae.saes.sae import WriteSAE

COLUMNS = ("cosine", "key_cosine", "value_cosine", "elsewhere")
"""Cosine to the native write; |cosine| of the factors alone; cosine to the write at a random token of the batch."""


def firings(
    model: HookedRecurrentModel, sae: WriteSAE, ids: Int[Tensor, "window pos"], generator: torch.Generator
) -> tuple[Int[Tensor, " firing"], Float[Tensor, " firing"], Float[Tensor, "firing 4"]]:
    """Every firing in some windows: the atom, its activation, and the `COLUMNS`.

    A firing is an atom active at a token, whether or not it is the strongest there.
    """
    layer, head = sae.place
    names = inputs(model.family(layer).rule, layer)
    _, cache = model.run_with_cache(ids, names=names, stop_at_layer=layer + 1)  # nobody wants the rest
    codes = codes_of(sae, cache, ids)
    at = (codes.values > 0).nonzero(as_tuple=True)
    columns = compare(sae, codes, at, cache.write(layer)[:, :, head], generator)
    return codes.indices[at].cpu(), codes.values[at].float().cpu(), columns


def compare(
    sae: WriteSAE, codes: Codes, at: tuple[Tensor, ...], write: Write, generator: torch.Generator
) -> Float[Tensor, "firing 4"]:
    """The `COLUMNS` of the firings ``at`` some rows, positions and columns of the codes of a pass.

    ``write`` is what the head writes in it, ``[batch, pos]``; the generator draws the random tokens.
    """
    device, write, lengths = sae.b_enc.device, write.to(sae.b_enc), norm2(sae.decoder).sqrt()
    dense = sae.cfg.decoder == "dense"
    size = sae.cfg.d_key * sae.cfg.d_value if dense else sae.cfg.rank * (sae.cfg.d_key + sae.cfg.d_value)
    row, pos, atom = (x.to(device) for x in (*at[:2], codes.indices[at]))
    tokens = (codes.positions != PAD).nonzero().to(device)
    other = tokens[torch.randint(len(tokens), (len(atom),), generator=generator).to(device)]
    parts = []
    for here in torch.arange(len(atom), device=device).split(max(1, BLOCK // size)):
        atoms, length, native = sae.atom(atom[here]), lengths[atom[here]], write[row[here], pos[here]]
        random = write[other[here, 0], other[here, 1]]
        cosine, elsewhere = (atoms.inner(x) / (length * x.norm()).clamp_min(1e-30) for x in (native, random))
        parts.append(torch.stack([cosine, *_factor_cosines(atoms, native), elsewhere], -1))
    return torch.cat(parts).float().cpu() if parts else torch.zeros(0, len(COLUMNS))


def _factor_cosines(atoms: Write, native: Write) -> tuple[Tensor, Tensor]:
    """|cosine| of keys and of values, NaN unless both are of rank 1."""
    if atoms.rank > 1 or native.rank > 1:
        nothing = native.key.new_full(native.shape, torch.nan)
        return nothing, nothing
    pairs = (atoms.key, native.key), (atoms.value, native.value)
    key, value = (torch.cosine_similarity(*pair, dim=-1, eps=1e-30).abs() for pair in pairs)
    return key, value


def first_of_each(group: Int[Tensor, " n"], priority: Shaped[Tensor, " n"], most: int) -> Int[Tensor, " kept"]:
    """Which rows are the first ``most`` of their group, those of the lowest priority; group by group, in that order."""
    order = priority.argsort()
    order = order[group[order].argsort(stable=True)]
    counts = group.bincount()
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[group[order]]
    return order[place < most]


class Seen:
    """Counts over all firings, and of each atom ``most`` firings drawn at random, with numbers called ``names``.

    ``ahead`` firings are held beyond those drawn so far; then it is drawn again.
    """

    def __init__(self, n_atoms: int, most: int, names: tuple[str, ...] = COLUMNS, ahead: int = 2**20) -> None:
        self.n_atoms, self.most, self.names, self.ahead, self.drawn = n_atoms, most, names, ahead, 0
        self.firings = torch.zeros(n_atoms, dtype=torch.long)
        self.total, self.largest = torch.zeros(n_atoms), torch.zeros(n_atoms)
        self.kept = [(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, len(names)))]

    def add(self, atom: Tensor, activation: Tensor, columns: Tensor, priority: Tensor) -> None:
        self.firings += atom.bincount(minlength=self.n_atoms)
        self.total.index_add_(0, atom, activation)
        self.largest.scatter_reduce_(0, atom, activation, "amax")
        self.kept.append((atom, priority, columns))
        if sum(len(part[0]) for part in self.kept) > self.drawn + self.ahead:
            self.draw()

    def draw(self) -> tuple[Int[Tensor, " firing"], Float[Tensor, "firing number"]]:
        """Keep those of the lowest priorities, drawn once per firing: a fair sample, whatever the batches."""
        atom, priority, columns = (torch.cat(part) for part in zip(*self.kept, strict=True))
        order = first_of_each(atom, priority, self.most)
        self.kept, self.drawn = [(atom[order], priority[order], columns[order])], len(order)
        return atom[order], columns[order]

    def medians(self) -> dict[str, Float[Tensor, " atom"]]:
        """Of the `COLUMNS`, for each atom, over what is a number; NaN where it never fired."""
        atom, columns = (x.numpy() for x in self.draw())
        order = atom.argsort(kind="stable")
        numbers, ends = columns[order], np.bincount(atom, minlength=self.n_atoms).cumsum()
        whole = np.full((self.n_atoms, len(self.names)), np.nan, np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of columns in which an atom has no number at all
            for i in np.unique(atom):
                whole[i] = np.nanmedian(numbers[ends[i - 1] if i else 0 : ends[i]], axis=0)
        return {name: torch.from_numpy(whole[:, self.names.index(name)].copy()) for name in COLUMNS}
