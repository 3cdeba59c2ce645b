"""Erasing an atom where it fires (paper, section 4 and appendix I.4): which token loses, how much, and only there?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.engine.targets import ranks, show_token
from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment
from writesae.hooks import Add, Delete, Intervention, short_chunks
from writesae.jobs.arguments import named_kinds
from writesae.jobs.extras import extra
from writesae.model import HookedRecurrentModel, LateLogits, late_logits
from writesae.recurrence import Read
from writesae.results.result import Figure, Number, Result, figure, frame, intervals
from writesae.results.statistics import paired
from writesae.saes import WriteSAE
from writesae.saes.activity.reading import encode
from writesae.stores.windows import Texts

__all__ = ["EraseResult", "erase"]

Mode: TypeAlias = Literal["delete", "subtract"]
Edit: TypeAlias = Callable[[Tensor], Intervention]
FEWEST = 4  # firings, and tokens of a window
WHAT = {"delete": "the native write was deleted", "subtract": "the atom at its activation was subtracted"}


@dataclass(frozen=True)
class Effect:
    """What one edit did to one token at some positions: its log probability, nats, and its rank (1 is the first)."""

    window: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    native: Float[Tensor, " n"]
    edited: Float[Tensor, " n"]
    native_rank: Int[Tensor, " n"]
    edited_rank: Int[Tensor, " n"]

    @property
    def change(self) -> Float[Tensor, " n"]:
        return self.edited - self.native

    def numbers(self, where: str) -> list[Number]:
        """Median change with its bootstrap interval over windows, and Wilcoxon's p."""
        p = paired(self.edited, self.native).p_wilcoxon
        median = Number.median(f"median change of log p{where}", self.change, self.window, "nats")
        return [median, Number(f"p (Wilcoxon){where}", p)]


@dataclass(frozen=True)
class EraseResult(Result):
    """What erasing an atom does to the token it prefers.

    Attributes:
        layer, head, atom, mode, read: what was erased, and which read first sees it.
        activation: median of the atom's at the firings, the ``a*`` of the paper.
        token, token_text: the preferred token, chosen on other firings than those it is tested on.
        token_same: the one chosen on all firings, as the paper does.
        fires: at how many of the ``n_tokens`` tokens that could be used the atom fires.
        effects: by condition: ``"erase"`` of the token at the firings kept for the test; ``"erase, same firings"`` of
            ``token_same`` at all of them; ``"minus m"`` with ``m`` times the atom at its activation subtracted; and
            where the atom does not fire ``"no firing: delete"`` and ``"no firing: plus m"``, with ``m a*`` added.
    """

    layer: int
    head: int
    atom: int
    mode: Mode
    read: Read
    activation: float
    token: int
    token_text: str
    token_same: int
    fires: int
    n_tokens: int
    doses: tuple[float, ...]
    effects: dict[str, Effect]

    @property
    def title(self) -> str:
        return f"Erasing atom {self.atom}, layer {self.layer} head {self.head}: {len(self.erased.window)} firings"

    @property
    def about(self) -> str:
        same = self.effects["erase, same firings"]
        return (
            f"Atom {self.atom} fires at {self.fires:,} of {self.n_tokens:,} tokens, with a median activation "
            f"a* = {self.activation:.3g}. At {len(same.window)} of these firings {WHAT[self.mode]}. On one half of "
            f"them (by windows of the text) the token was chosen whose log probability falls most in sum, the "
            f"preferred token: {self.token_text!r} (id {self.token}); the numbers are of that token at the other half. "
            f"To choose and to test on the same firings, as the paper does, finds a fall also where there is none; "
            f"that is given for comparison (token id {self.token_same}). 'minus m' subtracts m times the atom at its "
            f"activation. The control is at {len(self.effects['no firing: delete'].window)} tokens where the atom does "
            f"not fire: the write deleted, or m a* of the atom added. Intervals are bootstraps over windows. Paper: "
            f"section 4, appendix I.4."
        )

    @property
    def erased(self) -> Effect:
        return self.effects["erase"]

    def numbers(self) -> list[Number]:
        e, same = self.erased, self.effects["erase, same firings"]
        found = [
            *e.numbers(""),
            Number.estimate("mean change of log p", e.change, e.window, unit="nats"),
            Number.share("log p falls", e.change < 0),
            Number("median rank before", float(e.native_rank.double().median()), n=len(e.change)),
            Number("median rank after", float(e.edited_rank.double().median()), n=len(e.change)),
            *same.numbers(", same firings"),
        ]
        for name, effect in self.effects.items():
            if name not in ("erase", "erase, same firings"):
                found += effect.numbers(f", {name}")
        if len(self.doses) > 1:
            for name, place in (("minus", "at firings"), ("no firing: plus", "elsewhere")):
                changes = [self.effects[f"{name} {m:g}"].change for m in self.doses]
                x = np.repeat(self.doses, [len(change) for change in changes])
                y = torch.cat(changes).numpy()
                found.append(Number(f"trend with dose, {place} (Spearman)", _spearman(x, y), n=len(x)))
        return found

    def columns(self) -> dict[str, Any]:
        parts = []
        for name, e in self.effects.items():
            token = self.token_same if name == "erase, same firings" else self.token
            columns = {k: v.numpy() for k, v in vars(e).items()}
            parts.append({"condition": name, "token": token, **columns, "change": e.change.numpy()})
        return dict(frame(*parts))

    def plot(self) -> Figure:
        made, (spread, dose) = figure(2)
        shown = {"erased": "erase", "elsewhere: deleted": "no firing: delete"}
        spread.boxplot([self.effects[n].change.numpy() for n in shown.values()], showfliers=False)
        spread.set_xticks(range(1, len(shown) + 1), list(shown))
        spread.axhline(0, color="gray", lw=0.6)
        spread.set(ylabel=f"change of log p of {self.token_text!r}, nats")
        for sign, name, label in ((-1, "minus", "at firings"), (1, "no firing: plus", "where it does not fire")):
            effects = [self.effects[f"{name} {m:g}"] for m in self.doses]
            medians = [Number.median("", e.change, e.window, "nats") for e in effects]
            intervals(dose, [sign * m for m in self.doses], medians, label=label)
        dose.axhline(0, color="gray", lw=0.6)
        dose.set(xlabel="times the atom at its activation, added", ylabel="median change, nats")
        dose.legend(frameon=False)
        return made


