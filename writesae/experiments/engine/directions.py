"""Directions that should promote a token (paper, section 4).

A write ``k v^T`` that a read ``q`` meets adds ``(k.q) v^T W_O`` to the residual stream, norm and gate left out, and
``(k.q) v^T W_O W_U[T]`` to the logit of ``T``. So of all values of length 1 the formula takes ``v* ~ W_O W_U[T]``. It
names a value only; the key is the one under which the model itself writes at that token, unless another is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.engine.targets import token_ids
from writesae.gradients import gradient, in_batches
from writesae.hooks import Add
from writesae.hooks.names import inputs, name_of
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write
from writesae.recurrence.matrices import top_pair

Key: TypeAlias = Literal["native", "signed", "read"] | Float[Tensor, " d_key"]


@dataclass(frozen=True)
class Places:
    """Where writes are wanted, one row per sequence and target, and what is there: all that a direction may depend on.

    Attributes:
        model, layer, head: where in the model.
        tokens: ids, padded on the left. mask: 0 at padding, None without any.
        positions: of the tokens written at, counted without padding.
        targets: the token that each row should promote.
        native: the native writes there, ``[batch, n]``.
        query: what reads the state there.
        scale: by how much the writes will be larger than the native ones, for directions that depend on it.
    """

    model: HookedRecurrentModel
    layer: int
    head: int
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    positions: Int[Tensor, "batch n"]
    targets: Int[Tensor, " batch"]
    native: Write
    query: Float[Tensor, "batch n d_key"]
    scale: float = 1.0


Direction: TypeAlias = Literal["formula", "gradient", "optimised", "random"] | Callable[[Places], Write]


def formula_direction(
    model: HookedRecurrentModel, layer: int, head: int, tokens: Int[Tensor, " n"]
) -> Float[Tensor, "n d_value"]:
    """The value of length 1 that should promote each token most, ``v* = W_O[head] W_U[:, T] / |...|`` (section 4).

    Raises:
        IndexError: no such layer, head or token.
    """
    return F.normalize(promotion(model, layer, head, tokens), dim=-1)


def promotion(
    model: HookedRecurrentModel, layer: int, head: int, tokens: Int[Tensor, " n"]
) -> Float[Tensor, "n d_value"]:
    """``W_O[head] W_U[:, T]``: by how much one unit read out of a head raises the logit of ``T``, norms left out."""
    model.site(layer).check_head(head)
    ids = token_ids(model, tokens).to(model.device)
    return model.W_U[:, ids].T.float() @ model.W_O(layer)[head].T.float()


def gradient_directions(places: Sequence[Places]) -> list[Write]:
    """The write of norm 1 at each place that raises the target's log-probability after the last token most, per head.

    To first order through the whole model (`writesae.gradients`): the first singular pair of the gradient with respect
    to the write, ``[batch, n]``. One backward pass for all places, and for all heads (``places`` are of one layer and
    the same tokens).
    """
    return _in_parts(places, lambda rows: [top_pair(M) for M in _log_p(places, rows)[1]])


def optimised_directions(places: Sequence[Places], steps: int = 6) -> list[Write]:
    """Writes of norm 1 at all places of a row together, in all heads together, improved step by step at their size.

    A gradient is exact for small edits, and ``places.scale`` times the native write is none. So begin with
    `gradient_directions`; take the gradient with those writes in place; go towards it by as much as the write itself,
    then by a half, a third, ... of that; keep the first singular pair; and again. Each row keeps the best writes that
    it saw. One backward pass a step.
    """

    def improved(rows: slice) -> list[Write]:
        writes = best = [top_pair(M) for M in _log_p(places, rows)[1]]
        highest = torch.full(writes[0].shape[:1], -torch.inf, device=writes[0].key.device)
        for step in range(1, steps + 2):
            log_p, slopes = _log_p(places, rows, writes)
            better = (log_p > highest)[:, None, None]
            best = [
                Write(torch.where(better, new.key, old.key), torch.where(better, new.value, old.value))
                for new, old in zip(writes, best, strict=True)
            ]
            highest = torch.maximum(highest, log_p)
            writes = [top_pair(w.dense() + _of_norm_1(M) / step) for w, M in zip(writes, slopes, strict=True)]
        return best

    return _in_parts(places, improved)


def _of_norm_1(M: Float[Tensor, "batch n d_key d_value"]) -> Float[Tensor, "batch n d_key d_value"]:
    return M / M.flatten(-2).norm(dim=-1).clamp_min(1e-30)[..., None, None]


def _log_p(
    places: Sequence[Places], rows: slice, writes: Sequence[Write] = ()
) -> tuple[Float[Tensor, " batch"], Iterator[Float[Tensor, "batch n d_key d_value"]]]:
    """The target's log-probability after the last token, with ``writes`` added if given; and its gradient at the places
    of each head, one after the other."""
    one = places[0]

    def of(logits: Float[Tensor, "batch 1 vocab"]) -> Float[Tensor, " batch"]:
        return logits[:, -1].float().log_softmax(-1).gather(-1, one.targets[rows, None])[:, 0]

    model, layer, mask = one.model, one.layer, one.mask
    n_pad = 0 if mask is None else (one.tokens.shape[1] - mask.sum(-1))[rows, None]
    mask, positions = None if mask is None else mask[rows], one.positions[rows]
    edits = [Add(layer, p.head, write=w, scale=p.scale, relative=True) for p, w in zip(places, writes, strict=False)]
    with model.intervene(edits, positions=positions) if edits else nullcontext():
        found = gradient(model, one.tokens[rows], of, [layer], at=-1, attention_mask=mask)
    columns = positions + n_pad
    wanted = columns.unique()  # sequences of unequal length have their places in different columns
    each = torch.arange(len(columns), device=columns.device)[:, None]
    where = (each, torch.searchsorted(wanted, columns))
    return found.value.detach(), (found[layer].at(wanted.tolist(), [p.head])[:, :, 0][where] for p in places)


def _in_parts(places: Sequence[Places], run: Callable[[slice], list[Write]]) -> list[Write]:
    """``run`` of all rows, as many at a time as the memory has room for."""
    parts = [writes for _, writes in in_batches(places[0].model, len(places[0].tokens), run)]
    return [
        Write(torch.cat([w.key for w in of_head]), torch.cat([w.value for w in of_head]), of_head[0].rank)
        for of_head in zip(*parts, strict=True)
    ]


def choose_writes(
    places: Sequence[Places],
    direction: Direction = "formula",
    key: Key = "native",
    generator: torch.Generator | None = None,
) -> list[Write]:
    """The write of norm 1 for every row and position, ``[batch, n]``, of each head.

    Args:
        places: where, and for which targets: one for each head that is written to, of the same tokens and positions.
        direction: ``"formula"``: v* of the row's target. ``"gradient"``: see `gradient_directions`.
            ``"optimised"``: see `optimised_directions`. ``"random"``: a random value, one per row. Or a function of
            the places of one head that returns a `Write` ``[batch, n]``, scaled to norm 1.
        key: of formula and random: ``"native"``, the native write's; ``"signed"``, the same, turned round where the
            token's own read would meet it with a minus; ``"read"``, the one which that read meets fully; or a vector.
        generator: for random values.
    """
    if direction == "gradient":
        return gradient_directions(places)
    if direction == "optimised":
        return optimised_directions(places)
    return [_write(of_head, direction, key, generator) for of_head in places]


def _write(
    places: Places,
    direction: Literal["formula", "random"] | Callable[[Places], Write],
    key: Key,
    generator: torch.Generator | None,
) -> Write:
    """`choose_writes` of one head."""
    lead, (d_key, d_value) = places.positions.shape, (places.native.d_key, places.native.d_value)
    if callable(direction):
        write = direction(places)
        if (write.shape, write.d_key, write.d_value) != (lead, d_key, d_value):
            raise ValueError(
                f"the direction's function returned a write {list(write.shape)} of {write.d_key} x {write.d_value}; "
                f"wanted is {list(lead)} of {d_key} x {d_value}"
            )
        return write * (1 / write.norm().clamp_min(1e-30))
    if direction == "formula":
        value = formula_direction(places.model, places.layer, places.head, places.targets)
    elif direction == "random":
        value = F.normalize(torch.randn(lead[0], d_value, generator=generator), dim=-1)
    else:
        raise ValueError(
            f"direction={direction!r}: allowed are 'formula', 'gradient', 'optimised', 'random' and a function of "
            f"places"
        )
    keys = places.native.factors()[0][..., 0, :]
    if isinstance(key, Tensor):
        if key.shape != (d_key,):
            raise ValueError(f"key is {list(key.shape)}; the keys of layer {places.layer} are [{d_key}]")
        keys = key.to(keys).expand_as(keys)
    elif key == "read":
        keys = places.query
    elif key == "signed":
        keys = torch.where((keys * places.query).sum(-1, keepdim=True) < 0, -keys, keys)
    elif key != "native":
        raise ValueError(f"key={key!r}: allowed are 'native', 'signed', 'read' and a vector of {d_key} numbers")
    return Write(F.normalize(keys, dim=-1), value.to(keys)[:, None].expand(*lead, d_value))


@torch.no_grad()
def at_positions(
    model: HookedRecurrentModel,
    layer: int,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    positions: Int[Tensor, "batch n"],
) -> tuple[Write, Float[Tensor, "batch n head d_key"], Float[Tensor, "batch vocab"]]:
    """Native writes ``[batch, n, head]`` and reads at some positions, and the logits after the last token."""
    model.family(layer).rule.check_reads_once("this experiment")
    lengths = torch.full((len(tokens),), tokens.shape[1]).to(tokens) if mask is None else mask.sum(-1)
    for row in ((positions < 0) | (positions >= lengths[:, None])).any(1).nonzero()[:1, 0].tolist():
        raise IndexError(
            f"positions {positions[row].tolist()} of sequence {row}, which has {int(lengths[row])} tokens "
            f"(positions 0 to {int(lengths[row]) - 1})"
        )
    query, few = name_of("q", layer), model.logits_of_last(1)
    names = [*inputs(model.family(layer).rule, layer), query]
    logits, cache = model.run_with_cache(tokens, names=names, attention_mask=mask, **few)
    columns = positions + (tokens.shape[1] - lengths)[:, None]
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    write = cache.write(layer)
    native = Write(write.key[rows, columns], write.value[rows, columns], write.rank)
    return native, cache[query][rows, columns], logits[:, -1].float()


def setting(choice: Direction | Key) -> str:
    """A direction or key in a word, for records."""
    if isinstance(choice, Tensor):
        return "given"
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
