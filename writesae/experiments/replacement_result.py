"""The outcome of a replacement test: its records, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from writesae.experiments.engine.conditions import CONDITIONS
from writesae.experiments.engine.replay import Place
from writesae.experiments.results.result import Number, Result, figure
from writesae.experiments.results.statistics import Rate, bootstrap, cliffs_delta, paired, wilson
from writesae.recurrence import Read

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

When: TypeAlias = Literal["at", "through"]

COLORS = {
    "atom": "C0", "matched": "C9", "delete": "C3", "random": "C2", "random_matched": "C8", "orthogonal": "C5",
    "other_atom": "C1", "flat_svd": "C4",
}  # fmt: skip
LABELS = {
    "atom": "atom", "matched": "matched-norm atom", "delete": "deletion", "random": "random",
    "random_matched": "matched-norm random", "orthogonal": "orthogonal rank-1", "other_atom": "another atom",
    "flat_svd": "flat-SAE top SVD",
}  # fmt: skip
_SETTINGS = ("places", "together", "read", "context", "way")


@dataclass(frozen=True)
class ReplacementResult(Result):
    """The records of a replacement test, one row a firing.

    Attributes:
        layer, head: the site of each firing; -1 for several at once.
        window, document: which window of the text, and which text, each is in, and ``position`` its position there.
        atom: the top atom (-1 where several sites are replaced at once), ``activation`` its coefficient,
            ``native_norm`` the Frobenius norm of the native write, ``cosine`` that of the two matrices.
        kl: of each condition ``KL(edited || native)`` of the next-token distribution in nats, from the first token
            whose read sees the edit: the firing itself, or the token after it with ``read="next"``.
        flips: whether the most likely next token there is another one.
        divergence: ``||S' - S|| / ||S||`` at the firing and the tokens after it.
        places: all layers and heads tested; ``together``: at once. ``read``, ``context``, ``way``: as the test was run.
    """

    layer: Int[Tensor, " firing"]
    head: Int[Tensor, " firing"]
    window: Int[Tensor, " firing"]
    document: Int[Tensor, " firing"]
    position: Int[Tensor, " firing"]
    atom: Int[Tensor, " firing"]
    activation: Float[Tensor, " firing"]
    native_norm: Float[Tensor, " firing"]
    cosine: Float[Tensor, " firing"]
    kl: dict[str, Float[Tensor, "firing step"]]
    flips: dict[str, Bool[Tensor, " firing"]]
    divergence: dict[str, Float[Tensor, "firing horizon"]]
    places: tuple[Place, ...]
    together: bool = False
    read: Read = "same"
    context: int = 96
    way: tuple[bool, bool] | None = None

    @property
    def n(self) -> int:
        return len(self.atom)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.kl)

    @property
    def horizon(self) -> int:
        return next(iter(self.kl.values())).shape[1] - (self.read == "same")

    def score(self, condition: str, when: When = "at") -> Float[Tensor, " firing"]:
        """How far a condition moves the model, nats: ``"at"`` the first token that sees the edit (the firing, unless
        ``read="next"``), or summed ``"through"`` all tokens scored."""
        return self.kl[condition][:, 0] if when == "at" else self.kl[condition].sum(1)

    def wins(self, better: str, worse: str, when: When = "at") -> Rate:
        """How often ``better`` moves the distribution less than ``worse``."""
        return wilson(int((self.score(better, when) < self.score(worse, when)).sum()), self.n)

    def chain(self, when: When = "at") -> Rate:
        """How often the strict order atom < delete < random holds."""
        atom, delete, random = (self.score(c, when) for c in ("atom", "delete", "random"))
        return wilson(int(((atom < delete) & (delete < random)).sum()), self.n)

    def quartiles(self, when: When = "at") -> list[Rate]:
        """How often the atom beats deletion among firings of the smallest to the largest effect (KL of deletion)."""
        effect, won = self.score("delete", when), self.score("atom", when) < self.score("delete", when)
        parts = np.array_split(effect.argsort(stable=True).numpy(), 4)
        return [wilson(int(won[torch.from_numpy(part)].sum()), len(part)) for part in parts]

    def select(self, which: Bool[Tensor, " firing"]) -> ReplacementResult:
        """Some of the firings."""
        pick = lambda x: {k: v[which] for k, v in x.items()} if isinstance(x, dict) else x[which]  # noqa: E731
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _SETTINGS}
        return replace(self, **{name: pick(x) for name, x in rows.items()})

    def by_site(self) -> dict[Place, ReplacementResult]:
        """The firings of each site; of several at once, there is but one."""
        if self.together:
            return {(-1, -1): self}
        return {(a, b): self.select((self.layer == a) & (self.head == b)) for a, b in self.places}

    # As a result

    @property
    def where(self) -> str:
        names = [f"layer {layer} head {head}" for layer, head in self.places]
        return (" with " if self.together else ", ").join(names[:6]) + (
            f" ... ({len(names)})" if len(names) > 6 else ""
        )

    @property
    def title(self) -> str:
        return f"Replacement test, {self.where}: {self.n} firings on held-out text"

    @property
    def about(self) -> str:
        seen = (
            "the token's own read sees the edit" if self.read == "same" else "reads see the edit from the next token on"
        )
        several = (
            " The writes of all these heads were replaced at once, at tokens where every SAE is active. What is put in "
            "belongs to the native pass, also in upper layers, and divergence leaves out what edits below do to them."
        )
        slow = " This model's cache cannot be fed in pieces, or its layers not left out: futures ran the slower way."
        return (
            f"At {self.n} tokens at which the SAE is active, drawn at random from windows of {self.context} tokens, "
            f"at least a quarter of a window after its start and {self.horizon} tokens before its end, the native "
            f"write was taken out of the state and something else put in: "
            f"{'; '.join(f'{c}: {CONDITIONS[c]}' for c in self.conditions)}. "
            f"The score is KL(edited || native) of the model's final distribution, {seen}; 'in total' sums it over all "
            f"tokens scored. A win is a strictly lower KL at the same firing. Intervals are Wilson's, or percentile "
            f"bootstraps that draw whole windows, texts or atoms."
            + several * self.together
            + slow * (self.way not in (None, (True, True)))
            + " Paper: section 3.2, appendices F and I."
        )

    def numbers(self) -> list[Number]:
        moments: list[tuple[When, str]] = [("at", "")]
        if next(iter(self.kl.values())).shape[1] > 1:
            moments.append(("through", ", in total"))
        found = []
        for when, suffix in moments:
            found.append(Number.of(f"atom beats deletion{suffix}", self.wins("atom", "delete", when)))
            if "random" in self.kl:
                found.append(Number.of(f"atom < deletion < random{suffix}", self.chain(when)))
                found.append(Number.of(f"deletion beats random{suffix}", self.wins("delete", "random", when)))
            for name in self.conditions:
                if name not in ("atom", "delete", "random"):
                    found.append(Number.of(f"{LABELS[name]} beats deletion{suffix}", self.wins(name, "delete", when)))
            for by, clusters in (("window", self.window), ("text", self.document), ("atom", self.atom)):
                found += self._clustered(f"cluster bootstrap by {by}{suffix}", clusters, when)
            for name in self.conditions:
                found.append(self._median(f"median KL, {LABELS[name]}{suffix}", self.score(name, when)))
            found += self._effects(suffix, when)
            if not self.together and len(self.places) > 1:
                rates = {place: part.wins("atom", "delete", when) for place, part in self.by_site().items() if part.n}
                found += [Number.of(f"atom beats deletion{suffix}, L{a}H{b}", rate) for (a, b), rate in rates.items()]
                mean = np.array([rate.rate for rate in rates.values()])
                found.append(self._mean(f"atom beats deletion{suffix}, mean of sites", mean))
        found.append(self._median("median cosine of atom and write", self.cosine, unit=""))
        return found

    def _effects(self, suffix: str, when: When) -> list[Number]:
        atom, delete = self.score("atom", when), self.score("delete", when)
        found = [Number.of(f"Cliff's delta{suffix}", cliffs_delta(delete, atom))]
        if self.n > 1:
            found.append(Number.of(f"paired Wilcoxon p{suffix}", paired(delete, atom).p_wilcoxon))
        for name in ("delete", "random"):
            if name in self.kl and middle(atom) > 0:
                ratio = middle(self.score(name, when)) / middle(atom)
                found.append(Number.of(f"ratio of median KL, {LABELS[name]} : atom{suffix}", ratio))
        if self.n >= 4:
            names = ("smallest", "second", "third", "largest")
            rates = zip(names, self.quartiles(when), strict=True)
            found += [
                Number.of(f"atom beats deletion, {name} quarter of effects{suffix}", rate) for name, rate in rates
            ]
        return found

    def _clustered(self, name: str, clusters: Tensor, when: When) -> list[Number]:
        won = (self.score("atom", when) < self.score("delete", when)).double()
        if len(clusters.unique()) < 2:  # no interval can be had
            return []
        return [Number.of(name, bootstrap(won, clusters.numpy()), "%")]

    def _median(self, name: str, values: Tensor, unit: Literal["nats", ""] = "nats") -> Number:
        if self.n < 2:
            return Number(name, middle(values), unit, n=self.n)
        return Number.of(name, bootstrap(values.double(), statistic=np.median), unit)  # type: ignore[arg-type]

    def _mean(self, name: str, values: np.ndarray) -> Number:
        return (
            Number(name, float(values.mean()), "%", n=len(values))
            if len(values) < 2
            else Number.of(name, bootstrap(values), "%")
        )

    def records(self) -> pd.DataFrame:
        import pandas as pd

        names = ("layer", "head", "window", "document", "position", "atom", "activation", "native_norm", "cosine")
        columns = {name: getattr(self, name).numpy() for name in names}
        for condition in self.conditions:
            columns[f"kl_{condition}"] = self.score(condition).numpy()
            columns[f"kl_total_{condition}"] = self.score(condition, "through").numpy()
            columns[f"flips_{condition}"] = self.flips[condition].numpy()
            columns[f"divergence_{condition}"] = self.divergence[condition][:, 0].numpy()
            columns[f"divergence_end_{condition}"] = self.divergence[condition][:, -1].numpy()
        return pd.DataFrame(columns)

    def table(self) -> Table:
        moments: dict[When, str] = {"at": "at the firing" if self.read == "same" else "at the next token"}
        if next(iter(self.kl.values())).shape[1] > 1:
            moments["through"] = f"with the next {self.horizon}"
        table = Table(title=self.title)
        table.add_column("put in")
        for moment in moments.values():
            table.add_column(f"KL, {moment}", justify="right")  # wraps: a terminal of 80 columns has room for all
            table.add_column("beats deletion", justify="right", no_wrap=True)
        for name in self.conditions:
            row = [Text.assemble((name, "bold"), f": {CONDITIONS[name]}")]
            for when in moments:
                row.append(Text(f"{middle(self.score(name, when)):.1e}"))
                row.append(Text("" if name == "delete" else str(self.wins(name, "delete", when))))
            table.add_row(*row)
        orders = [
            f"{moment}: deletion beats random {self.wins('delete', 'random', when)}, "
            f"atom < deletion < random {self.chain(when)}.\n"
            for when, moment in moments.items()
            if "random" in self.kl
        ]
        table.caption = (
            "KL: median, in nats, summed over the tokens; Wilson 95% intervals.\n"
            + "".join(orders)
            + f"Median cosine of atom and write {middle(self.cosine):.2f}."
        )
        return table

    def plot(self) -> Figure:
        made, (scatter, bars, lines) = figure(3, width=3.8)
        atom = self.score("atom").clamp_min(1e-12)
        others = [name for name in ("random", "delete") if name in self.kl]
        for name in others:
            scatter.scatter(
                atom, self.score(name).clamp_min(1e-12), s=6, color=COLORS[name], alpha=0.6, label=LABELS[name]
            )
        both = torch.cat([atom, *(self.score(name).clamp_min(1e-12) for name in others)])
        ends = [float(both.min()), float(both.max())]
        scatter.plot(ends, ends, color="0.3", lw=0.8, ls="--")
        scatter.set(
            xscale="log", yscale="log", xlabel="KL with the atom (nats)", ylabel="KL with something else (nats)"
        )
        scatter.legend(frameon=False)
        rates = self.quartiles() if self.n >= 4 else [self.wins("atom", "delete")]
        names = ["smallest", "second", "third", "largest"] if self.n >= 4 else ["all"]
        bars.bar(names, [100 * r.rate for r in rates], color=COLORS["atom"])
        bars.vlines(range(len(rates)), [100 * r.low for r in rates], [100 * r.high for r in rates], color="0.1")
        bars.set(ylim=(0, 100), xlabel="quarter of firings by KL of deletion", ylabel="atom beats deletion (%)")
        for name, x in self.divergence.items():
            lines.plot(range(x.shape[1]), x.median(0).values.clamp_min(1e-12), color=COLORS[name], label=LABELS[name])
        lines.set(yscale="log", xlabel="tokens after the firing", ylabel="median |S' - S| / |S|")
        lines.legend(frameon=False, fontsize=7)
        return made


def middle(values: Float[Tensor, " n"]) -> float:
    """The median (torch's is the lower one of two)."""
    return float(np.median(values.numpy()))
