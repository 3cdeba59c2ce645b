"""What a lens showed, place by place and token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from writesae.results.across import chosen, name_tokens, spans, wide
from writesae.results.result import Figure, Number, Result, figure

SHOWN, ACROSS = 10, 24  # heads in the table; tokens across a plot that has room for words
CELL = 0.62  # inches across that a word takes


class Place(NamedTuple):
    """Where the lens looked: a point of the residual stream, or one head's part of it."""

    what: str
    layer: int
    head: int | None = None

    def __str__(self) -> str:
        return f"{self.what} {self.layer}" + ("" if self.head is None else f".{self.head}")


@dataclass(frozen=True, eq=False)
class LogitLens(Result):
    """Of each place and token, what the model would predict there. One text of n tokens has n cells, in order.

    Attributes:
        places: point, layer and head of each row.
        sequence, position, token: of each cell: which text, which position in it, the token's id.
        target: the token asked about, in each cell.
        top, top_probability: the most likely tokens, and how likely they are.
        probability, rank: of the target; rank 0 is the most likely token.
        kl: ``KL(model || lens)`` in nats: how far this is from what the model predicts at the end.
        entropy: in nats.
        words: ids as text.
        tuned: whether a tuned lens translated the stream.
    """

    places: tuple[Place, ...]
    sequence: Int[Tensor, " cell"]
    position: Int[Tensor, " cell"]
    token: Int[Tensor, " cell"]
    target: Int[Tensor, " cell"]
    top: Int[Tensor, "place cell k"]
    top_probability: Float[Tensor, "place cell k"]
    probability: Float[Tensor, "place cell"]
    rank: Int[Tensor, "place cell"]
    kl: Float[Tensor, "place cell"]
    entropy: Float[Tensor, "place cell"]
    words: Mapping[int, str]
    tuned: bool = False

    @property
    def title(self) -> str:
        name = "Tuned lens" if self.tuned else "Logit lens"
        return f"{name}, {len(self.places)} places, {len(self.position)} tokens"

    @property
    def about(self) -> str:
        translated = "translated by a tuned lens, then " if self.tuned else ""
        return (
            f"What stands at each place is {translated}given to the model's own last norm and head. KL is from the "
            f"model's own prediction at the same token to that of the place, in nats; agreement is how often the most "
            f"likely tokens are the same. What a mixer, an MLP or a head adds is looked at by itself."
        )

    def words_at(self, place: int, sequence: int = 0) -> list[str]:
        """The most likely token at each token of one text, as text."""
        return [self.words[int(i)] for i in self.top[place, self.sequence == sequence, 0]]

    def numbers(self) -> Sequence[Number]:
        heads = [i for i, place in enumerate(self.places) if place.head is not None]
        nearest = sorted(heads, key=lambda i: float(self.kl[i].mean()))[:SHOWN]
        shown = [i for i in range(len(self.places)) if i in nearest or self.places[i].head is None]
        return [
            number
            for i in shown
            for number in (
                Number.estimate(f"KL at {self.places[i]}", self.kl[i], self.sequence, unit="nats"),
                Number(f"median rank of the target at {self.places[i]}", float(self.rank[i].float().median())),
            )
        ]

    def columns(self) -> dict[str, Any]:
        place, cell = np.indices(self.kl.shape).reshape(2, -1)
        of_place = {name: [getattr(self.places[i], name) for i in place] for name in ("what", "layer", "head")}
        of_cell = {name: getattr(self, name).numpy()[cell] for name in ("sequence", "position")}
        of_cell |= {name: [self.words[int(i)] for i in getattr(self, name)[cell]] for name in ("token", "target")}
        of_both = {name: getattr(self, name).flatten().numpy() for name in ("probability", "rank", "kl", "entropy")}
        top = {
            "top": [self.words[int(i)] for i in self.top[..., 0].flatten()],
            "top_probability": self.top_probability[..., 0].flatten().numpy(),
        }
        return of_place | of_cell | top | of_both

    def plot(self, sequence: int = 0, first: int = 0, tokens: slice | Sequence[int] | None = None) -> Figure:
        """One text: places down, tokens across, the most likely token in each cell, coloured by its probability.

        The title says which tokens are shown, if these are not all that were looked at.

        >>> found.plot(tokens=slice(-10, None))                   # the last ten

        Args:
            sequence: which text.
            first: of its tokens looked at, the first to show; `ACROSS` are shown from there on.
            tokens: instead, positions in the text, or a slice of them; negative ones count from behind the last token
                looked at. All are shown; of more than `ACROSS`, the colours alone.

        Raises:
            IndexError: no such text, or no such token in it.
            ValueError: both ``first`` and ``tokens``.
        """
        cells = (self.sequence == sequence).nonzero()[:, 0]
        if first and tokens is not None:
            raise ValueError(f"give first={first} or tokens={tokens}, not both")
        if first not in range(len(cells)):
            raise IndexError(f"sequence={sequence}, first={first}: there is no such token, of {len(cells)}")
        there = self.position[cells].tolist()
        show = list(range(len(there))[first : first + ACROSS]) if tokens is None else chosen(tokens, there)
        here, n = cells[show], len(show)
        p, words = self.top_probability[:, here, 0].numpy(), n <= ACROSS
        width = wide(n, CELL, most=CELL * ACROSS + 1.5)
        made, (axis,) = figure(1, width, max(2.6, 0.26 * len(self.places) + 1.2))
        image = axis.imshow(p, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for i in range(len(self.places) if words else 0):
            for t, word in enumerate(self.words[int(x)] for x in self.top[i, here, 0]):
                colour = "white" if p[i, t] > 0.6 else "black"
                shown = repr(word)[1:-1]
                axis.text(t, i, shown[:10], ha="center", va="center", fontsize=6, color=colour, parse_math=False)
        name_tokens(axis, [self.words[int(i)] for i in self.token[here]], width)
        title = [] if n == len(there) else [f"tokens {spans([there[i] for i in show])}, of {spans(there)}"]
        title += [] if words else [f"more than {ACROSS} tokens: without words"]
        axis.set_title("; ".join(title), fontsize=9)
        axis.set_yticks(range(len(self.places)), [str(place) for place in self.places], fontsize=7)
        made.colorbar(image, ax=axis, label="probability of the top token")
        return made
