"""Where in a corpus each atom of an SAE fires most strongly: one pass, memory that does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.attachable import fit
from writesae.hooks.positions import PAD
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import track
from writesae.saes.activity.contexts import EDGES, Contexts
from writesae.saes.activity.reading import BLOCK, Codes, encode
from writesae.saes.autoencoder import Autoencoder
from writesae.saes.config import SAEConfig
from writesae.stores.windows import each_window, together

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel


@named_kinds
@torch.no_grad()
def top_contexts(
    model: HookedRecurrentModel,
    sae: Autoencoder,
    texts: str | Iterable[str] | Int[Tensor, "n pos"],
    *,
    n: int = 10,
    atoms: Sequence[int] | None = None,
    before: int = 16,
    after: int = 8,
    batch_size: int = 8,
    context: int = 512,
    check_model: bool = True,
    progress: bool = True,
) -> Contexts:
    """The strongest firings of atoms over a corpus, each with the tokens around it.

    A text is read in windows of ``context`` tokens, each from an empty memory, and an atom's firings are from ``n``
    different windows: the strongest of each, so that they show different places. Of equal ones the first counts.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        texts: a text, several (read one after the other, so a generator will do), or token ids.
        n: firings kept per atom.
        atoms: which atoms; None for all.
        before, after: tokens shown around each firing, as far as its window goes.
        batch_size: windows run at once.
        context: tokens of a window; the last of a text may be shorter.
        check_model: refuse an SAE trained on other weights.
        progress: show a progress bar.

    Raises:
        IndexError: no such atom.
        ValueError: no text, or no atom; text without a tokenizer; an SAE without a site, or of another model.
    """
    for name, number, least in (
        ("n", n, 1), ("before", before, 0), ("after", after, 0), ("batch_size", batch_size, 1), ("context", context, 1)
    ):  # fmt: skip
        if number < least:
            raise ValueError(f"{name}={number}: must be at least {least}")
    fit(sae, model, check_model=check_model)
    chosen = torch.tensor(list(range(sae.cfg.n_atoms) if atoms is None else dict.fromkeys(atoms)))
    if not len(chosen):
        raise ValueError("atoms=[]: name at least one, or None for all")
    for end in chosen.aminmax():
        sae.atom(end)  # raises for one out of range
    strongest = Strongest(chosen, sae.cfg.n_atoms, n, before, after)
    n_documents = n_tokens = 0
    texts = [texts] if isinstance(texts, str) else texts
    total = len(texts) if isinstance(texts, Sequence | Tensor) else None
    windows = each_window(model, track(texts, "top contexts", progress, total=total), context)
    while batch := list(islice(windows, batch_size)):
        documents, starts, rows = zip(*batch, strict=True)
        ids, given = together(rows)
        codes = encode(model, sae, ids, check_model=False, batch_size=batch_size, **given)
        strongest.add(codes, torch.tensor(documents), torch.tensor(starts))
        n_documents, n_tokens = max(n_documents, documents[-1] + 1), n_tokens + codes.n_tokens
    if not n_tokens:
        raise ValueError("no text: top_contexts needs at least one that is not empty")
    return strongest.contexts(model, sae.cfg, n_documents, n_tokens)


class Strongest:
    """The ``n`` strongest firings of each atom so far, and counts."""

    KEPT = ("values", "documents", "positions", "tokens", "activations")

    def __init__(self, atoms: Tensor, n_atoms: int, n: int, before: int, after: int) -> None:
        self.atoms, self.n_atoms, self.n = atoms, n_atoms, n
        self.around = torch.arange(-before, after + 1)
        size, width = (len(atoms), n), len(self.around)
        self.values, self.activations = torch.zeros(size), torch.zeros(*size, width)
        self.documents, self.positions = (torch.full(size, -1) for _ in range(2))
        self.tokens = torch.full((*size, width), -1)
        self.fired = torch.zeros(len(atoms), dtype=torch.long)
        self.histogram = torch.zeros(len(atoms), len(EDGES) + 1, dtype=torch.long)

    def add(self, codes: Codes, documents: Int[Tensor, " batch"], starts: Int[Tensor, " batch"]) -> None:
        """See the codes of some windows."""
        ids, places = codes.tokens.cpu(), codes.positions.cpu()
        values, indices = codes.values.float().cpu(), codes.indices.cpu()
        self._count(values, indices)
        best, column = self._best(values, indices)
        # A stable sort after those there are: of equal firings, the first stays.
        order = torch.cat([self.values, best], 1).sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        for name in self.KEPT:
            x = getattr(self, name)
            old = order.clamp(max=self.n - 1).view(*order.shape, *(1,) * (x.ndim - 2)).expand_as(x)
            setattr(self, name, x.gather(1, old))
        new = order >= self.n
        atom, row = new.nonzero()[:, 0], order[new] - self.n
        at = column[atom, row]
        around = at[:, None] + self.around
        inside = (around >= 0) & (around < ids.shape[1])
        where = (row[:, None], around.clamp(0, ids.shape[1] - 1))
        inside &= places[where] != PAD
        self.values[new] = best[atom, row]
        self.documents[new], self.positions[new] = documents[row], starts[row] + places[row, at]
        self.tokens[new] = ids[where].masked_fill(~inside, -1)
        step = max(1, BLOCK // (len(self.around) * values.shape[-1]))
        parts = [
            (values[r, c] * (indices[r, c] == self.atoms[a][:, None, None])).sum(-1)
            for r, c, a in zip(where[0].split(step), where[1].split(step), atom.split(step), strict=True)
        ]
        self.activations[new] = torch.cat(parts) * inside

    def contexts(self, model: HookedRecurrentModel, cfg: SAEConfig, n_documents: int, n_tokens: int) -> Contexts:
        """What was found in so much text."""
        kept = self.tokens.unique().tolist()
        decode = str if model.tokenizer is None else lambda token: model.tokenizer.decode([token])
        strings = {token: decode(token) for token in kept if token >= 0}
        found = {name: getattr(self, name) for name in ("fired", "histogram", *Strongest.KEPT)}
        before = -int(self.around[0])
        return Contexts(cfg, self.atoms, before, n_documents, n_tokens, **found, strings=strings)

    def _best(self, values: Tensor, indices: Tensor) -> tuple[Float[Tensor, "atom batch"], Int[Tensor, "atom batch"]]:
        """Each window's strongest firing of each atom, and its column, the first of equal ones."""
        batch, n_pos, m = values.shape
        flat, which = values.flatten(1), indices.flatten(1)
        best = torch.zeros(batch, self.n_atoms).scatter_reduce(1, which, flat, "amax")
        columns = torch.where(flat < best.gather(1, which), n_pos, torch.arange(n_pos).repeat_interleave(m))
        first = torch.full((batch, self.n_atoms), n_pos).scatter_reduce(1, which, columns, "amin")
        return best[:, self.atoms].T, first[:, self.atoms].T

    def _count(self, values: Tensor, indices: Tensor) -> None:
        active, n_bins = values > 0, len(EDGES) + 1
        bins = indices[active] * n_bins + torch.bucketize(values[active], EDGES)
        counts = bins.bincount(minlength=self.n_atoms * n_bins).view(-1, n_bins)[self.atoms]
        self.histogram += counts
        self.fired += counts.sum(1)
