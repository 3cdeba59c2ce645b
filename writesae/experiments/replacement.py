"""The replacement test (paper, section 3.2): can one atom stand in for what the model writes?

At a *firing*, a token at which the SAE activates an atom, the native write of one head is taken out and something else
put in; the score is how far the model's final distribution moves, in nats. The SAE's top atom at its activation should
move it less than putting in nothing, and putting in nothing less than a random matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from writesae.experiments.engine.conditions import CONDITIONS, DEFAULT, Tester, check_conditions, draw, windows_of
from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment, one_each, positive, several
from writesae.futures.replay import Replayer
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Read
from writesae.results.result import Figure, Number, Result, figure, intervals, joined, share
from writesae.results.statistics import Rate, cliffs_delta, paired
from writesae.saes import WriteSAE
from writesae.stores.windows import Texts

__all__ = ["ReplacementResult", "replacement_test"]

When: TypeAlias = Literal["at", "through"]
LOOK = {  # condition -> label, colour
    "atom": ("atom", "C0"), "matched": ("matched-norm atom", "C9"), "delete": ("deletion", "C3"),
    "random": ("random", "C2"), "random_matched": ("matched-norm random", "C8"),
    "orthogonal": ("orthogonal rank-1", "C5"), "other_atom": ("another atom", "C1"),
    "flat_svd": ("flat-SAE top SVD", "C4"),
}  # fmt: skip
QUARTERS = ("smallest", "second", "third", "largest")


@dataclass(frozen=True)
class ReplacementResult(Result):
    """The records of a replacement test, one row per firing.

    Attributes:
        layer, head: the head of each firing; -1 for several at once.
        window, document: which window of the text, and which text, each is in, and ``position`` its position there.
        atom: the top atom (-1 where several heads are replaced at once), ``activation`` its coefficient,
            ``native_norm`` the Frobenius norm of the native write, ``cosine`` that of the two matrices.
        kl: of each condition ``KL(edited || native)`` of the next-token distribution in nats, from the first token
            whose read sees the edit: the firing itself, or the token after it with ``read="next"``.
        flips: whether the most likely next token there is another one.
        divergence: ``||S' - S|| / ||S||`` at the firing and the tokens after it.
        places: all heads tested; ``together``: at once. ``read``, ``context``, ``way``: as the test was run.
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
    places: tuple[Head, ...]
    together: bool = False
    read: Read = "same"
    context: int = 96
    way: tuple[bool, bool] | None = None

    ROWS = ("layer", "head", "window", "document", "position", "atom", "activation", "native_norm", "cosine")

    @property
    def n(self) -> int:
        return len(self.atom)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.kl)

    @property
    def n_steps(self) -> int:
        """How many tokens are scored."""
        return next(iter(self.kl.values())).shape[1]

    @property
    def horizon(self) -> int:
        return self.n_steps - (self.read == "same")

    def score(self, condition: str, when: When = "at") -> Float[Tensor, " firing"]:
        """How far a condition moves the model, nats: ``"at"`` the first token that sees the edit (the firing, unless
        ``read="next"``), or summed ``"through"`` all tokens scored."""
        return self.kl[condition][:, 0] if when == "at" else self.kl[condition].sum(1)

    def wins(self, better: str, worse: str, when: When = "at") -> Rate:
        """How often ``better`` moves the distribution less than ``worse``."""
        return share(self.score(better, when) < self.score(worse, when))

    def chain(self, when: When = "at") -> Rate:
        """How often the strict order atom < delete < random holds."""
        atom, delete, random = (self.score(c, when) for c in ("atom", "delete", "random"))
        return share((atom < delete) & (delete < random))

    def quartiles(self, when: When = "at") -> list[Rate]:
        """How often the atom beats deletion among firings of the smallest to the largest effect (KL of deletion)."""
        effect, won = self.score("delete", when), self.score("atom", when) < self.score("delete", when)
        return [share(won[torch.from_numpy(part)]) for part in np.array_split(effect.argsort(stable=True).numpy(), 4)]

    def select(self, which: Bool[Tensor, " firing"]) -> ReplacementResult:
        """Some of the firings."""
        rows = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor | dict)}
        pick = lambda x: {k: v[which] for k, v in x.items()} if isinstance(x, dict) else x[which]  # noqa: E731
        return replace(self, **{name: pick(x) for name, x in rows.items()})

    def by_site(self) -> dict[Head, ReplacementResult]:
        """The firings of each head; of several at once, there is but one part."""
        if self.together:
            return {Head(-1, -1): self}
        return {head: self.select((self.layer == head.layer) & (self.head == head.head)) for head in self.places}

    # As a result

    @property
    def where(self) -> str:
        names = (" with " if self.together else ", ").join(head.words for head in self.places[:6])
        return names + (f" ... ({len(self.places)})" if len(self.places) > 6 else "")

    @property
    def title(self) -> str:
        return f"Replacement test, {self.where}: {self.n} firings on held-out text"

    @property
    def about(self) -> str:
        seen = (
            "the token's own read sees the edit" if self.read == "same" else "reads see the edit from the next token on"
        )
        together = (
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
            + together * self.together
            + slow * (self.way not in (None, (True, True)))
            + " Paper: section 3.2, appendices F and I."
        )

    def numbers(self) -> list[Number]:
        found = self._numbers("at", "")
        if self.n_steps > 1:
            found += self._numbers("through", ", in total")
        return [*found, Number.median("median cosine of atom and write", self.cosine.double())]

    def _numbers(self, when: When, suffix: str) -> list[Number]:
        scores = {name: self.score(name, when) for name in self.conditions}
        atom, delete = scores["atom"], scores["delete"]
        found = [Number.share(f"atom beats deletion{suffix}", atom < delete)]
        if "random" in scores:
            found.append(Number.of(f"atom < deletion < random{suffix}", self.chain(when)))
            found.append(Number.share(f"deletion beats random{suffix}", delete < scores["random"]))
        for name in [name for name in scores if name not in ("atom", "delete", "random")]:
            found.append(Number.share(f"{LOOK[name][0]} beats deletion{suffix}", scores[name] < delete))
        for by, clusters in (("window", self.window), ("text", self.document), ("atom", self.atom)):
            if len(clusters.unique()) > 1:  # else no interval can be had
                name = f"cluster bootstrap by {by}{suffix}"
                found.append(Number.estimate(name, (atom < delete).double(), clusters, unit="%"))
        for name, x in scores.items():
            found.append(Number.median(f"median KL, {LOOK[name][0]}{suffix}", x.double(), unit="nats"))
        found.append(Number(f"Cliff's delta{suffix}", cliffs_delta(delete, atom)))
        if self.n > 1:
            found.append(Number(f"paired Wilcoxon p{suffix}", paired(delete, atom).p_wilcoxon))
        for name in ("delete", "random"):
            if name in scores and middle(atom) > 0:
                ratio = middle(scores[name]) / middle(atom)
                found.append(Number(f"ratio of median KL, {LOOK[name][0]} : atom{suffix}", ratio))
        for name, rate in zip(QUARTERS, self.quartiles(when) if self.n >= 4 else (), strict=self.n >= 4):
            found.append(Number.of(f"atom beats deletion, {name} quarter of effects{suffix}", rate))
        if not self.together and len(self.places) > 1:
            rates = {head: part.wins("atom", "delete", when) for head, part in self.by_site().items() if part.n}
            found += [Number.of(f"atom beats deletion{suffix}, {head.folder}", rate) for head, rate in rates.items()]
            mean = np.array([rate.rate for rate in rates.values()])
            found.append(Number.estimate(f"atom beats deletion{suffix}, mean of sites", mean, unit="%"))
        return found

    def columns(self) -> dict[str, Any]:
        found = super().columns()
        for name in self.conditions:
            divergence = self.divergence[name]
            found |= {f"kl_{name}": self.score(name).numpy(), f"kl_total_{name}": self.score(name, "through").numpy()}
            found |= {f"flips_{name}": self.flips[name].numpy(), f"divergence_{name}": divergence[:, 0].numpy()}
            found |= {f"divergence_end_{name}": divergence[:, -1].numpy()}
        return found

    def table(self) -> Table:
        moments: dict[When, str] = {"at": "at the firing" if self.read == "same" else "at the next token"}
        if self.n_steps > 1:
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
        shown = {name: self.score(name).clamp_min(1e-12) for name in ("atom", "random", "delete") if name in self.kl}
        for name, x in list(shown.items())[1:]:
            scatter.scatter(shown["atom"], x, s=6, color=LOOK[name][1], alpha=0.6, label=LOOK[name][0])
        both = torch.cat(list(shown.values()))
        scatter.plot(ends := [float(both.min()), float(both.max())], ends, color="0.3", lw=0.8, ls="--")
        axes = dict(xlabel="KL with the atom (nats)", ylabel="KL with something else (nats)")
        scatter.set(xscale="log", yscale="log", **axes)
        scatter.legend(frameon=False)
        names, rates = (QUARTERS, self.quartiles()) if self.n >= 4 else (("all",), [self.wins("atom", "delete")])
        intervals(bars, names, rates, width=0.8, color=LOOK["atom"][1])
        bars.set(ylim=(0, 1), xlabel="quarter of firings by KL of deletion", ylabel="atom beats deletion")
        for name, x in self.divergence.items():
            label, color = LOOK[name]
            lines.plot(range(x.shape[1]), x.median(0).values.clamp_min(1e-12), color=color, label=label)
        lines.set(yscale="log", xlabel="tokens after the firing", ylabel="median |S' - S| / |S|")
        lines.legend(frameon=False, fontsize=7)
        return made


