"""What each part of a model adds to a logit by the direct path: along the residual stream, and through nothing else.

Every layer adds to the residual stream, and the final norm and the unembedding read it. With the norm's scale held
fixed, that is an affine map, so a logit is the sum of what each part adds to it: the embedding, each mixer, each MLP,
and a bias (direct logit attribution; Elhage et al. 2021, TransformerLens' ``logit_attrs``). What a part changes by way
of later parts is not in it.

No architecture needs a line of its own. In a pass under `direct_paths`, whatever a layer hands to a module of its own
is cut off from gradients. What is left of the graph is the residual stream itself, with whatever a model does to it on
its way (multipliers, several lanes), and the gradient of a logit is the direct path.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from writesae.futures.parts import map_tensors
from writesae.gradients import Logit
from writesae.gradients.norms import FixedScale
from writesae.hooks import HookPoint, find_mixers, name_of
from writesae.hooks.installing import stack_of
from writesae.hooks.scope import Owner, owning
from writesae.model import HookedRecurrentModel
from writesae.model.late_logits import LateLogits
from writesae.models.wrappers import bare
from writesae.recurrence.write import wide

EMBEDDING, BIAS = "embedding", "bias"
PRE_NORM = "pre_norm"  # RWKV-7 normalises its embedding in its first layer


@dataclass(frozen=True, eq=False)
class Part:
    """Something that was added to the residual stream.

    Attributes:
        layer: its layer; None for the embedding.
        name: the module's name in its layer, such as ``linear_attn`` or ``mlp``.
        value: what it gave.
        given: the same, with the graph of how it was made of what heads read.
        probe: zeros added to that; a gradient with respect to them is one with respect to the part.
    """

    layer: int | None
    name: str
    value: Float[Tensor, "batch pos ..."]
    given: Float[Tensor, "batch pos ..."]
    probe: Float[Tensor, "batch pos ..."]

    @classmethod
    def of(cls, layer: int | None, name: str, value: Tensor) -> Part:
        return cls(layer, name, value.detach(), value, torch.zeros_like(value).requires_grad_())

    def contribution(self, gradient: Tensor) -> Float[Tensor, " batch"]:
        """What it adds to the number that the gradient is of."""
        return wide(self.value * gradient).flatten(1).sum(1)


class DirectScale(FixedScale):
    """While it is active, no gradient passes through the scale of a norm, nor through gates that weigh lanes of the
    residual stream (Qwen4-Exp has them at its end)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.sigmoid, Tensor.sigmoid):
            return func(*args, **kwargs or {}).detach()
        return super().__torch_function__(func, types, args, kwargs)


@dataclass(eq=False)
class Paths:
    """The parts of a pass, and the biases behind the last layer, as tensors to differentiate by.

    Attributes:
        parts: in the order in which they were added.
        biases: those that are in no layer.
        end: what the last layer gave, normalised.
    """

    parts: list[Part]
    biases: list[nn.Parameter]
    end: LateLogits

    def tensors(self) -> list[Tensor]:
        return [part.probe for part in self.parts] + list(self.biases)

    def of_mixer(self, model: HookedRecurrentModel, layer: int) -> list[Part]:
        """What the recurrent mixer of a layer gave."""
        name = mixer_names(model)[layer]
        return [part for part in self.parts if (part.layer, part.name) == (layer, name)]

    def contributions(self, gradients: list[Tensor | None]) -> tuple[list[tuple[Part, Tensor]], Float[Tensor, ""]]:
        """What each part that reaches the number adds to it ``[batch]``, and what the biases do."""
        n = len(self.parts)
        found = [(p, p.contribution(g)) for p, g in zip(self.parts, gradients[:n], strict=True) if g is not None]
        biases = [wide(b.detach() * g).sum() for b, g in zip(self.biases, gradients[n:], strict=True) if g is not None]
        return found, torch.stack(biases).sum() if biases else torch.zeros(())


