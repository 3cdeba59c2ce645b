"""The population test (paper, appendix F.2): does every atom stand in for writes, or only the frequent ones?

The replacement test gives every firing the same weight, and so frequent atoms the most. Here each atom is tested at a
few of its own firings, and atoms count alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from writesae.experiments.classes import classes_once
from writesae.experiments.engine.conditions import Tester, check_conditions, windows_of
from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment
from writesae.experiments.replacement import ReplacementResult
from writesae.jobs.arguments import named_kinds
from writesae.jobs.extras import extra
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Read
from writesae.results.result import Figure, Number, Result, figure, joined
from writesae.results.statistics import Array, bootstrap, cliffs_delta
from writesae.saes import WriteSAE
from writesae.saes.activity.firings import first_of_each
from writesae.saes.activity.reading import encode
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PopulationResult", "population_test"]

BINS = (0.0, 0.05, 0.2, 0.3, 0.6, 0.8)
"""Edges of the bins of cosine: the paper's (table 13), and two more, for SAEs of writes."""


@dataclass(frozen=True)
class PopulationResult(Result):
    """The replacement test atom by atom.

    Attributes:
        firings: every firing tested.
        min_firings, max_firings: an atom with fewer is left out; of one with more, so many are drawn.
        n_alive: atoms that are the top one anywhere in the text.
        classes: the class of each atom, if classes were given.
    """

    firings: ReplacementResult
    min_firings: int
    max_firings: int
    n_alive: int
    classes: Mapping[int, str] | None = None

    @property
    def atoms(self) -> pd.DataFrame:
        """One row per atom: its firings tested, how often it beats deletion (and matched to the native norm), its
        median cosine to the writes, how often the top token changes, and whether it ``inverts``: wins at its
        coefficient at more than half of its firings, and loses at the native norm at more than half."""
        pd = extra("pandas")
        f = self.firings
        atom, delete = f.score("atom"), f.score("delete")
        columns = {"wins": atom < delete, "wins_in_total": f.score("atom", "through") < f.score("delete", "through")}
        columns |= {"flips_delete": f.flips["delete"], "flips_atom": f.flips["atom"]}
        if "matched" in f.kl:
            columns["wins_matched"] = f.score("matched") < delete
            columns["loses_matched"] = f.score("matched") > delete
        table: Any = pd.DataFrame({name: x.double().numpy() for name, x in columns.items()}).groupby(f.atom.numpy())
        medians = pd.DataFrame({"cosine": f.cosine.numpy(), "kl_lost": (delete - atom).numpy()})
        rows: Any = table.mean().join(medians.groupby(f.atom.numpy()).median())
        rows.insert(0, "firings", table.size())
        if "matched" in f.kl:
            rows["inverts"] = (rows["wins"] > 0.5) & (rows.pop("loses_matched") > 0.5)
        if self.classes is not None:
            rows["class"] = [self.classes.get(int(i), "") for i in rows.index]
        return rows.rename_axis("atom")

    @property
    def title(self) -> str:
        return f"Population test, {self.firings.where}: {len(self.firings.atom.unique())} atoms"

    @property
    def about(self) -> str:
        return (
            f"Of {self.n_alive} atoms that are the strongest somewhere in the text, those with at least "
            f"{self.min_firings} such firings were tested at up to {self.max_firings} of them, drawn at random, as in "
            f"the replacement test. Rates are worked out atom by atom and then averaged; intervals draw atoms. An atom "
            f"inverts if it beats deletion at its coefficient at most of its firings and loses to it, with the same "
            f"direction, at the native write's norm (F87 in the paper). Paper: sections 3.2 and appendices F.2 and H, "
            f"tables 13 and 17. {self.firings.about}"
        )

    def numbers(self) -> list[Number]:
        stats: Any = extra("scipy.stats")
        atoms: Any = self.atoms
        found = [
            _over_atoms("atom beats deletion, mean over atoms", atoms["wins"], "%"),
            _over_atoms("atom beats deletion, mean over atoms, in total", atoms["wins_in_total"], "%"),
            Number("atom beats deletion, median over atoms", float(atoms["wins"].median()), "%", n=len(atoms)),
            Number("atom beats deletion, lowest atom", float(atoms["wins"].min()), "%", n=len(atoms)),
            Number.of("atom beats deletion, all firings", self.firings.wins("atom", "delete")),
        ]
        if len(atoms) > 2 and atoms["wins"].nunique() > 1 and atoms["cosine"].nunique() > 1:
            for name, of in (("Pearson r", stats.pearsonr), ("Spearman rho", stats.spearmanr)):
                r: Any = of(atoms["cosine"], atoms["wins"])
                found.append(Number(f"{name}, cosine and win rate", float(r.statistic), n=len(atoms)))
                found.append(Number(f"p of {name}, cosine and win rate", float(r.pvalue)))
        for name, column, unit in (
            ("top-1 flips under deletion", "flips_delete", "%"),
            ("top-1 flips under the atom", "flips_atom", "%"),
            ("KL of deletion less that of the atom", "kl_lost", "nats"),
        ):
            found.append(_over_atoms(f"{name}, median over atoms", atoms[column], unit, np.median))
        if "inverts" in atoms:
            found.append(_over_atoms("matched-norm atom beats deletion, mean over atoms", atoms["wins_matched"], "%"))
            found.append(_over_atoms("atoms that invert at the native norm", atoms["inverts"].astype(float), "%"))
        for low, high in pairwise([-np.inf, *BINS, np.inf]):
            some = atoms[(atoms["cosine"] >= low) & (atoms["cosine"] < high)]
            if len(some):
                name = f"cosine < {high}" if low == -np.inf else f"cosine >= {low}" + f" and < {high}" * (high < np.inf)
                found.append(_over_atoms(f"atom beats deletion, {name}", some["wins"], "%"))
        groups = {} if self.classes is None else {str(name): rows for name, rows in atoms.groupby("class") if name}
        found += [_over_atoms(f"atom beats deletion, {name} atoms", rows["wins"], "%") for name, rows in groups.items()]
        if {"register", "bundle"} <= groups.keys():
            what = {"wins": "win rate", "flips_delete": "flips under deletion", "kl_lost": "KL lost"}
            for column, label in what.items():
                x, y = (groups[name][column].to_numpy() for name in ("register", "bundle"))
                p: Any = stats.mannwhitneyu(x, y)
                found.append(Number(f"Cliff's delta, register against bundle, {label}", cliffs_delta(x, y)))
                found.append(Number(f"Mann-Whitney p, register against bundle, {label}", float(p.pvalue)))
        return found

    def columns(self) -> dict[str, Any]:
        return dict(self.atoms.reset_index())

    def plot(self) -> Figure:
        atoms: Any = self.atoms
        made, (left, right) = figure(2)
        left.scatter(atoms["cosine"], 100 * atoms["wins"], s=8, alpha=0.5)
        left.set(xlabel="median cosine of atom and write", ylabel="atom beats deletion (% of its firings)")
        bins = np.linspace(0, 100, 21).tolist()
        right.hist(100 * atoms["wins"], bins=bins, color="C0", label="at its coefficient")
        if "wins_matched" in atoms:
            right.hist(100 * atoms["wins_matched"], bins=bins, histtype="step", color="C3", label="at the native norm")
        right.set(xlabel="atom beats deletion (% of its firings)", ylabel="atoms")
        right.legend(frameon=False)
        return made


