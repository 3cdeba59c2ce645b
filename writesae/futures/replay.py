"""What follows a token if something else is written there: edited futures, many at once.

The plain way copies a cache for every firing and condition and feeds the tokens that follow. Here edited futures share
what they have in common, and all of it is exact but for rounding:

- windows are fed once in pieces, and futures begin at the last cut before their token, from rows of that cache;
- futures of many tokens and all conditions are rows of one batch: before the recurrence they are the same;
- layers below the edited one are not run again: they give what they gave natively;
- logits are made only where they are scored, a few firings at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae.futures.parts import by_token, layers_below, map_tensors, rows_of
from writesae.hooks import ActivationCache, Intervention, Replace, short_chunks
from writesae.hooks.names import inputs
from writesae.hooks.residual import giving
from writesae.hooks.scope import owning
from writesae.hooks.sites import Head
from writesae.model import HookedRecurrentModel, LateLogits, late_logits
from writesae.recurrence import Read, Write
from writesae.recurrence.write import of_rank, wide, widest

LOGITS = 2**24  # numbers: logits scored at once
STATES = 2**28  # bytes: states of the rows run at once
KL = 2**22  # numbers: logits compared at once, in float64
TOLERANCE = 1e-6  # nats: a future without an edit is at most so far from the native pass, in float32
# (from a cache, layers below skipped): tried in this order, until a future without an edit is as the native pass.
WAYS = ((True, True), (True, False), (False, True), (False, False))


@dataclass(frozen=True, eq=False)
class Native:
    """A pass over windows as the model is.

    Attributes:
        ids: tokens.
        end: what logits are made of.
        cache: what writes and states of the layers edited are made from.
        below: output of the layer below the first one edited (whatever that layer returns); None if it is run again.
    """

    ids: Int[Tensor, "window pos"]
    end: LateLogits
    cache: ActivationCache
    below: Any

    def first_window(self) -> Native:
        """The same of the first window alone; its logits are still those of all."""
        below = None if self.below is None else map_tensors(lambda x: x[:1], self.below)
        return Native(self.ids[:1], self.end, self.cache, below)

    def write(self, place: Head, window: Int[Tensor, " firing"], position: Int[Tensor, " firing"]) -> Write:
        """The native writes of a head at some tokens, ``[firing]``."""
        layer, head = place
        return self.cache.write(layer)[window, position, torch.full_like(position, head)]


@dataclass(frozen=True, eq=False)
class Futures:
    """How far edits move what follows.

    Attributes:
        kl: ``KL(edited || native)`` of the next-token distribution, nats, from the first token whose read sees the
            edit on.
        flips: whether the most likely next token is another one, at the first of these.
    """

    kl: Float[Tensor, "firing condition step"]
    flips: Bool[Tensor, "firing condition"]


class Replayer:
    """Replays futures of edits at some heads.

    Args:
        model: the model.
        places: layers and heads to edit, all at once.
        horizon: tokens to follow after the edited one; None: to the window's end, whose last token alone is scored.
        read: ``"same"``: the token's own read sees the edit. ``"next"``: those after it do (the cache-slot protocol),
            and its own prediction, which cannot move, is not scored.
        stride: tokens from cut to cut. Small: more pieces to feed; large: more tokens before the edit run again.
        rows: futures run at once, fewer where their states are large.
        beside: run each firing without an edit beside its edited futures, to compare with, and not the native pass:
            the same computation in other pieces rounds otherwise. In bfloat16 it always is.

    Attributes:
        way: which of `WAYS` holds for this model, None before the first replay.
    """

    def __init__(
        self,
        model: HookedRecurrentModel,
        places: Sequence[Head],
        *,
        horizon: int | None = 16,
        read: Read = "same",
        stride: int = 4,
        rows: int = 96,
        beside: bool = False,
    ):
        if read not in ("same", "next"):
            raise ValueError(f"read={read!r}: allowed are 'same' and 'next'")
        if horizon is not None and horizon < (read == "next"):
            least = "at least 1 with read='next', where the token's own read sees no edit" if horizon == 0 else ">= 0"
            raise ValueError(f"horizon={horizon}: it must be {least}")
        if stride < 3:  # a piece of one token takes another path through some models
            raise ValueError(f"stride={stride}: it must be at least 3")
        for layer, head in places:
            model.site(layer).check_head(head)
        self.model, self.places = model, [Head(*place) for place in places]
        self.horizon, self.stride = horizon, stride
        lowest = min(layer for layer, _ in places)
        states = [site.n_heads * site.d_key * site.d_value for site in model.sites if site.layer >= lowest]
        self.rows = max(1, min(rows, STATES // (4 * sum(states))))
        self.read: Read = read
        self.first = int(read == "next")
        self.below = layers_below(model, lowest)
        self.after = horizon or 0  # tokens that a position needs after it
        self.n_steps = 1 if horizon is None else horizon + 1 - (read == "next")
        self.way: tuple[bool, bool] | None = None
        self.exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
        self.beside = beside or not self.exact

    @torch.no_grad()
    def native(self, ids: Int[Tensor, "window pos"]) -> Native:
        """Run the windows as they are."""
        seen: list[Any] = []
        layers = sorted({layer for layer, _ in self.places})
        names = [name for layer in layers for name in inputs(self.model.family(layer).rule, layer)]
        with owning(everywhere=False) as call, short_chunks(), late_logits(self.model) as end:

            def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
                if call.here:  # and not in a pass of another thread
                    seen.append(output)

            with self.below[-1].register_forward_hook(keep) if self.below else nullcontext():
                _, cache = self.model.run_with_cache(ids, names=names)
        below = seen[0] if len(seen) == 1 and by_token(seen[0], ids.shape) else None
        return Native(ids, end, cache, below)

    @torch.no_grad()
    def futures(
        self,
        native: Native,
        window: Int[Tensor, " firing"],
        position: Int[Tensor, " firing"],
        writes: Mapping[Head, Write],
        tell: Callable[[int], object] = lambda n: None,
    ) -> Futures:
        """Put other writes in the place of the native ones, each firing and condition for itself.

        Writes are ``[firing, condition]``. A token has ``horizon`` tokens of its window after it, else ValueError.
        ``tell`` is called with the number of firings done since the last time.
        """
        shape = (len(position), next(iter(writes.values())).shape[1], self.n_steps)
        kl = torch.zeros(shape, dtype=widest(position.device), device=position.device)
        flips = torch.zeros(shape[:2], dtype=torch.bool, device=position.device)
        for firings, edited, reference in self.logits(native, window, position, writes):
            kl[firings] = kl_from(edited, reference)
            flips[firings] = edited[:, :, 0].argmax(-1) != reference[:, :, 0].argmax(-1)
            tell(len(firings))
        return Futures(kl, flips)

    @torch.no_grad()
    def logits(
        self,
        native: Native,
        window: Int[Tensor, " firing"],
        position: Int[Tensor, " firing"],
        writes: Mapping[Head, Write],
    ) -> Iterator[
        tuple[Int[Tensor, " some"], Float[Tensor, "some condition step vocab"], Float[Tensor, "some 1 step vocab"]]
    ]:
        """What `futures` compares, a few firings at a time: which, their logits at the tokens scored, and those of the
        model as it is. Arguments and errors are the same."""
        context = native.ids.shape[1]
        if len(position) and (int(position.min()) < 0 or int(position.max()) + self.after >= context):
            raise ValueError(
                f"positions {int(position.min())} to {int(position.max())} with a horizon of {self.horizon}: windows "
                f"of {context} tokens allow 0 to {context - 1 - self.after}"
            )
        if self.beside:
            writes = {
                place: stacked([*(w[:, c] for c in range(w.shape[1])), native.write(place, window, position)])
                for place, w in writes.items()
            }

        def edits(some: Tensor) -> list[Intervention]:
            made: list[Intervention] = []
            for place, w in writes.items():
                key, value = (x[some].flatten(0, 1)[:, None] for x in (w.key, w.value))
                made.append(Replace(*place, write=Write(key, value, w.rank)))
            return made

        n_conditions = next(iter(writes.values())).shape[1]
        for firings, edited in self.replay(native, window, position, n_conditions, edits):
            if self.beside:
                yield firings, edited[:, :-1], edited[:, -1:]
            else:
                yield firings, edited, self._native_logits(native, window[firings], position[firings])

    def _native_logits(
        self, native: Native, window: Int[Tensor, " firing"], position: Int[Tensor, " firing"]
    ) -> Float[Tensor, "firing 1 step vocab"]:
        return native.end.at(*self._scored(window[:, None], position[:, None], native.ids.shape[1]))

    def _scored(
        self, rows: Int[Tensor, "firing condition"], columns: Int[Tensor, "firing condition"], end: int
    ) -> tuple[Int[Tensor, "firing condition step"], Int[Tensor, "firing condition step"]]:
        """Rows and columns of the tokens that are scored, of edits at ``columns`` in a pass of ``end`` tokens."""
        steps = torch.arange(self.n_steps, device=columns.device)
        at = columns[..., None] + steps + self.first
        if self.horizon is None:
            at = torch.full_like(at, end - 1)
        return rows[..., None].expand(at.shape), at

    def _groups(
        self, native: Native, window: Tensor, position: Tensor, n_conditions: int
    ) -> Iterator[tuple[Tensor, int, Any]]:
        """Firings that begin at one cut, the cut, and the cache of all windows up to it."""
        assert self.way is not None
        from_cache, context = self.way[0], native.ids.shape[1]
        cut = (position // self.stride * self.stride).clamp(max=max(context - 2, 0)) * from_cache
        cache, fed = None, 0
        for start in sorted(set(cut.tolist())):
            if start > fed:
                cache = self.model.new_cache() if cache is None else cache
                self._feed(native, fed, start, cache)
                fed = start
            here = (cut == start).nonzero()[:, 0]
            here = here[position[here].argsort()]  # so that those of one batch end together
            for some in here.split(max(1, self.rows // n_conditions)):
                yield some, start, cache

    def _feed(self, native: Native, start: int, end: int, cache: Any) -> None:
        ids = native.ids[:, start:end]
        # Layers of attention have to be fed, or the cache would not know how long it is.
        attention = any(hasattr(layer, "keys") for layer in cache.layers[: len(self.below)])
        with short_chunks(), self._skipping(native, slice(None), start, end, not attention):
            self.model(ids, past_key_values=cache, **self.model.logits_of_last(1))

    @torch.no_grad()
    def replay(
        self,
        native: Native,
        window: Int[Tensor, " firing"],
        position: Int[Tensor, " firing"],
        n_conditions: int,
        edits: Callable[[Int[Tensor, " some"]], Sequence[Intervention]],
    ) -> Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some condition step vocab"]]]:
        """Run the futures of any edits at some tokens, a few firings at a time: which, and their logits.

        Args:
            native: the windows as they are.
            window, position: where each firing is.
            n_conditions: futures of each.
            edits: makes the interventions for some firings, at their positions; rows are conditions of the first of
                them, then of the next.
        """
        if self.way is None and len(position):
            self.way = self._find_way(native)
        yield from self._each(native, window, position, n_conditions, edits)

    def _each(
        self,
        native: Native,
        window: Tensor,
        position: Tensor,
        n: int = 1,
        edits: Callable[[Tensor], Sequence[Intervention]] = lambda _: (),
    ) -> Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some condition step vocab"]]]:
        at_once, context = max(1, LOGITS // (n * self.n_steps * self.model.n_vocab)), native.ids.shape[1]
        for some, start, cache in self._groups(native, window, position, n):
            rows, at = window[some].repeat_interleave(n), position[some].repeat_interleave(n)
            end = context if self.horizon is None else min(max(int(at.max()) + self.horizon + 1, start + 2), context)
            if cache is not None:
                cache = rows_of(cache, rows)
            what = list(edits(some))
            editing = self.model.intervene(what, positions=at[:, None], read=self.read) if what else nullcontext()
            with short_chunks(), self._skipping(native, rows, start, end), editing, late_logits(self.model) as late:
                self.model(native.ids[rows, start:end], past_key_values=cache)
            each = torch.arange(len(rows), device=at.device).view(-1, n)
            scored = self._scored(each, at.view(-1, n) - start, end - start)
            for first in range(0, len(some), at_once):
                few = slice(first, first + at_once)
                yield some[few], late.at(*(x[few] for x in scored))

    def _skipping(
        self, native: Native, rows: Tensor | slice, start: int, end: int, allowed: bool = True
    ) -> AbstractContextManager[None]:
        """Layers below give what they gave natively while the block runs, at tokens ``start`` to ``end``."""
        if self.way is None or not self.way[1] or native.below is None or not allowed:
            return nullcontext()
        return giving(self.below, map_tensors(lambda x: x[rows, start:end], native.below))

    def _find_way(self, native: Native) -> tuple[bool, bool]:
        """The first of `WAYS` in which futures without an edit, after two pieces or more, are as in the native pass."""
        last = native.ids.shape[1] - 1 - self.after
        position = torch.tensor([last // 2, last], device=native.ids.device)
        window, error, native = torch.zeros_like(position), 0.0, native.first_window()
        try:
            for way in WAYS:
                if way[1] and native.below is None:
                    continue
                self.way = way
                try:
                    found = [
                        kl_from(logits, self._native_logits(native, window[i], position[i])).max()
                        for i, logits in self._each(native, window, position)
                    ]
                except torch.OutOfMemoryError:
                    raise
                except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
                    if way == WAYS[-1]:
                        raise
                    continue  # this cache cannot be fed in pieces, or not with layers left out
                error = float(torch.stack(found).max())
                if error <= (TOLERANCE if self.exact else 1e-2):
                    return way
        finally:
            self.way = None
        raise RuntimeError(
            f"a second pass over the same tokens is {error:.1e} nats from the first: this model is not deterministic "
            f"(is it in training mode?)"
        )


def stacked(writes: Sequence[Write]) -> Write:
    """Writes ``[firing]`` as conditions of one, ``[firing, condition]``, of the rank of the highest."""
    rank = max(write.rank for write in writes)
    same = [of_rank(write, rank) for write in writes]
    return Write(torch.stack([w.key for w in same], 1), torch.stack([w.value for w in same], 1), rank)


def kl_from(edited: Float[Tensor, "*#n vocab"], native: Float[Tensor, "*#n vocab"]) -> Float[Tensor, "..."]:
    """``KL(edited || native)`` of distributions given by logits, nats, a few tokens at a time.

    In the widest floats of their device. Sizes of 1 broadcast.
    """
    edited, native = torch.broadcast_tensors(edited, native)
    lead, n = edited.shape[:-1], max(1, KL // edited.shape[-1])
    found = []
    for p, q in zip(edited.flatten(0, -2).split(n), native.flatten(0, -2).split(n), strict=True):
        p, q = wide(p).log_softmax(-1), wide(q).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
    return torch.cat(found).view(lead)
