"""Which positions the tokens of the running pass have, and how that is read off the arguments and the cache."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from writesae.hooks.attachment import attach, attached_to
from writesae.hooks.positions import PAD, beams
from writesae.hooks.scope import Owner, owners, private
from writesae.models.arguments import CACHES

RECURRENT = "linear_attention"  # whose mask it is, among those that transformers' generation makes in advance


@dataclass
class Fed:
    """What a cache has been fed, kept on the cache itself, so that its copies know it too.

    Caches without any attention layer do not know how many tokens they have seen, and transformers feeds pure Mamba
    models no attention mask after the prompt, though the prompt may have been padded.
    """

    n_tokens: int
    mask: Tensor | None  # [batch, tokens], of the first of them; those after it are real
    known: bool = True  # False: some mask was given that does not say which tokens are padding
    ids: tuple[Tensor, ...] | None = None  # the tokens themselves, in pieces [batch, n]; None where they are not known
    sure: bool = False  # the count holds even if nothing seems to be in the cache: a memory's states may all be zero
    unread: dict[Any, Tensor] = field(default_factory=dict)  # of each knockout, see `Pass.unread`

    def begins(self, ids: Int[Tensor, "batch pos"]) -> bool:
        """Whether these are the tokens that it has been fed, and maybe more; True where that cannot be known."""
        if not self.ids or len(self.ids[0]) != len(ids):
            return True
        fed = torch.cat([x.to(ids.device) for x in self.ids], 1)[:, : self.n_tokens]
        same = fed == ids[:, : fed.shape[1]]
        if self.mask is not None:
            real = self.mask[:, : same.shape[1]].bool().to(ids.device)
            same[:, : real.shape[1]] |= ~real
        return bool(same.all())


@dataclass(eq=False)
class Pass:
    """One forward pass of a text model: its arguments while it runs, and what follows from them.

    Attributes:
        call: the arguments; none any more when the pass is over.
        outer: the pass of the same model, in a hook of which this one runs.
        owners: those in force in the thread or task that began it.
        past: tokens before it, in the cache; None if that cannot be known.
        before: what its cache had been fed.
        unread: of each knockout, what the tokens that are not to be read have left in the memory when it is over.
    """

    call: dict[str, Any]
    outer: Pass | None = None
    owners: frozenset[Owner] = frozenset()
    past: int | None = 0
    before: Fed | None = None
    unread: dict[Any, Tensor] = field(default_factory=dict)
    _mask: tuple[Tensor | None] | None = None  # None: not asked for yet
    _positions: Tensor | None = None
    _on_cpu: Tensor | None = None
    _padding: tuple[Tensor | None] | None = None

    def begin(self) -> None:
        """Look at its cache."""
        cache = cache_in(self.call)
        self.before = attached_to(cache, Fed)
        self.past = _length(cache)

    def feed(self) -> None:
        """Note on its cache what that will have been fed."""
        cache = cache_in(self.call)
        if cache is not None:
            attach(cache, self._after())

    def end(self, output: Any) -> None:
        """It is over, or has failed."""
        made = cache_in(output)
        if made is not None and cache_in(self.call) is None:  # the model made the cache
            attach(made, self._after())
        if made is None and cache_in(self.call) is None:
            self.unread = {}  # nothing goes on from here
        self.call = {}  # positions stay: gradient checkpointing runs layers again after the pass

    def positions(self) -> Int[Tensor, "batch pos"]:
        """See `Clock.positions`."""
        if self._positions is None:
            mask, (batch, n_pos), past = self.mask(), self._shape(), self.past or 0
            if mask is None:
                self._positions = torch.arange(past, past + n_pos, device=self._tokens().device).expand(batch, n_pos)
            else:
                real = mask.bool()
                self._positions = (real.long().cumsum(-1) - 1).masked_fill(~real, PAD)[:, -n_pos:]
        return self._positions

    def positions_on_cpu(self) -> Int[Tensor, "batch pos"]:
        """The same on the CPU, fetched once: which tokens are meant is decided there, without waiting for a device."""
        self._on_cpu = self.positions().cpu() if self._on_cpu is None else self._on_cpu
        return self._on_cpu

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """See `Clock.padding`."""
        if self._padding is None:
            self._padding = (self._find_padding(),)
        return self._padding[0]

    def _find_padding(self) -> Tensor | None:
        if self._positions is None and self.mask() is None:
            return None
        return self.positions() == PAD if bool((self.positions_on_cpu() == PAD).any()) else None

    def check_padding(self) -> None:
        """Raise ValueError if the memory of a text would run through padding: no model keeps that apart."""
        try:
            mask = self.mask()
        except ValueError:  # whoever needs to know it is told
            return
        if mask is None:
            return
        real = mask.cpu().bool()  # looked at several times: fetched once
        if bool(real.all()):
            return
        begun, ends = real.cumsum(-1) > 0, real.flip(-1).cumsum(-1).flip(-1) == 0
        between = ~real & begun & ~ends
        if bool(between.any()):
            row, at = between.nonzero()[0].tolist()
            raise ValueError(
                f"padding between the tokens of a text: token {at} of row {row} is padding, with tokens of the text "
                f"before and after it. A recurrent memory would go through it as through a token. Pad on the left of "
                f"whole texts only: continue texts of unequal length one by one, or give them anew from their "
                f"beginning"
            )
        if self._shape()[1] == 1 and not bool(begun[:, -1].all()):
            raise ValueError(
                "padding fed by itself: models take a single token for a real one, whatever its mask says. Feed "
                "padding on the left together with tokens of the text after it"
            )

    def _tokens(self) -> Tensor:
        ids, embeds = self.call.get("input_ids"), self.call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ValueError("the text model was called with neither input_ids nor inputs_embeds")
        return tokens

    @property
    def n_tokens(self) -> int:
        """Of each of its texts, padding included."""
        return self._shape()[1]

    def _shape(self) -> torch.Size:
        return self._tokens().shape[:2]

    def _after(self) -> Fed | None:
        """What the cache has been fed after this pass; None if that cannot be known."""
        if self.past is None:
            return None
        total = self.past + self._shape()[1]
        try:
            return Fed(total, self.mask(), ids=self._ids(), unread=self.unread)
        except ValueError:
            return Fed(total, None, known=False)

    def unread_before(self, knockout: Any) -> Tensor | None:
        """What the tokens that a knockout hides had left in the memory before this pass; None if that is not known."""
        fed = self.before
        found = None if fed is None or fed.n_tokens != self.past else fed.unread.get(knockout)
        return None if found is None or len(found) != self._shape()[0] else found

    def _ids(self) -> tuple[Tensor, ...] | None:
        """All tokens so far, as far as they are known. Beams are exchanged for one another: theirs are not."""
        ids, past = self.call.get("input_ids"), self.past or 0
        before = self.before.ids if past and self.before is not None else None if past else ()
        if ids is None or before is None or beams() > 1 or any(len(x) != len(ids) for x in before[:1]):
            return None
        if self.before is not None and past < self.before.n_tokens:  # the cache has been cropped
            before = (torch.cat(before, 1)[:, :past],)
        return (*before, ids) if len(before) < 64 else (torch.cat([*before, ids], 1),)

    def mask(self) -> Int[Tensor, "batch total"] | None:
        """Which tokens are real, of those before the pass and in it; None if all are.

        Raises:
            ValueError: that cannot be known.
        """
        if self._mask is None:
            self._mask = (self._find_mask(),)
        return self._mask[0]

    def _find_mask(self) -> Tensor | None:
        batch, n_pos = self._shape()
        if self.past is None:
            raise ValueError(
                "positions are not known: this cache was filled where writesae did not see it, and has no attention "
                "layer that would know how many tokens are in it. Fill it with the wrapped model."
            )
        given, total = self.call.get("attention_mask"), self.past + n_pos
        if isinstance(given, FakeTensor):  # a pass of shapes alone, as nnsight's scan makes one
            given = None
        if isinstance(given, Tensor) and _covers(given, total) and len(given) == batch:
            return given
        fed = self.before or Fed(self.past, None)
        of_new = given.get(RECURRENT) if isinstance(given, Mapping) else None
        known = fed.known and (fed.mask is None or len(fed.mask) == batch)
        if isinstance(given, Mapping):  # made by generation, of a mask that it does not pass on
            known = known and RECURRENT in given and (self.before is not None or self.past == 0)
        if not known or (given is not None and not isinstance(given, Mapping)):
            got = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"positions need an attention mask [batch, {total}] over the whole sequence ({self.past} cached and "
                f"{n_pos} new tokens); got {got}. Pass a 2-D mask of that length, or none if nothing is padded."
            )
        if fed.mask is None and of_new is None:
            return None
        ones = torch.ones(batch, total, dtype=torch.long, device=self._tokens().device)
        if fed.mask is not None:
            n_said = min(fed.mask.shape[1], self.past)
            ones[:, :n_said] = fed.mask[:, :n_said]
        if of_new is not None:
            ones[:, self.past :] = of_new
        return ones


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

    def begin(
        self, args: tuple, kwargs: dict[str, Any], nested: Callable[[], bool] = lambda: False, check: bool = False
    ) -> None:
        """A pass begins.

        Args:
            args, kwargs: what the text model was called with.
            nested: asked, where that is possible, whether it runs within another pass of the same model.
            check: raise ValueError if a memory would go through padding.
        """
        before = self._here()
        outer = before if before is not None and before.call and nested() else None
        begun = Pass({**dict(zip(self.parameters, args, strict=False)), **kwargs}, outer, owners())
        self._enter(begun)
        self._threads.add(threading.get_ident())
        begun.begin()
        if check:
            begun.check_padding()
        begun.feed()

    def check(self, call: dict[str, Any]) -> None:
        """Raise ValueError if a pass with these arguments would take a memory through padding, or if its mask is of
        other tokens."""
        would = Pass(call)
        would.begin()
        mask = call.get("attention_mask")
        if isinstance(mask, Tensor) and would.past is not None:
            (batch, n_pos), shape = would._shape(), mask.shape
            if mask.ndim == 2:
                would.mask()  # raises
            elif mask.ndim != 4 or shape[0] not in (1, batch) or shape[2] != n_pos or shape[3] < would.past + n_pos:
                raise ValueError(
                    f"attention_mask {list(shape)} for {n_pos} tokens of {batch} texts, {would.past} cached before "
                    f"them: give [batch, {would.past + n_pos}], 1 for real tokens and 0 for padding, or a mask of "
                    f"attention alone, [batch, 1, {n_pos}, {would.past + n_pos}]"
                )
        would.check_padding()

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
        if (here := self._here()) is not None:
            return here
        if self._last is None:
            return Pass({})
        if len(self._threads) > 1:
            raise RuntimeError(
                "layers run in a thread that began no forward pass, and several threads have run this model, so it "
                "cannot be known whose pass this is. Run the backward pass in the thread that ran the model"
            )
        return self._last

    def check_thread(self) -> None:
        """Raise RuntimeError if layers run again in a thread in which edits of their pass do not act."""
        if (
            self._here() is None
            and self._last is not None
            and any(owner in self._last.owners for owner in tuple(private()))
        ):
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
        """Which tokens of the running pass are padding; None if none is.

        Raises:
            ValueError: the attention mask does not say it.
        """
        return self.now.padding()


def cache_in(found: Any) -> Any:
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
    if fed is not None and fed.sure:
        return fed.n_tokens
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
