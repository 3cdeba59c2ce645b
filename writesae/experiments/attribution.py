"""Which earlier tokens' writes made a prediction: the part of every write in a logit, by layer, head and token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients import Gradient, LayerGradient, Logit, gradient
from writesae.hooks.attachable import fit
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel, Text
from writesae.results.across import name_tokens, wide
from writesae.results.result import Figure, Number, Result, figure, frame
from writesae.saes import WriteSAE
from writesae.saes.activity.reading import encode_matrices, target_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Attribution", "attribute"]


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """What every write of one text contributes to a logit, or to a difference of two.

    A write's contribution is ``<M, k v^T>``, with ``M`` the gradient of the logit with respect to that write, the scale
    of the head's norm held fixed: exact within the layer, later decays and erases included, and to first order behind
    it. The contributions of a head's writes sum to what its whole output contributes, ``sum_t g_t . o_t``. Taking a
    write out also changes the norm's scale; `deletions` have that in them, and do not add up.

    Attributes:
        tokens: of the text, as strings.
        question: the logit asked about, in words.
        value: that logit (or difference).
        contributions: layer -> ``[pos, head]``.
        deletions: layer -> ``[pos, head]``, what taking the write out would change: exact up to the head's norm. Only
            if asked for.
        outputs: layer -> ``[head]``, what the head's output contributes as a whole.
        atoms: head -> ``(indices, contributions)`` ``[pos, m]``: the contribution of each active atom to what
            its SAE reads there; they sum to the write's up to what the SAE leaves out.
    """

    tokens: list[str]
    question: str
    value: float
    contributions: dict[int, Float[Tensor, "pos head"]]
    outputs: dict[int, Float[Tensor, " head"]]
    deletions: dict[int, Float[Tensor, "pos head"]] | None = None
    atoms: dict[Head, tuple[Int[Tensor, "pos m"], Float[Tensor, "pos m"]]] | None = None

    @property
    def title(self) -> str:
        return f"Writes behind {self.question}"

    @property
    def about(self) -> str:
        return (
            f"What each write contributes to {self.question} ({self.value:.3f}): exact within a layer, later decays "
            f"and erases included, to first order through the rest of the model, the scale of the head's norm held "
            f"fixed. The contributions of a head's writes sum to the contribution of its output."
        )

    @property
    def by_token(self) -> Float[Tensor, " pos"]:
        """Summed over layers and heads."""
        return torch.stack([x.sum(1) for x in self.contributions.values()]).sum(0)

    def top(self, n: int = 10) -> list[tuple[int, int, int, float]]:
        """The ``n`` writes with the largest contributions in size: ``(layer, head, position, contribution)``."""
        found = self.columns()
        rows = np.argsort(-abs(found["contribution"]), kind="stable")[:n]
        where = (found[name][rows].tolist() for name in ("layer", "head", "position", "contribution"))
        return list(zip(*where, strict=True))

    def numbers(self) -> Sequence[Number]:
        made = [Number("the number asked about", self.value)]
        made += [Number(f"layer {layer}, all writes", float(x.sum())) for layer, x in self.contributions.items()]
        for layer, head, position, found in self.top(8):
            made.append(Number(f"layer {layer} head {head}, {self.tokens[position]!r} at {position}", found))
        return made

    def columns(self) -> dict[str, Any]:
        layers = self.contributions.items()
        layer = np.repeat([layer for layer, _ in layers], [found.numel() for _, found in layers])
        position, head = np.concatenate([np.indices(found.shape).reshape(2, -1) for _, found in layers], axis=1)
        columns = {"layer": layer, "head": head, "position": position, "token": [self.tokens[i] for i in position]}
        for name, found in (("contribution", self.contributions), ("deletion", self.deletions)):
            if found is not None:
                columns[name] = torch.cat([found[layer].flatten() for layer, _ in layers]).numpy()
        return columns

    def atom_records(self) -> pd.DataFrame:
        """One row per active atom: layer, head, position, token, atom, contribution."""
        rows = [
            (layer, head, t, self.tokens[t], int(atom), float(found))
            for (layer, head), (indices, values) in (self.atoms or {}).items()
            for t in range(len(indices))
            for atom, found in zip(indices[t], values[t], strict=True)
            if found != 0
        ]
        names = ("layer", "head", "position", "token", "atom", "contribution")
        return frame({name: [row[i] for row in rows] for i, name in enumerate(names)})

    def plot(self, n_heads: int = 16) -> Figure:
        """Tokens across, heads down (those with the largest contributions), and all heads' sum above."""
        layers = self.contributions.items()
        size = {(layer, i): float(x) for layer, found in layers for i, x in enumerate(found.abs().sum(0))}
        heads = sorted(sorted(size, key=size.__getitem__, reverse=True)[:n_heads])
        grid = torch.stack([self.contributions[layer][:, head] for layer, head in heads]).numpy()
        width = wide(len(self.tokens), 0.28)
        made, (axis,) = figure(1, width, height=0.22 * len(heads) + 1.6)
        limit = float(abs(grid).max()) or 1.0
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        name_tokens(axis, self.tokens, width)
        axis.set_yticks(range(len(heads)), [f"{layer}.{head}" for layer, head in heads], fontsize=7)
        axis.set_ylabel("layer.head")
        axis.set_title(self.title, fontsize=9, parse_math=False)
        made.colorbar(image, ax=axis, label="contribution to the logit")
        return made


