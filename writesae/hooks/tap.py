"""What is attached to one recurrent mixer, and what becomes of a call of its recurrence.

A `Tap` shows the canonical quantities to the mixer's hook points, runs the native function on what comes back, and adds
the linear response of the edits to its result (`writesae.hooks.response`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae.hooks.clock import Clock, cache_in
from writesae.hooks.families.base import Family, KernelCall
from writesae.hooks.graphs import outside_graphs
from writesae.hooks.interventions import Attached, Moment, some_of
from writesae.hooks.knockout import unread
from writesae.hooks.points import STATE_SHOWN, HookPoint, to_show
from writesae.hooks.positions import PositionSet, first_column, sent
from writesae.hooks.response import Edit, Record, Unread, kept_of, respond, total_write
from writesae.hooks.scope import Owned, private
from writesae.hooks.sites import Site
from writesae.recurrence import Write, first_state
from writesae.recurrence.kernels import chunked, full_precision
from writesae.recurrence.write import index_of


@dataclass(eq=False)
class Running:
    """A mixer, or the layer around it, that is running.

    Attributes:
        tap: of the mixer: the next call of a recurrence is its.
        outer: what ran when it began, if it runs in a hook of that.
        cache: of the model, if it is given one.
        shape: of the output of its recurrence ``[batch, pos, head, d_value]``, once that has run.
        waiting: calls that wait for others of the same recurrence: their arguments, and what they have returned.
    """

    tap: Tap
    outer: Running | None
    cache: Any = None
    shape: tuple[int, ...] = ()
    waiting: list[tuple[dict[str, Any], Any]] = field(default_factory=list)

    def remembered(self) -> Float[Tensor, "batch head d_key d_value"] | None:
        """The state that the cache holds for this mixer, None if it holds none."""
        layer = None if self.cache is None else self.cache.layers[self.tap.site.layer]
        if layer is None or not layer.is_recurrent_states_initialized[0]:
            return None
        return self.tap.family.from_model(layer.recurrent_states[0], self.tap.n_calls)

    def run(self, native: Callable[..., Any], arguments: dict[str, Any], begin: Tensor | None) -> Any:
        """A call of its recurrence. Where that comes in several, the last runs them all as one."""
        n_calls = self.tap.n_calls
        if n_calls is None:
            return self.tap.run(native, arguments, self, begin)
        last = len(self.waiting) + 1 == n_calls
        call = self.tap.family.call(self.tap.family, dict(arguments))
        self.waiting.append((arguments, None if last else call.blank(arguments)))
        if not last:
            return self.waiting[-1][1]
        waiting, self.waiting = self.waiting, []
        results = self.tap.run(native, {"parts": [part for part, _ in waiting]}, self, begin)
        results = results if n_calls > 1 else [results]
        for (_, blank), result in zip(waiting[:-1], results[:-1], strict=True):
            for empty, filled in zip(_each(blank), _each(result), strict=True):
                empty.copy_(filled)
        return results[-1]


def _each(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


KERNELS = ("native", "writesae")
"""What may compute a recurrence: the model's own function, or `writesae.recurrence.kernels`."""


def check_kernels(kernels: object) -> None:
    """Raise ValueError if there is nothing by that name to compute recurrences with."""
    if kernels not in KERNELS:
        allowed = " and ".join(map(repr, KERNELS))
        raise ValueError(f"kernels={kernels!r}: allowed are {allowed} (the model's own functions, and ours in torch)")


running: ContextVar[Running | None] = ContextVar("running_mixer", default=None)
"""The mixer that is running in this thread or task, if any."""


