"""Putting hooks into a model: taps at its recurrent mixers, points at its layers, a clock at its text model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from writesae.hooks import graphs
from writesae.hooks.attachment import attach, attached_to
from writesae.hooks.clock import Clock, cache_in
from writesae.hooks.dispatch import intercept
from writesae.hooks.families import FAMILIES, Family
from writesae.hooks.points import HookPoint
from writesae.hooks.positions import PositionSet
from writesae.hooks.residual import given, watch
from writesae.hooks.scope import Owned, Owner
from writesae.hooks.tap import Seen, Tap
from writesae.models.arguments import CACHES, check_no_packing
from writesae.models.kinds import why_not


def find_mixers(model: nn.Module) -> list[tuple[str, Any, Family]]:
    """The recurrent mixers of a model, wherever they sit: ``(path, module, family)`` in order of layers."""
    found: list[tuple[str, Any, Family]] = []
    for path, module in model.named_modules():
        for family in FAMILIES:
            if family.mixers.get(type(module).__module__) == type(module).__name__:
                if not hasattr(module, "layer_idx"):
                    vars(module)["layer_idx"] = int(path.rsplit(f"{family.layers}.", 1)[1].partition(".")[0])
                found.append((path, module, family))
    return sorted(found, key=lambda item: item[2].layer(item[1]))


def stack_of(model: nn.Module) -> tuple[Any, nn.ModuleList]:
    """The text model in a model with recurrent mixers, and its layers."""
    path, _, family = find_mixers(model)[0]
    text_model: Any = model.get_submodule(f".{path}".rsplit(f".{family.layers}.", 1)[0].removeprefix("."))
    return text_model, getattr(text_model, family.layers)


@dataclass(eq=False)
class Attachment:
    """All that is ours in a model. Kept on its text model.

    Attributes:
        clock: which positions the running pass has.
        taps: one at each recurrent mixer, in order of layers.
        points: of each layer, in firing order.
        stream: the positions at which the residual stream is edited.
        blocks: owners that want to know of forward passes.
    """

    clock: Clock
    taps: list[Tap]
    points: list[dict[str, HookPoint]]
    stream: Owned[PositionSet] = field(default_factory=Owned)
    blocks: Owned[Owner] = field(default_factory=Owned)

    @property
    def busy(self) -> bool:
        """Whether anybody would see or change anything in a pass."""
        return any(tap.busy for tap in self.taps) or any(
            point.listening for points in self.points for point in points.values()
        )

    @property
    def on_our_kernels(self) -> bool:
        """Whether its recurrences run on the kernels of `writesae.recurrence`."""
        return any(tap.kernels != "native" for tap in self.taps)

    @property
    def acts(self) -> bool:
        """Whether the running pass is another than that of a model that nobody wrapped."""
        return self.busy or self.on_our_kernels or self.taps[0].masks

    @torch.compiler.disable(reason=graphs.REASON)
    def begin(self, text_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before each pass of the text model: its arguments, with a cache that it takes (`Family.takes_cache`)."""
        if given(text_model):
            return args, kwargs
        kwargs = self._with_its_cache(text_model, args, kwargs)
        busy, mask = self.busy, kwargs.get("attention_mask")
        ours = busy or self.on_our_kernels
        if ours and (mask is None or getattr(mask, "ndim", 0) == 2):  # another does not say which tokens are padding
            check_no_packing(kwargs)
        for owner in self.blocks.all():
            owner.note(complete=False)
        self.clock.begin(args, kwargs, lambda: _calls_under_way(text_model) > 1, check=busy)
        graphs.begin(text_model, self.acts)
        if self.acts:
            self._check_uncut(text_model)
        return args, kwargs

    def _with_its_cache(self, text_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass, with a cache that the model takes."""
        take, config = self.taps[0].family.takes_cache, getattr(text_model, "config", None)
        if take is None:
            return kwargs
        cache, asked = cache_in(kwargs), kwargs.get("use_cache")
        if cache is None and not (getattr(config, "use_cache", False) if asked is None else asked):
            return kwargs
        given = {**dict(zip(self.clock.parameters, args, strict=False)), **kwargs}
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        others = {name: value for name, value in kwargs.items() if name not in CACHES}
        own = next((name for name in CACHES if name in self.clock.parameters), CACHES[0])
        return {**others, own: take(cache, text_model, tokens)}

    def _check_uncut(self, text_model: nn.Module) -> None:
        """Raise ValueError if the model would cut this pass into several within itself (`Family.cut_beyond`)."""
        name, config = self.taps[0].family.cut_beyond, getattr(text_model, "config", None)
        most, n_tokens = getattr(config, name, None), self.clock.now.n_tokens
        if most is not None and n_tokens > most and not text_model.training:
            raise ValueError(
                f"a pass of {n_tokens} tokens, which {type(text_model).__name__} would cut into pieces of {most} "
                f"within itself, where hooks and edits could not know which tokens they see: feed it in pieces with a "
                f"cache, or set model.config.{name} to {n_tokens} or more"
            )

    @torch.compiler.disable(reason=graphs.REASON)
    def end(self, text_model: nn.Module, _args: Any, output: Any) -> None:
        """After each pass, also if it failed."""
        if given(text_model):
            return
        graphs.end(text_model)
        if self.clock.end(output):
            graphs.begin(text_model, self.acts)
        if output is not None:
            for owner in self.blocks.all():
                owner.note(complete=True)


@dataclass(eq=False)
class Installed:
    """What `install` put into a model, and where.

    Attributes:
        ours: taps, points and clock.
        text_model: the module that they are kept on.
        layers: of the text model.
        mixers: the recurrent ones by their layer.
    """

    ours: Attachment
    text_model: nn.Module
    layers: list[nn.Module]
    mixers: dict[int, nn.Module]

    @property
    def taps(self) -> list[Tap]:
        return self.ours.taps

    @property
    def points(self) -> list[dict[str, HookPoint]]:
        return self.ours.points

    @property
    def clock(self) -> Clock:
        return self.ours.clock


def _calls_under_way(module: nn.Module) -> int:
    """How often the running code is inside a call of ``module``. (That torch ran its hooks before a call does not say
    that the call is not over: after Ctrl-C it runs none.)"""
    frame, n = inspect.currentframe(), 0
    while frame is not None:
        n += frame.f_code is _CALL and frame.f_locals["self"] is module
        frame = frame.f_back
    return n


_CALL = nn.Module._call_impl.__code__


def install(model: nn.Module) -> Installed:
    """Tap every recurrent mixer of ``model``, watch every layer (once; a second call finds the same taps and points).

    Raises:
        ValueError: no recurrent layer in it.
        RuntimeError: a modeling file lacks the functions to intercept.
    """
    found = find_mixers(model)
    if not found:
        raise ValueError(why_not(model, (name for family in FAMILIES for name in family.mixers.values())))
    paths: dict[int, str] = {}
    for path, mixer, family in found:
        if (first := paths.setdefault(family.layer(mixer), path)) != path:
            raise ValueError(
                f"layer {family.layer(mixer)} has two mixers, {first} and {path}, and one of them does not run: PEFT's "
                f"modules_to_save keeps such copies; take mixers out of it, or call merge_and_unload() first"
            )
    for name, family in {type(mixer).__module__: family for _, mixer, family in found}.items():
        intercept(name, family)
    text_model, stack = stack_of(model)
    layers = [_inside(layer) for layer in stack]
    ours = attached_to(text_model, Attachment)
    if ours is None:
        ours = _attach(text_model, layers, [(mixer, family) for _, mixer, family in found])
    return Installed(ours, text_model, layers, {family.layer(mixer): mixer for _, mixer, family in found})


def _inside(layer: nn.Module) -> nn.Module:
    """The layer itself, where TransformerLens' bridge has put a block around it."""
    return layer._modules.get("_original_component") or layer


def _attach(text_model: Any, layers: Sequence[nn.Module], mixers: Sequence[tuple[nn.Module, Family]]) -> Attachment:
    torch.compiler.reset()  # graphs made until now know nothing of what follows
    ours = Attachment(Clock.of(text_model), [], [])
    text_model.register_forward_pre_hook(ours.begin, with_kwargs=True)
    text_model.register_forward_hook(ours.end, always_call=True)
    recurrent = {family.layer(mixer): mixer for mixer, family in mixers}
    ours.points = [watch(layer, index, recurrent.get(index)) for index, layer in enumerate(layers)]
    for mixer, family in mixers:
        index = family.layer(mixer)
        tap = _tap(mixer, family, ours.clock)
        # The layer, too: TransformerLens' bridge calls the parts of a mixer, and not the mixer. It may come later.
        for module in (layers[index], mixer):
            module.register_forward_pre_hook(tap.enter, with_kwargs=True)
            module.register_forward_hook(tap.leave, always_call=True)
        ours.taps.append(tap)
        before, *after = ours.points[index].items()
        ours.points[index] = dict([before, *tap.points.items(), *after])
    attach(text_model, ours)
    return ours


def _tap(mixer: nn.Module, family: Family, clock: Clock) -> Tap:
    site = family.site(mixer)
    points = {quantity: HookPoint(site.layer, quantity) for quantity in family.quantities(mixer)}
    for quantity, point in points.items():
        mixer.add_module(f"hook_{quantity}", point)
    tap = Tap(site, family, points, clock, n_calls=family.n_calls(mixer))
    norm = family.gate_norm(mixer)
    if norm is not None:
        norm.register_forward_pre_hook(tap.gate)
    for quantity, name in family.seen_at.items():
        if quantity in points:
            mixer.get_submodule(name).register_forward_hook(Seen(tap, quantity).given)
    return tap
