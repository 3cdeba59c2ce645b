"""The quantities that hooks show are those of the recurrence, and edits are what brute force makes of them.

Both are looked at where they happen, in each layer by itself: what a head reads is compared with `replay`, to which the
quantities of the same pass are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from writesae.checking.replay import NONE, Change, exact, replay
from writesae.checking.result import Row
from writesae.checking.subject import MODES, PREFILL, Subject, largest, of_the_largest
from writesae.hooks import ActivationCache, Add, Delete, HookPoint, Intervention, Replace, name_of
from writesae.hooks.sites import Site
from writesae.recurrence import Write
from writesae.recurrence.kernels import chunked

SHARE = "of max"


def check_recurrences(subject: Subject) -> Iterator[Row]:
    """Token by token, the cached q, k, v and gates give the cached o and the states, over several calls with a cache:
    a piece from nothing, one that goes on, and a single token, which decoding kernels run."""
    caches, n = [], subject.n_pos
    for ids, arguments in subject.pieces([n // 2, n - n // 2 - 1, 1]):
        _, cache = subject.model.run_with_cache(ids, _inputs_and_outputs(subject), **arguments, **subject.of_last)
        caches.append(cache)
    for layer in subject.layers:
        state, shown, right, states = None, [], [], []
        for cache in caches:
            if state is not None:  # what the model itself had kept, as the kernel is given it
                kept = cache.dynamics(layer).initial
                states += [1.0] if kept is None else _errors(kept, state)
            rec, write = exact(subject.model, layer, partial(_value, cache, layer))
            o, state = replay(rec, write, NONE, state)
            states += _errors(cache.state(layer, [-1])[:, 0], state)
            shown.append(cache["o", layer].cpu().double())
            right.append(o)
        reads = of_the_largest(torch.cat(shown, 1) - torch.cat(right, 1), torch.cat(right, 1))
        where, allowed = f"layer {layer}", subject.kernel_tolerance
        yield Row("inputs give o", where, _worst(reads), allowed, SHARE)
        yield Row("inputs give states", where, _worst(states), allowed, SHARE)


# Edits ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """An edit said twice: as it is attached to layers, and as a change of their states."""

    name: str
    attach: Callable[[Subject], AbstractContextManager[Any]]
    change: Callable[[Subject, Site], Change]


def kinds(subject: Subject) -> list[Kind]:
    """One of each kind of edit, at a few tokens or many, at all heads."""
    n = subject.n_pos
    few, many = [1, n // 2, n - KEEP_LAST], range(0, n, 5)

    def intervene(make: Callable[[Site], Intervention], positions: Any, read: Any = "same") -> Any:
        return lambda s: s.model.intervene(
            [make(s.model.site(layer)) for layer in s.layers], positions=positions, read=read
        )

    def relative(scale: float, write: Write) -> Callable[[int, Tensor, Tensor], Tensor]:
        dense = write.dense().double()
        dense = dense if dense.ndim == 3 else dense[None]
        unit = dense / dense.norm(dim=(-1, -2), keepdim=True)
        return lambda i, own, state: scale * own.norm(dim=(-1, -2), keepdim=True) * unit[i % len(unit)]

    def add(site: Site) -> Add:
        return Add(site.layer, write=random_write(subject, site, rank=2), scale=2, relative=True)

    def added(s: Subject, site: Site) -> Change:
        extra = relative(2, random_write(s, site, rank=2))
        return Change(many, lambda i, own, state: state + extra(i, own, state), "next")

    def replacement(site: Site) -> Replace:
        return Replace(site.layer, write=random_write(subject, site, len(few)), scale=3, relative=True)

    def replaced(s: Subject, site: Site) -> Change:
        extra = relative(3, random_write(s, site, len(few)))
        return Change(few, lambda i, own, state: state - own + extra(i, own, state))

    def fade(state: Tensor, _hook: HookPoint) -> Tensor:
        return -0.5 * state

    def hook_states(s: Subject) -> Any:
        return s.model.hooks([(name_of("state", layer), fade) for layer in s.layers], state_positions=few)

    delete = Change(range(1, n, 3), lambda _i, own, state: state - own)
    fading = Change(few, lambda _i, _own, state: -0.5 * state)
    return [
        Kind("delete", intervene(lambda site: Delete(site.layer), slice(1, None, 3)), lambda _s, _site: delete),
        Kind("replace", intervene(replacement, few), replaced),
        Kind("add, next read", intervene(add, slice(0, None, 5), "next"), added),
        Kind("hook_state", hook_states, lambda _s, _site: fading),
    ]


KEEP_LAST = 3  # the last edit is so many tokens before the end: within those whose logits are compared


def random_write(subject: Subject, site: Site, *lead: int, rank: int = 1) -> Write:
    """A write for a layer, always the same."""
    generator = torch.Generator().manual_seed(subject.seed + site.layer)
    ranks = () if rank == 1 else (rank,)
    draw = lambda d: torch.randn(*lead, *ranks, d, generator=generator)  # noqa: E731
    return Write(draw(site.d_key), draw(site.d_value), rank)


def check_edits(subject: Subject) -> Iterator[Row]:
    """Each kind of edit, in all checked layers at once, against the same change of the state in `replay`: what each
    layer reads, given what reached it; and the logits, against a pass in which these layers read what `replay` says."""
    model, plain = subject.model, subject.unwrapped()
    for kind in kinds(subject):
        with kind.attach(subject):
            logits, cache = model.run_with_cache(subject.ids, _inputs_and_outputs(subject), **subject.of_last)
        reads = {}
        for layer in subject.layers:
            rec, write = exact(model, layer, partial(_value, cache, layer))
            right, _ = replay(rec, write, kind.change(subject, model.site(layer)))
            errors = of_the_largest(cache["o", layer].cpu().double() - right, right)
            moves = max(of_the_largest(right - chunked(rec, write)[0], right))
            allowed = subject.kernel_tolerance
            yield Row(f"{kind.name}: o", f"layer {layer}", _worst(errors), allowed, SHARE, moves)
            reads[layer] = right
        with model.hooks([(name_of("o", layer), _instead(right)) for layer, right in reads.items()]):
            right = subject.run()
        found = logits[0, -len(right) :].float()
        yield Row(
            f"{kind.name}: logits", "together", largest(found - right), subject.tolerance, moves=largest(right - plain)
        )


def _instead(right: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    return lambda o, _hook: right.to(o)


def check_ways_of_feeding(subject: Subject) -> Iterator[Row]:
    """Edits of several kinds at once, and the sequence in pieces, token by token and padded, against prefill."""
    edits = kinds(subject)

    def run(mode: str) -> Tensor:
        with ExitStack() as stack:
            for kind in edits[1:]:
                stack.enter_context(kind.attach(subject))
            return subject.run(mode)

    right = run(PREFILL)
    for mode in MODES[1:]:
        moves = largest(right - subject.unwrapped())
        yield Row("edited, against prefill", mode, largest(run(mode) - right), subject.tolerance, moves=moves)


def _inputs_and_outputs(subject: Subject) -> list[str]:
    model = subject.model
    return [name_of(q, layer) for layer in subject.layers for q in (*model.family(layer).rule.inputs, "o")]


def _value(cache: ActivationCache, layer: int, quantity: str) -> Tensor:
    return cache[quantity, layer]


def _errors(state: Tensor, right: Tensor) -> list[float]:
    """Of states, for each head."""
    return of_the_largest((state.cpu().double() - right)[:, None], right[:, None])


def _worst(errors: list[float]) -> float:
    """The largest, NaN if there is one (`max` may pass over it)."""
    return float(torch.tensor(errors).max())
