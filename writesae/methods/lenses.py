"""The logit lens: what a model would say next if it stopped at an earlier layer.

The residual stream after a layer goes straight to the model's own last norm and head (nostalgebraist 2020; on Mamba
Paulo et al. 2404.05971). The same is done with what a mixer or an MLP adds, and with what each recurrent head adds:
what it reads, through the layer's norm and gate, times its part of ``W_O``. A `TunedLens` translates the stream first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.hooks import HookPoint
from writesae.hooks.names import name_of
from writesae.hooks.quantities import RESIDUAL
from writesae.hooks.scope import LOCK, Owner, owning
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.cells import Cells
from writesae.methods.lensed import LogitLens, Place
from writesae.model import HookedRecurrentModel, LateLogits, Text, Unembedding, late_logits, unembedding

LOGITS = 2**23  # numbers: logits made at once
HEAD_OUT = "head_out"


@runtime_checkable
class Lens(Protocol):
    """What may translate the stream before it is unembedded. `TunedLens` is one."""

    def check_fits(self, model: Any) -> None:
        """Raise ValueError unless it was made for this model."""
        ...

    def translate(self, x: Float[Tensor, "n ..."], what: str, layer: int) -> Float[Tensor, "n ..."]:
        """The stream at a point, as it would be after the last layer."""
        ...


@named_kinds
def logit_lens(
    model: HookedRecurrentModel,
    text: Text,
    at: str | Sequence[str] = "resid_post",
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    target: str | int | Int[Tensor, "batch pos"] | None = None,
    k: int = 5,
    lens: Lens | None = None,
    progress: Progress | None = None,
) -> LogitLens:
    """What each layer would predict: top tokens, a target's probability, entropy, distance to what the model predicts.

    >>> found = ws.logit_lens(model, "The state of the Union")
    >>> found.plot()                                     # layers down, tokens across, the top token in each cell
    >>> ws.logit_lens(model, text, "head_out", layers=[2], target=" Paris").probability   # [head, token]

    Only a few tokens' logits exist at any time, whatever the vocabulary and the number of layers.

    Args:
        model: the model. Hooks and interventions that are attached act in the pass.
        text: a text, several, or token ids, as for ``model(x)``.
        at: where to look: ``"resid_pre"``, ``"resid_post"``: the stream; ``"mixer_out"``, ``"mlp_out"``: what a part of
            the layer adds, by itself; ``"head_out"``: what each recurrent head adds, by itself. Or several of these.
        layers: which; None for all that have such a point.
        positions: of the tokens to look at, in every sequence; negative ones count from its end. None for all.
        target: a token whose probability and rank are wanted, as text or id, or ids ``[batch, pos]``, one for each
            token; None: at each token the one that the model itself finds most likely.
        k: how many of the most likely tokens are kept.
        lens: a `TunedLens`, which translates the stream first; None for the plain logit lens.
        progress: called with the number of tokens done.

    Raises:
        ValueError: no layer has such a point; the stream has lanes and the point has none; a lens for another model.
        IndexError: no such layer, position or token.
    """
    asked = [at] if isinstance(at, str) else list(at)
    places = _places(model, asked, layers)
    if not 1 <= k <= model.n_vocab:
        raise ValueError(f"k={k}: give 1 to {model.n_vocab}, the number of tokens there are")
    if lens is not None:
        lens.check_fits(model)
    ids, mask = model.to_tokens(text)
    cells = Cells.of(ids, mask, positions)
    wanted = None if target is None else _targets(model, target, ids, cells)
    with torch.no_grad(), unembedding(model) as unembed, late_logits(model) as end:
        kept = read_points(model, ids, mask, places, cells)
    parts = []
    for some in torch.arange(len(cells)).split(max(1, LOGITS // model.n_vocab)):
        parts.append(_measure(model, unembed, end, kept, places, cells, some, wanted, k, lens))
        if progress is not None:
            progress(int(some[-1]) + 1)
    top, top_p, numbers, goal = (torch.cat([part[i] for part in parts], -1 if i == 3 else 1).cpu() for i in range(4))
    words = {i: str(i) if model.tokenizer is None else str(model.to_string(i)) for i in _distinct(top, goal, ids)}
    return LogitLens(
        places=tuple(places),
        sequence=cells.rows,
        position=cells.positions,
        token=cells.of_pass(ids).cpu(),
        target=goal,
        top=top,
        top_probability=top_p,
        probability=numbers[..., 0],
        rank=numbers[..., 1].long(),
        kl=numbers[..., 2],
        entropy=numbers[..., 3],
        words=words,
        tuned=lens is not None,
    )


@torch.no_grad()
def _measure(
    model: HookedRecurrentModel,
    unembed: Unembedding,
    end: LateLogits,
    kept: Mapping[tuple[str, int], Tensor],
    places: Sequence[Place],
    cells: Cells,
    some: Int[Tensor, " n"],
    wanted: Int[Tensor, " cell"] | None,
    k: int,
    lens: Lens | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some cells: top tokens and their probabilities ``[place, n, k]``, four numbers ``[place, n, 4]``, targets."""
    final = end.at(cells.rows[some], cells.columns[some]).float().log_softmax(-1)
    goal = final.argmax(-1) if wanted is None else wanted[some].to(final.device)
    top, top_p, numbers = [], [], []
    projections: dict[int, Tensor] = {}
    for place in places:
        x = kept[place.what, place.layer][some]
        if place.head is not None:
            if place.layer not in projections:
                projections = {place.layer: model.W_O(place.layer)}
            x = x[:, place.head] @ projections[place.layer][place.head].to(x)
        if lens is not None:
            x = lens.translate(x, place.what, place.layer)
        found = unembed(x).to(final.device).float().log_softmax(-1)
        best = found.topk(k, -1)
        own = found.gather(-1, goal[:, None])
        rank = (found > own).sum(-1)
        top.append(best.indices)
        top_p.append(best.values.exp())
        numbers.append(torch.stack([own[:, 0].exp(), rank.float(), kl(final, found), entropy(found)], -1))
    return torch.stack(top), torch.stack(top_p), torch.stack(numbers), goal


