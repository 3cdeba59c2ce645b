"""What follows a token if something else is written there: edited futures, many at once.

The plain way copies a cache for every firing and condition and feeds the tokens that follow. Here edited futures share
what they have in common, and all of it is exact but for rounding:

- windows are fed once in pieces, and futures begin at the last cut before their token, from rows of that cache;
- futures of many tokens and all conditions are rows of one batch: before the recurrence they are the same;
- layers below the edited one are not run again: they give what they gave natively;
- logits are made only where they are scored.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from writesae.hooks import ActivationCache, Replace, find_mixers, short_chunks
from writesae.hooks.names import inputs
from writesae.hooks.residual import giving
from writesae.hooks.scope import owning
from writesae.hooks.sites import Head
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Read, Write
from writesae.recurrence.write import of_rank, wide, widest

LOGITS = 2**27  # numbers: logits of one forward pass
TOLERANCE = 1e-6  # nats: a future without an edit is at most so far from the native pass, in float32
# (from a cache, layers below skipped): tried in this order, until a future without an edit is as the native pass.
WAYS = ((True, True), (True, False), (False, True), (False, False))


@dataclass(frozen=True, eq=False)
class Native:
    """A pass over windows as the model is.

    Attributes:
        ids: tokens.
        logits: at every token; of the last alone where nobody wants them.
        cache: what writes and states of the layers edited are made from.
        below: output of the layer below the first one edited (whatever that layer returns); None if it is run again.
    """

    ids: Int[Tensor, "window pos"]
    logits: Float[Tensor, "window scored vocab"]
    cache: ActivationCache
    below: Any

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
        horizon: tokens to follow after the edited one.
        read: ``"same"``: the token's own read sees the edit. ``"next"``: those after it do (the cache-slot protocol),
            and its own prediction, which cannot move, is not scored.
        stride: tokens from cut to cut. Small: more pieces to feed; large: more tokens before the edit run again.
        rows: futures run at once.

    Attributes:
        way: which of `WAYS` holds for this model, None before the first replay.
    """

    def __init__(
        self,
        model: HookedRecurrentModel,
        places: Sequence[Head],
        *,
        horizon: int = 16,
        read: Read = "same",
        stride: int = 4,
        rows: int = 96,
    ):
        if read not in ("same", "next"):
            raise ValueError(f"read={read!r}: allowed are 'same' and 'next'")
        if horizon < (read == "next"):
            least = "at least 1 with read='next', where the token's own read sees no edit" if horizon == 0 else ">= 0"
            raise ValueError(f"horizon={horizon}: it must be {least}")
        if stride < 3:  # a piece of one token takes another path through some models
            raise ValueError(f"stride={stride}: it must be at least 3")
        for layer, head in places:
            model.site(layer).check_head(head)
        self.model, self.places = model, [Head(*place) for place in places]
        self.horizon, self.stride, self.rows = horizon, stride, rows
        self.read: Read = read
        self.first = int(read == "next")
        self.below = _layers_below(model, min(layer for layer, _ in places))
        self.way: tuple[bool, bool] | None = None
        self.exact = next(model.parameters()).dtype in (torch.float32, torch.float64)

    @torch.no_grad()
    def native(self, ids: Int[Tensor, "window pos"], logits: bool = True) -> Native:
        """Run the windows as they are; without ``logits``, for what is written alone."""
        seen: list[Any] = []
        layers = sorted({layer for layer, _ in self.places})
        names = [name for layer in layers for name in inputs(self.model.family(layer).rule, layer)]
        few = self.model.logits_of_last(0 if logits else 1)
        with owning(everywhere=False) as call, short_chunks():

            def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
                if call.here:  # and not in a pass of another thread
                    seen.append(output)

            with self.below[-1].register_forward_hook(keep) if self.below else nullcontext():
                found, cache = self.model.run_with_cache(ids, names=names, **few)
        below = seen[0] if len(seen) == 1 and _by_token(seen[0], ids.shape) else None
        return Native(ids, found, cache, below)

    @torch.no_grad()
    def futures(
        self,
        native: Native,
        window: Int[Tensor, " firing"],
        position: Int[Tensor, " firing"],
        writes: Mapping[Head, Write],
    ) -> Futures:
        """Put other writes in the place of the native ones, each firing and condition for itself.

        Writes are ``[firing, condition]``. A token has ``horizon`` tokens of its window after it, else ValueError.
        """
        context = native.ids.shape[1]
        if len(position) and (int(position.min()) < 0 or int(position.max()) + self.horizon >= context):
            raise ValueError(
                f"positions {int(position.min())} to {int(position.max())} with a horizon of {self.horizon}: windows "
                f"of {context} tokens allow 0 to {context - 1 - self.horizon}"
            )
        if not self.exact:  # in bfloat16 even the same computation in other pieces differs: compare within one
            writes = {
                place: stacked([*(w[:, c] for c in range(w.shape[1])), native.write(place, window, position)])
                for place, w in writes.items()
            }
        if self.way is None and len(position):
            self.way = self._find_way(native)
        n_conditions = next(iter(writes.values())).shape[1]
        shape = (len(position), n_conditions, self.horizon + 1 - self.first)
        kl = torch.zeros(shape, dtype=widest(position.device), device=position.device)
        flips = torch.zeros(shape[:2], dtype=torch.bool, device=position.device)
        windows, positions = window.tolist(), position.tolist()  # a device is waited for here, not at each firing
        for firing, edited in self._each(native, window, position, writes):
            reference = self._native_logits(native, windows[firing], positions[firing]) if self.exact else edited[-1:]
            kl[firing] = kl_from(edited, reference)
            flips[firing] = edited[:, 0].argmax(-1) != reference[..., 0, :].argmax(-1)
        if not self.exact:
            kl, flips = kl[:, :-1], flips[:, :-1]
        return Futures(kl, flips)

    def _native_logits(self, native: Native, window: int, position: int) -> Float[Tensor, "1 step vocab"]:
        return native.logits[window, None, position + self.first : position + self.horizon + 1]

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
                cache = cache or DynamicCache(config=self.model.config)
                self._feed(native, fed, start, cache)
                fed = start
            here = (cut == start).nonzero()[:, 0]
            here = here[position[here].argsort()]  # so that those of one batch end together
            n_tokens = int(position[here].max()) + self.horizon + 1 - start
            rows = max(n_conditions, min(self.rows, LOGITS // (n_tokens * native.logits.shape[-1])))
            for some in here.split(rows // n_conditions):
                yield some, start, cache

    def _feed(self, native: Native, start: int, end: int, cache: Any) -> None:
        ids = native.ids[:, start:end]
        # Layers of attention have to be fed, or the cache would not know how long it is.
        attention = any(hasattr(layer, "keys") for layer in cache.layers[: len(self.below)])
        with short_chunks(), self._skipping(native, slice(None), start, end, not attention):
            self.model(ids, past_key_values=cache, **self.model.logits_of_last(1))

    def _each(
        self, native: Native, window: Tensor, position: Tensor, writes: Mapping[Head, Write]
    ) -> Iterator[tuple[int, Float[Tensor, "condition step vocab"]]]:
        """Each firing, and its logits at the tokens scored; without ``writes``, of one condition: no edit."""
        n = next(iter(writes.values())).shape[1] if writes else 1
        for some, start, cache in self._groups(native, window, position, n):
            rows, at = window[some].repeat_interleave(n), position[some].repeat_interleave(n)
            end = min(max(int(at.max()) + self.horizon + 1, start + 2), native.ids.shape[1])
            if cache is not None:
                cache = copy.deepcopy(cache)
                cache.reorder_cache(rows)
            edits = []
            for place, w in writes.items():
                key, value = (x[some].flatten(0, 1)[:, None] for x in (w.key, w.value))
                edits.append(Replace(*place, write=Write(key, value, w.rank)))
            editing = self.model.intervene(edits, positions=at[:, None], read=self.read) if edits else nullcontext()
            few = self.model.logits_of_last(end - int(at.min()) - self.first)
            with short_chunks(), self._skipping(native, rows, start, end), editing:
                logits = self.model(native.ids[rows, start:end], past_key_values=cache, **few)
            for i, (firing, t) in enumerate(zip(some.tolist(), at[::n].tolist(), strict=True)):  # slices, no copies
                begin = t + self.first - end + logits.shape[1]  # as some models give all logits
                yield firing, logits[i * n : (i + 1) * n, begin : begin + self.horizon + 1 - self.first]

    def _skipping(
        self, native: Native, rows: Tensor | slice, start: int, end: int, allowed: bool = True
    ) -> AbstractContextManager[None]:
        """Layers below give what they gave natively while the block runs, at tokens ``start`` to ``end``."""
        if self.way is None or not self.way[1] or native.below is None or not allowed:
            return nullcontext()
        return giving(self.below, _map(lambda x: x[rows, start:end], native.below))

    def _find_way(self, native: Native) -> tuple[bool, bool]:
        """The first of `WAYS` in which futures without an edit, after two pieces or more, are as in the native pass."""
        last = native.ids.shape[1] - 1 - self.horizon
        positions = [last // 2, last]
        position = torch.tensor(positions, device=native.ids.device)
        window, error = torch.zeros_like(position), 0.0
        try:
            for way in WAYS:
                if way[1] and native.below is None:
                    continue
                self.way = way
                try:
                    found = [
                        kl_from(logits, self._native_logits(native, 0, positions[i]))
                        for i, logits in self._each(native, window, position, {})
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


def kl_from(
    edited: Float[Tensor, "condition step vocab"], native: Float[Tensor, "1 step vocab"]
) -> Float[Tensor, "condition step"]:
    """``KL(edited || native)`` of distributions given by logits, nats, in the widest floats of their device."""
    p, q = wide(edited).log_softmax(-1), wide(native).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


# --- layers below -----------------------------------------------------------------------------------------------------


def _layers_below(model: HookedRecurrentModel, layer: int) -> list[nn.Module]:
    """The layers that run before a recurrent one; none where the stack is not a plain list."""
    path = next(path for path, mixer, _ in find_mixers(model.hf_model) if mixer.layer_idx == layer)
    found = re.match(r"(.*\blayers)\.(\d+)\.", path)
    if found is None:
        return []
    stack = model.hf_model.get_submodule(found[1])
    below, rest = list(stack.children())[: int(found[2])], list(stack.children())[int(found[2]) :]
    return below if isinstance(stack, nn.ModuleList) and not any(x is y for x in below for y in rest) else []


def _map(fn: Any, x: Any) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(_map(fn, part) for part in x)
    return fn(x) if isinstance(x, Tensor) else x


def _by_token(x: Any, shape: Sequence[int]) -> bool:
    """Whether everything in a layer's output is one thing per token, so that rows and pieces can be taken."""
    if isinstance(x, tuple | list):
        return type(x) in (tuple, list) and all(_by_token(part, shape) for part in x)
    return x is None or (isinstance(x, Tensor) and x.ndim >= 2 and x.shape[:2] == tuple(shape))
