"""Between a model and its recurrence: the thin dispatcher that gives hooks and edits to native code left untouched.

Mixers of these families call functions of their modeling file (``torch_chunk_gated_delta_rule``, ...). `install` puts a
dispatcher in the place of each, which asks one question: is a tapped mixer running, with anything attached? If not, the
native function runs as before. If so, the mixer's `Tap` shows the canonical quantities to its hook points, runs the
native function on what comes back, and adds the **linear response** of the edits to its result: since decay and erase
do not depend on the state, an edit ``E`` changes outputs and states by the same recurrence run on ``E`` alone, for the
edited heads only and from the first edited token on.

A native write that an edit takes out is not subtracted afterwards but never made: the native function gets ``v = 0``
there. A difference of nearly equal numbers would leave rounding errors, which the norm behind the recurrence blows up.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae.hooks import graphs
from writesae.hooks.families import FAMILIES, Family, KernelCall
from writesae.hooks.graphs import outside_graphs
from writesae.hooks.interventions import Intervention, Moment
from writesae.hooks.points import HookPoint, to_show
from writesae.hooks.positions import PAD, Clock, PositionSet
from writesae.hooks.residual import watch
from writesae.hooks.sites import Site
from writesae.recurrence import Read, Write, at_least_float32, first_state
from writesae.recurrence.kernels import chunked

_running: ContextVar[Tap | None] = ContextVar("running_tap", default=None)
_short: ContextVar[bool] = ContextVar("short_chunks", default=False)


SHORT = 32  # tokens


@contextmanager
def short_chunks() -> Iterator[None]:
    """Torch functions that work in chunks (mostly of 64 tokens) take chunks of at most `SHORT` tokens while the block
    runs, as few and as short as a call needs.

    They fill every call up to whole chunks with nothing, which is most of the work for short pieces of many sequences.
    Results move by rounding alone.
    """
    token = _short.set(True)
    try:
        yield
    finally:
        _short.reset(token)


@dataclass(eq=False)
class Attached:
    """An intervention in force: what, at which positions, and which read first sees it."""

    what: Intervention
    heads: list[int]
    positions: PositionSet
    read: Read


@dataclass
class Edit:
    """What was written in one call: to some heads (None: all), from token ``start`` on; instead of the native write
    where ``instead`` is 1, else beside it."""

    heads: tuple[int, ...] | None
    write: Write | None  # [batch, pos, head]
    read: Read
    start: int
    instead: Float[Tensor, "batch pos head"] | None = None

    @property
    def index(self) -> tuple[Any, ...]:
        """Its heads and tokens, in something that has all of them ``[batch, pos, head]``."""
        return slice(None), slice(self.start, None), slice(None) if self.heads is None else list(self.heads)

    def to(self, device: torch.device | str) -> Edit:
        """The same on another device."""
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        return replace(self, write=move(self.write), instead=move(self.instead))


@dataclass
class Record:
    """What, beside the canonical quantities, one call's states depend on. See `ActivationCache.state`."""

    initial_state: Float[Tensor, "batch head d_key d_value"] | None
    edits: list[Edit]
    dense: dict[int, Float[Tensor, "batch head d_key d_value"]]
    write: Write | None  # what hooks made of the native write

    def to(self, device: torch.device | str) -> Record:
        """The same on another device."""
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        dense = {t: E.to(device) for t, E in self.dense.items()}
        return Record(move(self.initial_state), [edit.to(device) for edit in self.edits], dense, move(self.write))