@named_kinds
def attribute(
    model: HookedRecurrentModel,
    text: Text,
    token: str | int | None = None,
    *,
    minus: str | int | None = None,
    position: int = -1,
    saes: Sequence[WriteSAE] = (),
    deletions: bool = False,
    check_model: bool = True,
) -> Attribution:
    """Attribute a logit to every write of a text, from one backward pass.

    Args:
        model, check_model: see `Run`.
        text: one text, or the token ids of one.
        token: whose logit (a text of one token, or an id); None: the most likely one there.
        minus: a token whose logit is subtracted.
        position: the token after which it is predicted; -1 is the last.
        saes: SAEs of some heads: their active atoms' contributions too.
        deletions: also estimate what deleting each write would change; costs ``pos^2 * d_value`` per head.

    Raises:
        ValueError: several texts, or a token that is several; IndexError: a position that is not there.
    """
    ids, _ = model.to_tokens(text)
    if len(ids) != 1:
        raise ValueError(f"attribute takes one text; got {len(ids)}")
    for sae in saes:
        fit(sae, model, check_model=check_model)
    n_pos = ids.shape[1]
    if not -n_pos <= position < n_pos:
        raise IndexError(f"position {position} is out of range: the text has {n_pos} tokens (0 to {n_pos - 1})")
    position %= n_pos
    ids = ids[:, : position + 1]  # what comes later plays no part
    other = None if minus is None else model.to_single_token(minus)
    if token is None:
        asked: list[int] = []

        def of(logits: Float[Tensor, "1 1 vocab"]) -> Float[Tensor, " 1"]:
            asked.append(int(logits.argmax()))
            return Logit(asked[0], minus=other)(logits)

        found = gradient(model, ids, of, at=-1)
        wanted = asked[0]
    else:
        wanted = model.to_single_token(token)
        found = gradient(model, ids, Logit(wanted, minus=other))
    fixed = {layer: g.at_fixed_scale for layer, g in found.layers.items()}
    strings = [str(i) for i in ids[0].tolist()] if model.tokenizer is None else model.to_str_tokens(ids)
    name = lambda i: str(i) if model.tokenizer is None else repr(model.to_str_tokens([i])[0])  # noqa: E731
    question = f"the logit of {name(wanted)}" + ("" if other is None else f" minus that of {name(other)}")
    return Attribution(
        tokens=strings,
        question=f"{question} after {strings[-1]!r}",
        value=float(found.value[0]),
        contributions={layer: g.price(g.write)[0].cpu() for layer, g in fixed.items()},
        outputs={layer: g.of_output()[0].cpu() for layer, g in fixed.items()},
        deletions={layer: _deletions(found, layer) for layer in found.layers} if deletions else None,
        atoms={s.place: _by_atom(found, fixed[s.place.layer], s) for s in saes} if saes else None,
    )


def _deletions(found: Gradient, layer: int) -> Float[Tensor, "pos head"]:
    g = found[layer]
    _, n_pos, n_heads = g.write.shape
    every = torch.arange(n_pos, device=g.output.device)[None]
    return torch.stack([g.effect(head, every, -g.write[:, :, head])[0].cpu() for head in range(n_heads)], 1)


@torch.no_grad()
def _by_atom(found: Gradient, g: LayerGradient, sae: WriteSAE) -> tuple[Int[Tensor, "pos m"], Float[Tensor, "pos m"]]:
    values, indices = encode_matrices(sae, *target_of(found.cache, *sae.place, sae.cfg.target))
    prices = g.prices(sae.place.head, sae.decoder).gather(-1, indices.to(found.value.device))
    return indices[0].cpu(), (values.to(prices.device) * prices)[0].cpu()
