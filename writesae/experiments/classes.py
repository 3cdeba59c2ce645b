"""Classes of atoms (paper, section 3.1): which of them look like what the model writes where they fire?

At every firing of an atom, any of the active ones, its cosine to the native write is taken; the median over its firings
is one number per atom. A mixture of two Gaussians over these splits the atoms: *registers* are those of the component
with the higher mean, *bundles* the others, *null* atoms never fired. Cosine is all that it looks at, and with an SAE
trained on writes a high one is what training asked for: see what the replacement test makes of the classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from writesae.experiments.engine.mixture import MIN_VALUES, Mixture, fit_mixture
from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment, positive
from writesae.jobs.arguments import named_kinds
from writesae.jobs.extras import extra, need
from writesae.model import HookedRecurrentModel
from writesae.results.result import Figure, Number, Result, figure
from writesae.results.statistics import Array, cliffs_delta
from writesae.saes import SAEConfig, WriteSAE
from writesae.saes.activity.firings import COLUMNS, Seen, firings
from writesae.stores.windows import Texts

__all__ = ["AtomClasses", "atom_classes"]

CLASSES = ("register", "bundle", "null")
COLORS = {"register": "tab:blue", "bundle": "tab:orange", "null": "tab:gray"}
THRESHOLDS = (0.02, 0.03, 0.05, 0.10)
"""Cosines from which on an atom would count as a register, were there no mixture (the paper's Table 15)."""


@dataclass(frozen=True, eq=False)
class AtomClasses(Result):
    """How every atom fires, and what it looks like there. Where an atom never fired, its numbers are NaN.

    Attributes:
        cfg: of the SAE.
        n_tokens, context: tokens read, in windows of ``context``, each from an empty memory.
        min_firings, max_firings, threshold: as of `atom_classes`.
        firings: at how many tokens each atom was active.
        mean_activation, max_activation: over all of its firings.
        cosine: to the native write, median.
        key_cosine, value_cosine: of the factors alone, median of the absolute value (the paper's ``cos_v``,
            ``cos_w``); NaN for atoms that are not of rank 1.
        elsewhere: cosine to the writes at tokens drawn at random, median: what the cosine at firings is to be held
            against.
        mixtures: of 1, 2 and 3 Gaussians over the cosines of alive atoms; empty where too few are alive.
    """

    cfg: SAEConfig
    n_tokens: int
    context: int
    min_firings: int
    max_firings: int
    threshold: float | None
    firings: Int[Tensor, " atom"]
    mean_activation: Float[Tensor, " atom"]
    max_activation: Float[Tensor, " atom"]
    cosine: Float[Tensor, " atom"]
    key_cosine: Float[Tensor, " atom"]
    value_cosine: Float[Tensor, " atom"]
    elsewhere: Float[Tensor, " atom"]
    mixtures: tuple[Mixture, ...]

    @property
    def title(self) -> str:
        c = self.cfg
        return f"Atom classes, layer {c.layer} head {c.head}: {int(self.alive.sum()):,} of {c.n_atoms:,} atoms fire"

    @property
    def alive(self) -> Shaped[Array, " atom"]:
        """Whether each atom fired often enough to be in a class."""
        return (self.firings >= self.min_firings).numpy()

    @cached_property
    def classes(self) -> Shaped[Array, " atom"]:
        """``"register"``, ``"bundle"`` or ``"null"``, for each atom."""
        cosine = np.nan_to_num(self.cosine.numpy())
        high = self.mixtures[1].upper(cosine) if self.threshold is None else cosine >= self.threshold
        return np.where(self.alive, np.where(high, *CLASSES[:2]), CLASSES[2])

    def atoms(self, name: str) -> list[int]:
        """The atoms of a class, most frequent first."""
        if name not in CLASSES:
            raise ValueError(f"class {name!r}: allowed are {', '.join(CLASSES)}")
        members = np.flatnonzero(self.classes == name)
        return members[np.argsort(-self.firings.numpy()[members], kind="stable")].tolist()

    @property
    def two_supported(self) -> bool:
        """Whether BIC prefers two components to one, without which the mixture's classes mean nothing."""
        return bool(self.mixtures) and self.mixtures[1].bic < self.mixtures[0].bic

    @property
    def about(self) -> str:
        if self.threshold is not None:
            rule = f"Registers are atoms whose cosine is at least {self.threshold}, bundles the other alive ones."
        else:
            rule = (
                "Registers are the atoms of the component with the higher mean of a mixture of two Gaussians over "
                "these cosines (hard assignment; an atom beyond a component's mean, away from the other, belongs to "
                "it), bundles those of the other."
            )
        if self.mixtures and not self.two_supported:
            rule += (
                " BIC prefers one component here, so that two classes are not supported: the mixture cuts one "
                "population in two."
            )
        elif self.mixtures and self.mixtures[1].separation < 2:
            rule += (
                f" BIC prefers two components to one, but they overlap (separation "
                f"{self.mixtures[1].separation:.2g}, where 2 would be two humps): what is not Gaussian need not be "
                f"two groups."
            )
        return (
            f"{self.n_tokens:,} tokens of text in windows of {self.context}; the SAE reads each {self.cfg.target}, k = "
            f"{self.cfg.k} (the paper's read states, 32 active). At every token at which an atom is active "
            f"(any of the active ones), the cosine of the atom to the native write; for each atom the median over its "
            f"firings, at most {self.max_firings:,} of them, drawn at random. Null atoms never fired"
            + (f", or fewer than {self.min_firings} times" if self.min_firings > 1 else "")
            + f". {rule} 'dBIC, two components against one' is BIC(2) - BIC(1): below 0 BIC prefers two. 'At random "
            f"tokens' is the same cosine to writes elsewhere in the text. Intervals: bootstrap over atoms. Paper: "
            f"sections 3.1 and G.1, Tables 1, 11, 15; firings of the classes: App. H."
        )

    def numbers(self) -> list[Number]:
        """Counts, the mixture, medians over the atoms of a class; what has no value (no such atom) is left out."""
        stats, alive, two = extra("scipy.stats"), self.alive, CLASSES[:2]
        n_alive = int(alive.sum())
        found = [_count("alive atoms", alive, self.cfg.n_atoms)]
        found += [_count(f"{name}s", self.classes == name, n_alive) for name in two]
        found += [_count("null atoms", ~alive, self.cfg.n_atoms), *self._bic()[:4]]
        for what, column in (
            ("cosine", self.cosine),
            ("|cosine| of key factors", self.key_cosine),
            ("|cosine| of value factors", self.value_cosine),
            ("firings per atom", self.firings),
        ):
            found += [_median(f"median {what}, {name}s", self._of(name, column)) for name in two]
        found += [_median("median cosine at random tokens", self.elsewhere.numpy()[alive])]
        one, other = (self._of(name, self.firings) for name in two)
        if min(len(one), len(other)):
            found.append(Number("Cliff's delta of firings, registers against bundles", cliffs_delta(one, other)))
            found.append(Number("p of the same (Mann-Whitney)", float(stats.mannwhitneyu(one, other).pvalue)))
        cosine, often = self.cosine.numpy()[alive], self.firings.numpy()[alive]
        if min(len(set(cosine)), len(set(often))) > 1:
            rho: Any = stats.spearmanr(cosine, often)
            found += [Number("Spearman, cosine and firings", float(rho.statistic), n=n_alive)]
        found += [_count(f"registers at cosine >= {at:.2f}", cosine >= at, n_alive) for at in THRESHOLDS]
        found += self._bic()[4:]
        return [number for number in found if not np.isnan(number.value)]

    def _bic(self) -> list[Number]:
        """What the mixtures say, in four numbers; and the details."""
        if not self.mixtures:
            return []
        n, bic, two = int(self.alive.sum()), [m.bic for m in self.mixtures], self.mixtures[1]
        found = [
            Number("dBIC, two components against one", bic[1] - bic[0], n=n),
            Number("dBIC, three components against two", bic[2] - bic[1], n=n),
            Number("components that BIC prefers", 1.0 + int(np.argmin(bic)), n=n),
            Number("separation of the two components", two.separation, n=n),
        ]
        for i, side in enumerate(("lower", "higher")):
            found += [Number(f"mean of the {side} component", two.means[i])]
            found += [Number(f"weight of the {side} component", two.weights[i], "%")]
        return found + [Number(f"BIC of {m.n}", m.bic, n=n) for m in self.mixtures]

    def _of(self, name: str, column: Tensor) -> Array:
        return column.numpy()[self.classes == name]

    def columns(self) -> dict[str, Any]:
        count, names = self.firings.numpy(), ("mean_activation", "max_activation", *COLUMNS)
        first = {"atom": np.arange(self.cfg.n_atoms), "class": self.classes, "firings": count}
        return first | {"rate": count / self.n_tokens} | {name: getattr(self, name).numpy() for name in names}

    def plot(self) -> Figure:
        """How the cosines are distributed, with the mixture; and cosine against activation rate."""
        fig, (left, right) = figure(2)
        cosine, rate = self.cosine.numpy(), self.firings.numpy() / self.n_tokens
        shown = [name for name in CLASSES[:2] if (self.classes == name).any()]
        edges = np.linspace(np.nanmin(cosine[self.alive]), np.nanmax(cosine[self.alive]) + 1e-6, 61)
        values = [cosine[self.classes == name] for name in shown]
        left.hist(values, edges, stacked=True, label=[f"{name}s" for name in shown], color=[COLORS[n] for n in shown])
        if self.mixtures:
            x = np.linspace(edges[0], edges[-1], 400)
            scale = self.alive.sum() * (edges[1] - edges[0])
            for i, of_each in enumerate(self.mixtures[1].density(x)):
                left.plot(x, scale * of_each, color="black", lw=1, label=None if i else "two Gaussians")
            left.set_ylim(0, 1.05 * max(1, np.histogram(cosine[self.alive], edges)[0].max()))
        left.set(xlabel="median cosine to the native write", ylabel="atoms")
        for name in shown:
            members = self.classes == name
            right.scatter(rate[members], cosine[members], s=6, alpha=0.5, color=COLORS[name], label=f"{name}s")
        right.set(xscale="log", xlabel="firings per token", ylabel="median cosine to the native write")
        for axis in (left, right):
            axis.legend(frameon=False)
        return fig


def _count(name: str, which: Array, n: int) -> Number:
    return Number(name, float(which.sum()), n=n)


def _median(name: str, values: Array) -> Number:
    """A median over atoms, with an interval where there are two or more; NaN where there is none."""
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if not len(values):
        return Number(name, float("nan"), n=0)
    return Number.median(name, values, n_resamples=1000)


def classes_once(asked: Asked, sae: WriteSAE, **settings: Any) -> AtomClasses:
    """Those of an SAE, for every experiment of a `reproduce` that wants them: the text is read once."""
    given = tuple(sorted((name, x) for name, x in settings.items() if name != "progress"))
    return asked.once((id(sae), given), lambda: atom_classes(asked.model, sae, asked.texts, **settings))


def _plan(asked: Asked) -> Iterator[Task]:
    for sae in asked.saes:
        given = {"max_tokens": asked.sizes.classes, **asked.common}
        yield Task(partial(classes_once, asked, sae), [sae], given)


@named_kinds
@experiment("registers and bundles (section 3.1)", order=3, plan=_plan)
@torch.no_grad()
def atom_classes(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    texts: Texts,
    *,
    context: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 8,
    min_firings: int = 1,
    max_firings: int = 500,
    threshold: float | None = None,
    seed: int = 0,
    check_model: bool = True,
    progress: Progress | None = None,
) -> AtomClasses:
    """Count every atom's firings over a text, and compare the atom with what is written there.

    Args:
        model, sae, texts, batch_size, seed, check_model: see `Run`.
        context: tokens per window, each from an empty memory; what is left at the end of a text is not read.
        max_tokens: read at most so many, evenly spread; None for all.
        min_firings: an atom that fires less often is a null atom.
        max_firings: at most so many of an atom's firings, drawn at random, are kept for its medians.
        threshold: split by this cosine; None for the mixture.
        progress: called with the number of tokens done.

    Raises:
        ValueError: the text is too short, or so few atoms fire in it that there is no mixture to fit.
    """
    need("scipy", "sklearn")
    positive(context=context, min_firings=min_firings, max_firings=max_firings)
    run = Run(model, texts, [sae], batch_size, seed, check_model, progress)
    windows = run.windows(context).spread(max_tokens).tokens
    seen = Seen(sae.cfg.n_atoms, max_firings)
    for ids in run.batches(windows, context):
        found = firings(model, sae, ids.to(model.device), run.generator)
        seen.add(*found, torch.rand(len(found[0]), generator=run.generator))
    return classes_of(sae.cfg, seen, windows.numel(), context, min_firings, threshold, seed)


def classes_of(
    cfg: SAEConfig, seen: Seen, n_tokens: int, context: int, min_firings: int, threshold: float | None, seed: int
) -> AtomClasses:
    """The classes, from the firings seen; arguments and error as of `atom_classes`."""
    alive = seen.firings >= min_firings
    found, n_alive = seen.medians(), int(alive.sum())
    if n_alive < MIN_VALUES and threshold is None:
        raise ValueError(
            f"{n_alive} of {cfg.n_atoms} atoms fire {min_firings} times or more in {n_tokens:,} tokens; a "
            f"mixture needs {MIN_VALUES}: give more text, lower min_firings, or split at a cosine (threshold=0.05)"
        )
    values = found["cosine"][alive].double().numpy()
    mixtures = tuple(fit_mixture(values, n, seed=seed) for n in (1, 2, 3)) if n_alive >= MIN_VALUES else ()
    return AtomClasses(
        cfg, n_tokens, context, min_firings, seen.most, threshold, seen.firings, seen.total / seen.firings,
        seen.largest.masked_fill(seen.firings == 0, torch.nan), **{name: found[name] for name in COLUMNS},
        mixtures=mixtures,
    )  # fmt: skip
