"""How good SAEs are at what they read, and what the model loses when they stand in its place.

Numbers are those of SAELens' evaluation and of SAEBench's core metrics (2503.09532); files have SAEBench's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks import Delete, Intervention
from writesae.hooks.attachable import fit
from writesae.hooks.names import inputs
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.evaluated import Evaluation, Quality
from writesae.model import HookedRecurrentModel, LateLogits, late_logits
from writesae.recurrence import Write
from writesae.recurrence.matrices import norm2
from writesae.recurrence.write import wide
from writesae.saes import Recode, WriteSAE
from writesae.saes.recode import reconstruction
from writesae.stores.windows import Texts, Windows

STRIDE = 8  # of states, which have d_key * d_value numbers each, one in so many is looked at
LOGITS = 2**24  # made at once


@named_kinds
@torch.no_grad()
def evaluate(
    model: HookedRecurrentModel,
    saes: WriteSAE | Sequence[WriteSAE],
    texts: Texts,
    *,
    context: int = 256,
    max_tokens: int | None = 20_000,
    batch_size: int = 4,
    check_model: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate SAEs on text that they were not trained on: each by itself, and all at once.

    >>> found = ws.evaluate(model, [sae, other], held_out)
    >>> found.table()
    >>> found.save("evaluation.json")

    With an SAE means that its whole reconstruction, all active atoms, mean and bias, stands in the place of what it
    reads, at every token (`Recode`). Ablation is the head without any write (`Delete`), which leaves its memory empty
    whatever the SAE reads. Loss recovered is how much of the way from ablation to the native model the SAE goes.

    Args:
        model: the model.
        saes: one or several, of different heads.
        texts: a text, several, or token ids ``[n, pos]``.
        context: tokens of a window, each of which begins with an empty memory.
        max_tokens: of windows spread over all texts; None for all.
        batch_size: windows run at once.
        check_model: refuse an SAE that was trained on other weights.
        progress: called with the number of windows done.

    Raises:
        ValueError: an SAE that does not fit, two of one head, or text that is too short.
    """
    saes = [saes] if isinstance(saes, WriteSAE) else list(saes)
    if not saes:
        raise ValueError("no SAE to evaluate: give one, or a list")
    for sae in saes:
        fit(sae, model, check_model=check_model)
    heads = [sae.place for sae in saes]
    if len(set(heads)) < len(heads):
        raise ValueError(f"two SAEs of one head ({', '.join(map(str, heads))}): they cannot stand in one place")
    if context < 2:
        raise ValueError(f"context={context}: a window needs two tokens, one to read and one to predict")
    rows = list(texts) if isinstance(texts, Tensor) else None
    windows = Windows.cut(model, texts, context) if rows is None else Windows.of_rows(rows, context)
    windows = windows.enough(of="the text").spread(max_tokens)

    sets = [[i] for i in range(len(saes))] + ([list(range(len(saes)))] if len(saes) > 1 else [])
    sums = [Sums() for _ in saes]
    native: list[Tensor] = []
    losses = {name: [[] for _ in sets] for name in ("ce_sae", "ce_ablated", "kl_sae", "kl_ablated")}
    for done in range(0, len(windows), batch_size):
        ids = windows.tokens[done : done + batch_size].to(model.device).long()
        with late_logits(model) as end:
            _, cache = model.run_with_cache(
                ids, names=[name for head in heads for name in inputs(model.family(head.layer).rule, head.layer)]
            )
        for sae, sum_of in zip(saes, sums, strict=True):
            sum_of.add(sae, read_by(sae, cache, context))
        native.append(losses_of(end, None, ids, model.n_vocab)[0])
        for i, some in enumerate(sets):
            for name, edits in (
                ("sae", [Recode(saes[j]) for j in some]),
                ("ablated", [Delete(heads[j].layer, heads[j].head) for j in some]),
            ):
                ce, kl = losses_of(end, _end(model, ids, edits, check_model), ids, model.n_vocab)
                losses[f"ce_{name}"][i].append(ce)
                losses[f"kl_{name}"][i].append(kl)
        if progress is not None:
            progress(min(done + batch_size, len(windows)))
    return Evaluation(
        model.model_id,
        tuple(str(head) for head in heads),
        context,
        tuple(sum_of.quality() for sum_of in sums),
        torch.cat(native),
        **{name: torch.stack([torch.cat(parts) for parts in of_sets]) for name, of_sets in losses.items()},
    )