def middle(values: Float[Tensor, " n"]) -> float:
    """The median (torch's is the lower one of two)."""
    return float(np.median(values.numpy()))


def _plan(asked: Asked) -> Iterator[Task]:
    """All heads in one table, by both protocols; and at once, where some are of one layer."""
    saes = list(asked.saes)
    conditions = ["atom", "matched", "delete", "random", "random_matched", "orthogonal", "other_atom"]
    given: dict[str, Any] = {"n_firings": asked.sizes.firings, **asked.common, "conditions": conditions}
    if flat := [flat for sae in saes for flat in asked.flat if flat.place == sae.place]:
        if len(flat) < len(saes):
            raise ValueError(f"{len(flat)} flat SAEs for {len(saes)} heads: give one for each head, or none")
        given["flat"] = flat
    ways: dict[str, Mapping[str, Any]] = {"": {}, "next": {"read": "next"}}
    if not all(asked.first_of_layer(sae) for sae in saes):
        ways["together"] = {"together": True}
    for name, more in ways.items():
        yield Task(partial(replacement_test, asked.model, saes, asked.texts), saes, {**given, **more}, name)


@named_kinds
@experiment("an atom in place of what is written (section 3.2), both protocols", order=1, plan=_plan)
@torch.no_grad()
def replacement_test(
    model: HookedRecurrentModel,
    sae: WriteSAE | Sequence[WriteSAE],
    text: Texts,
    *,
    n_firings: int = 300,
    context: int = 96,
    horizon: int = 16,
    atom: int | None = None,
    conditions: Sequence[str] = DEFAULT,
    read: Read = "same",
    flat: WriteSAE | Sequence[WriteSAE] | None = None,
    together: bool = False,
    per_window: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    check_model: bool = True,
    progress: Progress | None = None,
) -> ReplacementResult:
    """Run the replacement test at firings drawn at random, several from each window of the text.

    Args:
        model, text, batch_size, seed, check_model: see `Run`.
        sae: an SAE of one of its heads; its top atom at each firing is tested. Several: each head by itself, with
            ``n_firings`` each, all in one result.
        n_firings: how many to test.
        context: tokens per window; a firing has at least a quarter of it before it, ``horizon`` tokens after it.
        horizon: how many tokens after the firing to score, beside the firing itself.
        atom: test only where this atom is the top one.
        conditions: what is put in, of `CONDITIONS`; ``atom`` and ``delete`` always are.
        read: ``"same"``: the firing's own read sees the edit. ``"next"``: it does not (the paper's cache-slot
            protocol), and scores begin at the token after it.
        flat: for the condition ``flat_svd``: an SAE of writes or states at the same head (of each).
        together: with several SAEs, replace the writes of all their heads at once, at tokens where all are active.
            What is put in at upper layers are atoms for the writes of the native pass.
        per_window: firings drawn from a window at most.
        progress: called with the number of firings done.

    Raises:
        ValueError: the text is too short, or the SAE (or ``atom``) fires too rarely in it; the message has the numbers.
        IndexError: no such atom.
    """
    saes = several(sae)
    run = Run(model, text, saes, batch_size, seed, check_model, progress)
    places = one_each(saes)
    chosen, flats = check_conditions(run, conditions, flat)
    positive(n_firings=n_firings, per_window=per_window)
    if atom is not None:
        if len(saes) > 1:
            raise ValueError(f"atom={atom} means an atom of one SAE; {len(saes)} were given")
        saes[0].atom(atom)  # raises for one out of range
    windows = windows_of(run, context, horizon)
    parts: list[dict[str, Any]] = []
    replayer: Replayer | None = None
    for group in [saes] if together else [[one] for one in saes]:
        tester = Tester(run, windows, group, chosen, flats, horizon, read)
        generator = torch.Generator().manual_seed(seed)
        order, start, done = torch.randperm(len(windows), generator=generator), 0, 0
        while done < n_firings and start < len(windows):
            some = order[start : start + min(tester.step, -(-(n_firings - done) // per_window))]
            start += len(some)
            native, tops = tester.native(some)
            fires = torch.stack([value > 0 for value, _ in tops.values()]).all(0).cpu() & tester.testable
            if atom is not None:
                fires &= tops[group[0].place][1].cpu() == atom
            window, position = (x[: n_firings - done] for x in draw(fires, per_window, generator))
            if len(window):
                tester.test(native, tops, some, window, position)
                done += len(window)
        if done < n_firings:
            what = f"atom {atom}" if atom is not None else "every SAE" if len(group) > 1 else "the SAE"
            raise ValueError(
                f"{what} at {', '.join(one.place.words for one in group)} fired at only {done} tokens of "
                f"{len(windows)} windows of {context} ({per_window} per window at most); {n_firings} firings were "
                f"asked for: give a longer text, or lower n_firings or context"
            )
        parts, replayer = parts + tester.parts, tester.replayer
    assert replayer is not None
    settings: dict[str, Any] = dict(together=together and len(saes) > 1, context=context)
    return ReplacementResult(**joined(parts), places=tuple(places), read=replayer.read, way=replayer.way, **settings)
