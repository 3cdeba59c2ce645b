"""State tuning: an initial state of the memory, trained on texts while all weights stay as they are.

A recurrent model begins every text with an empty memory. Another beginning, found by the gradient of the next-token
loss, makes it go on in the style of the texts that it was trained on, or do their task (2504.05097; the state files of
the RWKV community). It costs nothing when the model runs, and is a `Memory` as any other.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients.backward import check_differentiable, frozen
from writesae.jobs.arguments import named_kinds
from writesae.jobs.disk import remove_halves
from writesae.jobs.progress import Progress
from writesae.jobs.resumable import check_same
from writesae.jobs.tensors import checksum, read_tensors, write_tensors
from writesae.model import HookedRecurrentModel, LateLogits, Memory, late_logits
from writesae.model.remembering import starting_from
from writesae.results.result import Figure, Number, Result, figure
from writesae.stores.windows import Texts, Windows

LOGITS = 2**24  # made at once
CHECKPOINT, MEMORY = "checkpoint.safetensors", "memory.safetensors"  # in the folder of a run


@dataclass(frozen=True, eq=False)
class TunedMemory(Result):
    """A trained initial state, and how much better the model predicts with it.

    Attributes:
        memory: an empty memory with the trained states: give it to ``model(..., memory=)`` or ``generate``.
        heads: the heads that were trained, pairs ``(layer, head)``.
        loss: of each step's texts, in nats per token.
        before, after: loss of each held-out window from an empty memory, and from this one.
        document: which held-out text each window is of.
    """

    memory: Memory
    heads: tuple[tuple[int, int], ...]
    loss: Float[Tensor, " step"]
    before: Float[Tensor, " window"]
    after: Float[Tensor, " window"]
    document: Int[Tensor, " window"]

    @property
    def title(self) -> str:
        return f"Tuned initial state, {len(self.heads)} heads, {len(self.loss)} steps"

    @property
    def about(self) -> str:
        return (
            f"The initial states of {len(self.heads)} heads of {self.memory.origin.model_id} were trained by "
            f"{len(self.loss)} steps of Adam on the next-token loss, with all weights as they are (state tuning, "
            f"2504.05097). Perplexity is of {len(self.before)} held-out windows, each read from its first token on, "
            f"with an empty memory and with the trained one; the interval of the difference is over texts."
        )

    def numbers(self) -> Sequence[Number]:
        return [
            Number("perplexity before", math.exp(self.before.mean()), n=len(self.before)),
            Number("perplexity after", math.exp(self.after.mean()), n=len(self.after)),
            Number.estimate("change of the loss", self.after - self.before, self.document, unit="nats"),
        ]

    def columns(self) -> dict[str, Any]:
        return {"step": np.arange(len(self.loss)), "loss": self.loss.numpy()}

    def plot(self) -> Figure:
        """The loss by step, and the held-out loss before and after."""
        made, (axis,) = figure()
        axis.plot(self.loss.numpy(), lw=0.8, color="0.5", label="texts")
        axis.axhline(float(self.before.mean()), ls="--", lw=1, color="C0", label="held out, before")
        axis.axhline(float(self.after.mean()), ls="-", lw=1, color="C1", label="held out, after")
        axis.set(xlabel="step", ylabel="nats per token")
        axis.legend(frameon=False)
        return made


@named_kinds
@torch.inference_mode(False)
def tune_memory(
    model: HookedRecurrentModel,
    texts: Texts,
    *,
    held_out: str | Iterable[str] | Int[Tensor, "n_held_out pos_held_out"],
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    steps: int = 200,
    lr: float = 1.0,
    batch_size: int = 8,
    context: int = 128,
    start: Memory | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: Progress | None = None,
) -> TunedMemory:
    """Train the initial state of the memory on texts, with all weights frozen.

    >>> tuned = ws.tune_memory(model, letters, held_out=other_letters, out="letters")
    >>> model.generate("Dear", memory=tuned.memory, max_new_tokens=50)
    >>> tuned.memory.save("letters.safetensors")

    Texts are cut into windows, and each window is read from the state that is trained. Logits are made in pieces, so
    a large vocabulary costs no more memory than a few thousand tokens of it.

    Args:
        model: the model. What is attached to it would act while it learns, so nothing may be.
        texts: to learn from: a text, several, or token ids, one text a row.
        held_out: others, on which the loss is measured before and after; a warning says if they became less likely,
            as they do where ``texts`` are few and ``steps`` many.
        layers: recurrent layers whose states are trained; None for all.
        heads: pairs ``(layer, head)`` in their place, for some heads alone.
        steps: of Adam.
        lr: learning rate, which falls to a tenth by a cosine; in units of how large each layer's states are after a
            window (root mean square), since architectures differ in that by a factor of a thousand.
        batch_size: windows in each step.
        context: tokens per window.
        start: an empty memory whose states to begin from; None for zeros.
        seed: of the windows drawn.
        out: a folder for a checkpoint, from which a run that was stopped goes on, and for the memory at the end.
        checkpoint_every: steps from one checkpoint to the next.
        progress: called with the number of steps done.

    Raises:
        IndexError: no such layer or head.
        ValueError: too little text, hooks or edits attached, or a folder that was begun by other work.
        FloatingPointError: the loss is no number any more.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
    if context < 2 or not 0 < lr < math.inf:
        raise ValueError(f"context={context} and lr={lr}: give 2 tokens or more, and a learning rate above 0")
    check_differentiable(model.hf_model)
    chosen = _chosen(model, layers, heads)
    learnt = Windows.cut(model, texts, context).enough(of="texts")
    measured = Windows.cut(model, held_out, context).enough(of="held_out")
    memory = model.memory()  # raises if anything is attached
    if start is not None:
        start.origin.check_fits(model)
        if start.n_tokens or len(start) != 1:
            raise ValueError(f"start= takes an empty memory, as model.memory() makes one; got {start!r}")
        memory = start
    base = {layer: memory.state(layer)[0].float().to(model.layer_device(layer)) for layer in chosen}
    read = model.memory(learnt.tokens[:batch_size])
    scale = {layer: float(read.states[layer].float().square().mean().sqrt()) or 1.0 for layer in chosen}
    run = _Run(model, chosen, base, scale, learnt.tokens, lr, steps, batch_size, seed)
    if out is not None:
        run.open(Path(out), {"context": context, "texts": _hash(learnt.tokens), "start": checksum(_named(base))})
    before = losses(model, measured.tokens, {}, batch_size)
    while run.step < steps:
        run.advance()
        if out is not None and (run.step % checkpoint_every == 0 or run.step == steps):
            run.save()
        if progress is not None:
            progress(run.step)
    for layer, S in run.states().items():
        memory = memory.with_state(layer, S.detach())
    trained = {layer: S[0].to(model.layer_device(layer)) for layer, S in memory.states.items()}
    after = losses(model, measured.tokens, trained, batch_size)
    if out is not None:
        memory.save(Path(out) / MEMORY)
    _warn_if_worse(before, after, seen=steps * batch_size / len(learnt.tokens), windows=len(learnt.tokens))
    pairs = tuple((layer, head) for layer, some in chosen.items() for head in some)
    return TunedMemory(memory, pairs, torch.tensor(run.losses), before, after, measured.document)


