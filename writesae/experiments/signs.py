"""The sign test (paper, section 4 and appendix I.5): does a token's logit move as the formula says, after one write?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.engine.directions import (
    Direction,
    Key,
    Places,
    at_positions,
    choose_writes,
    promotion,
    setting,
)
from writesae.experiments.engine.targets import Targets, ordinary_tokens, token_ids
from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment
from writesae.hooks import Add, short_chunks
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Read
from writesae.results.result import Figure, Number, Result, figure, intervals, joined, share
from writesae.results.statistics import r_squared
from writesae.stores.windows import Texts

__all__ = ["SignTest", "sign_test"]


@dataclass(frozen=True)
class SignTest(Result):
    """Trials of the sign test: for each, a target and the tokens scored, from the first that sees the write on.

    Attributes:
        layer, head: the site. scale: size of the write over the native write's. read: which read first sees it.
        direction, key, chosen: how values, keys and targets were chosen.
        window: which window of the text a trial is in. position: where it writes. target: the token.
        predicted: change of the target's logit if nothing stood between the head's read and the logits: ``(k.q) v^T W_O
            W_U[T]``, with decay and erase for later tokens. No norm or gate is in it, so only its sign and its ups and
            downs can be right, unless by chance.
        measured: change of the logit. log_p: change of the log probability, nats.
    """

    layer: int
    head: int
    scale: float
    read: Read
    direction: str
    key: str
    chosen: str
    window: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    predicted: Float[Tensor, "n scored"]
    measured: Float[Tensor, "n scored"]
    log_p: Float[Tensor, "n scored"]

    @property
    def title(self) -> str:
        return f"Sign test, layer {self.layer} head {self.head}: {len(self.target):,} trials"

    @property
    def about(self) -> str:
        seen = "the same token's read" if self.read == "same" else "the next token's read"
        return (
            f"At one token of each context a write of {self.scale:g} times the native write's norm was added, with the "
            f"{self.direction} direction for a target token (key: {self.key}; targets: {self.chosen}). The logit of "
            f"the target is compared with the unmodified model's at {seen}. Predicted is what the head reads more, "
            f"through W_O and W_U, with neither gate nor norms; so the ratio of measured to predicted depends on the "
            f"model's scale, and R squared is of the prediction as it is. Paper: section 4, appendix I.5."
        )

    def numbers(self) -> list[Number]:
        predicted, measured, n = self.predicted[:, 0], self.measured[:, 0], len(self.target)
        agrees = predicted.sign() == measured.sign()
        found = [
            Number.share("sign as predicted", agrees),
            Number.estimate("sign as predicted, by window", agrees.float(), self.window, unit="%"),
            Number.share("target's logit rises", measured > 0),
            Number.share("target's log p rises", self.log_p[:, 0] > 0),
        ]
        if self.measured.shape[1] > 1:
            found.append(Number.share("target's logit rises, in total", self.measured.sum(1) > 0))
        if n > 2 and min(float(predicted.std()), float(measured.std())) > 0:
            x, y = predicted.double().numpy(), measured.double().numpy()
            slope = float(x @ y / (x @ x))  # one factor for all, as norms and gates would give if they did not vary
            found += [
                Number("Pearson r", float(np.corrcoef(x, y)[0, 1]), n=n),
                Number("median measured / predicted", float(np.median(y[x != 0] / x[x != 0])), n=n),
                Number("R squared", r_squared(y, x), n=n),
                Number("R squared, one factor fitted", r_squared(y, slope * x), n=n),
            ]
        return [*found, Number.median("median change of log p", self.log_p[:, 0], self.window, "nats")]

    def columns(self) -> dict[str, Any]:
        columns = {name: getattr(self, name).numpy() for name in ("window", "position", "target")}
        for name in ("predicted", "measured", "log_p"):
            for i, column in enumerate(getattr(self, name).T, self.read == "next"):
                columns[f"{name} +{i}"] = column.numpy()
        return columns

    def plot(self) -> Figure:
        made, (cloud, along) = figure(2)
        cloud.scatter(self.predicted[:, 0], self.measured[:, 0], s=6, alpha=0.4, linewidths=0)
        cloud.axhline(0, color="gray", lw=0.6)
        cloud.axvline(0, color="gray", lw=0.6)
        cloud.set(xlabel="predicted change of the target's logit", ylabel="measured")
        rates = [share(column > 0) for column in self.measured.T]
        intervals(along, np.arange(len(rates)) + (self.read == "next"), rates)
        along.axhline(0.5, color="gray", lw=0.6)
        along.set(xlabel="tokens after the write", ylabel="share of trials whose logit rises", ylim=(0, 1))
        return made


def _plan(asked: Asked) -> Iterator[Task]:
    for sae in asked.saes:
        for direction, name in (("formula", ""), ("gradient", "gradient")):
            run = partial(sign_test, asked.model, *sae.place, asked.texts)
            given = {"n": asked.sizes.signs, "direction": direction, "seed": asked.seed}
            yield Task(run, [sae], given, name)


@named_kinds
@experiment("a direction chosen for a token (section 4)", order=7, plan=_plan)
@torch.no_grad()
def sign_test(
    model: HookedRecurrentModel,
    layer: int,
    head: int,
    text: Texts,
    *,
    n: int = 500,
    targets: Literal["random", "top"] | Targets = "random",
    top: int = 10,
    scale: float | int = 1.0,
    direction: Direction = "formula",
    key: Key = "native",
    read: Read = "same",
    horizon: int = 0,
    context: int = 64,
    per_window: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> SignTest:
    """Write a target's direction at one token, and look whether the target's logit moves as predicted.

    Args:
        model, text, batch_size, seed: see `Run`. ``per_window`` times as many rows run at once with the write.
        layer, head: whose state is written to.
        n: trials.
        targets: ``"random"``: any token of the vocabulary; ``"top"``: one of the model's ``top`` most likely next
            tokens there; or the tokens to draw from, ids or strings.
        top: see ``targets``.
        scale: size of the write, in native writes.
        direction, key: see `choose_writes`.
        read: ``"same"``: the token's own read sees the write; ``"next"``: the next token's does first, and is scored.
        horizon: how many tokens to score after the first that sees the write.
        context: tokens of a window; the write is at the last token that has ``horizon`` scored ones after it, so that
            all trials have as much before them.
        per_window: targets tried in a window.
        progress: called with the number of trials done.

    Raises:
        ValueError: the text is too short; a target is not one token; a layer that reads several times per token
            (Mamba-3's MIMO form).
        IndexError: no such layer, head or token.
    """
    model.site(layer).check_head(head)
    read = model.family(layer).rule.first_read(read)
    position = context - 1 - horizon - (read == "next")
    if position < 0 or min(n, per_window, top) < 1:
        raise ValueError(
            f"n={n}, per_window={per_window}, top={top}, context={context}, horizon={horizon}, read={read!r}: counts "
            f"are at least 1, and a window holds the token written at and the {horizon + (read == 'next')} after it"
        )
    drawn = {"random": "random tokens", "top": f"among the {top} most likely"}
    chosen = drawn.get(targets) if isinstance(targets, str) else None
    pool = token_ids(model, targets) if chosen is None else ordinary_tokens(model).nonzero()[:, 0]
    run = Run(model, text, batch_size=batch_size, seed=seed, progress=progress, total=n)
    generator = run.generator
    n_windows = -(-n // per_window)
    cut = run.windows(context, n_windows, "n or context, or raise per_window")
    order, windows = torch.randperm(len(cut), generator=generator)[:n_windows], cut.tokens
    parts: list[dict[str, Tensor]] = []
    times = torch.arange(horizon + 1)
    for batch in run.batches(order, per_window):
        ids = windows[batch]
        at = torch.full((len(ids), 1), position, device=ids.device)
        write, query, logits = at_positions(model, layer, ids[:, : position + 1], None, at)
        rows = torch.arange(len(ids)).repeat_interleave(per_window)
        if chosen == drawn["top"]:
            usable = logits.cpu().masked_fill(~ordinary_tokens(model), -torch.inf).topk(top).indices
            choice = torch.rand(len(ids), top, generator=generator).argsort(1)
            choice = choice.repeat(1, -(-per_window // top))[:, :per_window]
            target = usable.gather(1, choice).flatten()
        else:
            target = pool[torch.randint(len(pool), (len(rows),), generator=generator)]
        on = target.to(ids.device)
        native_write, reads = write[rows, :, head], query[rows, :, head]
        here = Places(
            model, layer, head, ids[rows, : position + 1], None, at[rows], on, native_write, reads, float(scale)
        )
        (made,) = choose_writes([here], direction, key, generator)
        edit = Add(layer, head, write=made, scale=scale, relative=True)
        native = _scored(model, layer, head, ids, horizon)
        with model.intervene(edit, positions=at[rows], read=read):
            edited = _scored(model, layer, head, ids[rows], horizon)
        extra = edited[1] - native[1][rows]
        where = on[:, None].expand(-1, horizon + 1)
        measured = edited[0].gather(-1, where[..., None])[..., 0] - native[0][rows[:, None], times, where]
        spread = edited[0].logsumexp(-1) - native[0].logsumexp(-1)[rows]
        predicted = (extra @ promotion(model, layer, head, target)[:, :, None].to(extra))[..., 0]
        found = dict(window=batch[rows], position=at[rows, 0], target=target)
        parts.append(found | dict(predicted=predicted, measured=measured, log_p=measured - spread))
    return SignTest(
        layer, head, float(scale), read, setting(direction), setting(key), chosen or f"among {len(pool)} given",
        **{name: x[:n] for name, x in joined(parts).items()},
    )  # fmt: skip


def _scored(
    model: HookedRecurrentModel, layer: int, head: int, ids: Int[Tensor, "batch pos"], horizon: int
) -> tuple[Float[Tensor, "batch scored vocab"], Float[Tensor, "batch scored d_value"]]:
    """Logits of the last tokens, and what the head reads there."""
    name = f"blocks.{layer}.mixer.hook_o"
    with short_chunks():
        logits, cache = model.run_with_cache(ids, names=name, **model.logits_of_last(horizon + 1))
    return logits[:, -1 - horizon :].float(), cache[name][:, -1 - horizon :, head].float()
