"""Points on the residual stream, of every layer: what enters it, what its mixer and its MLP add, and what leaves it.

    hook_resid_pre -> mixer -> hook_mixer_out -> MLP -> hook_mlp_out -> hook_resid_post          [batch, pos, d_model]

Layers are modules of the model, so these points only watch what modules take and return; no architecture needs a line
of its own. Where a layer scales what it adds (Granite, Falcon-H1), the mixer's and the MLP's output are what comes
before the scale; where a norm follows them (OLMo-Hybrid's attention), what comes after it. The mixer is the recurrent
one where a layer has two (Falcon-H1); a layer whose MLP is two modules beside each other (Granite's experts) or that
has none (Mamba-2) has no ``hook_mlp_out``. Streams of several lanes (Qwen4-Exp, GLM-5-Next) are shown as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from writesae.hooks.graphs import outside_graphs
from writesae.hooks.points import HookPoint, to_show
from writesae.hooks.scope import LOCK, Owned, owning

MIXERS = ("linear_attn", "self_attn", "mixer", "mamba", "attn")  # what a layer calls its mixer
MLPS = ("mlp", "feed_forward", "ffn")
NORM_AFTER = {"mixer_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def watch(layer: nn.Module, index: int, recurrent: nn.Module | None) -> dict[str, HookPoint]:
    """Give a layer its points ``{quantity: point}``, in firing order; ``recurrent`` is its recurrent mixer, if any."""
    watched = {"mixer_out": _mixer(layer, recurrent), "mlp_out": _child(layer, MLPS)}
    if all(hasattr(layer, norm) for norm in NORM_AFTER.values()):
        watched = {quantity: getattr(layer, norm) for quantity, norm in NORM_AFTER.items()}
    found = {quantity: module for quantity, module in watched.items() if module is not None}
    points = {quantity: HookPoint(index, quantity) for quantity in ("resid_pre", *found, "resid_post")}
    for quantity, point in points.items():
        layer.add_module(f"hook_{quantity}", point)
    layer.register_forward_pre_hook(Watch(points["resid_pre"]).taken, with_kwargs=True)
    layer.register_forward_hook(Watch(points["resid_post"]).given)
    for quantity, module in found.items():
        module.register_forward_hook(Watch(points[quantity]).given)
    return points


def _mixer(layer: nn.Module, recurrent: nn.Module | None) -> nn.Module | None:
    """The mixer, or what another tool has put around it in the layer; deeper in the layer, the recurrent one itself."""
    if recurrent is None:
        return _child(layer, MIXERS)
    around = (child for name, child in layer.named_children() if name in MIXERS)
    return next((child for child in around if any(module is recurrent for module in child.modules())), recurrent)


def _child(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(layer, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def stream_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The residual stream among the arguments of a layer: the first of them."""
    return args[0] if args else kwargs["hidden_states"]


@dataclass(eq=False)
class Watch:
    """Shows the stream to a point as a module takes or gives it. Its methods are hooks of torch on that module.

    A layer that does not run, since it is told what to give (`giving`), shows nothing: what it gives was shown before.
    """

    point: HookPoint

    @outside_graphs
    def taken(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Before a layer."""
        new = None if given(layer) else self._show(stream_in(args, kwargs))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    @outside_graphs
    def given(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """After a module, whose output is the stream, or a tuple whose first part is."""
        if given(module):
            return None
        if not isinstance(output, tuple):
            return self._show(output)
        new = self._show(output[0])
        return None if new is None else (new, *output[1:])

    def _show(self, stream: Tensor) -> Tensor | None:
        """What hooks made of the stream; None if they left it."""
        if not self.point.listening:
            return None
        new, changed = self.point.fire(to_show(stream))
        return new if changed else None


class Stopped(Exception):
    """Raised to leave a model's forward pass before its end; carries the residual stream."""

    def __init__(self, stream: Tensor):
        super().__init__("stopped")
        self.stream = stream


@contextmanager
def stop_at(layers: Sequence[nn.Module], index: int) -> Iterator[None]:
    """A pass stops before layer ``index`` with `Stopped`; ``len(layers)`` is after the last.

    Raises:
        IndexError: no such layer.
    """
    n = len(layers)
    if not -n <= index <= n:
        raise IndexError(f"stop_at_layer={index}: this model has layers 0 to {n - 1}; {n} stops after the last")

    with owning(everywhere=False) as call:

        def before(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if call.here:
                raise Stopped(stream_in(args, kwargs))

        def after(_layer: nn.Module, _args: Any, output: Any) -> None:
            if call.here:
                raise Stopped(output[0] if isinstance(output, tuple) else output)

        with LOCK:
            handle = (
                layers[-1].register_forward_hook(after)
                if index == n
                else layers[index].register_forward_pre_hook(before, with_kwargs=True)
            )
        with handle:
            yield


def given(module: nn.Module) -> bool:
    """Whether a module gives what `giving` says, here and now, instead of being run."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, _Forward) and bool(forward.outputs.here())


@contextmanager
def giving(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Layers (or a whole stack of them) give ``output`` without being run while the block runs, in the passes of its
    own thread or task."""
    with owning(everywhere=False) as call, ExitStack() as stack:
        for layer in layers:
            with LOCK:
                forward = layer.__dict__.get("forward")
                stand_in = forward if isinstance(forward, _Forward) else _Forward(layer, forward)
                layer.forward = stand_in  # type: ignore[method-assign]
                stack.callback(stand_in.restore)
                stack.enter_context(stand_in.outputs.added(output, call))
        yield


@dataclass(eq=False)
class _Forward:
    """In the place of a layer's ``forward``: gives what it is told to give, in the calls that it is told of.

    Attributes:
        layer: the layer.
        before: what another tool had put in that place, if any.
        outputs: what to give.
    """

    layer: nn.Module
    before: Any
    outputs: Owned[Any] = field(default_factory=Owned)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.outputs.here()
        if given:
            return given[-1]
        return self.before(*args, **kwargs) if self.before else type(self.layer).forward(self.layer, *args, **kwargs)

    def restore(self) -> None:
        """Leave the layer as it was, once nobody has anything to give."""
        with LOCK:
            if not self.outputs.all() and self.layer.__dict__.get("forward") is self:
                del self.layer.forward
                if self.before is not None:
                    self.layer.forward = self.before  # type: ignore[method-assign]