@dataclass(eq=False)
class Tap:
    """Everything attached to one mixer. Lives on the mixer as ``mixer.writesae_tap``."""

    site: Site
    family: Family
    points: dict[str, HookPoint]
    clock: Clock
    attached: list[Attached] = field(default_factory=list)
    state_requests: list[PositionSet] = field(default_factory=list)
    recorders: list[Callable[[Record], None]] = field(default_factory=list)
    shape: tuple[int, ...] = ()  # of the running call's output, [batch, pos, head, d_value]
    device: torch.device | None = None  # where that call runs; layers may lie on several

    @property
    def busy(self) -> bool:
        return bool(
            self.attached or self.state_requests or self.recorders or any(p.listening for p in self.points.values())
        )

    def run(self, native: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The native call, with hooks and edits."""
        self.device = _device(arguments.values())
        call = self.family.call(self.family, arguments)
        for quantity in self.family.raw + self.family.rule.inputs:
            if self.points[quantity].listening:
                new = self.show(quantity, call.get(quantity))
                if new is not None:
                    call.set(quantity, new)
        initial = call.initial_state
        if self.recorders and initial is not None:
            initial = initial.clone()  # the model's cache updates it in place
        hooked = self._write_hook(call)
        record = Record(initial, hooked + self._edits(call), {}, hooked[0].write if hooked else None)
        self._walk_states(call, record)
        write = call.write() if record.edits or record.dense else None
        kept = kept_of(write, record.edits) if write else None
        if kept is not None:
            call.set("v", call.get("v") * kept[..., None])
        o, state = call.run(native)
        self.shape = o.shape
        if write:
            o, state = respond(call, write, record, o, state)
        for recorder in self.recorders:
            recorder(record)
        new = self.show("o", o) if self.points["o"].listening else None
        return call.result(o if new is None else new, state)

    def show(self, quantity: str, given: Float[Tensor, "batch pos head ..."]) -> Tensor | None:
        """Fire a hook point: what its hooks made of the quantity, None if nothing. Padding stays as it was."""
        padding = self._padding(given.device)
        new, changed = self.points[quantity].fire(to_show(given) if padding is None else given.clone())
        if not changed:
            return None
        if padding is not None:
            new = torch.where(padding[(..., *(None,) * (given.ndim - 2))], given, new)  # type: ignore[arg-type]
        return new  # type: ignore[return-value]

    def _padding(self, device: torch.device | None) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens of the call are padding, None if none is. What a hook does to these stays out of the model."""
        padding = self.clock.padding()
        return None if padding is None else padding.to(device)

    def _write_hook(self, call: KernelCall) -> list[Edit]:
        """A changed ``hook_write`` comes instead of the native write: its key need not be the erase key any more."""
        point = self.points["write"]
        if not point.listening:
            return []
        shown = call.write()
        new, changed = point.fire(Write(shown.key.clone(), to_show(shown.value)))  # the erase may share the key
        if not changed:
            return []
        instead, padding = torch.ones_like(shown.value[..., 0]), self._padding(self.device)
        if padding is not None:
            instead = instead.masked_fill(padding[..., None], 0)
            new = new * instead  # type: ignore[operator]
        return [Edit(None, new, "same", 0, instead)]  # type: ignore[arg-type]

    def _edits(self, call: KernelCall) -> list[Edit]:
        """Edits that follow from the writes alone: all tokens at once."""
        edits = []
        for attached in self.attached:
            if attached.what.needs_state:
                continue
            mask, index = attached.positions.match(self.clock.positions().to(self.device))
            start = _first_column(mask)
            if start is None:
                continue
            heads = None if attached.heads == list(range(self.site.n_heads)) else attached.heads
            rec, write = call.recurrence(heads)[:, start:], call.write(heads)[:, start:]
            index = None if index is None else index[:, start:]
            made = attached.what.edit(Moment(write, rec, index, delta_rank=self.family.rule.delta_rank))
            there = mask[:, start:, None].to(write.value.dtype)
            instead = there.expand(write.shape) if attached.what.replaces else None
            made = None if made is None else made * there
            edits.append(Edit(None if heads is None else tuple(heads), made, attached.read, start, instead))
        return edits

    def _walk_states(self, call: KernelCall, record: Record) -> None:
        """Edits that depend on the state, and ``hook_state``: from one such token to the next, states only there."""
        by_state = [a for a in self.attached if a.what.needs_state]
        if not by_state and not self.state_requests:
            return
        positions = self.clock.positions().to(self.device)
        matches = [(a, *a.positions.match(positions)) for a in by_state]
        asked = [(request, request.match(positions)[0]) for request in self.state_requests]
        events: Bool[Tensor, " pos"] = torch.stack([m.any(0) for _, m, *_ in matches + asked]).any(0)  # type: ignore[operator]

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
                h = attached.heads
                now = Moment(
                    native[:, here][:, :, h],
                    rec[:, here][:, :, h],
                    None if index is None else index[:, here],
                    S[:, h],
                    self.family.rule.delta_rank,
                )
                there = mask[:, here, None].to(now.write.value.dtype)
                write = attached.what.edit(now) or now.write * 0.0
                made[id(attached)].append((t, write * there))
                E = (write - now.write if attached.what.replaces else write) * there
                after = after.index_add(1, torch.tensor(h, device=S.device), E.dense().squeeze(1))
            for request, mask in asked:
                rows = mask[:, t].nonzero()[:, 0]
                if len(rows):
                    after = self._state_hook(request, after, rows, positions[rows, t], record, t)
            S, start = after, t + 1
        for attached, mask, _ in matches:
            record.edits += [_spread(attached, made[id(attached)], mask)] if made[id(attached)] else []

    def _state_hook(
        self,
        request: PositionSet,
        S: Tensor,
        rows: Int[Tensor, " rows"],
        at: Int[Tensor, " rows"],
        record: Record,
        t: int,
    ) -> Tensor:
        point = self.points["state"]
        point.request, point.positions = request, at  # type: ignore[assignment]
        shown = S[rows].unsqueeze(1)
        new, changed = point.fire(shown.clone())
        if not changed:
            return S
        E = torch.zeros_like(S).index_copy(0, rows, (new - shown).squeeze(1))  # type: ignore[operator]
        record.dense[t] = record.dense[t] + E if t in record.dense else E
        return S + E


def kept_of(native: Write, edits: Sequence[Edit]) -> Float[Tensor, "batch pos head"] | None:
    """How much of each write is left by edits that come instead: 1, 0, or -1 if there are two. None if all is."""
    if all(edit.instead is None for edit in edits):
        return None
    kept = torch.ones_like(native.value[..., 0])
    for edit in edits:
        if edit.instead is not None:
            kept[edit.index] -= edit.instead
    return kept


def respond(
    call: KernelCall, native: Write, record: Record, o: Tensor, state: Tensor | None
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """Add the linear response of all edits to the outputs and final state of what is left of the native writes."""
    groups: dict[tuple[Any, ...], list[Edit]] = {}
    responses: list[tuple[Any, int, Tensor, Tensor | None]] = []
    for edit in record.edits:
        if edit.write is not None:
            groups.setdefault((edit.heads, edit.read), []).append(edit)
        if edit.instead is not None and edit.read == "next":  # the token's own read still sees the native write
            keys, values = (native[edit.index] * edit.instead).factors()
            q = call.recurrence(edit.heads).q[:, edit.start :]
            responses.append((edit.heads, edit.start, ((keys @ q[..., None]) * values).sum(-2), None))
    for (heads, read), edits in groups.items():
        start = min(edit.start for edit in edits)
        rec = call.recurrence(heads)[:, start:]
        write = _sum_from(edits, start)
        responses.append((heads, start, *chunked(rec, write, read=read)))
    if record.dense:
        rec = call.recurrence()
        responses.append((None, 0, *chunked(rec, native * 0.0, dense=record.dense)))
    dtype, o = o.dtype, at_least_float32(o).clone()  # rounded once, when all is added
    for heads, start, extra, extra_state in responses:
        o[:, start:, slice(None) if heads is None else list(heads)] += extra
        if state is not None and extra_state is not None:
            state = (
                state + extra_state
                if heads is None
                else state.index_add(1, torch.tensor(heads, device=state.device), extra_state.to(state.dtype))
            )
    return o.to(dtype), state


def total_write(native: Write, edits: Sequence[Edit]) -> Write:
    """What is left of the native write, and all edits, as one write of higher rank, all heads and tokens."""
    kept = kept_of(native, edits)
    total = native if kept is None else native * kept
    for edit in edits:
        if edit.write is None:
            continue
        rank, full = edit.write.rank, []
        for x in edit.write.factors():
            wide = x.new_zeros(*native.shape, *x.shape[-2:])
            wide[edit.index] = x
            full.append(wide if rank > 1 else wide.squeeze(-2))
        total = total + Write(*full, rank=rank)
    return total


def _sum_from(edits: Sequence[Edit], start: int) -> Write:
    """The sum of edits of the same heads, over the tokens from ``start`` on."""
    padded = []
    for edit in edits:
        assert edit.write is not None
        factors = (edit.write.key, edit.write.value)
        before = [x.new_zeros(x.shape[0], edit.start - start, *x.shape[2:]) for x in factors]
        key, value = (torch.cat(pair, 1) for pair in zip(before, factors, strict=True))
        padded.append(Write(key, value, edit.write.rank))
    return functools.reduce(lambda x, y: x + y, padded)


def _spread(attached: Attached, made: list[tuple[int, Write]], mask: Bool[Tensor, "batch pos"]) -> Edit:
    """Edits of single tokens as one edit over all tokens from the first on."""
    start, first = made[0]
    where = torch.tensor([t - start for t, _ in made], device=mask.device)

    def spread(x: Tensor, parts: list[Tensor]) -> Tensor:
        return x.new_zeros(x.shape[0], mask.shape[1] - start, *x.shape[2:]).index_copy(1, where, torch.cat(parts, 1))

    write = Write(
        spread(first.key, [w.key for _, w in made]), spread(first.value, [w.value for _, w in made]), first.rank
    )
    instead = mask[:, start:, None].to(write.value.dtype).expand(write.shape) if attached.what.replaces else None
    return Edit(tuple(attached.heads), write, attached.read, start, instead)


def _device(values: Iterable[Any]) -> torch.device:
    return next(x.device for x in values if isinstance(x, Tensor))


def _first_column(mask: Bool[Tensor, "batch pos"]) -> int | None:
    columns = mask.any(0)
    return int(columns.int().argmax()) if bool(columns.any()) else None


# --- installing -------------------------------------------------------------------------------------------------------


def find_mixers(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """The recurrent mixers of a model, wherever they sit: ``(path, module, family)`` in order of layers."""
    found = []
    for path, module in model.named_modules():
        for family in FAMILIES:
            if family.mixers.get(type(module).__module__) == type(module).__name__:
                found.append((path, module, family))
    return sorted(found, key=lambda item: int(item[1].layer_idx))  # type: ignore[arg-type]


@dataclass
class Installed:
    """What `install` put into a model: a tap at every recurrent mixer, and points at every layer by its index."""

    taps: list[Tap]
    points: list[dict[str, HookPoint]]
    layers: list[nn.Module]
    text_model: nn.Module
    clock: Clock


def install(model: nn.Module) -> Installed:
    """Tap every recurrent mixer of ``model``, watch every layer (once; a second call finds the same taps and points).

    Raises:
        ValueError: no recurrent layer in it.
        RuntimeError: this transformers release lacks the functions to intercept.
    """
    mixers = find_mixers(model)
    if not mixers:
        known = sorted(name for family in FAMILIES for name in family.mixers.values())
        raise ValueError(
            f"{type(model).__name__} has no recurrent layer that writesae knows; known mixers: {', '.join(known)}"
        )
    paths: dict[Any, str] = {}
    for path, mixer, _ in mixers:
        if (first := paths.setdefault(mixer.layer_idx, path)) != path:
            raise ValueError(
                f"layer {mixer.layer_idx} has two mixers, {first} and {path}, and one of them does not run: PEFT's "
                f"modules_to_save keeps such copies; take mixers out of it, or call merge_and_unload() first"
            )
    for name, family in {type(mixer).__module__: family for _, mixer, family in mixers}.items():
        _intercept(name, family)
    text_model = model.get_submodule(f".{mixers[0][0]}".rsplit(".layers.", 1)[0].removeprefix("."))
    layers = [_inside(layer) for layer in text_model.layers]  # type: ignore[union-attr]
    if not hasattr(text_model, "writesae_clock"):
        torch.compiler.reset()  # graphs made until now know nothing of what follows
        text_model.writesae_clock = Clock.of(text_model)  # type: ignore[assignment]
        text_model.register_forward_pre_hook(_begin, with_kwargs=True)
        text_model.register_forward_hook(_end, always_call=True)
        recurrent = {int(mixer.layer_idx): mixer for _, mixer, _ in mixers}  # type: ignore[arg-type]
        for index, layer in enumerate(layers):
            watch(layer, index, recurrent.get(index))
        for _, mixer, family in mixers:
            _tap(mixer, layers[int(mixer.layer_idx)], family, text_model.writesae_clock)  # type: ignore[arg-type]
    taps: Any = [mixer.writesae_tap for _, mixer, _ in mixers]
    points = [_points(layer, index, taps) for index, layer in enumerate(layers)]
    return Installed(taps, points, layers, text_model, taps[0].clock)


def _inside(layer: nn.Module) -> nn.Module:
    """The layer itself, where TransformerLens' bridge has put a block around it."""
    return layer._modules.get("_original_component") or layer


def _points(layer: nn.Module, index: int, taps: Sequence[Tap]) -> dict[str, HookPoint]:
    """All points of a layer, in firing order."""
    before, *after = layer.writesae_points.items()  # type: ignore[operator, union-attr]
    of_mixer = next((tap.points for tap in taps if tap.site.layer == index), {})
    return dict([before, *of_mixer.items(), *after])


def _tap(mixer: nn.Module, layer: nn.Module, family: Family, clock: Clock) -> None:
    site = family.site(mixer)
    points = {quantity: HookPoint(site.layer, quantity) for quantity in family.quantities(mixer)}
    for quantity, point in points.items():
        mixer.add_module(f"hook_{quantity}", point)
    tap = mixer.writesae_tap = Tap(site, family, points, clock)  # type: ignore[assignment]
    layer.writesae_tap = tap  # type: ignore[assignment]
    # The layer, too: TransformerLens' bridge calls the parts of a mixer, and not the mixer.
    for module in (layer, mixer):
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    norm = family.gate_norm(mixer)
    if norm is not None:
        norm.writesae_tap = tap  # type: ignore[assignment]
        norm.register_forward_pre_hook(_gate)
    for quantity, name in family.seen_at.items():
        if quantity in points:
            module = mixer.get_submodule(name)
            module.writesae_tap, module.writesae_quantity = tap, quantity  # type: ignore[assignment]
            module.register_forward_hook(_seen)


# Hooks find what is theirs on the module they run on, so that a deepcopy of a model has its own.


@torch.compiler.disable(reason=graphs.REASON)
def _begin(text_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    graphs.begin(text_model)
    text_model.writesae_clock.begin(args, kwargs)  # type: ignore[union-attr, operator]


@torch.compiler.disable(reason=graphs.REASON)
def _end(text_model: nn.Module, _args: Any, output: Any) -> None:
    graphs.end(text_model)
    text_model.writesae_clock.end(output)  # type: ignore[union-attr, operator]


@outside_graphs
def _enter(module: nn.Module, _args: Any) -> None:
    _running.set(module.writesae_tap)  # type: ignore[arg-type]


@outside_graphs
def _leave(_module: nn.Module, _args: Any, _output: Any) -> None:
    _running.set(None)


@outside_graphs
def _gate(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The gated norm is called as ``norm(o, z)`` with tokens and heads flattened together: that is where ``z`` is."""
    tap: Tap = norm.writesae_tap  # type: ignore[assignment]
    if not tap.points["z"].listening:
        return None
    o, z, *rest = args
    new = tap.show("z", z.reshape(tap.shape))
    return None if new is None else (o, new.reshape(z.shape), *rest)


@outside_graphs
def _seen(module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
    """A quantity that is a submodule's output, heads side by side."""
    tap: Tap = module.writesae_tap  # type: ignore[assignment]
    quantity: str = module.writesae_quantity  # type: ignore[assignment]
    if not tap.points[quantity].listening:
        return None
    new = tap.show(quantity, output.reshape(*output.shape[:2], tap.site.n_heads, -1))
    _running.set(tap)  # a hook may have run another model, and the recurrence is still to come
    return None if new is None else new.reshape(output.shape)


def _intercept(module_name: str, family: Family) -> None:
    module = importlib.import_module(module_name)
    for name in family.kernels + family.fused + family.helpers:
        function = getattr(module, name, None)
        if function is None:
            if name not in family.kernels:
                continue
            raise RuntimeError(
                f"transformers {transformers.__version__} has no {name} in {module_name}, which writesae intercepts; "
                f"install transformers>=5.15 (tested with the version in constraints.txt)"
            )
        if not hasattr(function, "writesae_native"):
            setattr(module, name, _dispatcher(function, name in family.kernels, name in family.fused))


def _dispatcher(function: Callable[..., Any], tapped: bool, fused: bool) -> Callable[..., Any]:
    """Stand-in for a function of a modeling file.

    transformers binds these at import to whatever GPU package is installed, also for models on a CPU, where such
    kernels crash. Here the tensors' device decides: on a CPU the torch function runs.
    """
    torch_function = inspect.unwrap(function)
    signature = inspect.signature(torch_function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        packed = [name for name in ("cu_seqlens", "seq_idx") if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{torch_function.__name__} cannot keep packed sequences ({packed[0]}) apart on a CPU")
        if not takes_any:
            kwargs = {name: value for name, value in kwargs.items() if name in signature.parameters}
        if _short.get() and "chunk_size" in signature.parameters:
            call = signature.bind_partial(*args, **kwargs)
            call.apply_defaults()
            n_pos = next(iter(call.arguments.values())).shape[1]
            n_chunks = -(-n_pos // min(call.arguments["chunk_size"], SHORT))
            call.arguments["chunk_size"] = -(-n_pos // n_chunks)
            return torch_function(*call.args, **call.kwargs)
        return torch_function(*args, **kwargs)

    def native_of(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return on_cpu if _device((*args, *kwargs.values())).type == "cpu" else function

    def untapped(*args: Any, **kwargs: Any) -> Any:
        return native_of(*args, **kwargs)(*args, **kwargs)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        native = native_of(*args, **kwargs)
        tap = _running.get()
        if tap is None or not tap.busy:
            return native(*args, **kwargs)
        if fused:
            return None
        given = signature.bind_partial(*args).arguments

        def by_place(**arguments: Any) -> Any:  # as they came: GPU packages have other names for the first arguments
            first = [arguments.pop(name) for name in given]
            return native(*first, **arguments)

        _running.set(None)  # a hook may run another model, which is not this mixer
        result = tap.run(by_place, {**given, **kwargs})
        _running.set(tap)
        return result

    stand_in = outside_graphs(dispatch, untapped) if tapped or fused else untapped
    functools.update_wrapper(stand_in, function)
    stand_in.writesae_native = function  # type: ignore[attr-defined]
    return stand_in


__all__ = [
    "PAD", "Attached", "Edit", "Installed", "Record", "Tap", "find_mixers", "install", "kept_of", "respond",
    "total_write",
]  # fmt: skip
