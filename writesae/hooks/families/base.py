"""What an adapter must say about a family of architectures."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from writesae.hooks.quantities import PER_KEY, QUANTITIES, UNDESCRIBED, Quantity
from writesae.hooks.sites import Site
from writesae.models.gpu import plays_gpu
from writesae.models.wrappers import weight
from writesae.recurrence import Recurrence, Write, at_least_float32
from writesae.recurrence.kernels import stretches
from writesae.recurrence.rules import Rule
from writesae.recurrence.write import index_of


class KernelCall(ABC):
    """One call of the model's own recurrence, seen through the canonical quantities.

    `get` computes a quantity only when asked, in float32, heads expanded to value heads; `set` replaces one, and `run`
    calls the native function with the replacements. With nothing replaced, `run` changes no bit.

    An adapter says what a quantity is in the arguments (`canonical`), which of them have tokens (`sequences`), where
    the state is (`initial_state`, and `state_argument` if it has another name), how to call the native function
    (`run`), and what the mixer expects back (`result`).
    """

    state_argument: ClassVar[str] = "initial_state"  # which has the state before the call

    def __init__(self, family: Family, arguments: dict[str, Any]):
        self.family = family
        self.arguments = arguments
        self.changed: dict[str, Tensor] = {}
        self._known: dict[tuple[str, tuple[int, ...] | None], Tensor] = {}

    def get(self, quantity: str, heads: Sequence[int] | None = None) -> Float[Tensor, "batch pos head ..."]:
        """A canonical quantity ``[batch, pos, head, ...]``, of the given heads only if ``heads`` is not None."""
        if quantity in self.changed:
            value = self.changed[quantity]
            return value if heads is None else value[:, :, list(heads)]
        key = (quantity, None if heads is None else tuple(heads))
        if key not in self._known:
            self._known[key] = self.canonical(quantity, heads)
        return self._known[key]

    def to_show(self, quantity: str) -> tuple[Float[Tensor, "batch pos head ..."], bool]:
        """A quantity, all heads, and whether it is a tensor that nobody else holds: neither the model, which may use
        its own for something else, nor this call."""
        value = self.get(quantity)
        held = (x for x in (*self.arguments.values(), *self.changed.values()) if isinstance(x, Tensor))
        ours = not any(_same_memory(x, value) for x in held)
        if ours and not value.requires_grad:
            self._known.pop((quantity, None))
        return value, ours

    def set(self, quantity: str, value: Tensor) -> None:
        """Replace a quantity (all heads) by a canonical value."""
        self.changed[quantity] = value

    def start_from(self, state: Float[Tensor, "batch head d_key d_value"]) -> None:
        """Begin at a state, in the place of the one that the model gave."""
        self.arguments = {**self.arguments, self.state_argument: self.family.to_model(state)}

    def leave_out(self, padding: Bool[Tensor, "batch pos"]) -> None:
        """Have the memory pass over these tokens, as if they were not there. Only where a family needs it
        (`Family.ignores_padding`)."""
        raise TypeError("a family with ignores_padding= needs a KernelCall that has leave_out(padding)")

    def recurrence(self, heads: Sequence[int] | None = None) -> Recurrence:
        """Decay, erase and reads of the given heads."""
        return self.family.rule.recurrence(partial(self.get, heads=heads))

    def write(self, heads: Sequence[int] | None = None) -> Write:
        """The native write, leading dimensions ``[batch, pos, head]``."""
        return self.family.rule.write(partial(self.get, heads=heads))

    @abstractmethod
    def canonical(self, quantity: str, heads: Sequence[int] | None) -> Float[Tensor, "batch pos head ..."]:
        """A quantity as the arguments have it, see `get`: a new tensor, or a view of an argument."""

    @property
    @abstractmethod
    def initial_state(self) -> Float[Tensor, "batch head d_key d_value"] | None:
        """The state before the call, None if zero."""

    @abstractmethod
    def run(
        self, native: Callable[..., Any]
    ) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
        """Call the native function: reads in the model's dtype, and the final state if the model wants it."""

    def compute(self) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"]]:
        """The same on the kernels of `writesae.recurrence`: reads in the model's dtype, and the final state.

        Some tokens at a time (`stretches`), so that canonical quantities of all are never made.
        """
        outputs, S = [], self.initial_state
        parts = [self.arguments[name] for name in self.sequences]
        for call in map(self._of, stretches(*parts)) if parts else [self]:
            o, S = self.family.rule.run(call.get, S)
            outputs.append(o.to(self.dtype))
        assert S is not None
        return torch.cat(outputs, 1), S

    def _of(self, tokens: tuple[slice, slice]) -> KernelCall:
        """A call of some tokens only. (Its initial state is not theirs.)"""
        some = copy.copy(self)
        # A convolution leaves the numbers of one token far apart in memory; in the copy they are close together.
        pick = lambda x: x[tokens] if x.is_contiguous() else x[tokens].clone()  # noqa: E731
        some.arguments = {name: pick(x) if name in self.sequences else x for name, x in self.arguments.items()}
        some.changed, some._known = {name: x[tokens] for name, x in self.changed.items()}, {}
        return some

    @property
    def sequences(self) -> tuple[str, ...]:
        """The arguments that have tokens, ``[batch, pos, ...]``: those called like the rule's inputs, if all of these
        are there. If none are known, all tokens are computed at once."""
        inputs = self.family.rule.inputs
        return inputs if all(name in self.arguments for name in inputs) else ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the reads that the mixer expects back: that of the arguments."""
        return next(x.dtype for x in self.arguments.values() if isinstance(x, Tensor) and x.is_floating_point())

    def result(self, o: Tensor, state: Tensor | None) -> Any:
        """What the mixer expects back, for these reads and this final state."""
        return o, state

    @staticmethod
    def blank(arguments: dict[str, Any]) -> Any:
        """Tensors of the shapes that a call returns, which are filled in later. Only where a recurrence comes in
        several calls (`Family.calls`): the last of them runs all, and `result` is then a list."""
        raise TypeError("a family with calls= needs a KernelCall that has blank(arguments)")


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def of_heads(
    x: Tensor, heads: Sequence[int] | None, n_heads: int, then: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """``then`` of the heads asked for, in float32. A key head serves ``n_heads / n_key_heads`` consecutive heads, and
    is copied for each of them only after ``then``."""
    served = n_heads // x.shape[2]
    if heads is not None:
        return then(at_least_float32(x[:, :, index_of([h // served for h in heads])]))
    x = then(at_least_float32(x))
    if served == 1:
        return x
    each = x.unsqueeze(3).expand(*x.shape[:3], served, *x.shape[3:])
    return each.flatten(2, 3).contiguous()  # three times as fast as repeat_interleave


def as_given(value: Tensor, given: Tensor) -> Tensor:
    """GPU kernels want one dtype for reads, keys and values; torch functions compute in float32 whatever they get."""
    return value.to(given.dtype) if value.is_cuda or plays_gpu() else value


SSM = {"ssm_C": "q", "ssm_B": "k", "ssm_decay": "log_decay", "ssm_write": "write", "ssm_state": "state"}
"""What TransformerLens calls the quantities of any recurrence, see `Family.aliases`."""


@dataclass(frozen=True)
class Family:
    """An adapter: where an architecture runs its recurrence, and what the arguments mean. `register` makes it known.

    A mixer has its layer's index as ``mixer.layer_idx`` (it is told it, where transformers does not), and is somewhere
    under ``....layers.{index}``, as in nearly all of transformers.

    Attributes:
        name: for messages and the support table.
        rule: its update rule.
        mixers: ``{modeling module: name of its mixer class}``.
        kernels: functions of the modeling module that run the recurrence; they are intercepted. ``Class.method`` for a
            method, whose ``self`` is then one of the arguments.
        sizes: the mixer's attributes that hold ``n_heads, d_key, d_value``, or a number that is the same in all models;
            or a function of the mixer that gives all three.
        raw: what the kernel itself makes inputs of (``k_raw`` becomes ``k`` by its norm), in firing order before them.
        call: this family, arguments of an intercepted call -> `KernelCall`.
        helpers: other functions of the modeling module that an installed GPU package may have taken over; on CPU
            tensors the torch versions run instead.
        fused: functions that do a whole mixer at once, where ``None`` tells the mixer to go step by step.
        projections: names a mixer may have for its output projection, which takes the heads side by side.
        norms: names a mixer may have for the norm of what was read, called as ``norm(o, z)`` if gated: where ``z`` is
            seen.
        seen_at: ``{quantity: submodule}`` for what is no input of the recurrence but the output of a submodule that
            runs before it, in firing order. A mixer need not have them all.
        meanings: shape and meaning of quantities that are this architecture's own, see `writesae.hooks.quantities`.
        transposed: the model keeps its states, in its cache and between calls, as ``[batch, head, d_value, d_key]``.
        columns: it keeps them as ``[batch, head, d_key]``, the one column of each alone (``d_value`` is 1).
        calls: the mixer's attribute that says in how many calls one after the other its recurrence comes, each of some
            consecutive heads; its states then are ``[batch, call, head, ...]``. A mixer without it makes one call.
            ``call`` gets the arguments of several as ``{"parts": [...]}``; see `KernelCall.blank`.
        forgets: those of ``kernels`` that begin at a zero state whatever the model's cache holds, so that a text given
            in pieces would lose its memory: they begin at the state in the cache, which the mixer is given. Such a
            mixer also gets the attention mask of all tokens so far cut to those of the piece.
        takes_cache: for models with a cache class of their own: (the cache that a pass is given or None, the text
            model, the pass's tokens or their embeddings; None if there is no pass yet) -> a cache that the model takes,
            and that keeps states where transformers' `DynamicCache` does.
        stream_norms: submodules of a layer that are norms of the residual stream itself: what they give is the stream.
        rounds_within: by how many units in the last place of half precision its own functions may be off, as a share of
            the largest value, where they compute the recurrence in it and not in float32, on a CPU too; 0 where not.
        layers: what its text models call the list of their layers.
        ignores_padding: its mixers know nothing of the attention mask. Where a token is padding, the tap takes the call
            even if nothing is attached, and has the memory pass over it (`KernelCall.leave_out`).
        needs_memory: dtypes in which its own functions fail on tokens without a memory before them (of zeros, say). The
            tap takes all calls in these, and its `KernelCall` gives them one.
        cut_beyond: the attribute of a config that says beyond how many tokens a model cuts a pass into several within
            itself, where positions cannot be known.
        letters: what canonical quantities are in the architecture's own words, where those differ.
        aliases: TransformerLens' names of quantities, less ``hook_``: what we call the same quantity.
    """

    name: str
    rule: Rule
    mixers: Mapping[str, str]
    kernels: tuple[str, ...]
    sizes: tuple[str | int, str | int, str | int] | Callable[[Any], tuple[int, int, int]]
    call: Callable[[Family, dict[str, Any]], KernelCall]
    raw: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    projections: tuple[str, ...] = ("out_proj", "o_proj")
    norms: tuple[str, ...] = ()
    seen_at: Mapping[str, str] = field(default_factory=dict)
    meanings: Mapping[str, Quantity] = field(default_factory=dict)
    transposed: bool = False
    columns: bool = False
    calls: str = ""
    forgets: tuple[str, ...] = ()
    takes_cache: Callable[[Any, Any, Tensor | None], Any] | None = None
    stream_norms: tuple[str, ...] = ()
    rounds_within: int = 0
    layers: str = "layers"
    ignores_padding: bool = False
    needs_memory: tuple[torch.dtype, ...] = ()
    cut_beyond: str = ""
    letters: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=lambda: SSM)

    def layer(self, mixer: Any) -> int:
        """The layer that a mixer is in, ``mixer.layer_idx`` as in all of transformers."""
        return int(mixer.layer_idx)

    def shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        """A mixer's number of heads, ``d_key`` and ``d_value``."""
        if callable(self.sizes):
            return self.sizes(mixer)
        n_heads, d_key, d_value = (x if isinstance(x, int) else int(getattr(mixer, x)) for x in self.sizes)
        return n_heads, d_key, d_value

    def site(self, mixer: nn.Module) -> Site:
        """Where a mixer's states are, and of what shape."""
        return Site(self.layer(mixer), *self.shape(mixer), rule=self.rule.name)

    def n_calls(self, mixer: nn.Module) -> int | None:
        """In how many calls its recurrence comes, see `calls`; None if it is one, of all heads."""
        return int(getattr(mixer, self.calls)) if self.calls and hasattr(mixer, self.calls) else None

    def to_model(
        self, state: Float[Tensor, "batch head d_key d_value"], n_calls: int | None = None
    ) -> Float[Tensor, "batch ..."]:
        """A state as the model keeps it."""
        state = state[..., 0] if self.columns else state.mT if self.transposed else state
        return state if n_calls is None else state.unflatten(1, (n_calls, -1))

    def from_model(
        self, state: Float[Tensor, "batch ..."], n_calls: int | None = None
    ) -> Float[Tensor, "batch head d_key d_value"]:
        """A state that the model keeps, in the canonical layout."""
        state = state if n_calls is None else state.flatten(1, 2)
        return state[..., None] if self.columns else state.mT if self.transposed else state

    def describe(self, quantity: str) -> Quantity:
        """Shape and meaning of a quantity, in this architecture's words."""
        shape, meaning = self.meanings.get(quantity) or QUANTITIES.get(quantity, UNDESCRIBED)
        if quantity == "log_decay" and self.rule.decay_per_key:
            shape = PER_KEY
        return Quantity(shape, f"{meaning} ({self.letters[quantity]})" if quantity in self.letters else meaning)

    def norm(self, mixer: nn.Module) -> nn.Module | None:
        """The mixer's norm of what its heads read, if it has one."""
        return next((getattr(mixer, name) for name in self.norms if hasattr(mixer, name)), None)

    def gate_norm(self, mixer: nn.Module) -> nn.Module | None:
        """That norm, if it takes the gate as its second argument (without a gate it takes one)."""
        norm = self.norm(mixer)
        return norm if norm is not None and len(inspect.signature(norm.forward).parameters) > 1 else None

    def out_proj(self, mixer: nn.Module) -> nn.Module:
        """The mixer's output projection, which takes the heads side by side, after norm and gate."""
        return next(getattr(mixer, name) for name in self.projections if hasattr(mixer, name))

    def projection(self, mixer: nn.Module) -> Float[Tensor, "head d_value d_model"]:
        """What the mixer's output projection makes of each head's output; norm and gate before it are left out."""
        n_heads, _, d_value = self.shape(mixer)
        return weight(self.out_proj(mixer)).T.unflatten(0, (n_heads, d_value))

    def quantities(self, mixer: nn.Module) -> tuple[str, ...]:
        """All hook points of a mixer, in firing order."""
        seen = [quantity for quantity, name in self.seen_at.items() if hasattr(mixer, name)]
        gate = [] if self.gate_norm(mixer) is None else ["z"]
        return (*seen, *self.raw, *self.rule.inputs, "write", "state", "o", *gate)