@contextmanager
def direct_paths(model: HookedRecurrentModel) -> Iterator[Paths]:
    """Gradients of a pass in the block go along the residual stream alone, norms with their scale as it was."""
    layers = layers_of(model)
    mixers = [mixer for _, mixer, _ in find_mixers(model.hf_model)]
    of_stream = {name for _, _, family in find_mixers(model.hf_model) for name in family.stream_norms}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    named = model.hf_model.named_parameters()
    biases = [p for name, p in named if name.endswith("bias") and p.ndim == 1 and id(p) not in inside]
    whole: Any = bare(model.hf_model)
    paths, wanted = Paths([], biases, LateLogits(whole)), [p.requires_grad for p in biases]

    def embedding(x: Tensor, hook: HookPoint) -> Tensor:
        for p in biases:
            p.requires_grad_(True)
        paths.parts.append(Part.of(None, EMBEDDING, x))
        return x.detach() + paths.parts[-1].probe

    def keep(_stack: nn.Module, _args: Any, output: Any) -> None:
        if call.here and paths.end.output is None:  # later calls make logits of it
            paths.end.output = output

    with ExitStack() as stack:
        call = stack.enter_context(owning(everywhere=False))
        stack.callback(whole.base_model.register_forward_hook(keep).remove)
        seen: set[int] = set()
        for index, layer in enumerate(layers):
            for name, module in modules_of(layer, mixers):
                if id(module) not in seen and name not in of_stream:  # Zamba2 has one transformer in several layers
                    seen.add(id(module))
                    _cut_off(stack, call, paths.parts, index, name, module)
        stack.enter_context(model.hooks([(name_of("resid_pre", 0), embedding)]))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # graphs know nothing of all this
        stack.enter_context(DirectScale())
        try:
            yield paths
        finally:
            for p, before in zip(biases, wanted, strict=True):
                p.requires_grad_(before)


def reading(end: LateLogits, of: Logit) -> Float[Tensor, " d_model"]:
    """The vector that reads a logit, or a difference, off the normalised stream behind the last layer.

    Raises:
        ValueError: there is none, since logits are not linear in it.
    """
    x = end.output.last_hidden_state[:1, -1:].detach()
    points = torch.cat([x, 2 * x, torch.zeros_like(x)], 1).requires_grad_()
    output = copy.copy(end.output)
    output.last_hidden_state = points
    columns = torch.arange(3, device=x.device)
    with torch.enable_grad():
        found = replace(of, at=0)(LateLogits(end.model, output).at(torch.zeros_like(columns), columns)[:, None])
        (slopes,) = torch.autograd.grad(found.sum(), points)
    here, twice, zero = found.detach()
    if (twice - 2 * here + zero).abs() > max(1e-4, 16 * torch.finfo(x.dtype).eps) * (1 + twice.abs() + here.abs()):
        raise ValueError(
            "logits are not linear in what the last layer gives (a softcap), so no vector reads one off, and nothing "
            "can be attributed to it directly"
        )
    return slopes[0, 0]


def layers_of(model: HookedRecurrentModel) -> list[nn.Module]:
    """The layers that the residual stream goes through."""
    return list(stack_of(model.hf_model)[1])


def modules_of(module: nn.Module, mixers: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a layer hands its stream to. One with a mixer somewhere in it is a layer itself (Zamba2)."""
    for name, child in module.named_children():
        if isinstance(child, HookPoint):
            continue
        if any(child is not mixer and any(mixer is m for m in child.modules()) for mixer in mixers):
            yield from modules_of(child, mixers)
        else:
            yield name, child


def _cut_off(stack: ExitStack, call: Owner, parts: list[Part], layer: int, name: str, module: nn.Module) -> None:
    """What goes into the module carries no gradient, and what comes out of it is a part; not so if it has another width
    than what went in, as the weights of lanes have (GLM-5-Next)."""
    handed: dict[int, tuple[Tensor, Tensor]] = {}  # what it was given, and what that was cut off from

    def cut(x: Tensor) -> Tensor:
        made = x.detach()
        handed[id(made)] = made, x
        return made

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not call.here:
            return None
        handed.clear()
        return map_tensors(cut, args), {key: map_tensors(cut, x) for key, x in kwargs.items()}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not call.here:
            return None
        several = isinstance(output, tuple)
        values = [handed.get(id(x), (x, x))[1] for x in (output if several else [output])]  # the stream handed through
        first, widths = values[0], {x.shape[-1] for x, _ in handed.values() if x.ndim}
        if isinstance(first, Tensor) and first.is_floating_point() and first.shape[-1] in widths:
            parts.append(Part.of(layer, EMBEDDING if name == PRE_NORM else name, first))
            values[0] = first + parts[-1].probe
        return tuple(values) if several else values[0]

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)


def mixer_names(model: HookedRecurrentModel) -> dict[int, str]:
    """What each recurrent layer calls the module that holds its mixer."""
    mixers = {family.layer(mixer): mixer for _, mixer, family in find_mixers(model.hf_model)}
    layers = layers_of(model)
    return {
        layer: next(name for name, child in modules_of(layers[layer], [mixer]) if child is mixer)
        for layer, mixer in mixers.items()
    }
