"""What activation patching found, as a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.methods.grids import PartGrid
from writesae.results.result import Figure, Number, predicted_and_measured


@dataclass(frozen=True, eq=False, kw_only=True)
class Patching(PartGrid):
    """What each part of the clean run does in the corrupted one.

    Attributes:
        what: the hook point patched.
        layers: of the grid.
        tokens: those of the corrupted text, as strings.
        clean, corrupted: the number after each text as it is.
        grid: the number with that part patched in. ``head`` has one entry where the point has no heads.
        estimate: the same to first order; None where it was not asked for.
    """

    VALUE, NUMBER, UNIT = "restored", "patched", "%"

    what: str
    clean: float
    corrupted: float
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

    def numbers(self) -> Sequence[Number]:
        made = [Number("clean", self.clean), Number("corrupted", self.corrupted)]
        if self.estimate is not None:
            pair = torch.stack([self.grid.flatten(), self.estimate.flatten()])
            r = float(torch.corrcoef(pair)[0, 1])
            made.append(Number("correlation with the first-order estimate", r, n=self.grid.numel()))
        return [*made, *self.top_numbers()]

    def columns(self) -> dict[str, Any]:
        more = {} if self.estimate is None else {"estimate": self.estimate.flatten().numpy()}
        return super().columns() | more

    def plot(self) -> Figure:
        """Tokens across, layers (and their heads) down; beside it, the estimate."""
        made, axes = self.draw(*([] if self.estimate is None else [3.6]))
        if self.estimate is not None:
            predicted_and_measured(axes[1], self.estimate.flatten(), self.grid.flatten())
            axes[1].set(xlabel="first-order estimate", ylabel="number with the part patched in")
        return made
