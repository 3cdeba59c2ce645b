"""Who reads whom in one head: how much of each token's write is in each read, and what it adds to a logit by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients import Logit
from writesae.gradients.backward import differentiate, frozen
from writesae.gradients.questions import in_ids
from writesae.hooks import HookPoint
from writesae.hooks.names import name_of
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.methods.direct_paths import direct_paths, reading
from writesae.methods.questions import one_text, strings_of
from writesae.model import HookedRecurrentModel, Text
from writesae.recurrence.kernels import gradient_of_read
from writesae.results.across import name_tokens, wide
from writesae.results.result import Figure, Number, Result, figure


@dataclass(frozen=True, eq=False)
class Pattern(Result):
    """What the reads of one head have from each token that wrote.

    Attributes:
        head: which head.
        tokens: of the text, as strings.
        of: what an entry is, in words.
        grid: for the read at each token, the entry of each token that wrote; 0 for later ones.
    """

    KEYS, VALUE = ("query_token", "key_token"), "entry"

    head: Head
    tokens: tuple[str, ...]
    of: str
    grid: Float[Tensor, "query key"]

    @property
    def title(self) -> str:
        return f"Who reads whom, {self.head.words}: {self.of}"

    @property
    def about(self) -> str:
        return (
            f"Rows are tokens that read, columns tokens that wrote, both of one text of {len(self.tokens)} tokens. An "
            f"entry is {self.of}, with all that the memory decayed and erased of it in between."
        )

    def top(self, n: int = 10, at: int | None = None) -> list[tuple[int, int, float]]:
        """The ``n`` largest entries in size, ``(who reads, who wrote, entry)``; ``at``: of this read alone."""
        rows = range(len(self.tokens)) if at is None else [range(len(self.tokens))[at]]
        some = self.grid[list(rows)]
        found = [divmod(i, len(self.tokens)) for i in some.abs().flatten().topk(min(n, some.numel())).indices.tolist()]
        return [(rows[t], j, float(some[t, j])) for t, j in found]

    def numbers(self) -> Sequence[Number]:
        return [
            Number(f"{self.tokens[t]!r} at {t} of {self.tokens[j]!r} at {j}", x, id=f"read/{t}/{j}")
            for t, j, x in self.top(12)
        ]

    def columns(self) -> dict[str, Any]:
        query, key = np.tril_indices(len(self.tokens))
        return {
            "query": query,
            "key": key,
            "query_token": [self.tokens[t] for t in query],
            "key_token": [self.tokens[t] for t in key],
            "entry": self.grid.numpy()[query, key],
        }

    def plot(self) -> Figure:
        """The grid: who reads down, who wrote across."""
        size = wide(len(self.tokens), 0.19, least=4.0)
        made, (axis,) = figure(1, size + 0.8, size)
        limit = float(self.grid.abs().max()) or 1.0
        image = axis.imshow(self.grid.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(xlabel="who wrote", ylabel="who reads")
        for down in (False, True):
            name_tokens(axis, self.tokens, size, down=down)
        made.colorbar(image, ax=axis, label=self.of)
        return made


@named_kinds
def pattern(
    model: HookedRecurrentModel,
    text: Text,
    layer: int,
    head: int,
    *,
    of: Logit | Float[Tensor, " d_model"] | Literal["stream"] | None = None,
    **kwargs: Any,
) -> Pattern:
    """Who reads whom in one head, with a picture (`ActivationCache.pattern`); or what they get from it.

    >>> ws.pattern(model, "The state of the Union", 2, 1).plot()
    >>> ws.pattern(model, text, 2, 1, of=ws.Logit(answer)).top(3, at=-1)     # (who reads, who wrote, how much)

    What a head reads goes through the norm behind it, gates and the output projection into the residual stream, and
    from there to the logits. With the scales of the norms as they were, all of this is linear, so each entry of the
    pattern adds something of its own: ``pattern[t, j] * (written_j . g_t)``, where ``g_t`` is the gradient of the
    number at ``t`` with respect to the read along the direct path. The row of a token sums to what the head adds there.

    Args:
        model: the model; hooks and edits that are attached act in the pass.
        text: one text, or token ids ``[pos]``.
        layer, head: which head.
        of: None: entries are how much of each write is in each read. A `Logit`: what that adds to the logit (or
            difference) after the token that reads, by the direct path; its ``at`` has no say, since every read is
            asked. ``"stream"``: the length of the vector that it adds to the residual stream, with the sign of the
            share; this takes ``d_value`` backward passes through the end of the layer. A vector: what it adds along
            that direction, as a scalar product.
        **kwargs: arguments of the model.

    Raises:
        ValueError: several texts, writes of higher rank, a vector of another size than the stream, or a model whose
            logits are not linear in its last layer's output (a softcap).
        IndexError: no such layer or head.
    """
    model.site(layer).check_head(head)
    ids = one_text(model, text)
    if of is None:
        names = [name_of(quantity, layer) for quantity in model.family(layer).rule.inputs]
        with torch.no_grad():
            _, cache = model.run_with_cache(ids, names=names, **kwargs)
            grid = _of_one_value(cache.pattern(layer, head)[0], layer)
        return _found(model, ids, layer, head, "share of the write in the read", grid)
    if isinstance(of, str):
        if of != "stream":
            raise ValueError(f"of={of!r}: give a Logit, a vector, 'stream', or None")
        grid = _lengths(model, ids, layer, head, kwargs)
        return _found(model, ids, layer, head, "length of what the write adds", grid)
    logit = in_ids(of, model) if isinstance(of, Logit) else None
    with direct_paths(model) as paths:

        def number(_logits: Float[Tensor, "batch 1 vocab"]) -> Float[Tensor, " batch"]:
            if logit is not None:  # of every token, by the vector that reads it off: no logits are made for it
                return (paths.end.output.last_hidden_state @ reading(paths.end, logit)).sum(1)
            assert not isinstance(of, Logit)
            (part,) = paths.of_mixer(model, layer)
            if of.shape != part.value.shape[-1:]:
                raise ValueError(
                    f"of= a vector {list(of.shape)}: the residual stream has {part.value.shape[-1]} numbers"
                )
            return (part.given @ of.to(part.given)).sum(1)

        found, _ = differentiate(model, ids, number, [layer], at=-1, **kwargs)
    with torch.no_grad():
        fixed = found[layer].at_fixed_scale
        grid = found.cache.pattern(layer, head)[0]
        slopes, values = gradient_of_read(fixed.recurrence, fixed.output), fixed.write
        slopes, values = (x.factors()[1][0, :, head].float() for x in (slopes, values))
        seen = torch.einsum("qrv,ksv->qksr", slopes, values)  # of each value and read
    what = "what the write adds to the logit" if isinstance(of, Logit) else "what the write adds along the direction"
    return _found(model, ids, layer, head, what, (grid.reshape(seen.shape) * seen).sum((2, 3)))


def _lengths(
    model: HookedRecurrentModel, ids: Int[Tensor, "1 pos"], layer: int, head: int, kwargs: dict[str, Any]
) -> Float[Tensor, "query key"]:
    """The length of what each write, through each read, adds to the residual stream.

    A head adds to the space that its rows of the output projection span. So its additions are known from ``d_value``
    directions, and a gradient for each, of all reads at once.
    """
    directions = torch.linalg.qr(model.W_O(layer)[head].mT.detach().float())[0].mT  # [d_value, d_model]
    pattern(model, ids, layer, head, of=directions[0], **kwargs)  # raises where the norm's scale can't be held
    reads: list[Tensor] = []

    def read(o: Tensor, hook: HookPoint) -> Tensor:
        reads.append(o.detach().requires_grad_())
        return reads[-1]

    names = [name_of(quantity, layer) for quantity in model.family(layer).rule.inputs]
    with torch.inference_mode(False), torch.enable_grad(), frozen(model.hf_model), direct_paths(model) as paths:
        with model.hooks([(name_of("o", layer), read)]):
            _, cache = model.run_with_cache(ids.clone(), names=names, stop_at_layer=layer + 1, **kwargs)
        shares = _of_one_value(cache.pattern(layer, head)[0].detach(), layer)
        (part,) = paths.of_mixer(model, layer)
        written = cache.write(layer).value[0, :, head].float()
        squares = torch.zeros(len(written), len(written), device=written.device)
        for u in directions:
            (slope,) = torch.autograd.grad((part.given.float() @ u).sum(), reads[0], retain_graph=True)
            squares += (slope[0, :, head].float() @ written.mT).square()
    return shares * squares.sqrt()


def _of_one_value(grid: Tensor, layer: int) -> Float[Tensor, "query key"]:
    if grid.ndim > 2:
        raise ValueError(
            f"a token of layer {layer} writes {grid.shape[2]} values, and their shares do not add up: give of= a Logit "
            f"or a vector of the stream, or take cache.pattern({layer}, head), which has all of them"
        )
    return grid


def _found(model: HookedRecurrentModel, ids: Tensor, layer: int, head: int, of: str, grid: Tensor) -> Pattern:
    return Pattern(Head(layer, head), strings_of(model, ids), of, grid.detach().float().cpu())
