"""Do SAEs of one site find the same atoms? (Paper, section 3.1 and Table 16: the classes recur, the atoms do not.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from writesae.experiments.classes import CLASSES, COLORS, AtomClasses
from writesae.experiments.protocol import Asked, Task, experiment
from writesae.jobs.arguments import named_kinds
from writesae.models.fingerprint import same_weights
from writesae.recurrence.matrices import Atoms, project, size, unit_norm
from writesae.results.result import Figure, Number, Result, figure, frame
from writesae.results.statistics import Array
from writesae.saes import WriteSAE
from writesae.saes.activity.reading import BLOCK

__all__ = ["SeedStability", "seed_stability"]


@dataclass(frozen=True, eq=False)
class Match:
    """For the atoms of one SAE, the most similar atom of another.

    Attributes:
        sae, other: which two, counted from 0.
        atoms: those compared; all, or the alive ones.
        partner: for each, the atom of ``other`` with the largest |cosine|.
        cosine: that |cosine|, of the two matrices.
    """

    sae: int
    other: int
    atoms: Int[Tensor, " atom"]
    partner: Int[Tensor, " atom"]
    cosine: Float[Tensor, " atom"]


@dataclass(frozen=True, eq=False)
class SeedStability(Result):
    """How far SAEs of one site agree, atom by atom and class by class.

    Attributes:
        layer, head: the site.
        threshold: an atom has a partner if some atom of the other SAE has a larger |cosine| to it.
        matches: for every ordered pair of SAEs.
        classes: of each SAE's atoms; None if they were not given.
    """

    layer: int | None
    head: int | None
    threshold: float
    matches: tuple[Match, ...]
    classes: tuple[Shaped[Array, " atom"], ...] | None

    @property
    def n_saes(self) -> int:
        return 1 + max(match.sae for match in self.matches)

    @property
    def title(self) -> str:
        return f"Stability over seeds, layer {self.layer} head {self.head}: {self.n_saes} SAEs"

    @property
    def about(self) -> str:
        which = "Every atom" if self.classes is None else "Every alive atom"
        text = (
            f"{which} of each SAE against those of every other SAE of the same head, as matrices: it has a partner if "
            f"one of them has an |cosine| above {self.threshold:g} to it. The share is over all ordered pairs of SAEs; "
            f"its interval takes atoms as independent. Paper: section 3.1 and Table 16, less than 1% at 0.9."
        )
        if self.classes is not None:
            text += " Variation of a class: standard deviation of its counts over the SAEs, over their mean."
        return text

    def shares(self) -> dict[tuple[int, int], float]:
        """For each ordered pair of SAEs, how many atoms of the first have a partner in the second."""
        return {(m.sae, m.other): float((m.cosine > self.threshold).float().mean()) for m in self.matches}

    def numbers(self) -> list[Number]:
        best = self._all("cosine")
        pairs = self.shares()
        found = [
            Number.share("atoms with a partner", torch.from_numpy(best > self.threshold)),
            Number("atoms with a partner, least pair", min(pairs.values()), "%", n=len(pairs)),
            Number("atoms with a partner, best pair", max(pairs.values()), "%", n=len(pairs)),
        ]
        found += [Number(f"best |cosine|, {q}%", float(np.quantile(best, q / 100)), n=len(best)) for q in (10, 50, 90)]
        if self.classes is None:
            return found
        label = self._all("class")
        for name in CLASSES[:2]:
            counts = np.array([(of_one == name).sum() for of_one in self.classes], dtype=float)
            mine = torch.from_numpy(best[label == name])
            if len(mine):
                spread = float(counts.std(ddof=1) / counts.mean())
                found.append(Number(f"variation of the number of {name}s", spread, "%", n=len(counts)))
                found.append(Number.share(f"{name}s with a partner", mine > self.threshold))
        return found

    def _all(self, what: str) -> Array:
        """A column of the records."""
        return self.records()[what].to_numpy()

    def columns(self) -> dict[str, Any]:
        parts = []
        for m in self.matches:
            of_class = {} if self.classes is None else {"class": self.classes[m.sae][m.atoms.numpy()]}
            first = {"sae": m.sae, "other": m.other, "atom": m.atoms.numpy(), **of_class}
            parts.append(first | {"partner": m.partner.numpy(), "cosine": m.cosine.numpy()})
        return dict(frame(*parts))

    def plot(self) -> Figure:
        """How alike the most similar atoms are; and the classes of each SAE."""
        fig, axes = figure(1 if self.classes is None else 2)
        axes[0].hist(self._all("cosine"), np.linspace(0, 1, 51), color="tab:blue")
        axes[0].axvline(self.threshold, color="black", lw=1, ls="--")
        axes[0].set(xlabel="largest |cosine| to an atom of the other SAE", ylabel="atoms, all pairs")
        if self.classes is not None:
            bottom = np.zeros(self.n_saes)
            for name in CLASSES:
                counts = np.array([(of_one == name).sum() for of_one in self.classes])
                axes[1].bar(range(self.n_saes), counts, bottom=bottom, color=COLORS[name], label=name)
                bottom = bottom + counts
            axes[1].set(xlabel="SAE", ylabel="atoms", xticks=range(self.n_saes))
            axes[1].legend(frameon=False)
        return fig


def _plan(asked: Asked) -> Iterator[Task]:
    for sae in asked.saes:
        if others := [other for other in asked.other_seeds if other.place == sae.place]:
            saes = [sae, *others]
            yield Task(lambda progress, saes=saes: seed_stability(saes), saes)


@named_kinds
@experiment("atoms of SAEs trained with other seeds (section 3.1); needs --other-seed", order=4, plan=_plan)
@torch.no_grad()
def seed_stability(
    saes: Sequence[WriteSAE], *, threshold: float = 0.9, classes: Sequence[AtomClasses] | None = None
) -> SeedStability:
    """Look for each atom's partner in SAEs of the same head that were trained with other seeds.

    Args:
        saes: two or more, of one head and target; their atoms may be of any rank or dense.
        threshold: |cosine| above which two atoms are the same.
        classes: of each SAE, in order, from `atom_classes`: only alive atoms are compared then, and classes counted.

    Raises:
        ValueError: fewer than two SAEs, SAEs of different heads, sizes, targets or models, classes of other SAEs, or
            no alive atom in one.
    """
    if len(saes) < 2:
        raise ValueError(f"stability over seeds needs two or more SAEs; got {len(saes)}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}: a |cosine| to lie above, from 0 to less than 1")
    first = saes[0].cfg
    for name in ("layer", "head", "d_key", "d_value", "target", "fingerprint"):
        found = [getattr(sae.cfg, name) for sae in saes]
        if len(set(found)) > 1 and not (name == "fingerprint" and all(_same(found[0], other) for other in found)):
            raise ValueError(f"SAEs of one head are compared; these differ in {name}: {', '.join(map(str, found))}")
    if classes is not None and [c.cfg for c in classes] != [sae.cfg for sae in saes]:
        raise ValueError("classes must be those of the SAEs, one for each, in the same order")
    alive = [torch.arange(sae.cfg.n_atoms) for sae in saes]
    if classes is not None:
        alive = [torch.from_numpy(c.alive).nonzero()[:, 0] for c in classes]
        for i, atoms in enumerate(alive):
            if not len(atoms):
                raise ValueError(f"no atom of SAE {i} is alive: give atom_classes more text, or lower min_firings")
    where = saes[0].b_enc.device
    atoms = [unit_norm(sae.decoder[own.to(sae.b_enc.device)]).to(where) for sae, own in zip(saes, alive, strict=True)]
    matches = []
    for i, j in permutations(range(len(saes)), 2):
        cosine, partner = _nearest(atoms[i], atoms[j])
        matches.append(Match(i, j, alive[i], alive[j][partner], cosine))
    labels = None if classes is None else tuple(c.classes for c in classes)
    return SeedStability(first.layer, first.head, threshold, tuple(matches), labels)


def _same(one: str | None, other: str | None) -> bool:
    return one == other or bool(one and other and same_weights(one, other))


def _nearest(atoms: Atoms, others: Atoms) -> tuple[Float[Tensor, " atom"], Int[Tensor, " atom"]]:
    """The largest |inner product| of each atom with the others, and which, a block of atoms at a time."""
    ranks = [1 if isinstance(x, Tensor) else x.rank for x in (atoms, others)]
    n_others, d_key, d_value = size(others)
    step = max(1, BLOCK // max(n_others * ranks[0] * ranks[1], d_key * d_value))
    parts = [project(atoms[i : i + step], others).abs().max(-1) for i in range(0, size(atoms)[0], step)]
    cosine, partner = (torch.cat([part[k] for part in parts]).cpu() for k in range(2))
    return cosine.float().clamp(max=1), partner