@dataclass(eq=False)
class Tap:
    """Everything attached to one mixer, and what its hooks and edits make of a call of its recurrence.

    Attributes:
        site: where it is.
        family: the adapter of its architecture.
        points: the mixer's hook points by quantity, in firing order.
        clock: of the model.
        attached: interventions.
        state_requests: the positions at which somebody wants to see states.
        recorders: called with the `Record` of every call.
        initial: states to begin each call at, in the place of the model's own.
        kernels: what computes the recurrence, one of `KERNELS`.
        n_calls: in how many calls the recurrence comes, see `Family.calls`.
    """

    site: Site
    family: Family
    points: dict[str, HookPoint]
    clock: Clock
    attached: Owned[Attached] = field(default_factory=Owned)
    state_requests: Owned[PositionSet] = field(default_factory=Owned)
    recorders: Owned[Callable[[Record], None]] = field(default_factory=Owned)
    initial: Owned[Float[Tensor, "batch head d_key d_value"]] = field(default_factory=Owned)
    kernels: str = "native"
    n_calls: int | None = None

    @property
    def busy(self) -> bool:
        """Whether anybody would see or change anything in a call."""
        own = (self.attached, self.state_requests, self.recorders, self.initial)
        return any(map(bool, own)) or any(p.listening for p in self.points.values())

    @property
    def masks(self) -> bool:
        """Whether it keeps padding of the running pass out of the memory, which the model would not
        (`Family.ignores_padding`)."""
        return self.family.ignores_padding and self.clock.padding() is not None

    def takes(self, arguments: Iterable[Any]) -> bool:
        """Whether a call of the recurrence is the tap's, and not the native function's alone."""
        if self.kernels != "native" or self.busy or self.masks:
            return True
        needs = self.family.needs_memory
        return bool(needs) and any(isinstance(x, Tensor) and x.dtype in needs for x in arguments)

    def run(
        self, native: Callable[..., Any], arguments: dict[str, Any], here: Running, begin: Tensor | None = None
    ) -> Any:
        """The native call, with hooks and edits; from the state ``begin``, where the native one would forget it."""
        call = self.family.call(self.family, arguments)
        if begin is not None:
            call.start_from(begin)
        for state in self.initial.here():
            call.start_from(state)
        if self.family.ignores_padding and (padding := self.clock.padding()) is not None:
            call.leave_out(padding.to(device_of_call(call.arguments.values())))
        attached, requests, recorders = self.attached.here(), self.state_requests.here(), self.recorders.here()
        knockouts = [a for a in attached if a.targets is not None]
        attached = [a for a in attached if a.targets is None]
        for quantity in self.family.raw + self.family.rule.inputs:
            if self.points[quantity].listening:
                new = self.show(quantity, *call.to_show(quantity))
                if new is not None:
                    call.set(quantity, new)
        initial = call.initial_state
        if recorders and initial is not None:
            initial = initial.clone()  # the model's cache updates it in place
        hooked = self._write_hook(call)
        record = Record(initial, hooked, {}, hooked[0].write if hooked else None)
        # Layers may lie on several devices, and the model's inputs on another.
        device = device_of_call(call.arguments.values())
        if attached or requests:
            positions = self.clock.now.positions_on_cpu()
            at_once = (self._edit(a, call, positions, device) for a in attached if not a.what.needs_state)
            with full_precision(device):
                record.edits = hooked + [edit for edit in at_once if edit is not None]
                self._walk_states(
                    [a for a in attached if a.what.needs_state], requests, call, positions, device, record
                )
        write = call.write() if record.edits or record.dense or knockouts else None
        kept = kept_of(write, record.edits) if write else None
        hidden: list[Unread | None] = []
        if knockouts:
            with full_precision(device):
                hidden = [unread(a, call, record, len(hooked), self.clock.now) for a in knockouts]
        if kept is not None:
            v = call.get("v")
            call.set("v", v * kept[(..., *(None,) * (v.ndim - kept.ndim))])
        ours = self.kernels == "writesae" and call.get("v").shape[1] > 1  # for one token there is nothing to gain
        o, state = call.compute() if ours else call.run(native)
        here.shape = o.shape
        if write:
            with full_precision(o.device):
                o, state = respond(call.recurrence, write, record, o, state, [part for part in hidden if part])
        for recorder in recorders:
            recorder(record)
        new = self.show("o", o) if self.points["o"].listening else None
        return call.result(o if new is None else new, state)

    def show(
        self, quantity: str, given: Float[Tensor, "batch pos head ..."], ours: bool = False
    ) -> Float[Tensor, "batch pos head ..."] | None:
        """Fire a hook point: what its hooks made of the quantity, None if nothing. Padding stays as it was.

        ``ours``: the tensor was made for this call of `show`, so no copy of it need be made.
        """
        padding, unknown = self._padding(given.device)
        shown = given.clone() if padding is not None else given if ours else to_show(given)
        new, changed = self.points[quantity].fire(shown)
        if not changed:
            return None
        if unknown is not None:
            raise unknown
        if padding is not None:
            new = torch.where(padding[(..., *(None,) * (given.ndim - 2))], given, new)
        return new

    def _padding(self, device: torch.device | None) -> tuple[Bool[Tensor, "batch pos"] | None, ValueError | None]:
        """Which tokens of the call are padding, None if none is: what a hook does to these stays out of the model. Or
        the error, if that is not known, and a hook changes something."""
        try:
            padding = self.clock.padding()
        except ValueError as error:
            return None, error
        return None if padding is None else padding.to(device), None

    def _write_hook(self, call: KernelCall) -> list[Edit]:
        """A changed ``hook_write`` comes instead of the native write: its key need not be the erase key any more."""
        point = self.points["write"]
        if not point.listening:
            return []
        shown = call.write()
        own = replace(shown, key=shown.key.clone(), value=to_show(shown.value))  # the erase may share the key
        new, changed = point.fire(own)
        if not changed:
            return []
        instead = shown.value.new_ones(shown.shape)
        padding, unknown = self._padding(instead.device)
        if unknown is not None:
            raise unknown
        if padding is not None:
            instead = instead.masked_fill(padding[..., None], 0)
            new = new * instead
        return [Edit(None, new, "same", 0, instead)]

    def _edit(
        self, attached: Attached, call: KernelCall, positions: Int[Tensor, "batch pos"], device: torch.device
    ) -> Edit | None:
        """An edit that follows from the writes alone, all tokens at once; None if none of them is meant."""
        mask, index = attached.positions.match(positions)
        start = first_column(mask)
        if start is None:
            return None
        mask, index = sent(mask, device), sent(index, device)
        heads = some_of(attached.heads, self.site.n_heads)
        rec, write = call.recurrence(heads)[:, start:], call.write(heads)[:, start:]
        index = None if index is None else index[:, start:]
        made = attached.what.made(Moment(write, rec, index, delta_rank=self.family.rule.delta_rank))
        there = mask[:, start:, None].to(write.value.dtype)
        instead = there.expand(write.shape) if attached.what.replaces else None
        made = None if made is None else made * there
        return Edit(heads, made, attached.read, start, instead)

    def _walk_states(
        self,
        by_state: Sequence[Attached],
        requests: Sequence[PositionSet],
        call: KernelCall,
        positions: Int[Tensor, "batch pos"],
        device: torch.device,
        record: Record,
    ) -> None:
        """Edits that depend on the state, and ``hook_state``: from one such token to the next, states only there."""
        if not by_state and not requests:
            return
        matches = [(a, *a.positions.match(positions)) for a in by_state]
        asked = [(request, request.match(positions)[0]) for request in requests]
        masks = [mask for _, mask, _ in matches] + [mask for _, mask in asked]
        events: Bool[Tensor, " pos"] = torch.stack([mask.any(0) for mask in masks]).any(0)
        on_device = {
            id(x): sent(x, device) for x in (*masks, *(index for *_, index in matches))
        }  # once, not at each token

        rec, native = call.recurrence(), call.write()
        total = total_write(native, record.edits)
        S = first_state(rec, native, call.initial_state)
        made: dict[int, list[tuple[int, Write]]] = {id(a): [] for a in by_state}
        start = 0
        for t in events.nonzero()[:, 0].tolist():
            if t > start:
                _, S = chunked(rec[:, start:t], total[:, start:t], S)
            here = slice(t, t + 1)
            _, after = chunked(rec[:, here], total[:, here], S)
            for attached, mask, index in matches:
                if not mask[:, t].any():
                    continue
                h = index_of(attached.heads)
                now = Moment(
                    native[:, here][:, :, h],
                    rec[:, here][:, :, h],
                    None if index is None else on_device[id(index)][:, here],
                    S[:, h],
                    self.family.rule.delta_rank,
                )
                there = on_device[id(mask)][:, here, None].to(now.write.value.dtype)
                write = attached.what.made(now)
                write = now.write * 0.0 if write is None else write
                made[id(attached)].append((t, write * there))
                E = (write - now.write if attached.what.replaces else write) * there
                after = after.clone()
                after[:, h] += E.dense().squeeze(1)
            for request, mask in asked:
                rows = mask[:, t].nonzero()[:, 0]
                if len(rows):
                    at = sent(positions[rows, t], device)
                    after = self._state_hook(request, after, sent(rows, device), at, record, t)
            S, start = after, t + 1
        for attached, mask, _ in matches:
            if writes := made[id(attached)]:
                record.edits.append(
                    Edit.of_tokens(attached.heads, attached.read, writes, on_device[id(mask)], attached.what.replaces)
                )

    def _state_hook(
        self,
        request: PositionSet,
        S: Tensor,
        rows: Int[Tensor, " rows"],
        at: Int[Tensor, " rows"],
        record: Record,
        t: int,
    ) -> Tensor:
        shown = S[rows].unsqueeze(1)
        token = STATE_SHOWN.set((request, at))
        try:
            new, changed = self.points["state"].fire(shown.clone())
        finally:
            STATE_SHOWN.reset(token)
        if not changed:
            return S
        E = torch.zeros_like(S).index_copy(0, rows, (new - shown).squeeze(1))
        record.dense[t] = record.dense[t] + E if t in record.dense else E
        return S + E

    # Hooks of torch on the modules where all this happens. They are methods, so a deepcopy of a model has its own.

    @outside_graphs
    def enter(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the mixer, or the layer it is in: calls of the recurrence from here on are this mixer's."""
        if private():
            self.clock.check_thread()
        running.set(Running(self, running.get(), cache_in(kwargs)))
        if not self.family.forgets:
            return None
        mask, x = kwargs.get("attention_mask"), args[0] if args else kwargs.get("hidden_states")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or x is None or mask.shape[1] <= x.shape[1]:
            return None
        of_piece = mask[:, -x.shape[1] :]  # of what was a mask of all tokens so far
        return args, {**kwargs, "attention_mask": of_piece}

    @outside_graphs
    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """After it, also if it failed."""
        here = running.get()
        if here is not None and here.tap is self:
            running.set(here.outer)

    @outside_graphs
    def gate(self, _norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the gated norm. It is called as ``norm(o, z)`` with tokens and heads flattened together: that is where
        ``z`` is."""
        here = running.get()
        if not self.points["z"].listening or here is None:
            return None
        o, z, *rest = args
        new = self.show("z", z.reshape(here.shape))
        return None if new is None else (o, new.reshape(z.shape), *rest)


@dataclass(eq=False)
class Seen:
    """A quantity that is the output of a submodule of the mixer, heads side by side (`Family.seen_at`)."""

    tap: Tap
    quantity: str

    @outside_graphs
    def given(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """After the submodule."""
        if not self.tap.points[self.quantity].listening:
            return None
        new = self.tap.show(self.quantity, output.reshape(*output.shape[:2], self.tap.site.n_heads, -1))
        return None if new is None else new.reshape(output.shape)


def device_of_call(values: Iterable[Any]) -> torch.device:
    """Where the arguments of a call are."""
    return next(x.device for x in values if isinstance(x, Tensor))
