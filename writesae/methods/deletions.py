"""Which writes a number needs: each one deleted by itself, and the number after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.hooks.positions import Positions
from writesae.hooks.scope import owning
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.grids import PartGrid
from writesae.methods.questions import Metric, answer, checked_metric, layers_with, listed, one_text, strings_of
from writesae.methods.replayed_writes import replay_writes
from writesae.model import HookedRecurrentModel, Text
from writesae.results.result import Figure, Number


@dataclass(frozen=True, eq=False, kw_only=True)
class DeletionSweep(PartGrid):
    """What a number is without each write.

    Attributes:
        layers: of the grid.
        tokens: of the text, as strings.
        native: the number as the model is.
        grid: the number without that write; where none was deleted, the native one.
    """

    VALUE = "change"

    native: float

    @property
    def change(self) -> Float[Tensor, "layer head pos"]:
        """How much the deletion changes the number."""
        return self.grid - self.native

    @property
    def title(self) -> str:
        return f"Deleted writes, one at a time, {len(self.layers)} layers, {len(self.tokens)} tokens"

    @property
    def about(self) -> str:
        return (
            f"The number is {self.native:.3f} as the model is. What one head writes at one token is deleted, and all "
            f"that follows is run again. The change says how much the number needs that write. Writes that hold the "
            f"same stand in for each other, so a small change does not say that a write holds nothing."
        )

    def numbers(self) -> Sequence[Number]:
        return [Number("native", self.native), *self.top_numbers()]

    def plot(self) -> Figure:
        """Tokens across, layers and their heads down."""
        return self.draw()[0]


@named_kinds
def deletion_sweep(
    model: HookedRecurrentModel,
    text: Text,
    metric: Metric | str,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> DeletionSweep:
    """Delete each write, one layer, head and token at a time, and see what becomes of an answer (`Delete`).

    >>> found = ws.deletion_sweep(model, text, ws.Logit(answer))
    >>> found.top(3)                                    # (layer, head, position, how much it changes the answer)

    Deletions are made by replay: everything before the token, and the layers below, are run once for all. To first
    order, one backward pass gives all of them: ``ws.attribute(model, text, answer, deletions=True)``.

    Args:
        model: the model.
        text: one text, or token ids ``[pos]``.
        metric: the number: a `Logit`, or a function of the logits after the last token, ``[batch, 1, vocab]``.
        layers: the recurrent layers whose writes are deleted; None for all.
        positions: at which tokens; negative ones count from the end; None for all.
        batch_size: rows run at once.
        progress: called with the number of deletions done.

    Raises:
        ValueError: several texts, or no position.
        IndexError: no such layer or position.
    """
    metric = checked_metric(metric, model)
    ids = one_text(model, text)
    at = torch.tensor(listed(positions, ids.shape[1], "deletion"), device=ids.device, dtype=torch.long).unique()
    if not len(at):
        raise ValueError(f"positions={positions!r} names no token: give positions, or None for all")
    chosen = layers_with(model, "write", layers)
    with owning(everywhere=False), torch.no_grad():
        native = answer(model, ids, metric, [])[1]
        n_heads = max(model.site(layer).n_heads for layer in chosen)
        grid, done = torch.full((len(chosen), n_heads, ids.shape[1]), native), 0
        for i, layer in enumerate(chosen):
            for head, t, value in replay_writes(model, ids, layer, at, lambda own: own * -1.0, metric, batch_size):
                grid[i, head, t] = value
                done += value.numel()
                if progress is not None:
                    progress(done)
    return DeletionSweep(layers=tuple(chosen), tokens=strings_of(model, ids), native=native, grid=grid)
