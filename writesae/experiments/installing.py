"""Installing a token (paper, section 4 and appendix I.6): write its direction into the memory at the end of a prompt,
let the model go on greedily, and see whether the token turns up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from writesae.experiments.engine.directions import Direction, Key, Places, at_positions, choose_writes, setting
from writesae.experiments.engine.targets import Targets, choose_targets, ranks, show_token
from writesae.experiments.protocol import Asked, Progress, Run, Task, experiment
from writesae.futures.continuations import go_on, prompts_of, text_of
from writesae.hooks import Add
from writesae.jobs.arguments import named_kinds
from writesae.jobs.extras import extra
from writesae.model import HookedRecurrentModel
from writesae.model.tokens import Text as Prompts
from writesae.recurrence import Read, Write
from writesae.results.result import Figure, Number, Result, figure, intervals, joined, share

__all__ = ["InstallResult", "install"]

STRATA = (2, 11, 101, 1001)
CONDITIONS = ("edited", "random")


@dataclass(frozen=True)
class InstallResult(Result):
    """Trials of installing, one row per prompt, target and scale; the scales one after the other.

    Attributes:
        layer, heads, n_positions, direction, key, max_new_tokens: what was done.
        scales: sizes of the write over the native write's; the first is the one that most numbers are of.
        strata: names of the strata of targets. prompts: the prompts. natives: how the unmodified model goes on.
        prompt, target, stratum: of each trial, ``stratum`` as a number. scale: of each.
        rank: of the target in the unmodified model, 1 is the first. log_p: its log probability, nats.
        rank_after, log_p_after: the same with the write, ``[2, n]``: of the direction, and of a random value.
        native: whether the unmodified model's continuation has the target.
        included: whether the edited ones have it, ``[2, n]`` likewise.
        targets, texts: the target and the edited continuation, as strings.
    """

    layer: int
    heads: tuple[int, ...]
    n_positions: int
    direction: str
    key: str
    max_new_tokens: int
    scales: tuple[float, ...]
    strata: tuple[str, ...]
    prompts: tuple[str, ...]
    natives: tuple[str, ...]
    prompt: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    stratum: Int[Tensor, " n"]
    scale: Float[Tensor, " n"]
    rank: Int[Tensor, " n"]
    log_p: Float[Tensor, " n"]
    rank_after: Int[Tensor, "2 n"]
    log_p_after: Float[Tensor, "2 n"]
    native: Bool[Tensor, " n"]
    included: Bool[Tensor, "2 n"]
    targets: tuple[str, ...]
    texts: tuple[str, ...]

    ROWS = ("prompt", "target", "scale", "rank", "log_p", "native")

    @property
    def title(self) -> str:
        heads = f"head {self.heads[0]}" if len(self.heads) == 1 else f"heads {', '.join(map(str, self.heads))}"
        return f"Installing tokens, layer {self.layer} {heads}: {len(self.prompt):,} trials"

    @property
    def about(self) -> str:
        return (
            f"The {self.direction} direction of a target token (key: {self.key}) was written at the last "
            f"{self.n_positions} tokens of a prompt, at {self.scales[0]:g} times the norm of what each head itself "
            f"writes there; then the model went on greedily for {self.max_new_tokens} tokens. A target is included if "
            f"it is among these. Targets are in strata by their rank as next token of the unmodified model; that "
            f"model's continuations are the comparison (paired, McNemar's exact test), and a random value at the same "
            f"keys and norms the control. Lift is the change of the target's log probability as first new token. "
            f"Intervals of lifts are bootstraps over prompts. Paper: section 4, appendix I.6, tables 3, 20 and 21, "
            f"whose ranks are among some 248,000 tokens."
        )

    def of_scale(self, scale: float) -> Bool[Tensor, " n"]:
        return self.scale == scale

    def numbers(self) -> list[Number]:
        first = self.of_scale(self.scales[0])
        found = self._inclusion(first, "")
        for i, name in enumerate(self.strata):
            if bool((here := first & (self.stratum == i)).any()):
                found += self._inclusion(here, f", {name}")
        lift, shift = (x[:, first] for x in (self.log_p_after - self.log_p, self.rank - self.rank_after))
        prompt = self.prompt[first]
        found += [
            Number.share("rank improved", shift[0] > 0),
            Number("median rank shift", float(shift[0].double().median()), n=int(first.sum())),
            Number.median("first-step lift", lift[0], prompt, "nats"),
            Number.estimate("mean first-step lift", lift[0], prompt, unit="nats"),
            Number.median("first-step lift, random value", lift[1], prompt, "nats"),
        ]
        for scale in self.scales if len(self.scales) > 1 else ():
            for name, hits in zip(("", ", random value"), self.included[:, self.of_scale(scale)], strict=True):
                found.append(Number.share(f"inclusion at {scale:g}x{name}", hits))
        return found

    def _inclusion(self, here: Bool[Tensor, " n"], where: str) -> list[Number]:
        edited, native = self.included[0, here], self.native[here]
        gained, lost = int((edited & ~native).sum()), int((native & ~edited).sum())
        p = extra("scipy.stats").binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        return [
            Number.share(f"inclusion{where}", edited),
            Number.share(f"inclusion, unmodified{where}", native),
            Number.share(f"inclusion, random value{where}", self.included[1, here]),
            Number(f"p (McNemar){where}", float(p), n=gained + lost),
        ]

    def columns(self) -> dict[str, Any]:
        columns = super().columns()
        columns |= {"target_text": self.targets, "stratum": [self.strata[i] for i in self.stratum.tolist()]}
        for i, condition in enumerate(CONDITIONS):
            for name in ("rank_after", "log_p_after", "included"):
                columns[f"{name}_{condition}"] = getattr(self, name)[i].numpy()
        return columns | {"text": self.texts}

    def plot(self) -> Figure:
        made, (bars, dose) = figure(2)
        first = self.of_scale(self.scales[0])
        present = [i for i in range(len(self.strata)) if bool((first & (self.stratum == i)).any())]
        series = {"unmodified": self.native, "random value": self.included[1], "edited": self.included[0]}
        for j, (name, hits) in enumerate(series.items()):
            rates = [share(hits[first & (self.stratum == i)]) for i in present]
            intervals(bars, np.arange(len(present)) + 0.27 * (j - 1), rates, width=0.25, label=name)
        bars.set_xticks(range(len(present)), [self.strata[i].removeprefix("ranks ") for i in present])
        bars.set(xlabel="rank of the target before", ylabel="target in continuation", ylim=(0, 1))
        bars.legend(frameon=False)
        for i, name in enumerate(("edited", "random value")):
            intervals(dose, self.scales, [share(self.included[i, self.of_scale(s)]) for s in self.scales], label=name)
        dose.axhline(float(self.native.double().mean()), color="gray", lw=0.8, ls="--", label="unmodified")
        dose.set(xlabel="size of the write / native write", ylabel="target in continuation", ylim=(0, 1))
        dose.legend(frameon=False)
        return made

    def table(self) -> Table:
        """The numbers; of a few trials also the texts."""
        table = super().table()
        if len(self.prompt) <= 12:
            lines = []
            for i in range(len(self.prompt)):
                p = int(self.prompt[i])
                change = f"rank {int(self.rank[i])} to {int(self.rank_after[0, i])} at {float(self.scale[i]):g}x"
                lines.append(
                    f"{self.targets[i]!r}, {change}: {self.prompts[p]!r} ...\n"
                    f"  before {self.natives[p]!r}\n  after  {self.texts[i]!r}"
                )
            table.caption = Text("\n".join(lines), justify="left")
        return table


def _plan(asked: Asked) -> Iterator[Task]:
    """In each head, and in all heads of a layer at once; at the last token of the prompts, and at the last three."""
    ways = (("formula", 3), ("formula", 1), ("gradient", 3), ("gradient", 1), ("optimised", 3))
    for sae in asked.saes:
        for direction, n_positions in ways:
            name = f"{n_positions}" if direction == "formula" else f"{direction}_{n_positions}"
            given = {"direction": direction, "n_positions": n_positions, "seed": asked.seed}
            given["per_stratum"] = asked.sizes.per_stratum
            scales = 3.0 if direction == "optimised" else [3.0, 1.5, 6.0]  # it costs several passes a size
            where: list[tuple[str, int | None, Any]] = [(name, sae.place.head, scales)]
            if n_positions == 3 and asked.first_of_layer(sae):
                where.append((f"{name}_all_heads", None, 3.0))
            for name, head, scale in where:
                run = partial(install, asked.model, sae.place.layer, head, asked.prompts)
                yield Task(run, [sae], {"scale": scale, **given}, name)


@named_kinds
@experiment("a token written into the memory (section 4)", order=8, plan=_plan)
@torch.no_grad()
def install(
    model: HookedRecurrentModel,
    layer: int,
    head: int | Sequence[int] | None,
    prompts: Prompts,
    *,
    targets: Targets | None = None,
    strata: Sequence[int] = STRATA,
    per_stratum: int = 2,
    n_positions: int = 3,
    scale: float | int | Sequence[float | int] = 3.0,
    max_new_tokens: int = 20,
    direction: Direction = "formula",
    key: Key = "native",
    read: Read = "same",
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> InstallResult:
    """Write the direction of a target at the end of prompts, and see whether greedy continuations have the target.

    >>> install(model, 2, 0, "The captain", targets=[" war"]).table()      # one prompt: its texts before and after

    Args:
        model, batch_size, seed: see `Run`.
        layer: whose state is written to.
        head: one head, several, or None for all of the layer.
        prompts: a text, several, or token ids.
        targets: tokens tried with every prompt, ids or strings of one token each; None to draw them by rank.
        strata: the lowest rank of each stratum of targets; the last has no end.
        per_stratum: targets drawn from each for every prompt, special tokens left out.
        n_positions: how many tokens at the prompt's end get the write.
        scale: its size over the native write's, or several; the first is the one that the numbers are about.
        max_new_tokens: length of the continuations.
        direction, key: see `writesae.experiments.engine.directions.choose_writes`.
        read: ``"same"``: the read of a token written at sees the write. ``"next"``: the next token's does.
        progress: called with the number of continuations done: trials, twice for the control, and prompts.

    Raises:
        ValueError: a target is not one token; a prompt is shorter than ``n_positions``; no token is in a stratum; a
            layer that reads several times per token (Mamba-3's MIMO form).
        IndexError: no such layer, head or token.
    """
    heads = _heads(model, layer, head)
    scales = tuple(float(x) for x in ([scale] if isinstance(scale, float | int) else scale))
    if not scales or len(set(scales)) < len(scales) or min(n_positions, max_new_tokens, per_stratum) < 1:
        raise ValueError(
            f"scale={scale}, n_positions={n_positions}, max_new_tokens={max_new_tokens}, per_stratum={per_stratum}: "
            f"give at least one scale, each once, and counts of at least 1"
        )
    run = Run(model, batch_size=batch_size, seed=seed, progress=progress)
    generator = run.generator
    ids, mask, lengths, texts = prompts_of(model, prompts)
    if int(lengths.min()) < n_positions:
        short = int(lengths.argmin())
        raise ValueError(
            f"n_positions={n_positions}, but prompt {short} has {int(lengths[short])} tokens: lower n_positions or "
            f"give a longer prompt"
        )
    positions = lengths[:, None] - n_positions + torch.arange(n_positions, device=ids.device)
    write, query, logits = at_positions(model, layer, ids, mask, positions)
    prompt, target = choose_targets(model, logits.cpu(), targets, strata, per_stratum, generator)
    names = [f"ranks {a} to {b - 1}" for a, b in pairwise(strata)]
    names += [f"ranks {strata[-1]} and up", f"ranks below {strata[0]}"]

    log_p = logits.log_softmax(-1).cpu()
    rank = ranks(logits.cpu()[prompt], target)
    native = go_on(model, ids, mask, max_new_tokens).cpu()
    run.done = len(ids)
    parts: dict[str, list[dict[str, Tensor]]] = {condition: [] for condition in CONDITIONS}
    chosen: dict[int, list[Write]] = {}  # of each batch
    for size in scales:
        for batch in run.batches(torch.arange(len(prompt)), len(CONDITIONS)):
            rows, wanted = prompt[batch].to(ids.device), target[batch].to(ids.device)
            at = positions[rows]
            own, start = None if mask is None else mask[rows], int(batch[0])
            if start not in chosen or direction != "gradient":  # which does not depend on the size
                places = [
                    Places(model, layer, h, ids[rows], own, at, wanted, write[rows, :, h], query[rows, :, h], size)
                    for h in heads
                ]
                chosen[start] = choose_writes(places, direction, key, generator)
            made = dict(zip(heads, chosen[start], strict=True))
            for condition in CONDITIONS:
                if condition == "random":
                    made = {h: _with_random_value(w, generator) for h, w in made.items()}
                edits = [Add(layer, h, write=w, scale=size, relative=True) for h, w in made.items()]
                new = go_on(model, ids[rows], own, max_new_tokens, edits, at, read, first=(seen := []))
                after = seen[0]
                log_p_after = after.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
                found = dict(rank_after=ranks(after, wanted), log_p_after=log_p_after)
                parts[condition].append(found | dict(included=included(new, wanted), new=new))
    edited, random = (joined(parts[condition]) for condition in CONDITIONS)
    texts_after = tuple(text_of(model, row) for row in edited.pop("new").cpu())
    stratum = torch.bucketize(rank, torch.tensor(strata), right=True) - 1
    stratum = torch.where(stratum < 0, len(strata), stratum)
    once = dict(prompt=prompt, target=target, stratum=stratum, rank=rank, log_p=log_p[prompt, target])
    once["native"] = included(native[prompt], target)
    return InstallResult(
        layer, tuple(heads), n_positions, setting(direction), setting(key), max_new_tokens, scales, tuple(names),
        tuple(texts), tuple(text_of(model, row) for row in native.cpu()),
        scale=torch.tensor(scales, dtype=torch.float64).repeat_interleave(len(prompt)),
        targets=tuple(show_token(model, t) for t in target.tolist()) * len(scales), texts=texts_after,
        **{name: torch.stack([x, random[name]]) for name, x in edited.items()},
        **{name: x.repeat(len(scales)) for name, x in once.items()},
    )  # fmt: skip


def _with_random_value(write: Write, generator: torch.Generator) -> Write:
    """The same keys with a random value per row, for `Add` with ``relative=True``."""
    one = torch.randn(len(write.value), 1, *write.value.shape[2:], generator=generator)
    return Write(write.key, one.to(write.value).expand_as(write.value), write.rank)


def included(new: Int[Tensor, "n new"], target: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether each continuation has its target."""
    return (new == target[:, None]).any(-1)


def _heads(model: HookedRecurrentModel, layer: int, head: int | Sequence[int] | None) -> list[int]:
    if head is None:
        return list(range(model.site(layer).n_heads))
    heads = [head] if isinstance(head, int) else list(head)
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"head={head!r}: give one head, several different ones, or None for all")
    for h in heads:
        model.site(layer).check_head(h)
    return heads
