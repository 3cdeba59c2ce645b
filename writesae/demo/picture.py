"""The picture of the demo: which write holds the name, what is said after each change, and atoms in place of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from writesae.demo.name import NAME, OTHER, Held, Outcome
from writesae.experiments import ReplacementResult
from writesae.experiments.replacement import When
from writesae.jobs.extras import extra


def draw(where: Held, outcomes: Sequence[Outcome], results: Sequence[ReplacementResult], path: Path) -> None:
    """All three in one PNG file; MissingExtra without matplotlib."""
    extra("matplotlib").use("agg")
    plt = extra("matplotlib.pyplot")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.4, 1))
    top, left, right = (figure.add_subplot(part) for part in (grid[0, :], grid[1, 0], grid[1, 1]))
    _draw_grid(top, where)
    _draw_outcomes(left, outcomes)
    _draw_rates(right, results)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


def _draw_grid(axis: Any, where: Held, most: int = 16) -> None:
    """The heads in which writes matter most, down; tokens across."""
    found = where.found
    strength = found.restored.abs().amax(-1).flatten()
    rows = sorted(strength.topk(min(most, len(strength))).indices.tolist())
    grid = found.restored.flatten(0, 1)[rows].float().cpu().numpy()
    axis.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    n = found.grid.shape[1]
    heads = [(found.layers[i // n], i % n) for i in rows]
    axis.set_yticks(range(len(heads)), [f"{layer}.{head}" for layer, head in heads], fontsize=7)
    axis.set_xticks(range(len(found.tokens)), [t.strip() for t in found.tokens], rotation=90, fontsize=8)
    for layer, head, t in where.places:
        if (layer, head) in heads:
            axis.scatter([t], [heads.index((layer, head))], s=130, facecolors="none", edgecolors="0.1", lw=1.5)
    axis.set_ylabel("layer.head")
    axis.set_title(f"Which write holds {NAME.strip()}? Red: exchanged, it brings {OTHER.strip()}", fontsize=10)


def _draw_outcomes(axis: Any, outcomes: Sequence[Outcome]) -> None:
    for y, row in enumerate(outcomes):
        for shift, p, color in ((-0.2, row.name, "C0"), (0.2, row.other, "C3")):
            axis.barh(y + shift, p, height=0.38, color=color)
        axis.text(1.02, y, row.says.strip(), va="center", fontsize=9, style="italic")
    axis.set_yticks(range(len(outcomes)), [row.done for row in outcomes])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"probability of {NAME.strip()} (blue), {OTHER.strip()} (red)")
    axis.set_title("What is changed, and what the model says (in italics)", fontsize=10)


def _draw_rates(axis: Any, results: Sequence[ReplacementResult]) -> None:
    looks: tuple[tuple[float, When, str], ...] = ((-0.2, "at", "C0"), (0.2, "through", "#9ecae1"))
    for y, result in enumerate(results):
        for shift, when, color in looks:
            rate = result.wins("atom", "delete", when)
            axis.barh(y + shift, 100 * rate.rate, height=0.38, color=color)
            axis.plot([100 * rate.low, 100 * rate.high], [y + shift] * 2, color="0.1", lw=1.5)
    axis.set_yticks(range(len(results)), ["layer {}\nhead {}".format(*r.places[0]) for r in results])
    axis.axvline(50, color="0.3", lw=0.8, ls="--")
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of firings, with Wilson 95% interval")
    axis.set_title("An atom is closer than a deletion:\nat the firing (dark), with next tokens (light)", fontsize=10)
