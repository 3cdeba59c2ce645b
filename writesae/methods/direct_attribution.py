"""Direct logit attribution: a logit as a sum over layers, heads, and the tokens that wrote what heads read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients import Logit
from writesae.gradients.backward import LayerGradient, differentiate
from writesae.gradients.questions import in_ids
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.methods.direct_paths import BIAS, direct_paths, mixer_names
from writesae.methods.questions import one_text, strings_of
from writesae.model import HookedRecurrentModel, Text
from writesae.results.across import name_tokens, wide
from writesae.results.result import Figure, Number, Result, figure

By = Literal["layer", "head", "token"]
TOLERANCE = 1e-4  # of the sum of the parts in size: parts that add up to less or more are an error


@dataclass(frozen=True, eq=False)
class DirectAttribution(Result):
    """A logit, or the difference of two, as a sum of parts. One entry per part in ``part`` to ``contribution``.

    Attributes:
        by: how fine the parts are.
        tokens: of the text, as strings.
        value: the number that the parts sum to.
        part: ``embedding``, ``bias``, the name of a module of a layer, ``head``, or ``rest`` for what a recurrent layer
            adds beside its heads.
        layer, head, position: where it is; -1 where a part has no such thing. The position is that of the token that
            wrote.
        contribution: what it adds.
    """

    ROWS = ("part", "layer", "head", "position", "contribution")
    VALUE = "contribution"

    by: str
    tokens: tuple[str, ...]
    value: float
    part: tuple[str, ...]
    layer: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    contribution: Float[Tensor, " n"]

    @property
    def title(self) -> str:
        return f"Direct attribution by {self.by}, {len(self.part):,} parts"

    @property
    def about(self) -> str:
        return (
            f"The number is {self.value:.3f}. Each part's contribution is what it adds to the number by the direct "
            f"path, along the residual stream, with the scales of the norms on it as they were. The contributions sum "
            f"to the number. What a part does by way of later layers is in the contributions of these."
        )

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The ``n`` largest contributions in size: what part, how much."""
        found = self.contribution.abs().topk(min(n, len(self.part))).indices.tolist()
        return [(self.name(i), float(self.contribution[i])) for i in found]

    def name(self, i: int) -> str:
        """What the ``i``-th part is called."""
        layer, head, position = int(self.layer[i]), int(self.head[i]), int(self.position[i])
        name = self.part[i] if head < 0 else Head(layer, head).folder
        name = f"layer {layer} {name}" if layer >= 0 > head else name
        return name if position < 0 else f"{name}, {self.tokens[position]!r} at {position}"

    def numbers(self) -> Sequence[Number]:
        made = [Number("sum of all parts", self.value)]
        return made + [Number(name, x, id=f"part/{name}") for name, x in self.top(12)]

    def plot(self) -> Figure:
        """The largest parts; for writes, all of them, tokens across and heads down."""
        if self.by == "token":
            return self._grid()
        shown = self.top(24)[::-1]
        made, (axis,) = figure(1, 5.2, 0.17 * len(shown) + 1.0)
        values = [x for _, x in shown]
        axis.barh(range(len(shown)), values, color=["C3" if x < 0 else "C0" for x in values])
        axis.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7, parse_math=False)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.set_xlabel("contribution to the number")
        return made

    def _grid(self) -> Figure:
        written = self.position >= 0
        heads = sorted({(int(a), int(b)) for a, b in zip(self.layer[written], self.head[written], strict=True)})
        rows = np.zeros((len(heads), len(self.tokens)))
        row_of = {head: i for i, head in enumerate(heads)}
        for i in written.nonzero()[:, 0].tolist():
            rows[row_of[int(self.layer[i]), int(self.head[i])], int(self.position[i])] = float(self.contribution[i])
        width = wide(len(self.tokens))
        made, (axis,) = figure(1, width, max(3.0, 0.12 * len(heads) + 1.2))
        limit = float(abs(rows).max()) or 1.0
        image = axis.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        name_tokens(axis, self.tokens, width)
        axis.set_yticks(range(len(heads)), [Head(*head).folder for head in heads], fontsize=7)
        made.colorbar(image, ax=axis, label="contribution to the number")
        return made