def kl(one: Float[Tensor, "n vocab"], other: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """``KL(one || other)`` of log-probabilities, nats."""
    return (one.exp() * (one - other)).sum(-1).clamp_min(0)


def entropy(log_p: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Entropy of log-probabilities, nats."""
    return -(log_p.exp() * log_p).sum(-1)


def read_points(
    model: HookedRecurrentModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    places: Sequence[Place],
    cells: Cells,
) -> dict[tuple[str, int], Tensor]:
    """What some points of the stream have at some tokens, ``[cell, ...]``; of ``head_out`` what the projection takes,
    ``[cell, head, d_value]``."""
    kept: dict[tuple[str, int], Tensor] = {}
    points = dict.fromkeys((place.what, place.layer) for place in places)

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept[hook.quantity, hook.layer] = cells.of_pass(x)

    with owning(everywhere=False) as call, ExitStack() as stack:
        for what, layer in points:
            if what == HEAD_OUT:
                stack.enter_context(_of_heads(model, layer, ids.shape, cells, kept, call))
        hooks = [(name_of(what, layer), keep) for what, layer in points if what != HEAD_OUT]
        model.run_with_hooks(ids, hooks, attention_mask=mask)
    for what, layer in points:
        if (what, layer) not in kept:
            raise RuntimeError(f"the model ran and {what} of layer {layer} was never reached: another tool computes it")
    return kept


def _of_heads(
    model: HookedRecurrentModel,
    layer: int,
    shape: Sequence[int],
    cells: Cells,
    kept: dict[tuple[str, int], Tensor],
    call: Owner,
) -> Any:
    """While the handle is open: keep what the output projection of a layer is given."""
    n_heads = model.site(layer).n_heads

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if call.here:
            x = args[0].reshape(*shape, n_heads, -1)
            kept[HEAD_OUT, layer] = cells.of_pass(x)

    with LOCK:
        return model.out_proj(layer).register_forward_pre_hook(before)


def _places(model: HookedRecurrentModel, asked: Sequence[str], layers: Sequence[int] | None) -> list[Place]:
    """Every place asked for, layer by layer."""
    allowed = (*RESIDUAL, HEAD_OUT)
    recurrent = {site.layer: site.n_heads for site in model.sites}
    names = set(model.hook_names)
    have: dict[str, list[int]] = {}
    for what in asked:
        if what not in allowed:
            raise ValueError(f"at={what!r}: the lens looks at {', '.join(allowed)}")
        there = (i in recurrent if what == HEAD_OUT else name_of(what, i) in names for i in range(model.n_layers))
        have[what] = [layer for layer, is_there in enumerate(there) if is_there]
    every = sorted({layer for found in have.values() for layer in found})
    for layer in every if layers is None else layers:
        if layer not in every:
            raise IndexError(f"layer {layer!r} has no {' or '.join(asked)}; layers that do: {every}")
    chosen = every if layers is None else sorted(set(layers))
    if not chosen:
        raise ValueError(f"no layer of this model has {' or '.join(asked)}")
    order = [what for what in ("resid_pre", HEAD_OUT, *RESIDUAL[1:]) if what in have]
    return [place for layer in chosen for what in order if layer in have[what] for place in _of(what, layer, recurrent)]


def _of(what: str, layer: int, recurrent: Mapping[int, int]) -> Iterator[Place]:
    heads = range(recurrent[layer]) if what == HEAD_OUT else [None]
    return (Place(what, layer, head) for head in heads)


def _targets(
    model: HookedRecurrentModel, target: str | int | Tensor, ids: Int[Tensor, "batch pos"], cells: Cells
) -> Int[Tensor, " cell"]:
    if isinstance(target, Tensor):
        found, _ = model.to_tokens(target)
        if found.shape != ids.shape:
            raise ValueError(f"target {list(found.shape)}: give one token for each of the text, {list(ids.shape)}")
        return cells.of_pass(found)
    return torch.full((len(cells),), model.to_single_token(target))


def _distinct(*ids: Tensor) -> list[int]:
    return sorted({i for x in ids for i in x.unique().tolist()})
