"""Amplifying atoms while a model writes (paper, section 4, table 4): does the text have more, or less, of something?

Atoms that are more active on a class of tokens than on others are added to the memory at every generated token, and a
number is read off the text; as many other atoms, at the same norm, are the control.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment
from writesae.futures.continuations import CommonRandomNumbers, go_on, prompts_of, text_of
from writesae.futures.replay import stacked
from writesae.hooks import Add
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel
from writesae.model.tokens import Text as Prompts
from writesae.results.result import Figure, Number, Result, figure, intervals
from writesae.results.statistics import Array, paired
from writesae.saes import WriteSAE
from writesae.saes.activity.token_classes import ChosenAtoms, choose_atoms

__all__ = ["AmplifyResult", "ChosenAtoms", "amplify", "choose_atoms"]

Metric: TypeAlias = Callable[[str], float]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


METRICS: dict[str, Metric] = {
    "newlines": lambda text: float(text.count("\n")),
    "paragraphs": lambda text: float(len([p for p in text.split("\n\n") if p.strip()])),
    "word length": lambda text: float(np.mean([len(w) for w in _words(text)] or [0])),
    "capitalised words": lambda text: float(np.mean([w[0].isupper() for w in _words(text)] or [0])),
    "commas": lambda text: float(text.count(",")),
    "sentence ends": lambda text: float(len(re.findall(r"[.!?]", text))),
}


@dataclass(frozen=True)
class AmplifyResult(Result):
    """Texts written with atoms amplified, and what was read off them.

    Attributes:
        sites: the head of each SAE. atoms: amplified in each. what: the class they were chosen by.
        contrast: the largest contrast among them.
        doses: factors of the mean activation on the class.
        n_tokens, temperature: of the texts.
        prompts: what they continue.
        texts: by condition, one per prompt: ``"baseline"``, ``"5x"``, ``"random 5x"`` ...
        scores: metric -> condition -> one number per prompt; the first metric is what tests are of.
    """

    sites: tuple[Head, ...]
    atoms: tuple[tuple[int, ...], ...]
    what: str
    contrast: float
    doses: tuple[float, ...]
    n_tokens: int
    temperature: float
    prompts: tuple[str, ...]
    texts: dict[str, tuple[str, ...]]
    scores: dict[str, dict[str, Array]]

    @property
    def title(self) -> str:
        where = ", ".join(head.words for head in self.sites)
        return f"Amplifying {self.what} atoms, {where}: {len(self.prompts)} prompts"

    @property
    def about(self) -> str:
        n = sum(map(len, self.atoms))
        return (
            f"The {n} atoms most active on {self.what} tokens relative to others (largest contrast "
            f"{self.contrast:.3g}) were added at every generated token, each at dose x its mean activation on such "
            f"tokens; not in the prompt. {len(self.prompts)} prompts were continued by {self.n_tokens} tokens at "
            f"temperature {self.temperature:g}, the end of a text never being chosen. The noise of the sampling is the "
            f"same for a prompt in every condition, so conditions are compared pair by pair. Control: other active "
            f"atoms, drawn anew for each prompt, their sum at the same norm. p of paired t-tests; adjusted: times the "
            f"number of doses (Bonferroni). Intervals are bootstraps over prompts. Paper: section 4, table 4."
        )

    def numbers(self) -> list[Number]:
        found = []
        for metric, scores in self.scores.items():
            found += [Number.estimate(f"{metric}, {condition}", values) for condition, values in scores.items()]
            if metric == next(iter(self.scores)) and len(self.prompts) > 1:
                found += self._tests(metric, scores)
        return found

    def _tests(self, metric: str, scores: dict[str, Array]) -> list[Number]:
        found = []
        for dose in self.doses:
            name, control = f"{dose:g}x", f"random {dose:g}x"
            test, other = paired(scores[name], scores["baseline"]), paired(scores[control], scores["baseline"])
            direct = paired(scores[name], scores[control])
            found += [
                Number(f"change of {metric}, {name}", test.mean, "", test.low, test.high, test.n),
                Number(f"p, {name}", test.p_t),
                Number(f"p adjusted, {name}", min(1.0, test.p_t * len(self.doses))),
                Number(f"p (Wilcoxon), {name}", test.p_wilcoxon),
                Number(f"Cohen's d, {name}", test.cohens_d),
                Number(f"change of {metric}, {control}", other.mean, "", other.low, other.high, other.n),
                Number(f"p, {control}", other.p_t),
                Number(f"p, {name} against random", direct.p_t),
            ]
        return found

    def columns(self) -> dict[str, Any]:
        n, names = len(self.prompts), list(self.texts)
        scores = {metric: np.concatenate([of[name] for name in names]) for metric, of in self.scores.items()}
        condition = [name for name in names for _ in range(n)]
        texts = [text for name in names for text in self.texts[name]]
        return {"prompt": list(range(n)) * len(names), "condition": condition, **scores, "text": texts}

    def plot(self) -> Figure:
        made, axes = figure(len(self.scores))
        for axis, (metric, scores) in zip(axes, self.scores.items(), strict=True):
            for name, style, label in (("{:g}x", "o-", "chosen atoms"), ("random {:g}x", "s--", "random atoms")):
                of_each = [scores["baseline"], *(scores[name.format(dose)] for dose in self.doses)]
                found = [Number.estimate("", values) for values in of_each]
                intervals(axis, (0.0, *self.doses), found, fmt=style, label=label)
            axis.set(xlabel="dose", ylabel=metric)
        axes[0].legend(frameon=False)
        return made


def _plan(asked: Asked) -> Iterator[Task]:
    """Of the atoms that are more active at ends of sentences than elsewhere, as in the paper."""
    metrics = ["sentence ends", "newlines", "paragraphs", "word length"]

    def run(sae: WriteSAE, **settings: Any) -> Result:
        chosen = choose_atoms(asked.model, sae, asked.texts, "boundary", check_model=asked.check_model)
        return amplify(asked.model, chosen, asked.prompts, metrics, **settings)

    for sae in asked.saes:
        yield Task(partial(run, sae), [sae], {"n_tokens": asked.sizes.tokens, **asked.common})


@named_kinds
@experiment("a class of atoms amplified while generating (section 4)", order=9, plan=_plan)
@torch.no_grad()
def amplify(
    model: HookedRecurrentModel,
    chosen: ChosenAtoms | Sequence[ChosenAtoms],
    prompts: Prompts,
    metric: str | Metric | Sequence[str] | Mapping[str, Metric] = "newlines",
    *,
    doses: Sequence[float | int] = (2.0, 5.0, 10.0),
    n_tokens: int = 200,
    temperature: float | int = 0.7,
    batch_size: int = 64,
    seed: int = 0,
    check_model: bool = True,
    progress: Progress | None = None,
) -> AmplifyResult:
    """Let a model write with atoms added to its memory at every generated token.

    >>> chosen = choose_atoms(model, sae, texts, "boundary")
    >>> amplify(model, chosen, prompts, ["newlines", "paragraphs", "word length"]).table()

    Args:
        model, batch_size, seed, check_model: see `Run`.
        chosen: atoms of one SAE, or of several (all heads of a layer, say), which are then amplified together.
        prompts: a text, several, or token ids; a test needs two or more.
        metric: what is read off the text generated: names of `METRICS`, functions by name, or one function. The first
            is what is tested.
        doses: factors of the mean activation on the class.
        n_tokens: how many tokens to generate.
        temperature: of the sampling.
        progress: called with the number of texts done, of prompts x (1 + 2 x doses).

    Raises:
        ValueError: no such metric; no dose; fewer other active atoms than chosen ones; an SAE of another model.
    """
    sets = [chosen] if isinstance(chosen, ChosenAtoms) else list(chosen)
    if not sets or not doses or min(doses) < 0 or len(set(doses)) < len(doses) or n_tokens < 2 or temperature <= 0:
        raise ValueError(
            f"{len(sets)} sets of atoms, doses={list(doses)}, n_tokens={n_tokens}, temperature={temperature}: give at "
            f"least one set and one dose of 0 or more, 2 or more tokens, and a temperature above 0"
        )
    run = Run(model, (), [x.sae for x in sets], batch_size, seed, check_model, progress)
    for x in sets:
        if len(x.pool) < len(x.atoms):
            raise ValueError(f"{len(x.pool)} other atoms were active, and the control needs {len(x.atoms)}")
    metrics = _metrics(metric)
    ids, mask, lengths, shown = prompts_of(model, prompts)
    n = len(ids)
    names = ["baseline", *(f"{k}{dose:g}x" for dose in doses for k in ("", "random "))]
    factors = [0.0, *(float(dose) for dose in doses for _ in range(2))]
    writes = []  # of each SAE, [prompt, 2]: of the chosen atoms, and of each prompt's random ones
    for x in sets:
        order = [torch.randperm(len(x.pool), generator=run.generator) for _ in shown]
        drawn = x.pool[torch.stack(order)[:, : len(x.atoms)]]
        writes.append(stacked([x.write(x.atoms.expand(n, -1)), x.write(drawn)]))

    texts: list[str] = []
    for batch in run.batches(torch.arange(n * len(names))):
        condition, row = batch // n, batch % n
        at, random = row.to(ids.device), ((condition > 0) & (condition % 2 == 0)).long()
        factor = torch.tensor(factors)[condition]
        edits = [
            Add(*x.site, write=(w[row, random] * factor.to(w.key))[:, None]) for x, w in zip(sets, writes, strict=True)
        ]
        positions = lengths[at, None] + torch.arange(n_tokens - 1, device=ids.device)  # the last is never fed
        own_mask = None if mask is None else mask[at]
        chance = CommonRandomNumbers(row, temperature, seed)
        new = go_on(model, ids[at], own_mask, n_tokens, edits, positions, chance=chance, whole=True)
        texts += [text_of(model, r) for r in new.cpu()]
    by_condition = {name: tuple(texts[i * n : (i + 1) * n]) for i, name in enumerate(names)}
    scores = {
        label: {name: np.array([float(measure(t)) for t in found]) for name, found in by_condition.items()}
        for label, measure in metrics.items()
    }
    return AmplifyResult(
        tuple(x.site for x in sets),
        tuple(tuple(x.atoms.tolist()) for x in sets),
        sets[0].what, max(float(x.contrast.max()) for x in sets), tuple(map(float, doses)), n_tokens,
        float(temperature), tuple(shown), by_condition, scores,
    )  # fmt: skip


def count_of(what: str) -> Metric:
    """A metric: how often a string occurs."""
    return lambda text: float(text.count(what))


def _metrics(metric: str | Metric | Sequence[str] | Mapping[str, Metric]) -> dict[str, Metric]:
    found: dict[str, Metric]
    if isinstance(metric, Mapping):
        found = dict(metric)
    elif callable(metric):
        found = {str(getattr(metric, "__name__", "metric")): metric}
    else:
        given = [metric] if isinstance(metric, str) else list(metric)
        for name in given:
            if name not in METRICS:
                raise ValueError(
                    f"metric {name!r}: there are {', '.join(METRICS)}; or give {{name: function of a text}}"
                )
        found = {name: METRICS[name] for name in given}
    if not found:
        raise ValueError("metric is empty: name at least one")
    return found
