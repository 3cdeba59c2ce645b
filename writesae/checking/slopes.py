"""Hooks and edits move logits as the model's own gradient says.

What a hook point shows is taken to be what the model computes with: the gradient is taken through what is shown, and
the value that comes back is what moves the logits. If these are not one quantity, the two do not agree.

The number asked about is a fixed random combination of the last token's logits, so that no single rounding decides. It
is compared with half the difference of two passes, with the change and with its opposite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.checking.result import Row
from writesae.checking.subject import Subject, largest
from writesae.gradients import gradient
from writesae.gradients.backward import frozen
from writesae.hooks import Add, HookPoint
from writesae.recurrence import Write

SHORT = 16  # tokens
DRAWS = 8  # of rounding
MOST = 0.8  # of the effect: an error below that tells a hook that acts from one that does not
FEW = 8  # entries that a change is spread over at least
SMALLEST = 4.0  # units in the last place: a change below one would be rounded away
EFFECT = "of slope"


class Number:
    """What is asked about, and how large a change of it can be measured."""

    def __init__(self, subject: Subject):
        n_vocab = subject.unwrapped().shape[-1]
        direction = torch.randn(n_vocab, generator=torch.Generator().manual_seed(subject.seed))
        self.direction = (direction / direction.norm()).to(subject.unwrapped().device)
        self.eps = subject.eps
        self.noise = float(self(subject.nudged(subject.ids[:, :SHORT].expand(DRAWS, -1))).std())
        self.target = min(max(16 * self.noise, 2e-3 * subject.spread), subject.spread / 4)
        """How far it is to move: far more than by rounding, and little beside the spread of the logits."""

    def allowed(self, moves: float) -> float:
        """The error of a slope, as a share of it, if the number moves that far: rounding of the gradient and of the
        logits, and what is not linear."""
        return 0.03 + 4 * self.eps + 6 * self.noise / moves  # known from few draws, so a wide margin

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return logits[:, -1].float() @ self.direction


def check_own_values(subject: Subject) -> Iterator[Row]:
    """Every hook of the checked layers gives back a copy of what it was shown: nothing changes but by rounding."""

    def copy(value: Tensor | Write, _hook: HookPoint) -> Tensor | Write:
        return _with(value, _tensor(value).clone())

    names = [name for names in _points(subject).values() for name in names]
    with subject.model.hooks([(name, copy) for name in names]):
        found = subject.run()
    yield Row("hooks given own values", "every hook", largest(found - subject.unwrapped()), subject.tolerance)


def check_hook_slopes(subject: Subject) -> Iterator[Row]:
    """Each hook point changed a little, in all checked layers, against the gradient with respect to what it shows."""
    model, number = subject.model, Number(subject)
    ids, points = subject.ids[:, :SHORT], _points(subject)
    probes: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def probed(value: Tensor | Write, hook: HookPoint) -> Tensor | Write:
        x = _tensor(value)
        values[hook.name] = x.detach().clone()
        probes[hook.name] = torch.zeros_like(x, requires_grad=True)
        return _with(value, x + probes[hook.name])

    names = [name for names in points.values() for name in names]
    with torch.enable_grad(), frozen(model.hf_model), model.hooks([(name, probed) for name in names]):
        found = torch.autograd.grad(
            number(subject.logits(ids)).sum(), [probes[name] for name in names], allow_unused=True
        )
    gradients = dict(zip(names, found, strict=True))
    for quantity, of_layers in points.items():
        changes = {}
        for name in of_layers:
            if (slope := gradients[name]) is not None:
                changes[name] = _change(values[name], slope.detach(), number.target / len(of_layers), subject.eps)
        predicted = sum(float((d * gradients[name]).sum()) for name, d in changes.items())

        def moved(value: Tensor | Write, hook: HookPoint, changes: dict[str, Tensor] = changes) -> Tensor | Write:
            x, d = _tensor(value), changes[hook.name]
            return _with(value, x + torch.cat([d, -d]))

        with model.hooks([(name, moved) for name in changes]):
            up, down = number(subject.logits(ids.expand(2, -1))).tolist()
        yield _row("gradient of a hook", quantity, predicted, (up - down) / 2, number)


def check_edit_slopes(subject: Subject) -> Iterator[Row]:
    """A little added to every write of a layer, at its own key, against the prices that `gradient` names for it; all
    layers in one pass, each in two rows of its own."""
    model, number, ids = subject.model, Number(subject), subject.ids[:, :SHORT]
    layers, every = subject.layers, list(range(SHORT))
    found = gradient(model, ids, number, layers, **subject.of_last)
    edits, predicted, n_rows = [], [], 2 * len(layers)
    for i, layer in enumerate(layers):
        key = found[layer].write.key
        # With these keys, they raise the number most.
        edit = replace(found[layer].write, value=torch.einsum("bthkv,bth...k->bth...v", found[layer].at(every), key))
        edit = edit * (found[layer].write.norm() / edit.norm().clamp_min(1e-30))
        prices = found[layer].price(edit)
        edit = edit * (1 / prices.clamp_min(float(prices.median()) + 1e-30))  # a norm makes much of it where o is small
        price = float(found[layer].price(edit).sum())
        scale = number.target / max(price, 1e-12)
        signs = torch.zeros(n_rows, 1, device=key.device)
        signs[2 * i], signs[2 * i + 1] = scale, -scale
        for head in range(model.site(layer).n_heads):
            edits.append(Add(layer, head, write=edit[:, :, head].expand(n_rows, SHORT) * signs))
        predicted.append(scale * price)
    with model.intervene(edits, positions=every):
        numbers = number(subject.logits(ids.expand(n_rows, -1))).tolist()
    for i, layer in enumerate(layers):
        measured = (numbers[2 * i] - numbers[2 * i + 1]) / 2
        yield _row("price of an edit", f"layer {layer}", predicted[i], measured, number)


def _row(check: str, where: str, predicted: float, measured: float, number: Number) -> Row:
    if not predicted > 0:  # or NaN
        return Row(check, where, None, number.allowed(number.target), EFFECT, note=f"its gradient is {predicted:.2g}")
    error, allowed = abs(measured / predicted - 1), number.allowed(predicted)
    if allowed > MOST:
        note = f"not judged: it moves logits by {predicted:.2g} at most, and rounding by {number.noise:.2g}"
        return Row(check, where, error, None, EFFECT, note=note)
    return Row(check, where, error, allowed, EFFECT, note=f"moves logits by {predicted:.2g}")


def _change(value: Tensor, slope: Tensor, target: float, eps: float) -> Tensor:
    """A change of ``value`` that should move the number by ``target``: a small share of the entries that count most,
    and a larger share of all only if that is not enough."""
    gain = (value * slope).abs().float()
    share = SMALLEST * eps
    gain = gain.masked_fill(share * gain > target / FEW, 0)  # where little is read, a norm makes too much of one entry
    ordered = gain.flatten().sort(descending=True).values
    reached = share * ordered.cumsum(0) >= target
    if reached.any():
        least = ordered[int(reached.int().argmax())]
        change = share * value.abs() * slope.sign() * (gain >= least)
    else:
        change = min(target / float(ordered.sum().clamp_min(1e-30)), 0.5) * value.abs() * slope.sign() * (gain > 0)
    return change.to(value.dtype)


def _points(subject: Subject) -> dict[str, list[str]]:
    """The hook points of the checked layers by quantity, but for states, which are edited token by token."""
    found: dict[str, list[str]] = {}
    for name, point in subject.model.hook_dict.items():
        if point.layer in subject.layers and point.quantity != "state":
            found.setdefault(point.quantity, []).append(name)
    return found


def _tensor(value: Tensor | Write) -> Tensor:
    """Of a write, its value factor stands for it."""
    return value.value if isinstance(value, Write) else value


def _with(value: Tensor | Write, x: Tensor) -> Tensor | Write:
    return replace(value, value=x) if isinstance(value, Write) else x