def _warn_if_worse(before: Tensor, after: Tensor, seen: float, windows: int) -> None:
    """Say that the held-out texts became less likely, and what was learnt instead."""
    if after.mean() > before.mean():
        learnt = f"{windows} window{'s' if windows > 1 else ''}"
        warnings.warn(
            f"the held-out texts became less likely: perplexity {math.exp(before.mean()):.4g} before, "
            f"{math.exp(after.mean()):.4g} after. The memory has learnt its texts by heart, {learnt} seen {seen:.3g} "
            f"times each: give more text, or fewer steps=, a lower lr= or fewer heads=",
            stacklevel=5,  # the caller's line
        )


@dataclass(eq=False)
class _Run:
    """The training, as far as it has come. What a step does follows from the seed and its number alone."""

    model: HookedRecurrentModel
    chosen: Mapping[int, list[int]]
    base: Mapping[int, Float[Tensor, "head d_key d_value"]]
    scale: Mapping[int, float]
    tokens: Int[Tensor, "window pos"]
    lr: float
    steps: int
    batch_size: int
    seed: int
    losses: list[float] = field(default_factory=list)
    folder: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = {  # what is added to the base, in units of the scale
            layer: torch.zeros_like(S[self.chosen[layer]]).requires_grad_() for layer, S in self.base.items()
        }
        self.adam = torch.optim.Adam(self.trained.values(), lr=self.lr)

    @property
    def step(self) -> int:
        return len(self.losses)

    def states(self) -> dict[int, Float[Tensor, "head d_key d_value"]]:
        """All heads of the trained layers."""
        made = {}
        for layer, S in self.base.items():
            where = torch.tensor(self.chosen[layer], device=S.device)
            made[layer] = S.index_add(0, where, self.scale[layer] * self.trained[layer])
        return made

    def advance(self) -> None:
        """One step."""
        drawn = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        rows = torch.randint(len(self.tokens), (self.batch_size,), generator=drawn)
        self.adam.zero_grad()
        with torch.enable_grad():
            loss = backward(self.model, self.tokens[rows.to(self.tokens.device)], self.states())
        if not math.isfinite(loss):
            raise FloatingPointError(f"tuning diverged: the loss of step {self.step} is {loss}; lower lr={self.lr}")
        for group in self.adam.param_groups:
            group["lr"] = self.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * self.step / self.steps)) / 2)
        self.adam.step()
        self.losses.append(loss)

    def open(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Keep checkpoints in a folder, and go on from the one that is there."""
        fingerprints = {str(layer): self.model.fingerprint(layer) for layer in self.chosen}
        settings = {"lr": self.lr, "steps": self.steps, "batch_size": self.batch_size, "seed": self.seed}
        heads = {str(layer): list(some) for layer, some in self.chosen.items()}
        self.folder, self.identity = folder, {**about, **settings, "heads": heads, "weights": fingerprints}
        remove_halves(folder, CHECKPOINT, MEMORY)
        if not (folder / CHECKPOINT).exists():
            return
        tensors, there = read_tensors(
            folder / CHECKPOINT, "tuning", "checkpoint of state tuning", "delete it to start anew"
        )
        check_same(folder, there, self.identity)
        self.losses = tensors["losses"].tolist()
        with torch.no_grad():
            for layer, S in self.trained.items():
                S.copy_(tensors[f"{layer}.state"])
                kept = {name: tensors[f"{layer}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
                self.adam.state[S] = {name: x if name == "step" else x.to(S.device) for name, x in kept.items()}

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.folder is not None
        tensors = {f"{layer}.{name}": x for layer, S in self.trained.items() for name, x in self.adam.state[S].items()}
        tensors |= _named(self.trained) | {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        write_tensors(self.folder / CHECKPOINT, "tuning", tensors, self.identity)


# --- the loss ---------------------------------------------------------------------------------------------------------


def backward(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "batch pos"],
    states: Mapping[int, Float[Tensor, "head d_key d_value"]],
) -> float:
    """The mean loss of the next tokens, in nats, from initial states, to which its gradient is added."""
    with frozen(model.hf_model), starting_from(model, _each(states, len(tokens))):
        with late_logits(model) as end:
            model(tokens, return_type=None)
        apart, total = end.apart(), 0.0
        for _, loss in _pieces(model, tokens, apart):
            loss.sum().backward()
            total += float(loss.detach().sum())
        n = tokens.shape[0] * (tokens.shape[1] - 1)
        assert apart.kept.grad is not None
        end.kept.backward(apart.kept.grad / n)
    return total / n


@torch.no_grad()
def losses(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "window pos"],
    states: Mapping[int, Float[Tensor, "head d_key d_value"]],
    batch_size: int,
) -> Float[Tensor, " window"]:
    """The mean loss of each window's next tokens, in nats, from initial states."""
    found = torch.zeros(len(tokens))
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        with starting_from(model, _each(states, len(batch))), late_logits(model) as end:
            model(batch, return_type=None)
        for rows, loss in _pieces(model, batch, end):
            found.index_add_(0, start + rows.cpu(), loss.cpu())
    return found / (tokens.shape[1] - 1)


def _pieces(
    model: HookedRecurrentModel, tokens: Int[Tensor, "batch pos"], end: LateLogits
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, " n"]]]:
    """Losses of the next tokens and the row of each, as many at once as their logits allow."""
    tokens = tokens.to(end.kept.device)
    batch, n_pos = tokens.shape
    rows, columns = torch.meshgrid(torch.arange(batch), torch.arange(n_pos - 1), indexing="ij")
    pairs = torch.stack([rows.flatten(), columns.flatten()]).to(tokens.device)
    for row, column in (piece.unbind(0) for piece in pairs.split(max(1, LOGITS // model.n_vocab), dim=1)):
        logits = end.at(row, column).float()
        yield row, F.cross_entropy(logits, tokens[row, column + 1].to(logits.device), reduction="none")


# --- what was asked ---------------------------------------------------------------------------------------------------


def _chosen(
    model: HookedRecurrentModel, layers: Sequence[int] | None, heads: Sequence[tuple[int, int]] | None
) -> dict[int, list[int]]:
    """Heads to train, by layer."""
    if layers is not None and heads is not None:
        raise TypeError("layers= and heads= both say what is trained: pass one of them")
    if heads is None:
        sites = model.sites if layers is None else [model.site(layer) for layer in layers]
        return {site.layer: list(range(site.n_heads)) for site in sites}
    chosen: dict[int, list[int]] = {}
    for layer, head in dict.fromkeys(heads):
        model.site(layer).check_head(head)
        chosen.setdefault(layer, []).append(head)
    if not chosen:
        raise ValueError("heads=[]: name one head at least, or leave it out for all")
    return chosen


def _each(states: Mapping[int, Tensor], batch: int) -> dict[int, Tensor]:
    """The same states for every text of a batch."""
    return {layer: S.expand(batch, *S.shape) for layer, S in states.items()}


def _named(states: Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.state": S for layer, S in states.items()}


def _hash(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]
