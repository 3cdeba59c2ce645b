"""What was measured of each head's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.sites import Head
from writesae.results.result import Figure, Number, Result, figure, frame

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # heads and tokens in the table


@dataclass(frozen=True, eq=False)
class MemoryLength(Result):
    """How long each head remembers. Half-lives and distances are in tokens; inf: longer than half a window.

    Attributes:
        heads: layer and head of each column.
        ids: the windows.
        words: ids as text.
        delimiters: the token ids that count as such; None where that is not known (no tokenizer, none given).
        half_life_by_decay: tokens until a write is half as strong, by decay alone.
        half_life_with_erase: the same with what erases take of it.
        strength_by_decay, strength_with_erase: mean strength of writes, 0, 1, 2, ... tokens later.
        read_distance: the nearest so many tokens are half of what is read; the median of the reads looked at.
        first, own: share of a read that goes to the first token; to the reading token itself.
        delimiter: the share that goes to delimiters; None where these are not known.
        unread: share of writes, of the second half, that none of the later reads looked at gives a tenth of an equal
            share.
        participation: ``(sum s^2)^2 / sum s^4`` of a state's singular values: how many parts carry its energy.
        entropy_rank: ``exp(H(s / sum s))``, the effective rank of Roy and Vetterli.
        written: the norm of each token's write.
        received: what each token of the second half gets of the later reads looked at, in equal shares; else NaN.
    """

    heads: tuple[Head, ...]
    ids: Int[Tensor, "window pos"]
    words: Mapping[int, str]
    delimiters: tuple[int, ...] | None
    half_life_by_decay: Float[Tensor, "window write head"]
    half_life_with_erase: Float[Tensor, "window write head"]
    strength_by_decay: Float[Tensor, "window lag head"]
    strength_with_erase: Float[Tensor, "window lag head"]
    read_distance: Float[Tensor, "window 1 head"]
    first: Float[Tensor, "window 1 head"]
    own: Float[Tensor, "window 1 head"]
    unread: Float[Tensor, "window 1 head"]
    participation: Float[Tensor, "window state head"]
    entropy_rank: Float[Tensor, "window state head"]
    written: Float[Tensor, "window pos head"]
    received: Float[Tensor, "window pos head"]
    delimiter: Float[Tensor, "window 1 head"] | None = None

    @property
    def title(self) -> str:
        n, context = self.ids.shape
        return f"Memory of {len(self.heads)} heads, {n} windows of {context} tokens"

    @property
    def about(self) -> str:
        known = "" if self.delimiters is not None else " Which tokens are delimiters is not known without a tokenizer."
        return (
            "The half-life of a write is the number of tokens after which its norm in the memory is half of what it "
            "was, by decay alone and with erases; the median of the writes followed. Shares of a read are those of the "
            "lengths of what it holds of each token. Ranks are those of states as they are in the pass." + known
        )

    def columns(self) -> dict[str, Any]:
        shares = {"first": self.first, "own": self.own, "unread": self.unread}
        shares |= {} if self.delimiter is None else {"delimiter": self.delimiter}
        return {
            "layer": [head.layer for head in self.heads],
            "head": [head.head for head in self.heads],
            "half_life_by_decay": lower_median(self.half_life_by_decay.flatten(0, 1).numpy()),
            "half_life": lower_median(self.half_life_with_erase.flatten(0, 1).numpy()),
            "read_distance": lower_median(self.read_distance.flatten(0, 1).numpy()),
            **{f"{name}_share": x.mean((0, 1)).numpy() for name, x in shares.items()},
            "participation": self.participation.mean((0, 1)).numpy(),
            "entropy_rank": self.entropy_rank.mean((0, 1)).numpy(),
        }

    def tokens(self, at_least: int = 3) -> pd.DataFrame:
        """A row per token of the text, those that write most first: how often it occurs, how strongly it writes (1: as
        its heads do on average), and what it gets of later reads (1: an equal share).

        Args:
            at_least: leave out tokens that occur less often.
        """
        return frame(self._tokens(at_least))

    def _tokens(self, at_least: int = 3) -> dict[str, Any]:
        """The columns of `tokens`; a mean is over the places where there is a number."""
        written = self.written / self.written.mean((0, 1)).clamp_min(1e-30)
        token, at = np.unique([self.words[i] for i in self.ids.flatten().tolist()], return_inverse=True)
        count, columns = np.bincount(at), {"token": token}
        for name, x in (("written", written), ("received", self.received)):
            x = x.mean(-1).flatten().numpy()
            there = ~np.isnan(x)
            sums, n = (np.bincount(at[there], of, len(token)) for of in (x[there], None))
            columns[name] = np.divide(sums, n, where=n > 0, out=np.full(len(token), np.nan))
        rows = np.argsort(-columns["written"], kind="stable")
        rows = rows[count[rows] >= at_least]
        return {name: column[rows] for name, column in (columns | {"count": count}).items()}

    def numbers(self) -> Sequence[Number]:
        of_heads, n = self.columns(), len(self.heads)
        made = [
            Number(
                "half-life by decay alone, median of heads", float(lower_median(of_heads["half_life_by_decay"])), n=n
            ),
            Number("half-life with erases, median of heads", float(lower_median(of_heads["half_life"])), n=n),
            Number("read distance, median of heads", float(lower_median(of_heads["read_distance"])), n=n),
            Number.estimate("share of reads of the first token", self.first.mean((1, 2)), unit="%"),
        ]
        if self.delimiter is not None:
            delimiters = torch.isin(self.ids, torch.tensor(self.delimiters)).float()
            made += [
                Number.estimate("share of reads of delimiters", self.delimiter.mean((1, 2)), unit="%"),
                Number("share of tokens that are delimiters", float(delimiters.mean()), "%"),
            ]
        made += [
            Number.estimate("writes that are never read", self.unread.mean((1, 2)), unit="%"),
            Number.estimate("participation ratio of states", self.participation.mean((1, 2))),
            Number.estimate("effective rank of states", self.entropy_rank.mean((1, 2))),
        ]
        for i in np.argsort(-of_heads["half_life"])[:SHOWN]:
            made.append(Number(f"half-life, {self.heads[i].words}", float(of_heads["half_life"][i])))
        for i in np.argsort(-of_heads["first_share"])[:SHOWN]:
            made.append(Number(f"first token's share, {self.heads[i].words}", float(of_heads["first_share"][i]), "%"))
        seen = list(zip(*(column.tolist() for column in self._tokens().values()), strict=True))
        for token, written, _, count in seen[:SHOWN]:
            made.append(Number(f"writes of {token!r}, over the mean", written, n=count))
        for token, _, received, count in sorted((row for row in seen if row[2] >= 0), key=lambda row: row[2])[:SHOWN]:
            made.append(Number(f"reads of {token!r}, in equal shares", received, n=count))
        return made

    def plot(self) -> Figure:
        """What is left of writes over time, by decay alone and with erases; half-lives and first tokens' shares."""
        made, (left, right) = figure(2)
        layers = sorted({head.layer for head in self.heads})
        for i, layer in enumerate(layers):
            here = [n for n, head in enumerate(self.heads) if head.layer == layer]
            colour = f"C{i % 10}" if len(layers) <= 10 else None
            for name, style in (("with_erase", "-"), ("by_decay", ":")):
                y = getattr(self, f"strength_{name}")[..., here].mean((0, 2))
                label = f"layer {layer}" if style == "-" and len(layers) <= 10 else None
                left.plot(range(1, len(y)), y[1:], ls=style, color=colour, label=label)
        left.axhline(0.5, color="0.7", lw=0.8)
        left.set(
            xscale="log", xlabel="tokens later", ylabel="what is left of a write (dotted: decay alone)", ylim=(0, None)
        )
        if len(layers) <= 10:
            left.legend(frameon=False)
        of_heads = self.columns()
        life = np.minimum(of_heads["half_life"], self.ids.shape[1] // 2)
        dots = right.scatter(life, of_heads["first_share"], c=of_heads["layer"], cmap="viridis", s=14)
        right.set_xscale("log", base=2)
        right.set(xlabel="half-life of a write, tokens", ylabel="first token's share of reads")
        made.colorbar(dots, ax=right, label="layer")
        return made


def lower_median(x: Any) -> Any:
    """The median along the first dimension; of two middle values the lower, which need not be inf."""
    return np.quantile(x, 0.5, axis=0, method="lower")
