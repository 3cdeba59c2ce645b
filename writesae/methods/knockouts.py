"""In which layers a prediction reads some tokens: knockouts in a window of layers, slid over all of them.

Geva et al. 2304.14767 do this with attention, Endy et al. 2505.24244 with Mamba.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from writesae.hooks.knockout import Knockout
from writesae.hooks.positions import Positions
from writesae.hooks.scope import owning
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.questions import Metric, answer, checked_metric, listed, one_text, strings_of
from writesae.model import HookedRecurrentModel, Text
from writesae.results.result import Figure, Number, Result, figure


@dataclass(frozen=True, eq=False)
class KnockoutSweep(Result):
    """What a number is when some tokens can't be read in some layers.

    Attributes:
        windows: the layers cut at once, one entry for each window.
        tokens: of the text, as strings.
        sources, targets: which tokens are not read, and by which.
        uncut: the number with nothing cut.
        grid: the number with each window cut. ``head`` has one entry where all heads are cut together.
    """

    KEYS, VALUE = ("first_layer", "last_layer", "head"), "change"

    windows: tuple[tuple[int, ...], ...]
    tokens: tuple[str, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    uncut: float
    grid: Float[Tensor, "window head"]

    @property
    def change(self) -> Float[Tensor, "window head"]:
        """How much the cut changes the number."""
        return self.grid - self.uncut

    @property
    def by_head(self) -> bool:
        return self.grid.shape[1] > 1

    @property
    def title(self) -> str:
        count = lambda n, word: f"{n} {word}" + ("s" if n > 1 else "")  # noqa: E731
        windows, layers = count(len(self.windows), "window"), count(len(self.windows[0]), "layer")
        return f"Knockout of {count(len(self.sources), 'source')}, {windows} of {layers}"

    @property
    def about(self) -> str:
        sources, targets = (
            ", ".join(f"{self.tokens[t]!r} at {t}" for t in some[:8]) + (" ..." if len(some) > 8 else "")
            for some in (self.sources, self.targets)
        )
        return (
            f"The number is {self.uncut:.3f} as the model is. In one window of layers after the other, the reads at "
            f"{targets} do not see what was written at {sources}. A change says that these layers bring something "
            f"from there that the number depends on."
        )

    def top(self, n: int = 10) -> list[tuple[tuple[int, ...], int | None, float]]:
        """The ``n`` largest changes in size: ``(layers, head or None, change)``."""
        flat = self.change.abs().flatten().topk(min(n, self.change.numel())).indices.tolist()
        found = [divmod(i, self.grid.shape[1]) for i in flat]
        return [(self.windows[w], h if self.by_head else None, float(self.change[w, h])) for w, h in found]

    def numbers(self) -> Sequence[Number]:
        made = [Number("uncut", self.uncut)]
        for layers, head, x in self.top(8):
            where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {min(layers)} to {max(layers)}"
            made.append(Number(where + ("" if head is None else f" head {head}") + ", change", x))
        return made

    def columns(self) -> dict[str, Any]:
        window, head = np.indices(tuple(self.grid.shape)).reshape(2, -1)
        return {
            "first_layer": np.array([layers[0] for layers in self.windows])[window],
            "last_layer": np.array([layers[-1] for layers in self.windows])[window],
            **({"head": head} if self.by_head else {}),
            "number": self.grid.flatten().numpy(),
            "change": self.change.flatten().numpy(),
        }

    def plot(self) -> Figure:
        """The change over the layers of the windows' middle; by head, a grid."""
        made, (axis,) = figure()
        if self.by_head:
            limit = float(self.change.abs().max()) or 1.0
            image = axis.imshow(self.change.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axis.set_yticks(range(len(self.windows)), [str(layers[0]) for layers in self.windows], fontsize=7)
            axis.set_xticks(range(self.change.shape[1]))
            axis.set(xlabel="head", ylabel="layer")
            made.colorbar(image, ax=axis, label="change")
            return made
        axis.plot([float(np.mean(layers)) for layers in self.windows], self.change[:, 0].numpy(), "o-", ms=4)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.set(xlabel=f"middle of {len(self.windows[0])} layers", ylabel="change")
        return made


@named_kinds
def knockout_sweep(
    model: HookedRecurrentModel,
    text: Text,
    metric: Metric | str,
    *,
    sources: Positions,
    targets: Positions = -1,
    window: int = 1,
    layers: Sequence[int] | None = None,
    by_head: bool = False,
    progress: Progress | None = None,
) -> KnockoutSweep:
    """Hide what some tokens wrote from what others read, in one window of layers after the other (`Knockout`).

    >>> found = ws.knockout_sweep(model, text, ws.Logit(answer), sources=slice(1, 4), window=3)
    >>> found.top(3)                                    # (layers, head or None, how much it changes the answer)

    One pass per window, or per layer and head. Small windows miss what several layers bring together.

    Args:
        model: the model.
        text: one text, or token ids ``[pos]``.
        metric: the number: a `Logit`, or a function of the logits after the last token, ``[batch, 1, vocab]``.
        sources, targets: positions of the text, as for `Knockout`; negative ones count from its end. By default the
            last token does not read the sources.
        window: layers cut at once.
        layers: the recurrent layers to slide over; None for all.
        by_head: each head of each layer by itself; with a window of 1.
        progress: called with the number of passes done.

    Raises:
        ValueError: several texts, a window that does not fit, or tokens that no target reads anyway.
        IndexError: no such layer or position.
    """
    metric = checked_metric(metric, model)
    chosen = [s.layer for s in model.sites] if layers is None else [model.site(layer).layer for layer in layers]
    if not isinstance(window, int) or not 1 <= window <= len(chosen):
        raise ValueError(f"window={window!r}: give a number of layers, 1 to {len(chosen)}")
    if by_head and window > 1:
        raise ValueError(f"by_head=True with window={window}: heads of different layers do not belong together")
    ids = one_text(model, text)
    hidden, reads = (listed(asked, ids.shape[1], name) for asked, name in ((sources, "source"), (targets, "target")))
    windows = [tuple(chosen[i : i + window]) for i in range(len(chosen) - window + 1)]
    n_heads = max(model.site(layer).n_heads for layer in chosen) if by_head else 1

    def number(*cuts: Knockout) -> float:
        with model.intervene(cuts):
            return answer(model, ids, metric, [])[1]

    with owning(everywhere=False), torch.no_grad():
        uncut = number()
        grid, done = torch.full((len(windows), n_heads), uncut), 0
        for w, cut_layers in enumerate(windows):
            for h in range(model.site(cut_layers[0]).n_heads) if by_head else [0]:
                head = h if by_head else None
                grid[w, h] = number(*(Knockout(layer, head, sources=hidden, targets=reads) for layer in cut_layers))
                done += 1
                if progress is not None:
                    progress(done)
    return KnockoutSweep(tuple(windows), strings_of(model, ids), tuple(hidden), tuple(reads), uncut, grid)
