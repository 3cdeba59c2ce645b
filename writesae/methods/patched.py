"""What activation patching found, as a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from writesae.results.across import name_tokens, wide
from writesae.results.result import Figure, Number, Result, figure, predicted_and_measured


@dataclass(frozen=True, eq=False)
class Patching(Result):
    """What each part of the clean run does in the corrupted one.

    Attributes:
        what: the hook point patched.
        layers: of the grid.
        tokens: those of the corrupted text, as strings.
        clean, corrupted: the number after each text as it is.
        grid: the number with that part patched in. ``head`` has one entry where the point has no heads.
        estimate: the same to first order; None where it was not asked for.
    """

    VALUE = "restored"

    what: str
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    clean: float
    corrupted: float
    grid: Float[Tensor, "layer head pos"]
    estimate: Float[Tensor, "layer head pos"] | None

    @property
    def restored(self) -> Float[Tensor, "layer head pos"]:
        """How much of the way from the corrupted number to the clean one: 0 nothing, 1 all of it."""
        return (self.grid - self.corrupted) / (self.clean - self.corrupted)

    @property
    def title(self) -> str:
        return f"Patching {self.what}, {len(self.layers)} layers, {len(self.tokens)} tokens"

    @property
    def about(self) -> str:
        return (
            f"The number is {self.clean:.3f} after the clean text and {self.corrupted:.3f} after the corrupted one. "
            f"{self.what} of the clean run is put into the corrupted run at one layer, head and token at a time. "
            f"Restored is how much of the difference that makes. The estimate is of first order, from one backward "
            f"pass through the corrupted run."
        )

    def top(self, n: int = 10) -> list[tuple[int, int, int, float]]:
        """The ``n`` parts that restore most, in size: ``(layer, head, position, restored)``."""
        flat = self.restored.abs().flatten().topk(min(n, self.grid.numel())).indices
        found = [np.unravel_index(int(i), tuple(self.grid.shape)) for i in flat]
        return [(self.layers[a], int(h), int(t), float(self.restored[a, h, t])) for a, h, t in found]

    def numbers(self) -> Sequence[Number]:
        made = [Number("clean", self.clean), Number("corrupted", self.corrupted)]
        if self.estimate is not None:
            pair = torch.stack([self.grid.flatten(), self.estimate.flatten()])
            r = float(torch.corrcoef(pair)[0, 1])
            made.append(Number("correlation with the first-order estimate", r, n=self.grid.numel()))
        for layer, head, t, x in self.top(8):
            where = f"layer {layer}" + (f" head {head}" if self.grid.shape[1] > 1 else "")
            made.append(Number(f"{where}, {self.tokens[t]!r} at {t}, restored", x, "%"))
        return made

    def columns(self) -> dict[str, Any]:
        layer, head, position = np.indices(self.grid.shape).reshape(3, -1)
        columns = {
            "layer": np.array(self.layers)[layer],
            "head": head,
            "position": position,
            "token": [self.tokens[t] for t in position],
            "patched": self.grid.flatten().numpy(),
            "restored": self.restored.flatten().numpy(),
        }
        return columns | ({} if self.estimate is None else {"estimate": self.estimate.flatten().numpy()})

    def plot(self) -> Figure:
        """Tokens across, layers (and their heads) down; beside it, the estimate."""
        rows = self.restored.flatten(0, 1).numpy()
        height = max(3.0, 0.12 * len(rows) + 1.2)
        width = wide(len(self.tokens))
        widths = [width] if self.estimate is None else [width, 3.6]
        made, axes = figure(len(widths), widths, height)
        limit = float(abs(rows).max()) or 1.0
        image = axes[0].imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        name_tokens(axes[0], self.tokens, width)
        n_heads = self.grid.shape[1]
        axes[0].set_yticks([i * n_heads for i in range(len(self.layers))], [f"layer {x}" for x in self.layers])
        made.colorbar(image, ax=axes[0], label="restored")
        if self.estimate is not None:
            predicted_and_measured(axes[1], self.estimate.flatten(), self.grid.flatten())
            axes[1].set(xlabel="first-order estimate", ylabel="number with the part patched in")
        return made