def _over_atoms(name: str, values: Any, unit: Any, statistic: Any = np.mean) -> Number:
    """A statistic with its bootstrap interval over atoms, where there are two or more."""
    x = values.to_numpy()
    return Number.of(name, bootstrap(x, statistic=statistic) if len(x) > 1 else float(statistic(x)), unit)


def _plan(asked: Asked) -> Iterator[Task]:
    """With the classes of the atoms, so that registers and bundles are compared."""

    def run(sae: WriteSAE, max_tokens: int, **settings: Any) -> Result:
        Run(asked.model, progress=settings.get("progress")).note("classes of the atoms")
        classes = classes_once(asked, sae, max_tokens=max_tokens, **asked.common).classes
        return population_test(asked.model, sae, asked.texts, classes=classes, **settings)

    sizes = asked.sizes
    given = {"n_atoms": sizes.population, "max_firings": sizes.per_atom, "max_tokens": sizes.classes, **asked.common}
    for sae in asked.saes:
        yield Task(partial(run, sae), [sae], given)


@named_kinds
@experiment("the same, atom by atom (App. F.2)", order=2, plan=_plan)
@torch.no_grad()
def population_test(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    text: Texts,
    *,
    min_firings: int = 5,
    max_firings: int = 30,
    n_atoms: int | None = None,
    atoms: Sequence[int] | None = None,
    context: int = 96,
    horizon: int = 16,
    conditions: tuple[str, ...] = ("atom", "matched", "delete"),
    read: Read = "same",
    classes: Mapping[int, str] | Sequence[str] | Shaped[Array, " atom"] | None = None,
    flat: WriteSAE | None = None,
    batch_size: int = 32,
    seed: int = 0,
    check_model: bool = True,
    progress: Progress | None = None,
) -> PopulationResult:
    """Run the replacement test for every atom that fires often enough.

    Args:
        model, sae, text, batch_size, seed, check_model: see `Run`.
        context, horizon, conditions, read, flat: as for `replacement_test`.
        min_firings: firings an atom needs, as the strongest, at tokens that can be tested.
        max_firings: firings tested of each atom at most.
        n_atoms: test so many atoms, drawn at random from those that qualify; None for all of them.
        atoms: test these alone, as far as they qualify; None for any.
        classes: of atoms, to compare: ``{atom: "register" or "bundle" or ...}``, or one for every atom, as
            ``AtomClasses.classes``.
        progress: called with the number of firings tested.

    Raises:
        ValueError: no atom (of those asked for) fires ``min_firings`` times in the text.
        IndexError: no such atom.
    """
    run = Run(model, text, [sae], batch_size, seed, check_model, progress)
    chosen, flats = check_conditions(run, conditions, flat)
    if not 1 <= min_firings <= max_firings:
        raise ValueError(
            f"min_firings={min_firings}, max_firings={max_firings}: 1 <= min_firings <= max_firings is needed"
        )
    if n_atoms is not None and n_atoms < 1:
        raise ValueError(f"n_atoms={n_atoms}: it must be at least 1, or None for all")
    wanted = None if atoms is None else torch.tensor(list(atoms), dtype=torch.long)
    if wanted is not None:
        sae.atom(wanted)  # raises for one out of range
    if classes is not None and not isinstance(classes, Mapping):
        if len(classes) != sae.cfg.n_atoms:
            raise ValueError(f"classes of {len(classes)} atoms; this SAE has {sae.cfg.n_atoms}")
        classes = {i: str(name) for i, name in enumerate(classes)}
    windows = windows_of(run, context, horizon)
    tester = Tester(run, windows, [sae], chosen, flats, horizon, read)
    codes = [encode(model, sae, ids, check_model=False, batch_size=len(ids)) for ids in run.reading(windows.tokens)]
    top = torch.cat([c.indices[..., 0].masked_fill(c.values[..., 0] <= 0, -1).cpu() for c in codes])
    can = top.masked_fill(~tester.testable, -1)
    if wanted is not None:
        can[~torch.isin(can, wanted)] = -1
    window, position = _draw(can, min_firings, max_firings, n_atoms, run.generator)
    if not len(window):
        most = int(can[can >= 0].bincount().max()) if bool((can >= 0).any()) else 0
        raise ValueError(
            f"no atom {'of the SAE' if atoms is None else 'asked for'} fires {min_firings} times in {len(windows)} "
            f"windows of {context} tokens (the most frequent one {most} times): give a longer text, or lower "
            f"min_firings"
        )
    for some in window.unique().split(tester.step):  # only windows with something to test, in order
        here = (window >= some[0]) & (window <= some[-1])
        tester.test(*tester.native(some), some, torch.searchsorted(some, window[here]), position[here])
    firings = ReplacementResult(
        **joined(tester.parts),
        places=(sae.place,),
        read=tester.replayer.read,
        context=context,
        way=tester.replayer.way,
    )
    return PopulationResult(firings, min_firings, max_firings, len(top[top >= 0].unique()), classes)


def _draw(
    top: Int[Tensor, "window pos"], least: int, most: int, n_atoms: int | None, generator: torch.Generator
) -> tuple[Int[Tensor, " firing"], Int[Tensor, " firing"]]:
    """Window and position of up to ``most`` firings of each atom with at least ``least``, by window."""
    at = (top >= 0).nonzero()
    at = at[torch.randperm(len(at), generator=generator)]
    atom = top[at[:, 0], at[:, 1]]
    qualified = (atom.bincount() >= least).nonzero()[:, 0]
    if n_atoms is not None:
        qualified = qualified[torch.randperm(len(qualified), generator=generator)[:n_atoms]]
    order = first_of_each(atom, torch.arange(len(atom)), most)  # at random: ``at`` is shuffled
    at = at[order[torch.isin(atom[order], qualified)]]
    at = at[(at[:, 0] * top.shape[1] + at[:, 1]).argsort()]
    return at[:, 0], at[:, 1]
