"""Attribution against the real thing: single writes deleted, the change compared with what the gradient predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.protocol import Progress, Run, experiment
from writesae.gradients import Gradient, Logit, gradient, in_batches
from writesae.hooks import Delete, short_chunks
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel
from writesae.results.result import Figure, Number, Result, figure, predicted_and_measured
from writesae.results.statistics import bootstrap, r_squared
from writesae.stores.windows import Texts

__all__ = ["AttributionTest", "attribution_test"]

PREDICTIONS = {
    "contribution": "minus its contribution, the scale of the head's norm held fixed",
    "first order": "minus its first-order effect, the gradient as it is",
    "exact through the norm": "the deletion's effect, exact up to the head's norm",
}


@dataclass(frozen=True, eq=False)
class AttributionTest(Result):
    """Predicted changes of a logit difference when single writes are deleted, against the changes measured.

    Attributes:
        layer, head, position, prompt: of each deletion.
        lag: tokens from the write to the prediction.
        measured: change of the logit difference, the model run with the write taken out.
        predicted: by each of `PREDICTIONS`.
        context: tokens per prompt.
    """

    layer: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    prompt: Int[Tensor, " n"]
    lag: Int[Tensor, " n"]
    measured: Float[Tensor, " n"]
    predicted: dict[str, Float[Tensor, " n"]]
    context: int

    ROWS = ("layer", "head", "position", "prompt", "lag", "measured", "predicted")

    @property
    def title(self) -> str:
        return f"Attribution against {len(self.measured):,} deletions of single writes"

    @property
    def about(self) -> str:
        return (
            f"The logit of the most likely next token minus that of the second, after prompts of {self.context} "
            f"tokens; one write (any layer, any head; its distance from the prediction drawn evenly on a log scale) is "
            f"deleted, and the change is compared with what one backward pass predicts: minus the write's contribution "
            f"(the scale of the head's norm held fixed, so that contributions add up), minus its first-order effect "
            f"(the gradient as it is), and the deletion's effect with the head's norm taken exactly. Nothing is "
            f"fitted. Intervals: bootstrap over prompts."
        )

    def correlation(self, prediction: str, chosen: Tensor | None = None) -> float:
        keep = slice(None) if chosen is None else chosen
        return float(torch.corrcoef(torch.stack([self.measured[keep], self.predicted[prediction][keep]]))[0, 1])

    def numbers(self) -> Sequence[Number]:
        made = []
        large = self.measured.abs() >= self.measured.abs().quantile(0.75)
        n_large = int(large.sum())
        for name, predicted in self.predicted.items():
            pairs = np.stack([self.measured.numpy(), predicted.numpy()], 1)
            r = bootstrap(pairs, self.prompt, lambda x: float(np.corrcoef(x.T)[0, 1]), n_resamples=500)
            sign = (predicted[large] > 0) == (self.measured[large] > 0)
            made += [
                Number.of(f"correlation with deletions, {name}", r),
                Number(f"R², {name}", r_squared(self.measured, predicted), n=len(predicted)),
                Number(f"correlation with the largest quarter, {name}", self.correlation(name, large), n=n_large),
                Number(f"right sign of the largest quarter, {name}", float(sign.float().mean()), "%", n=n_large),
            ]
        return [*made, Number("median size of a change", float(self.measured.abs().median()))]

    def plot(self) -> Figure:
        made, axes = figure(len(self.predicted))
        for axis, (name, predicted) in zip(axes, self.predicted.items(), strict=True):
            predicted_and_measured(axis, predicted, self.measured, c=self.layer, cmap="viridis")
            axis.set(xlabel=f"predicted, {name}", ylabel="measured change of the logit difference")
            axis.set_title(f"r = {self.correlation(name):.3f}", fontsize=9)
        return made


@experiment(
    "which writes made a prediction, against real deletions",
    order=10,
    settings=lambda sizes: {"n_deletions": sizes.deletions},
)
@named_kinds
def attribution_test(
    model: HookedRecurrentModel,
    text: Texts,
    *,
    n_deletions: int = 1024,
    n_prompts: int = 32,
    context: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> AttributionTest:
    """Delete single writes, and compare what that does with what the gradient said it would.

    Args:
        model, text, seed: see `Run`.
        n_deletions: writes deleted, rounded up to a multiple of ``n_prompts``; each time one layer and head, drawn
            evenly, and in each prompt one token.
        n_prompts: prompts, drawn from the text.
        context: tokens of each; the question is about what follows the last.
        progress: called with the number of deletions done.

    Raises:
        ValueError: the text has too few prompts.
    """
    run = Run(model, text, seed=seed, progress=progress)
    generator = run.generator
    ids, few = run.prompts(n_prompts, context), model.logits_of_last(1)
    heads = [Head(site.layer, head) for site in model.sites for head in range(site.n_heads)]
    n_rounds = -(-n_deletions // n_prompts)
    chosen = [heads[int(torch.randint(len(heads), (), generator=generator))] for _ in range(n_rounds)]
    lags = (context ** torch.rand(n_rounds, n_prompts, generator=generator)).long() - 1
    rows = []

    def predicted(prompts: slice) -> tuple[Logit, Gradient]:
        with torch.no_grad():
            best = model(ids[prompts], **few)[:, -1].topk(2).indices
        question = Logit(best[:, 0], minus=best[:, 1])
        return question, gradient(model, ids[prompts], question)

    for prompts, (question, found) in in_batches(model, n_prompts, predicted):
        here = ids[prompts]
        each = torch.arange(len(here), device=here.device)
        for (layer, head), lag in zip(chosen, lags[:, prompts], strict=True):
            at = (context - 1 - lag).to(model.device)[:, None]
            with torch.no_grad(), short_chunks(), model.intervene(Delete(layer, head), positions=at):
                measured = question(model(here, **few)) - found.value
            g = found[layer]
            effect = g.effect(head, at, -g.write[each[:, None], at, torch.full_like(at, head)])[:, 0]
            both = (x.of_heads([head]) for x in (g, g.at_fixed_scale))
            first, fixed = (-x.price(x.write)[each, at[:, 0], 0] for x in both)
            site = torch.tensor([layer, head]).expand(len(here), 2)
            number = torch.arange(n_prompts)[prompts]
            rows.append([*site.T, at[:, 0], number, lag, measured, fixed, first, effect])
            run.tell(len(here))
    columns = [torch.cat([row[i].cpu() for row in rows]) for i in range(len(rows[0]))]
    said = dict(zip(PREDICTIONS, columns[6:], strict=True))
    return AttributionTest(*columns[:6], predicted=said, context=context)  # type: ignore[misc]