@named_kinds
def direct_attribution(
    model: HookedRecurrentModel, text: Text, of: Logit, *, by: By = "layer", **kwargs: Any
) -> DirectAttribution:
    """A logit as the sum of what each part of the model adds to it by the direct path.

    >>> found = ws.direct_attribution(model, "The state of the", ws.Logit(a, minus=b), by="head")
    >>> found.top(3)                                            # ("L2H0", what it adds), ...

    A part adds a vector to the residual stream, which later layers carry on and the final norm and the unembedding
    read. With the scale of the norm as it was, that is linear, so the parts sum to the logit. Heads are split likewise:
    what a head reads goes through the norm behind it, at its scale, gates and output projection; and what it reads is
    the sum of what tokens wrote, decays and erases included (`ActivationCache.pattern`). A layer's ``rest`` is what it
    adds beside its heads' writes: Mamba-2's skip ``D x``, RWKV-7's bonus, biases, and what edits wrote. Everything
    is had from one backward pass, without patterns.

    Args:
        model: the model; hooks and edits that are attached act in the pass.
        text: one text, or token ids ``[pos]``.
        of: the logit, or the difference of two.
        by: ``"layer"``: the embedding, and each module of each layer that adds to the stream (mixer, attention, MLP);
            ``"head"``: recurrent mixers by heads; ``"token"``: these by the tokens that wrote.
        **kwargs: arguments of the model.

    Raises:
        ValueError: several texts; no such ``by``; the parts do not sum to the logit: the model does something to it
            that is not linear (a softcap), or an edit adds to the residual stream itself.
        IndexError: a token outside the vocabulary, or a column that is not there.
    """
    if by not in ("layer", "head", "token"):
        raise ValueError(f"by={by!r}: allowed are 'layer', 'head' and 'token'")
    of = in_ids(of, model)
    if not isinstance(of, Logit):
        raise TypeError(f"of={of!r}: give a ws.Logit(token, minus=other_token); other numbers are not sums of parts")
    ids = one_text(model, text)
    with direct_paths(model) as paths:
        found, gradients = differentiate(
            model, ids, replace(of, at=0), [] if by == "layer" else None, paths.tensors, at=of.at, **kwargs
        )
    parts, bias = paths.contributions(gradients)
    value = float(found.value)
    roundings = torch.finfo(parts[0][0].value.dtype).eps
    _check_sum(value, torch.stack([x[0] for _, x in parts] + [bias.to(parts[0][1])]), max(TOLERANCE, 4 * roundings))
    rows: list[tuple[str, int, int, int, float]] = []
    mixers = mixer_names(model)
    for part, contribution in parts:
        layer, x = -1 if part.layer is None or part.name == "embedding" else part.layer, float(contribution)
        if by == "layer" or mixers.get(layer) != part.name:
            rows.append((part.name, layer, -1, -1, x))
            continue
        heads = _by_head(found[layer], by)
        rows += [("head", layer, int(h), int(t), float(heads[t, h])) for t, h in np.ndindex(*heads.shape)]
        rows.append(("rest", layer, -1, -1, x - float(heads.sum())))
    if by != "token":
        rows = [(name, layer, head, -1, x) for name, layer, head, _, x in rows]
    rows.append((BIAS, -1, -1, -1, float(bias)))
    names, *where, amounts = zip(*rows, strict=True)
    layer, head, position = (torch.tensor(column) for column in where)
    return DirectAttribution(
        by, strings_of(model, ids), value, names, layer, head, position, torch.tensor(amounts, dtype=torch.float64)
    )


@torch.no_grad()
def _by_head(layer: LayerGradient, by: str) -> Float[Tensor, "pos head"]:
    """What each head adds to the number, or each of its writes; one row where it is the former."""
    fixed = layer.at_fixed_scale
    return (fixed.of_output() if by == "head" else fixed.price(fixed.write)[0]).cpu().double()


def _check_sum(value: float, parts: Float[Tensor, " n"], tolerance: float) -> None:
    """Raise ValueError unless the parts sum to the number."""
    total = float(parts.sum())
    if abs(total - value) > tolerance * max(1.0, float(parts.abs().sum())):
        raise ValueError(
            f"the parts sum to {total:.5g}, and the number is {value:.5g}: the model does something to its residual "
            f"stream or logits that is not a sum (a softcap, or an edit of the stream that is attached), so it can't "
            f"be attributed directly"
        )
