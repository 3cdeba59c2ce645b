"""How a number moves with the strength of steering, beside what would move it anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.futures.replay import Replayer
from writesae.gradients import Logit
from writesae.hooks import Add, Intervention
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.cells import Cells
from writesae.methods.questions import Metric, checked_metric
from writesae.methods.steering import SteeringVector
from writesae.model import HookedRecurrentModel, Text, late_logits
from writesae.recurrence import Write
from writesae.results.result import Figure, Number, Result, figure, intervals


@dataclass(frozen=True, eq=False)
class DoseResponse(Result):
    """The number after each prompt, for each vector and scale.

    Attributes:
        at: where was steered.
        scales: how strongly.
        conditions: ``vector``; its controls ``negated``, ``random`` and, where there are any, ``shuffled``.
        values: the number; of ``random`` and ``shuffled`` the mean of several draws.
        native: the number without steering.
    """

    at: tuple[str | int, ...]
    scales: tuple[float, ...]
    conditions: tuple[str, ...]
    values: Float[Tensor, "condition scale prompt"]
    native: Float[Tensor, " prompt"]

    @property
    def title(self) -> str:
        return f"Dose and response at {' '.join(map(str, self.at))}, {len(self.native)} prompts"

    @property
    def about(self) -> str:
        return (
            "The number after each prompt when a steering vector is added at several scales, less the number without. "
            "Controls have the same norm (and rank): the negated vector, random ones, and ones from texts of which "
            "half of each side have changed sides; of these the mean of several draws. Intervals are over prompts."
        )

    @property
    def change(self) -> Float[Tensor, "condition scale prompt"]:
        """The number less that without steering."""
        return self.values - self.native

    @property
    def slope(self) -> Float[Tensor, "condition prompt"]:
        """Change per unit of scale, by least squares through no change at scale 0."""
        x = torch.tensor(self.scales)
        return (self.change * x[:, None]).sum(1) / x.square().sum()

    def numbers(self) -> Sequence[Number]:
        made = [
            Number.estimate(f"change per unit of scale, {name}", self.slope[i])
            for i, name in enumerate(self.conditions)
        ]
        most = int(np.argmax(np.abs(self.scales)))
        for i, name in enumerate(self.conditions):
            made.append(Number.estimate(f"change at scale {self.scales[most]:g}, {name}", self.change[i, most]))
        return made

    def columns(self) -> dict[str, Any]:
        condition, scale, prompt = np.indices(self.values.shape).reshape(3, -1)
        return {
            "condition": [self.conditions[i] for i in condition],
            "scale": np.array(self.scales)[scale],
            "prompt": prompt,
            "value": self.values.flatten().numpy(),
            "change": self.change.flatten().numpy(),
        }

    def plot(self) -> Figure:
        """The change over the scale, a line for each vector."""
        made, (axis,) = figure()
        for i, name in enumerate(self.conditions):
            found = [Number.estimate(name, self.change[i, s]) for s in range(len(self.scales))]
            style = {} if name == "vector" else {"alpha": 0.6, "fmt": "o--"}
            intervals(axis, self.scales, found, label=name, **style)
        axis.axhline(0, color="0.7", lw=0.8)
        axis.set(xlabel="scale", ylabel="change of the number")
        axis.legend(frameon=False)
        return made


@named_kinds
@torch.no_grad()
def dose_response(
    model: HookedRecurrentModel,
    vector: SteeringVector,
    prompts: Text,
    metric: Metric | str,
    scales: Sequence[float | int] = (0.5, 1, 2, 4),
    *,
    positions: Sequence[int] | None = (-1,),
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> DoseResponse:
    """A number of the model's prediction against the strength of steering, with controls of the same norm.

    Where the memory is steered at one token, everything before it and the layers below are run once for all scales and
    controls; other steering runs whole passes.

    >>> found = ws.dose_response(model, vector, prompts, ws.Logit(good, minus=bad))
    >>> found.plot()

    Args:
        model: the model.
        vector: from `steering_vector`.
        prompts: texts, or token ids ``[n, pos]``.
        metric: the number: a `Logit` (its tokens may be one per prompt), or a function of the logits after the last
            token, ``[batch, 1, vocab]``.
        scales: how strongly; the sign of a control that is negated is turned by itself.
        positions: at which tokens of each prompt the vector is added; negative ones count from its end; None: at all.
        batch_size: rows run at once.
        seed: of the random vectors.
        progress: called with the number of passes' rows done.

    Raises:
        ValueError: a vector of another model, no scales or a scale of 0, a metric about another token.
        IndexError: no such position.
    """
    vector.check_fits(model)
    if not scales or 0 in scales:
        raise ValueError(f"scales={list(scales)}: give one or more other than 0, which is measured anyway")
    metric = checked_metric(metric, model)
    controls = vector.controls(seed)
    conditions = {"vector": [(vector, 1)], "negated": [(vector, -1)]}
    conditions |= {name: [(one, 1) for one in drawn] for name, drawn in controls.items()}
    each = [pair for drawn in conditions.values() for pair in drawn]
    doses = [(one, sign * float(scale)) for one, sign in each for scale in scales]
    ids, mask = model.to_tokens(prompts)
    values, done = torch.zeros(1 + len(doses), len(ids)), 0
    one_token = isinstance(vector.direction, Write) and positions is not None and len(set(positions)) == 1
    run = _by_replay if one_token else _by_passes
    for dose, rows, found in run(model, ids, mask, positions, doses, metric, batch_size):
        values[dose, rows] = found
        done += found.numel()
        if progress is not None:
            progress(done)
    of_each = values[1:].view(len(each), len(scales), len(ids)).split([len(drawn) for drawn in conditions.values()])
    mean = torch.stack([drawn.mean(0) for drawn in of_each])
    return DoseResponse(vector.at, tuple(map(float, scales)), tuple(conditions), mean, values[0])


Dose = tuple[SteeringVector, float]
Found = Iterator[tuple[Tensor | int, Tensor, Tensor]]  # dose, prompts, the number of each


def _asked(metric: Metric, rows: Int[Tensor, " n"], logits: Float[Tensor, "n 1 vocab"]) -> Tensor:
    """The number of some prompts."""
    found = (metric.of(rows) if isinstance(metric, Logit) else metric)(logits)
    if found.shape != (len(rows),):
        raise ValueError(f"the metric gave {list(found.shape)} for {len(rows)} prompts: one number each, [batch]")
    return found.float().cpu()


def _by_passes(
    model: HookedRecurrentModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    positions: Sequence[int] | None,
    doses: Sequence[Dose],
    metric: Metric,
    batch_size: int,
) -> Found:
    """A pass for each dose; dose 0 is none."""
    for rows in torch.arange(len(ids)).split(batch_size):
        some, of_some = ids[rows], None if mask is None else mask[rows]
        at = None if positions is None else Cells.of(some, of_some, positions).positions.view(len(rows), -1)
        for i in range(len(doses) + 1):
            with late_logits(model) as end:
                if i == 0:
                    model(some, attention_mask=of_some)
                else:
                    steered, scale = doses[i - 1]
                    with model.intervene(steered.intervention(scale), positions=at):
                        model(some, attention_mask=of_some)
            yield i, rows, _asked(metric, rows, end.of_last())


def _by_replay(
    model: HookedRecurrentModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    positions: Sequence[int] | None,
    doses: Sequence[Dose],
    metric: Metric,
    batch_size: int,
) -> Found:
    """Prompts of equal length are run once; each prompt's doses are futures of it."""
    lengths = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1).cpu()
    _, layer, *heads = doses[0][0].at
    head = heads[0]
    replayer = Replayer(model, [Head(layer, head)], horizon=None, stride=8, rows=batch_size)
    writes = [one.direction * scale for one, scale in doses if isinstance(one.direction, Write)]
    rank, key, value = writes[0].rank, torch.stack([w.key for w in writes]), torch.stack([w.value for w in writes])
    which = torch.arange(1, len(doses) + 1)
    for n in lengths.unique().tolist():
        for rows in (lengths == n).nonzero()[:, 0].split(batch_size):
            windows = ids[rows] if mask is None else ids[rows][mask[rows].bool()].view(len(rows), -1)
            native = replayer.native(windows)
            yield 0, rows, _asked(metric, rows, native.end.of_last())

            def edits(some: Tensor) -> list[Intervention]:
                here = Write(key, value, rank)[torch.arange(len(writes)).repeat(len(some)), None]
                return [Add(layer, head, write=here)]

            at = Cells.of(windows, None, positions).positions.to(ids.device)
            window = torch.arange(len(rows), device=ids.device)
            for some, logits in replayer.replay(native, window, at, len(doses), edits):
                prompts = rows[some.cpu()].repeat_interleave(len(doses))
                found = _asked(metric, prompts, logits.flatten(0, 1))
                yield which.repeat(len(some)), prompts, found
