"""Which positions the tokens of the running pass have, and how that is read off the arguments and the cache."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from writesae.hooks.attachment import attach, attached_to
from writesae.hooks.positions import PAD
from writesae.hooks.scope import Owner, owners, private

CACHES = ("past_key_values", "cache_params")  # what models call their cache


@dataclass
class Fed:
    """What a cache has been fed, kept on the cache itself, so that its copies know it too.

    Caches without any attention layer do not know how many tokens they have seen, and transformers feeds pure Mamba
    models no attention mask after the prompt, though the prompt may have been padded.
    """

    n_tokens: int
    mask: Tensor | None  # [batch, tokens], of the first of them; those after it are real


@dataclass(eq=False)
class Pass:
    """One forward pass of a text model: its arguments while it runs, and what follows from them.

    Attributes:
        call: the arguments; none any more when the pass is over.
        outer: the pass of the same model, in a hook of which this one runs.
        owners: those in force in the thread or task that began it.
        past: tokens before it, in the cache; None if that cannot be known.
        before: what its cache had been fed.
    """

    call: dict[str, Any]
    outer: Pass | None = None
    owners: frozenset[Owner] = frozenset()
    past: int | None = 0
    before: Fed | None = None
    _positions: Tensor | None = None
    _padding: tuple[Tensor | None] | None = None  # None: not asked for yet

    def begin(self) -> None:
        """Look at its cache."""
        cache = _cache_in(self.call)
        self.before = attached_to(cache, Fed)
        self.past = _length(cache)
        if cache is not None:
            attach(cache, self._after())

    def end(self, output: Any) -> None:
        """It is over, or has failed."""
        made = _cache_in(output)
        if made is not None and _cache_in(self.call) is None:  # the model made the cache
            attach(made, self._after())
        self.call = {}  # positions stay: gradient checkpointing runs layers again after the pass

    def positions(self) -> Int[Tensor, "batch pos"]:
        """See `Clock.positions`."""
        if self._positions is None:
            self._positions = self._work_out()
        return self._positions

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """See `Clock.padding`."""
        if self._padding is None:
            self._padding = (self._find_padding(),)
        return self._padding[0]

    def _find_padding(self) -> Tensor | None:
        if self._positions is None and self.call.get("attention_mask") is None:
            return None  # tokens without a mask are real
        try:
            padding = self.positions() == PAD
        except ValueError:
            return None
        return padding if bool(padding.any()) else None

    def _shape(self) -> torch.Size:
        ids, embeds = self.call.get("input_ids"), self.call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ValueError("the text model was called with neither input_ids nor inputs_embeds")
        return tokens.shape[:2]

    def _after(self) -> Fed | None:
        """What the cache has been fed after this pass; None if its mask does not say."""
        mask = self.call.get("attention_mask")
        if self.past is None:
            return None
        total = self.past + self._shape()[1]
        if mask is None:
            return Fed(total, None if self.before is None else self.before.mask)
        return Fed(total, mask) if _covers(mask, total) else None

    def _work_out(self) -> Tensor:
        batch, n_pos = self._shape()
        if self.past is None:
            raise ValueError(
                "positions are not known: this cache was filled where writesae did not see it, and has no attention "
                "layer that would know how many tokens are in it. Fill it with the wrapped model."
            )
        mask, total = self.call.get("attention_mask"), self.past + n_pos
        if mask is None and self.before is not None and self.before.mask is not None:
            before = self.before.mask[:, : self.past]
            mask = F.pad(before, (0, total - before.shape[1]), value=1)
        if mask is None:
            ids = self.call.get("input_ids")
            device = (ids if ids is not None else self.call["inputs_embeds"]).device
            return torch.arange(self.past, total, device=device).expand(batch, n_pos)
        if not _covers(mask, total):
            got = f"a tensor {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"positions need an attention mask [batch, {total}] over the whole sequence ({self.past} cached and "
                f"{n_pos} new tokens); got {got}. Pass a 2-D mask of that length, or none if nothing is padded."
            )
        real = mask.bool()
        return (real.long().cumsum(-1) - 1).masked_fill(~real, PAD)[:, -n_pos:]


_passes: ContextVar[tuple[tuple[ref[Clock], Pass], ...]] = ContextVar("passes", default=())
"""The running or last pass of each model that this thread or task has run."""


class Clock:
    """Knows which positions the tokens of the running forward pass have. One per model.

    A model may run in several threads and tasks at once, and in a hook of its own pass: each has a `Pass` of its own.
    Costs nothing until somebody asks: `positions` works it out and keeps it for the pass.
    """

    def __init__(self, parameters: Sequence[str]):
        self.parameters = parameters  # names, in order, of what the model's forward takes
        self._last: Pass | None = None  # whichever thread or task began it
        self._threads: set[int] = set()  # those that began any

    @classmethod
    def of(cls, text_model: nn.Module) -> Clock:
        _self, *parameters = inspect.signature(type(text_model).forward).parameters  # instances' may be replaced
        return cls(parameters)

    def __reduce__(self) -> tuple[type[Clock], tuple[Sequence[str]]]:
        return Clock, (self.parameters,)  # copies and pickles of a model start anew

    def begin(self, args: tuple, kwargs: dict[str, Any], nested: Callable[[], bool] = lambda: False) -> None:
        """A pass begins; ``nested`` tells, if it may be so, whether it runs within another one of the same model."""
        before = self._here()
        outer = before if before is not None and before.call and nested() else None
        begun = Pass({**dict(zip(self.parameters, args, strict=False)), **kwargs}, outer, owners())
        self._enter(begun)
        self._threads.add(threading.get_ident())
        begun.begin()

    def end(self, output: Any = None) -> bool:
        """The pass is over, or has failed. Returns whether the one goes on in a hook of which it ran."""
        over = self._here()
        if over is None:
            return False
        over.end(output)
        if over.outer is not None:
            self._enter(over.outer)
        return over.outer is not None

    def _here(self) -> Pass | None:
        """The running pass, or the last one, of this thread or task."""
        return next((found for clock, found in _passes.get() if clock() is self), None)

    def _enter(self, entered: Pass) -> None:
        others = (item for item in _passes.get() if item[0]() not in (None, self))
        _passes.set((*others, (ref(self), entered)))
        self._last = entered

    @property
    def now(self) -> Pass:
        """The running pass. After it, still that one: gradient checkpointing runs layers again in the backward pass,
        on a GPU in a thread of torch's own.

        Raises:
            RuntimeError: layers run again in a thread that began no pass, and several have.
        """
        found = self._here() or self._last
        if found is None:
            return Pass({})
        if found is self._last and len(self._threads) > 1 and self._here() is None:
            raise RuntimeError(
                "layers run in a thread that began no forward pass, and several threads have run this model, so it "
                "cannot be known whose pass this is. Run the backward pass in the thread that ran the model"
            )
        return found

    def check_thread(self) -> None:
        """Raise RuntimeError if layers run again in a thread in which edits of their pass do not act."""
        if self._here() is None and self._last is not None and any(owner in self._last.owners for owner in private()):
            raise RuntimeError(
                "layers run again in another thread than the one that began the pass, where its hooks and edits do not "
                "act, since they were attached outside of the main thread or in a task. Run the backward pass in the "
                "thread that ran the model, or attach in the main thread"
            )

    def positions(self) -> Int[Tensor, "batch pos"]:
        """The position of each token of the running pass; `PAD` for padding.

        Raises:
            ValueError: the attention mask does not say which tokens are padding.
        """
        return self.now.positions()

    def try_positions(self) -> Int[Tensor, "batch pos"] | None:
        """`positions`, or None where they cannot be known."""
        try:
            return self.positions()
        except ValueError:
            return None

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens of the running pass are padding; None if none is, or if that cannot be known."""
        return self.now.padding()


def _cache_in(found: Any) -> Any:
    """The cache among a model's arguments, or in its output."""
    get = found.get if isinstance(found, Mapping) else lambda name: getattr(found, name, None)
    return next((get(name) for name in CACHES if get(name) is not None), None)


def _covers(mask: Any, n_tokens: int) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == n_tokens


def _length(cache: Any) -> int | None:
    """How many tokens are in a cache; None if neither it nor we know."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no attention layer in it
        pass
    fed = attached_to(cache, Fed)
    filled = any(map(_filled, cache.layers)) if hasattr(cache, "layers") else fed is not None
    if not filled:
        return 0
    return None if fed is None else fed.n_tokens


def _filled(layer: Any) -> bool:
    """Whether a layer of a cache holds anything."""
    if any(getattr(layer, "is_conv_states_initialized", {}).values()):
        return any(layer.has_previous_state.values())
    states = getattr(layer, "recurrent_states", {}).values()  # without a convolution, `has_previous_state` stays False
    return any(state is not None and bool(state.any()) for state in states)
