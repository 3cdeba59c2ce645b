"""Activation patching: which part of one run, put into another, brings its answer with it.

Two texts of equal length differ in what they say (a name), and a number tells their answers apart (the logit of one
name less that of the other). One part after the other of the *corrupted* run is replaced by what the *clean* run has
there: causal tracing (Meng et al. 2202.05262), on recurrent models Sharma et al. (2404.03646); TransformerLens has it
as `patching`. Beside it stands its estimate to first order, from one backward pass: attribution patching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.futures.parts import by_token, layers_below, map_tensors
from writesae.gradients import gradient
from writesae.gradients.backward import frozen
from writesae.hooks import ActivationCache, HookPoint
from writesae.hooks.names import inputs, name_of
from writesae.hooks.quantities import RESIDUAL
from writesae.hooks.residual import giving
from writesae.hooks.scope import owning
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.patched import Patching
from writesae.methods.questions import Metric, answer, checked_metric, layers_with, one_text, strings_of
from writesae.methods.replayed_writes import replay_writes
from writesae.model import HookedRecurrentModel, Text, late_logits
from writesae.recurrence import Write

STATES = 16  # positions whose states are compared at once


@named_kinds
def patching(
    model: HookedRecurrentModel,
    clean: Text,
    corrupted: Text,
    metric: Metric | str,
    what: str = "write",
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[tuple[int, int]] | None = None,
    estimate: bool = True,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Patching:
    """Put each part of a clean run into a corrupted one, and see how much of its answer comes with it.

    >>> found = ws.patching(model, "... said Ahab", "... said Peleg", ws.Logit(a, minus=b), "write")
    >>> found.top(3)                                   # (layer, head, position, how much it restores)

    Writes are patched by replay: everything before the token, and the layers below, are run once for all; quantities at
    other points by full passes, in batches, without the layers below.

    Args:
        model: the model.
        clean, corrupted: one text each, or token ids ``[pos]``.
        metric: the number: a `Logit`, or a function of the logits after the last token, ``[batch, 1, vocab]``.
        what: ``"write"``, ``"state"`` (after the token), or another hook point of a recurrence (``"k"``, ``"v"``,
            ``"log_decay"``, ...): one head at a time; or of the residual stream (``"resid_pre"``, ``"mixer_out"``,
            ``"mlp_out"``, ``"resid_post"``).
        layers: which; None for all that have such a point.
        positions: pairs of a position of the clean text and one of the corrupted text that belongs to it, for texts
            that do not align token by token; None: each to its own.
        estimate: also to first order, from one backward pass through the corrupted run.
        batch_size: rows run at once.
        progress: called with the number of parts done.

    Raises:
        ValueError: the texts have not the same length and no positions are given; several texts; the two answers are
            the same, so there is nothing to restore; no layer has such a point.
        IndexError: no such layer or position.
    """
    metric = checked_metric(metric, model)
    ids, source_ids = (one_text(model, text, name) for text, name in ((corrupted, "corrupted"), (clean, "clean")))
    pairs = _aligned(source_ids.shape[1], ids.shape[1], positions, ids.device)
    chosen = layers_with(model, what, layers)
    with owning(everywhere=False), torch.no_grad():
        source, before = answer(model, source_ids, metric, [x for layer in chosen for x in _names(model, what, layer)])
        _, after = answer(model, ids, metric, [])
        if before == after:
            raise ValueError(
                f"the number is {before:.4g} after both texts, so nothing can be restored: choose a metric that tells "
                f"their answers apart, such as Logit(answer, minus=other_answer)"
            )
        n_heads = 1 if what in RESIDUAL else max(model.site(layer).n_heads for layer in chosen)
        grid, done = torch.full((len(chosen), n_heads, ids.shape[1]), after), 0
        parts = _writes if what == "write" else _points
        for i, layer in enumerate(chosen):
            for head, at, value in parts(model, ids, source, what, layer, pairs, metric, batch_size):
                grid[i, head, at] = value
                done += value.numel()
                if progress is not None:
                    progress(done)
    guess = None
    if estimate:
        guess = torch.full_like(grid, after)
        for i, found in enumerate(_first_order(model, ids, source, chosen, pairs, metric, what)):
            guess[i, : len(found), pairs[:, 1].cpu()] += found.detach().float()
    return Patching(
        what=what, layers=tuple(chosen), tokens=strings_of(model, ids), clean=before, corrupted=after, grid=grid,
        estimate=guess,
    )  # fmt: skip


def _writes(
    model: HookedRecurrentModel,
    ids: Tensor,
    source: ActivationCache,
    _what: str,
    layer: int,
    pairs: Int[Tensor, "n 2"],
    metric: Metric,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Heads, positions and the number, of every write of a layer."""
    there = source.write(layer)[0:1, pairs[:, 0]]
    return replay_writes(model, ids, layer, pairs[:, 1], lambda own: there - own, metric, batch_size)