def _plan(asked: Asked) -> Iterator[Task]:
    """Of the atom that fires most."""
    for sae in asked.saes:
        run = partial(erase, asked.model, sae, None, asked.texts, context=64)
        yield Task(run, [sae], {"n": asked.sizes.erase, **asked.common})


@named_kinds
@experiment("an atom taken out where it fires (section 4)", order=6, plan=_plan)
@torch.no_grad()
def erase(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    atom: int | None,
    text: Texts,
    *,
    n: int = 150,
    mode: Mode = "delete",
    doses: Sequence[float | int] = (1.0, 2.0, 4.0),
    read: Read = "same",
    context: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    check_model: bool = True,
    progress: Progress | None = None,
) -> EraseResult:
    """Take an atom out of the memory where it fires, and see which token becomes less likely.

    Args:
        model, sae, text, batch_size, seed, check_model: see `Run`.
        atom: which of its atoms; any activation above 0 is a firing. None: the one that fires most, at as many firings
            as it has if those are fewer than ``n``.
        n: firings, half of them to choose the token and half to test it; and ``n // 2`` tokens without a firing.
        mode: ``"delete"``: take out the native write, as the paper does; ``"subtract"``: ``a_i A_i`` alone.
        doses: what ``a_i A_i`` is multiplied by where it is subtracted at firings, or added elsewhere.
        read: ``"same"``: the token's own read sees the edit, and the token after it is predicted; ``"next"``: the next
            token's read does, and the one after that is predicted.
        context: tokens of a window, of which the first quarter is only context.
        progress: called with the number of distributions done, about ``n * (3 + len(doses))`` in all.

    Raises:
        ValueError: the text is too short, or the atom fires too rarely in it or never; the message has the numbers.
        IndexError: no such atom.
    """
    if mode not in WHAT:
        raise ValueError(f"mode={mode!r}: allowed are 'delete' and 'subtract'")
    if min(n, context) < FEWEST or len(set(doses)) < len(doses) or min(doses, default=0) < 0:
        raise ValueError(
            f"n={n}, context={context}, doses={list(doses)}: n and context are at least {FEWEST}; doses are not "
            f"negative, and each is given once"
        )
    run = Run(model, text, [sae], batch_size, seed, check_model, progress)
    if atom is not None:
        sae.atom(atom)  # raises for one out of range
    (layer, head), generator = sae.place, run.generator
    read = model.family(layer).rule.first_read(read)
    windows = run.windows(context).tokens
    windows = windows[torch.randperm(len(windows), generator=generator)]
    usable = slice(context // 4, context - (read == "next"))
    codes = [encode(model, sae, x, check_model=False, batch_size=batch_size) for x in run.reading(windows)]
    kept = ("values", "indices", "tokens", "positions")
    codes = [replace(x, **{name: getattr(x, name)[:, usable] for name in kept}) for x in codes]
    if atom is None:
        fired = torch.stack([x.fired for x in codes]).sum(0)
        n, atom = min(n, max(FEWEST, int(fired.max()))), int(fired.argmax())
    activation = torch.cat([x.atom(atom).cpu() for x in codes])
    fires, others = _choose(activation, atom, n, generator)
    for_choice = fires[:, 0] < fires[n // 2, 0]  # rows are in order, so no window is on both sides
    tested = fires[~for_choice]
    if not bool(for_choice.any()) or len(tested[:, 0].unique()) < 2:
        raise ValueError(
            f"the {n} firings of atom {atom} lie in {len(fires[:, 0].unique())} windows: too few to choose the token "
            f"on some and test it on others; give more text or a smaller context"
        )
    score = _Scores(run, windows, usable.start, read)
    typical = float(activation[tuple(fires.T)].median())

    def add(times: float | int, own: bool) -> Edit:  # so much of the atom, at its activation there or the typical one
        def made(at: Int[Tensor, "n 2"]) -> Add:
            atoms = sae.atom(torch.full((len(at), 1), atom))
            of = activation[tuple(at.T)] if own else torch.full((len(at),), typical)
            return Add(layer, head, write=atoms * (times * of)[:, None].to(atoms.key))

        return made

    def delete(_: Tensor) -> Delete:
        return Delete(layer, head)

    native, erased = score(fires), score(fires, delete if mode == "delete" else add(-1, own=True))
    lost = torch.zeros(2, model.n_vocab)
    for rows, before, after in zip(torch.arange(n).split(batch_size), native.log_p(), erased.log_p(), strict=True):
        lost[0] += (before - after)[for_choice[rows]].sum(0).cpu()
        lost[1] += (before - after).sum(0).cpu()
    token, token_same = lost.argmax(1).tolist()
    where = native.of(token)[~for_choice], score(others).of(token)
    effects = {
        "erase": score.effect(tested, where[0], erased.of(token)[~for_choice]),
        "erase, same firings": score.effect(fires, native.of(token_same), erased.of(token_same)),
        **{f"minus {m:g}": score.effect(tested, where[0], score(tested, add(-m, own=True)).of(token)) for m in doses},
        "no firing: delete": score.effect(others, where[1], score(others, delete).of(token)),
    }
    for m in doses:
        edited = score(others, add(m, own=False)).of(token)
        effects[f"no firing: plus {m:g}"] = score.effect(others, where[1], edited)
    return EraseResult(
        layer, head, atom, mode, read, typical, token, show_token(model, token), token_same,
        int((activation > 0).sum()), activation.numel(), tuple(float(m) for m in doses), effects,
    )  # fmt: skip


def _choose(
    activation: Float[Tensor, "window pos"], atom: int, n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "n 2"], Int[Tensor, "m 2"]]:
    """``n`` firings at random, and half as many other tokens; both in the order of the windows."""
    fires, others = (activation > 0).nonzero(), (activation <= 0).nonzero()
    if min(len(fires), 2 * len(others)) < n:
        raise ValueError(
            f"atom {atom} {f'fires at {len(fires)}' if len(fires) else 'never fires at any'} of {activation.numel():,} "
            f"tokens of the text; n={n} firings, and {n // 2} other tokens, were asked for: lower n, give more text, "
            f"or choose an atom that fires more (top_contexts has counts)"
        )
    some = lambda x, m: x[torch.randperm(len(x), generator=generator)[:m].sort().values]  # noqa: E731
    return some(fires, n), some(others, n // 2)


@dataclass(frozen=True)
class _Distributions:
    """Next-token distributions of many tokens, made a batch at a time: with a large vocabulary all of them together
    would not fit."""

    ends: Sequence[LateLogits]

    def log_p(self) -> Iterator[Float[Tensor, "batch vocab"]]:
        """Log probabilities."""
        for end in self.ends:
            rows = torch.arange(end.shape[0])
            yield end.at(rows, torch.zeros_like(rows)).float().log_softmax(-1)

    def of(self, token: int) -> Float[Tensor, "n 2"]:
        """The log probability of a token, and its rank."""
        found = []
        for log_p in self.log_p():
            rank = ranks(log_p, torch.full((len(log_p),), token, device=log_p.device))
            found.append(torch.stack([log_p[:, token].cpu(), rank.cpu().float()], 1))
        return torch.cat(found)


@dataclass
class _Scores:
    """Next-token distributions at single tokens, each a row ``(window, column)``, with or without an edit there."""

    run: Run
    windows: Int[Tensor, "n_windows context"]
    first: int  # position of column 0
    read: Read

    def __call__(self, at: Int[Tensor, "n 2"], edit: Edit | None = None) -> _Distributions:
        """Those after the first token whose read sees the edit."""
        return _Distributions([self._end(part, edit) for part in self.run.batches(at)])

    def _end(self, at: Int[Tensor, "n 2"], edit: Edit | None) -> LateLogits:
        model, device, position = self.run.model, self.windows.device, at[:, 1] + self.first
        last = position + (self.read == "next")  # nothing after that token is run; shorter rows are padded on the left
        column = torch.arange(int(last.max()) + 1) - (last.max() - last)[:, None]
        real = column >= 0
        tokens = self.windows[at[:, :1].to(device), column.clamp_min(0).to(device)]
        editing = nullcontext()
        if edit is not None:
            editing = model.intervene(edit(at), positions=position[:, None], read=self.read, check_model=False)
        with short_chunks(), editing, late_logits(model) as end:
            model(tokens, attention_mask=None if bool(real.all()) else real.long().to(device))
        return end.last()

    def effect(self, at: Int[Tensor, "n 2"], native: Float[Tensor, "n 2"], edited: Float[Tensor, "n 2"]) -> Effect:
        """Of the token whose log probabilities and ranks these are."""
        (before, rank), (after, new_rank) = native.T, edited.T
        return Effect(at[:, 0], at[:, 1] + self.first, before, after, rank.long(), new_rank.long())


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return 0.0 if y.std() == 0 else float(extra("scipy.stats").spearmanr(x, y)[0])
