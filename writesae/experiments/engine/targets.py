"""Tokens as targets: named by a string or an id, or drawn by their rank under the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.model import HookedRecurrentModel

Targets: TypeAlias = str | int | Sequence[str] | Sequence[int] | Int[Tensor, " n"]


def token_ids(model: HookedRecurrentModel, targets: Targets) -> Int[Tensor, " n"]:
    """Target tokens as ids, from ids or from strings that are one token each.

    Raises:
        IndexError: an id outside the vocabulary.
        ValueError: a string that is not one token (the message has its tokens), or no target.
    """
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    given = [targets] if isinstance(targets, str | int) else list(targets)
    if not given:
        raise ValueError("targets is empty: give at least one token, or None where the experiment may choose")
    ids = torch.tensor([x if isinstance(x, int) else _one_token(model, x) for x in given])
    n_vocab = model.W_U.shape[1]
    for bad in ids[(ids < 0) | (ids >= n_vocab)][:1].tolist():
        raise IndexError(f"target {bad} is outside the vocabulary: token ids are 0 to {n_vocab - 1}")
    return ids


def _one_token(model: HookedRecurrentModel, text: str) -> int:
    try:
        return model.to_single_token(text)
    except ValueError as error:
        raise ValueError(f"target {error}") from error


def ordinary_tokens(model: HookedRecurrentModel) -> Bool[Tensor, " vocab"]:
    """Which ids a target may be drawn from: no special token, and none that the tokenizer does not have."""
    usable = torch.ones(model.W_U.shape[1], dtype=torch.bool)
    if model.tokenizer is not None:
        usable[len(model.tokenizer) :] = False
        usable[list(model.tokenizer.all_special_ids)] = False
    return usable


def show_token(model: HookedRecurrentModel, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def ranks(logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The rank of each target, 1 for the most likely token."""
    return 1 + (logits > logits.gather(-1, targets[..., None])).sum(-1)


def choose_targets(
    model: HookedRecurrentModel,
    logits: Float[Tensor, "prompt vocab"],
    targets: Targets | None,
    strata: Sequence[int],
    per_stratum: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The prompt and the target of each trial, from the logits after each prompt.

    Args:
        targets: tokens for every prompt; None to draw from each stratum of ranks, special tokens left out.
        strata: the lowest rank of each; the last has no end.
        per_stratum: how many from each for every prompt.

    Raises:
        ValueError: the ranks do not rise, or a stratum has too few tokens; see also `token_ids`.
    """
    if not strata or strata[0] < 1 or list(strata) != sorted(set(strata)):
        raise ValueError(f"strata={strata}: give ranks from 1 on that rise")
    if targets is not None:
        ids = token_ids(model, targets)
        return torch.arange(len(logits)).repeat_interleave(len(ids)), ids.repeat(len(logits))
    ordinary, chosen = ordinary_tokens(model), []
    for order in logits.argsort(-1, descending=True):
        for low, high in zip(strata, (*strata[1:], logits.shape[1] + 1), strict=True):
            inside = order[low - 1 : high - 1]
            inside = inside[ordinary[inside]]
            if len(inside) < per_stratum:
                raise ValueError(
                    f"ranks {low} to {high - 1} have {len(inside)} tokens to choose from, per_stratum={per_stratum} "
                    f"are wanted; the vocabulary has {logits.shape[1]}: give other strata, or targets"
                )
            chosen.append(inside[torch.randperm(len(inside), generator=generator)[:per_stratum]])
    return torch.arange(len(logits)).repeat_interleave(len(strata) * per_stratum), torch.cat(chosen)