def _points(
    model: HookedRecurrentModel,
    ids: Tensor,
    source: ActivationCache,
    what: str,
    layer: int,
    pairs: Int[Tensor, "n 2"],
    metric: Metric,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Heads, positions and the number, of everything that one hook point of a layer holds."""
    name, n_heads = name_of(what, layer), 1 if what in RESIDUAL else model.site(layer).n_heads
    below = _below(model, ids, layer)
    cells = torch.cartesian_prod(torch.arange(n_heads), torch.arange(len(pairs))).to(ids.device).view(-1, 2)
    for part in cells.split(batch_size):
        head, (start, at) = part[:, 0], pairs[part[:, 1]].T
        if what == "state":
            distinct, where = start.unique(return_inverse=True)
            found = source.state(layer, distinct.tolist())[0, where, head]
        else:
            found = source[name][0, start] if what in RESIDUAL else source[name][0, start, head]

        def put(x: Tensor, hook: HookPoint, head: Tensor = head, at: Tensor = at, found: Tensor = found) -> Tensor:
            x = x.clone()
            if what == "state":
                assert hook.positions is not None
                these = (at == hook.positions[0]).nonzero()[:, 0]
                x[torch.arange(len(these), device=x.device), 0, head[these]] = found[these].to(x)
            elif what in RESIDUAL:
                x[torch.arange(len(at), device=x.device), at] = found.to(x)
            else:
                x[torch.arange(len(at), device=x.device), at, head] = found.to(x)
            return x

        asked = at[:, None] if what == "state" else None
        skip = nullcontext() if below is None else giving(*below(part))
        with late_logits(model) as end, skip, model.hooks([(name, put)], state_positions=asked):
            model(ids.expand(len(part), -1))
        value = metric(end.of_last())
        yield head.cpu(), at.cpu(), value.float().cpu()


def _below(
    model: HookedRecurrentModel, ids: Tensor, layer: int
) -> Callable[[Tensor], tuple[Sequence[nn.Module], Any]] | None:
    """The layers below and what they give, for some rows; None where leaving them out changes the model."""
    layers = layers_below(model, layer)
    if not layers:
        return None
    seen: list[Any] = []
    with owning(everywhere=False) as call, late_logits(model) as end:

        def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
            if call.here:
                seen.append(output)

        with layers[-1].register_forward_hook(keep):
            model(ids)
    if len(seen) != 1 or not by_token(seen[0], ids.shape):
        return None
    with giving(layers, seen[0]), late_logits(model) as again:
        model(ids)
    difference = end.of_last() - again.of_last()
    if not bool((difference.abs() < 1e-3).all()):
        return None
    return lambda rows: (layers, map_tensors(lambda x: x.expand(len(rows), *x.shape[1:]), seen[0]))


# --- to first order ---------------------------------------------------------------------------------------------------


def _first_order(
    model: HookedRecurrentModel,
    ids: Tensor,
    source: ActivationCache,
    layers: Sequence[int],
    pairs: Int[Tensor, "n 2"],
    metric: Metric,
    what: str,
) -> list[Float[Tensor, "head n"]]:
    """What each part would change, from one backward pass: its difference times the number's gradient."""
    if what in ("write", "state"):
        found = gradient(model, ids, metric, layers, at=-1)
        made = []
        for layer in layers:
            if what == "write":
                own = found[layer].write
                change = source.write(layer)[0:1, pairs[:, 0]] - own[0:1, pairs[:, 1]]
                key, value = (x.new_zeros(1, ids.shape[1], *x.shape[2:]) for x in (change.key, change.value))
                key[:, pairs[:, 1]], value[:, pairs[:, 1]] = change.key, change.value
                made.append(found[layer].price(Write(key, value, change.rank))[0, pairs[:, 1]].T.cpu())
                continue
            parts = []
            for some in pairs.split(STATES):
                here, there = source.state(layer, some[:, 0].tolist()), found.cache.state(layer, some[:, 1].tolist())
                slope = found[layer].at(some[:, 1].tolist())
                parts.append(((here - there) * slope).sum((0, -1, -2)))
            made.append(torch.cat(parts).T.cpu())
        return made
    probes: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}

    def probe(x: Tensor, hook: HookPoint) -> Tensor:
        kept[hook.layer], probes[hook.layer] = x.detach(), torch.zeros_like(x).requires_grad_()
        return x + probes[hook.layer]

    with torch.enable_grad(), frozen(model.hf_model), late_logits(model) as end:
        with model.hooks([(name_of(what, layer), probe) for layer in layers]):
            model(ids)
        value = metric(end.of_last()).sum()
        slopes = torch.autograd.grad(value, list(probes.values()), allow_unused=True)
    made = []
    for (layer, zeros), slope in zip(probes.items(), slopes, strict=True):
        slope = torch.zeros_like(zeros) if slope is None else slope
        change = source[what, layer][0, pairs[:, 0]].to(kept[layer]) - kept[layer][0, pairs[:, 1]]
        x = (change * slope[0, pairs[:, 1]]).float()
        heads = x.sum(-1)[:, None] if what in RESIDUAL else x.flatten(2).sum(-1) if x.ndim > 2 else x
        made.append(heads.T.cpu())
    return made


# --- what was asked ---------------------------------------------------------------------------------------------------


def _aligned(
    n_clean: int, n_corrupted: int, positions: Sequence[tuple[int, int]] | None, device: torch.device
) -> Int[Tensor, "n 2"]:
    """Pairs of positions, of the clean and the corrupted text."""
    if positions is None:
        if n_clean != n_corrupted:
            raise ValueError(
                f"the clean text has {n_clean} tokens and the corrupted one {n_corrupted}: choose words of equal "
                f"length, or say which position belongs to which, positions=[(clean, corrupted), ...]"
            )
        positions = [(t, t) for t in range(n_clean)]
    pairs = torch.tensor(list(positions), device=device).reshape(-1, 2)
    for name, column, n in (("clean", pairs[:, 0], n_clean), ("corrupted", pairs[:, 1], n_corrupted)):
        bad = column[(column < 0) | (column >= n)]
        if len(bad) or not len(column):
            got = int(bad[0]) if len(bad) else "none"
            raise IndexError(f"position {got} of the {name} text: allowed are 0 to {n - 1}")
    if len(pairs[:, 1].unique()) < len(pairs):
        raise ValueError("positions= names a position of the corrupted text twice: give each once")
    return pairs


def _names(model: HookedRecurrentModel, what: str, layer: int) -> list[str]:
    """What has to be cached of a layer."""
    return inputs(model.family(layer).rule, layer) if what in ("write", "state") else [name_of(what, layer)]