def _end(model: HookedRecurrentModel, ids: Tensor, edits: Sequence[Intervention], check_model: bool) -> LateLogits:
    with model.intervene(edits, check_model=check_model), late_logits(model) as end:
        model(ids)
    return end


def read_by(sae: WriteSAE, cache: Any, context: int) -> Write | Float[Tensor, "batch n d_key d_value"]:
    """What an SAE reads in a pass: writes and deltas of all tokens; of states, one in `STRIDE`."""
    layer, head = sae.place
    if sae.cfg.target == "state":
        at = list(range(min(STRIDE, context) - 1, context, STRIDE))
        return cache.state(layer, at, [head])[:, :, 0]
    found: Write = cache.write(layer) if sae.cfg.target == "write" else cache.delta(layer)
    return found[:, :, head]


def losses_of(
    native: LateLogits, edited: LateLogits | None, ids: Int[Tensor, "batch pos"], n_vocab: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Of each window, the mean cross entropy of the edited pass (None: of the native one) and the mean
    ``KL(native || edited)``, in nats per token. Logits are made for a part of the tokens at a time."""
    batch, n_pos = ids.shape
    rows, columns = (x.flatten() for x in torch.meshgrid(
        torch.arange(batch, device=ids.device), torch.arange(n_pos - 1, device=ids.device), indexing="ij"
    ))  # fmt: skip
    ce, kl = [], []
    for part in torch.arange(len(rows), device=ids.device).split(max(1, LOGITS // n_vocab)):
        log_p = native.at(rows[part], columns[part]).float().log_softmax(-1)
        log_q = log_p if edited is None else edited.at(rows[part], columns[part]).float().log_softmax(-1)
        ce.append(-log_q.gather(-1, ids[rows[part], columns[part] + 1, None])[:, 0])
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return tuple(torch.cat(x).view(batch, -1).mean(1).cpu() for x in (ce, kl))  # type: ignore[return-value]


@dataclass(eq=False)
class Sums:
    """What adds up over matrices ``X`` and their reconstructions ``X^``; sums that cancel are in the widest floats."""

    n: int = 0
    total: Tensor | None = None  # of X
    fired: Tensor | None = None  # [n_atoms]
    of: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sae: WriteSAE, x: Write | Float[Tensor, "batch n d_key d_value"]) -> None:
        x = x.to(sae.b_enc.dtype)
        values, indices = sae.topk(x)
        made = reconstruction(sae, values, indices)
        x2, made2 = norm2(x), norm2(made)
        cross = x.inner(made) if isinstance(x, Write) else (x * made.dense()).sum((-1, -2))
        found = {
            "x2": x2,
            "made2": made2,
            "cross": cross,
            "error2": (x2 - 2 * cross + made2).clamp_min(0),
            "cosine": cross / (x2 * made2).sqrt().clamp_min(1e-30),
            "length_in": x2.sqrt(),
            "length_out": made2.clamp_min(0).sqrt(),
            "l0": (values > 0).sum(-1),
            "l1": values.sum(-1),
        }
        for name, each in found.items():
            self.of[name] = self.of.get(name, 0) + wide(each).sum()  # type: ignore[operator]
        self.n += x2.numel()
        total = wide(_sum(x))
        self.total = total if self.total is None else self.total + total
        fired = indices[values > 0].bincount(minlength=sae.cfg.n_atoms)
        self.fired = fired if self.fired is None else self.fired + fired

    def quality(self) -> Quality:
        assert self.total is not None and self.fired is not None
        mean = {name: float(x) / self.n for name, x in self.of.items()}
        variance = mean["x2"] - float((self.total / self.n).square().sum())
        return Quality(
            n=self.n,
            explained_variance=1 - mean["error2"] / max(variance, 1e-30),
            nmse=mean["error2"] / max(mean["x2"], 1e-30),
            mse=mean["error2"],
            cosine=mean["cosine"],
            l0=mean["l0"],
            l1=mean["l1"],
            length_in=mean["length_in"],
            length_out=mean["length_out"],
            bias=mean["made2"] / mean["cross"] if mean["cross"] else float("nan"),
            density=(self.fired / self.n).cpu(),
        )


def _sum(x: Write | Float[Tensor, "batch n d_key d_value"]) -> Float[Tensor, "d_key d_value"]:
    """The sum of all matrices."""
    if isinstance(x, Write):
        key, value = (f.flatten(0, -2) for f in x.factors())
        return key.mT @ value
    return x.flatten(0, -3).sum(0)
