"""Nodes and edges of a circuit against real deletions: in the frozen model, and in the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from writesae.jobs.progress import Progress
from writesae.methods.tracing import Again, Question, Trace, run
from writesae.results.result import Figure, Number, Result, figure


@dataclass(frozen=True, eq=False)
class CircuitCheck(Result):
    """What deletions did, beside what the graph said. One entry per node or edge.

    Attributes:
        what: ``node`` or ``edge``.
        name: of the node, or of both.
        random: whether it was drawn at random rather than kept for its influence.
        predicted: the change that the graph says: of the number, for a node by all paths; for an edge, of the
            pre-activation at its end.
        frozen: the change when the node is taken out of the frozen model; for an edge, with all other nodes held.
        real: the same in the model as it is, with norms and gates free to move.
    """

    KEYS, ROWS, VALUE = ("what", "name"), ("what", "name", "random", "predicted", "frozen", "real"), "real"

    what: tuple[str, ...]
    name: tuple[str, ...]
    random: Bool[Tensor, " n"]
    predicted: Float[Tensor, " n"]
    frozen: Float[Tensor, " n"]
    real: Float[Tensor, " n"]

    @property
    def title(self) -> str:
        return f"Deletions against the graph, {len(self.what)} of them"

    @property
    def about(self) -> str:
        return (
            "Each node was taken out, and so was the start of each edge. In the frozen model norms, gates, decays, "
            "keys and attention patterns stay as they were, so the graph must be exact. In the real model they move; "
            "how far its changes are from the predicted ones is what freezing costs. Random nodes stand beside those "
            "kept."
        )

    def _of(self, what: str, random: bool) -> Bool[Tensor, " n"]:
        return torch.tensor([w == what for w in self.what]) & (self.random == random)

    def r(self, what: str = "node", where: str = "real") -> float:
        """The correlation of predicted and measured changes, ``where`` in ``frozen`` or ``real``; NaN for fewer than
        two, or where all are alike."""
        rows = self._of(what, False)
        x, y = self.predicted[rows].numpy(), getattr(self, where)[rows].numpy()
        return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else float("nan")

    def numbers(self) -> Sequence[Number]:
        made = []
        for what in ("node", "edge"):
            rows = self._of(what, False)
            if not rows.any():
                continue
            for where in ("frozen", "real"):
                made.append(
                    Number(f"{what}s: r of predicted and {where} changes", self.r(what, where), n=int(rows.sum()))
                )
            made.append(Number(f"{what}s: mean size of the real change", float(self.real[rows].abs().mean())))
            if (others := self._of(what, True)).any():
                size = float(self.real[others].abs().mean())
                made.append(Number(f"{what}s at random: mean size of the real change", size, n=int(others.sum())))
        return made

    def plot(self) -> Figure:
        made, axes = figure(2)
        for axis, what in zip(axes, ("node", "edge"), strict=True):
            for where, style in (("frozen", "x"), ("real", "o")):
                rows = self._of(what, False)
                axis.plot(self.predicted[rows], getattr(self, where)[rows], style, ms=4, alpha=0.7, label=where)
            axis.axline((0, 0), slope=1, color="0.6", lw=0.8)
            axis.set(title=f"{what}s", xlabel="predicted change", ylabel="change")
            axis.legend(frameon=False)
        return made


def check(
    asked: Question,
    trace: Trace,
    nodes: Sequence[tuple[int, bool, str]],
    edges: Sequence[tuple[int, int, str]],
    totals: tuple[list[Tensor], list[Tensor]],
    progress: Progress | None = None,
) -> CircuitCheck:
    """Delete nodes, and starts of edges.

    Args:
        asked, trace: what was traced.
        nodes: number of each node, whether it is a random one, its name.
        edges: numbers of start and end, and the name; an end of -1 is the target.
        totals: `Trace.totals` with errors that move, and with errors as they were.
        progress: called with the number of deletions done.
    """
    moving, D = totals
    effects = torch.cat([cut.effects(G)[0].double().cpu() for cut, G in zip(trace.cuts, moving, strict=True)])
    found: list[tuple[str, str, bool, float, float, float]] = []
    value = [float(run(asked, _again(trace, kept, [], False)).value.detach()) for kept in (trace.kept, None)]
    for node, random, name in nodes:
        changes = [
            float(run(asked, _again(trace, kept, [node], False)).value.detach()) - before
            for kept, before in zip((trace.kept, None), value, strict=True)
        ]
        found.append(("node", name, random, -float(effects[node]), changes[0], changes[1]))
        if progress is not None:
            progress(len(found))
    held = [run(asked, _again(trace, kept, [], True)) for kept in (trace.kept, None)]
    for start, end, name in edges:
        cut, n = (len(trace.cuts), -1) if end < 0 else trace.where(end)
        seed = None if end < 0 else trace.cuts[cut].reads(n, D[cut])[0]
        predicted = -float(trace.row(cut, seed)[0][start])
        changes = []
        for kept, before in zip((trace.kept, None), held, strict=True):
            after = run(asked, _again(trace, kept, [start], True))
            changes.append(_read(after, cut, seed) - _read(before, cut, seed))
        found.append(("edge", name, False, predicted, changes[0], changes[1]))
        if progress is not None:
            progress(len(found))
    what, names, random, *numbers = zip(*found, strict=True)
    return CircuitCheck(what, names, torch.tensor(random), *(torch.tensor(x, dtype=torch.float64) for x in numbers))


def _again(trace: Trace, kept: list[Tensor] | None, removed: Sequence[int], hold: bool) -> Again:
    return Again(kept, trace.cuts, [trace.where(node) for node in removed], hold)


def _read(trace: Trace, cut: int, seed: Tensor | None) -> float:
    if seed is None:
        return float(trace.value.detach())
    return float((trace.given[cut].detach() * seed).double().sum())
