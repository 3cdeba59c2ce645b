"""A number for each layer, head and token whose write, or another part, was changed: what several methods return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from writesae.results.across import name_tokens, wide
from writesae.results.result import Figure, Number, Result, figure


@dataclass(frozen=True, eq=False, kw_only=True)
class PartGrid(Result):
    """A number, once for each part of a run that was changed. ``VALUE`` names what is made of it, a grid too.

    Attributes:
        layers: of the grid.
        tokens: of the text, as strings.
        grid: the number with that part changed. ``head`` has one entry where the part has no heads.
    """

    NUMBER, UNIT = "number", ""

    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    grid: Float[Tensor, "layer head pos"]

    @property
    def values(self) -> Float[Tensor, "layer head pos"]:
        """What ``VALUE`` names."""
        return getattr(self, self.VALUE)

    def top(self, n: int = 10) -> list[tuple[int, int, int, float]]:
        """The ``n`` largest in size: ``(layer, head, position, value)``."""
        found = self.values.abs().flatten().topk(min(n, self.grid.numel())).indices
        a, h, t = np.unravel_index(found.numpy(), tuple(self.grid.shape))
        rows = zip(a.tolist(), h.tolist(), t.tolist(), strict=True)
        return [(self.layers[i], head, at, float(self.values[i, head, at])) for i, head, at in rows]

    def top_numbers(self, n: int = 8) -> list[Number]:
        """The same to report."""
        made = []
        for layer, head, t, x in self.top(n):
            where = f"layer {layer}" + (f" head {head}" if self.grid.shape[1] > 1 else "")
            made.append(Number(f"{where}, {self.tokens[t]!r} at {t}, {self.VALUE}", x, self.UNIT))
        return made

    def columns(self) -> dict[str, Any]:
        """One row per part."""
        layer, head, position = np.indices(self.grid.shape).reshape(3, -1)
        return {
            "layer": np.array(self.layers)[layer],
            "head": head,
            "position": position,
            "token": [self.tokens[t] for t in position],
            self.NUMBER: self.grid.flatten().numpy(),
            self.VALUE: self.values.flatten().numpy(),
        }

    def draw(self, *more: float) -> tuple[Figure, list[Any]]:
        """A figure with tokens across, layers (and their heads) down, and further axes of these widths, in inches."""
        rows = self.values.flatten(0, 1).numpy()
        width = wide(len(self.tokens))
        made, axes = figure(1 + len(more), [width, *more], max(3.0, 0.12 * len(rows) + 1.2))
        limit = float(abs(rows).max()) or 1.0
        image = axes[0].imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        name_tokens(axes[0], self.tokens, width)
        n_heads = self.grid.shape[1]
        axes[0].set_yticks([i * n_heads for i in range(len(self.layers))], [f"layer {x}" for x in self.layers])
        made.colorbar(image, ax=axes[0], label=self.VALUE)
        return made, axes
