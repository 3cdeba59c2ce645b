"""Predicting how an edit of the memory changes a logit (paper, equation 1, section 3.2 and appendix A).

An atom ``p u^T`` of norm 1 is added to a head's state at a token ``t0``, ``epsilon`` times as large as what the model
writes there; some tokens later, at ``t``, the logit of the model's own most likely token has changed. Predictions, none
of which looks at the edited model::

    three factors           G <p, q_t> <u, W_O W_U[token]>        G = product of the gates from t0 + 1 to t (equation 1)
    exact in the layer      q_t^T A_t ... A_{t0+1} p <u, W_O W_U[token]>         gates and erases
    first order             <M_t0, p u^T>                         and the rest of the model, by one backward pass
    exact through the norm  first order only behind the head's norm

``A_s`` is the recurrence's ``D_s + a_s b_s^T`` and ``M`` the gradient (`writesae.gradients`). The first two leave out
the way from the head's output to the logits, norms included, so they know no scale: the paper fits one, a *prefactor*.
Here one is fitted for each atom and epsilon on one half of the prompts and judged on the other. The paper fits one for
every prompt, atom and token; then the factors no longer predict anything but proportion: the number is what was
measured at another epsilon, scaled. That is reported too, as "proportional".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.protocol import Progress, Run, experiment
from writesae.futures.replay import Replayer, stacked
from writesae.gradients import Logit, gradient, in_batches
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Recurrence, Write, at_least_float32
from writesae.recurrence.kernels import carried
from writesae.results.result import Figure, Number, Result, figure, predicted_and_measured
from writesae.results.statistics import r_squared
from writesae.saes import WriteSAE
from writesae.stores.windows import Texts

__all__ = ["LogitChange", "logit_change"]

CLOSED = ("three factors", "exact in the layer")  # want a prefactor
PREDICTIONS = (*CLOSED, "first order", "exact through the norm")
NOISE = 1e-5  # logits: changes below are rounding, and have no sign


@dataclass(frozen=True, eq=False)
class LogitChange(Result):
    """Measured and predicted changes of logits: ``[prompt, lag, atom, epsilon]`` each.

    Attributes:
        layer, head: the site.
        atoms: which were added.
        epsilons: sizes, times the native write's norm at that token.
        lags: tokens from the edit to the logit.
        measured: change of the logit.
        predicted: by each of `PREDICTIONS`.
        position, token: ``[prompt]`` where the edit was; ``[prompt, lag]`` whose logit.
    """

    layer: int
    head: int
    atoms: Int[Tensor, " n_atoms"]
    epsilons: tuple[float, ...]
    lags: tuple[int, ...]
    measured: Float[Tensor, "prompt lag atom epsilon"]
    predicted: dict[str, Float[Tensor, "prompt lag atom epsilon"]]
    position: Int[Tensor, " prompt"]
    token: Int[Tensor, "prompt lag"]

    @property
    def title(self) -> str:
        n_atoms, n_prompts = len(self.atoms), len(self.position)
        return f"Logit changes at layer {self.layer} head {self.head}: {n_atoms} atoms, {n_prompts} prompts"

    @property
    def about(self) -> str:
        return (
            f"An atom is added to the state, epsilon times as large as the native write at that token; measured is the "
            f"change of the logit of the model's most likely token {', '.join(map(str, self.lags))} tokens later "
            f"(paper, equation 1 and appendix A). R² of a prediction as it is, or with a prefactor for each atom and "
            f"epsilon fitted on one half of the prompts and judged on the other half alone; 'a cell' is one atom at "
            f"one epsilon, and the number is the median over cells. Predictions: the paper's three factors (gates, key "
            f"factor with the query, value factor through the head's output projection with the output embedding); the "
            f"same with the layer's erases; the gradient by one backward pass; and that with the head's norm taken "
            f"exactly. 'Proportional' is what a prefactor for every prompt, atom and token comes to, as the paper fits "
            f"it: the change measured at the nearest other epsilon, scaled; none of the factors matters then. Signs "
            f"are of changes above {NOISE:g}."
        )

    @property
    def test(self) -> slice:
        """The prompts that nothing is fitted on."""
        return slice(len(self.position) // 2, None)

    def prefactor(self, prediction: str) -> Float[Tensor, "atom epsilon"]:
        """By least squares on the first half of the prompts, one for each atom and epsilon."""
        fit = slice(0, self.test.start)
        x, y = self.predicted[prediction][fit], self.measured[fit]
        return (x * y).sum((0, 1)) / x.square().sum((0, 1)).clamp_min(1e-30)

    @property
    def proportional(self) -> Float[Tensor, "prompt lag atom epsilon"]:
        """The change measured at the next smaller epsilon (for the smallest, the next larger), scaled to this one."""
        e = torch.tensor(self.epsilons)
        order = e.argsort()
        other = torch.empty_like(order)
        other[order] = torch.cat([order[1:2], order[:-1]])
        return self.measured[..., other] * (e / e[other])

    def r_squared(self, prediction: str, epsilon: int, *, fitted: bool = False, by_cell: bool = False) -> float:
        """Of one prediction, at ``epsilons[epsilon]``, on the test prompts: all together, or the median over atoms."""
        found = self.proportional if prediction == "proportional" else self.predicted[prediction]
        x, y = found[self.test, ..., epsilon], self.measured[self.test, ..., epsilon]
        if fitted:
            x = x * self.prefactor(prediction)[:, epsilon]
        if not by_cell:
            return r_squared(y.flatten(), x.flatten())
        return float(np.median([r_squared(y[..., i].flatten(), x[..., i].flatten()) for i in range(len(self.atoms))]))

    def numbers(self) -> Sequence[Number]:
        made = []
        for name in (*reversed(PREDICTIONS), *(["proportional"] if len(self.epsilons) > 1 else [])):
            for fitted in (False, True) if name in CLOSED else (False,):
                what = f"{name}, prefactor fitted" if fitted else name
                for e, epsilon in enumerate(self.epsilons):
                    pooled, cell = (self.r_squared(name, e, fitted=fitted, by_cell=x) for x in (False, True))
                    made += [
                        Number(f"R², {what}, epsilon {epsilon:g}", pooled, n=self.measured[self.test, ..., e].numel()),
                        Number(f"R² of a cell, {what}, epsilon {epsilon:g}", cell, n=len(self.atoms)),
                    ]
        loud = self.measured.abs() > NOISE
        for name in PREDICTIONS:
            same = ((self.predicted[name] > 0) == (self.measured > 0))[loud]
            made.append(Number(f"right sign, {name}", float(same.double().mean()), "%", n=same.numel()))
        sizes = self.measured.abs().flatten(0, 2).median(0).values.tolist()
        made += [Number(f"median size, epsilon {e:g}", x) for e, x in zip(self.epsilons, sizes, strict=True)]
        return made

    def columns(self) -> dict[str, Any]:
        prompt, lag, atom, epsilon = np.indices(self.measured.shape).reshape(4, -1)
        return {
            "prompt": prompt,
            "position": self.position.numpy()[prompt],
            "lag": np.array(self.lags)[lag],
            "token": self.token.numpy()[prompt, lag],
            "atom": self.atoms.numpy()[atom],
            "epsilon": np.array(self.epsilons)[epsilon],
            "measured": self.measured.flatten().numpy(),
        } | {name: x.flatten().numpy() for name, x in self.predicted.items()}

    def plot(self) -> Figure:
        made, axes = figure(len(PREDICTIONS) + 1, width=3.4)
        e = min(1, len(self.epsilons) - 1)
        for axis, name in zip(axes, PREDICTIONS, strict=False):
            x, y = self.predicted[name][self.test, ..., e], self.measured[self.test, ..., e]
            fitted = name in CLOSED
            x = x * self.prefactor(name)[:, e] if fitted else x
            predicted_and_measured(axis, x.flatten(), y.flatten(), s=4, alpha=0.4)
            axis.set(xlabel=name + (" (prefactor fitted)" if fitted else ""), ylabel="measured change of the logit")
            axis.set_title(f"epsilon {self.epsilons[e]:g}: R² {self.r_squared(name, e, fitted=fitted):.3f}", fontsize=9)
        for name in PREDICTIONS:
            fitted = name in CLOSED
            values = [self.r_squared(name, e, fitted=fitted, by_cell=True) for e in range(len(self.epsilons))]
            axes[-1].plot(self.epsilons, np.clip(values, -1, 1), marker="o", ms=3, label=name)
        axes[-1].set(xscale="log", xlabel="epsilon", ylabel="R², median over atoms (cut at -1)", ylim=(-1.05, 1.05))
        axes[-1].legend(frameon=False, fontsize=7)
        return made


@experiment(
    "predicted changes of logits (equation 1) and one backward pass",
    order=5,
    settings=lambda sizes: {"n_prompts": sizes.logit, "atoms": max(4, sizes.logit // 4)},
)
@named_kinds
@torch.no_grad()
def logit_change(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    text: Texts,
    *,
    atoms: int | Sequence[int] = 16,
    epsilons: Sequence[float] = (0.1, 0.3, 1.0, 3.0),
    lags: Sequence[int] = (0, 4),
    n_prompts: int = 64,
    context: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    check_model: bool = True,
    progress: Progress | None = None,
) -> LogitChange:
    """Measure what atoms do to logits, and predict it in four ways.

    Args:
        model, sae, text, batch_size, seed, check_model: see `Run`.
        atoms: which, or how many, drawn from those that fire in the prompts.
        epsilons: sizes of the edit, times the norm of the native write at its token (the paper's are absolute: norms
            of writes differ a hundredfold between models).
        lags: tokens from the edit to the logit; 0 is the edited token's own prediction.
        n_prompts: prompts, drawn from the text; a prefactor is fitted on the first half of them.
        context: tokens of each; the edit is at one in the second half.
        progress: called with the number of edited prompts run.

    Raises:
        ValueError: too little text, too few atoms that fire, a lag longer than half a prompt, fewer than 4 prompts, or
            a layer that reads several times per token (Mamba-3's MIMO form).
        IndexError: an atom out of range.
    """
    run = Run(model, text, [sae], batch_size, seed, check_model, progress)
    (layer, head), generator = sae.place, run.generator
    model.family(layer).rule.check_reads_once("logit_change, whose closed form has one query,")
    if min(lags) < 0 or max(lags) >= context // 2 or n_prompts < 4:
        raise ValueError(
            f"lags={tuple(lags)}, context={context}, n_prompts={n_prompts}: lags are 0 to {context // 2 - 1} (half a "
            f"prompt), and half of at least 4 prompts is fitted on"
        )
    ids = run.prompts(n_prompts, context)
    position = torch.randint(context // 2, context - max(lags), (n_prompts,), generator=generator).to(model.device)
    chosen = _chosen(model, sae, ids, atoms, generator).to(model.device)
    edits = sae.atom(chosen).detach().to(model.device, torch.float32)  # [atom]
    edits = edits * (1 / edits.norm())

    rows = torch.arange(n_prompts, device=model.device)
    at = position[:, None] + torch.tensor(list(lags), device=model.device)
    replayer = Replayer(model, [sae.place], horizon=max(lags), rows=batch_size, beside=True)
    native = replayer.native(ids)
    token = native.end.at(rows[:, None].expand_as(at), at).argmax(-1)
    wanted = torch.tensor(list(epsilons), device=model.device)
    predicted = {name: torch.empty(n_prompts, len(lags), len(chosen), len(epsilons)) for name in PREDICTIONS}
    sizes = torch.empty(n_prompts, device=model.device)
    for i in range(len(lags)):
        question = Logit(token[:, i], at=at[:, i])
        ask = lambda some, question=question: gradient(model, ids[some], question.of(some), [layer])[layer]  # noqa: E731
        for some, found in in_batches(model, n_prompts, ask):
            run.note(f"lag {lags[i]}: predicted in {some.stop} of {n_prompts} prompts")
            here, each = position[some], rows[: len(position[some])]
            sizes[some] = found.write[each, here, torch.full_like(here, head)].norm()
            scale = sizes[some, None, None] * wanted  # [prompt, 1, epsilon]
            direct = model.W_O(layer)[head].float() @ model.W_U[:, token[some, i]].float()  # [d_value, prompt]
            rec, parts = found.recurrence[:, :, [head]], {}
            for name, reading in zip(CLOSED, (gated, carried), strict=True):
                factor = _read(reading, rec, edits, here, at[some, i])  # [prompt, atom, rank]
                values = torch.einsum("ard,dp->par", edits.factors()[1], direct)
                parts[name] = (factor * values).sum(-1)[..., None] * scale
            parts["first order"] = found.prices(head, edits)[each, here][..., None] * scale
            spread = scale.expand(-1, len(chosen), -1).flatten(1)
            every = edits[torch.arange(len(chosen)).repeat_interleave(len(epsilons))].expand(*spread.shape) * spread
            effect = found.effect(head, here[:, None].expand(spread.shape), every)
            parts["exact through the norm"] = effect.unflatten(1, (len(chosen), -1))
            for name, part in parts.items():
                predicted[name][some, i] = part.float().cpu()

    own = native.write(sae.place, rows, position)
    writes = stacked([own + edits[a].expand(n_prompts) * (e * sizes) for a in range(len(chosen)) for e in epsilons])
    measured = torch.empty(n_prompts, len(lags), len(chosen), len(epsilons))
    for some, edited, plain in replayer.logits(native, rows, position, {sae.place: writes}):
        steps = at[some] - position[some, None]
        each = torch.arange(len(some), device=some.device)[:, None]
        moved = edited[each, :, steps, token[some]] - plain[each, :, steps, token[some]]  # [prompt, lag, condition]
        measured[some.cpu()] = moved.unflatten(-1, (len(chosen), -1)).float().cpu()
        run.tell(len(some) * writes.shape[1])
    doses, after = tuple(map(float, epsilons)), tuple(map(int, lags))
    return LogitChange(layer, head, chosen.cpu(), doses, after, measured, predicted, position.cpu(), token.cpu())


def gated(
    rec: Recurrence, keys: Float[Tensor, "batch n d_key"], positions: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch pos n"]:
    """`carried` without erases, as equation 1 has it: ``G <p, q_t>``, with ``G`` the product of the gates."""
    return carried(replace(rec, a=None, b=None), keys, positions)


def _read(
    reading: Callable[..., Tensor], rec: Recurrence, edits: Write, position: Tensor, at: Tensor
) -> Float[Tensor, "prompt atom rank"]:
    """How strongly the read at ``at`` sees each term of each atom, written at ``position``."""
    keys = at_least_float32(edits.factors()[0]).flatten(0, 1).expand(len(position), -1, -1)
    found = reading(rec, keys, position[:, None].expand(keys.shape[:2]))
    return found[torch.arange(len(at), device=at.device), at].unflatten(1, (-1, edits.rank))


def _chosen(
    model: HookedRecurrentModel, sae: WriteSAE, ids: Tensor, atoms: int | Sequence[int], generator: torch.Generator
) -> Int[Tensor, " n"]:
    if not isinstance(atoms, int):
        sae.atom(torch.tensor(list(atoms)))  # raises for one out of range
        return torch.tensor(list(atoms))
    fired = model.encode(sae, ids, check_model=False).fired.nonzero()[:, 0].cpu()
    if len(fired) < atoms:
        raise ValueError(
            f"{atoms} atoms were asked for, and {len(fired)} fire in the prompts: give more, or longer ones"
        )
    return fired[torch.randperm(len(fired), generator=generator)[:atoms]].sort().values
