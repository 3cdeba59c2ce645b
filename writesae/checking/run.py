"""`check`: everything that is claimed of a wrapped model, measured on the model at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from rich.console import Console

from writesae.checking.costs import check_costs
from writesae.checking.environment import environment
from writesae.checking.nothing_attached import (
    check_looking,
    check_nothing_attached,
    check_nothing_left,
    check_rounding,
)
from writesae.checking.recurrences import check_edits, check_recurrences, check_ways_of_feeding
from writesae.checking.result import CheckResult, Row
from writesae.checking.slopes import SHORT, check_edit_slopes, check_hook_slopes, check_own_values
from writesae.checking.subject import Subject, evaluating
from writesae.jobs.progress import Bars
from writesae.model import HookedRecurrentModel
from writesae.model.tokens import Text

N_POS = 72  # more than a chunk of 64 tokens, which kernels work in

CHECKS: dict[str, Callable[[Subject], Iterator[Row]]] = {
    "nothing attached": check_nothing_attached,
    "rounding": check_rounding,
    "hooks that look": check_looking,
    "hooks given their own values": check_own_values,
    "recurrences": check_recurrences,
    "edits": check_edits,
    "edits, fed in other ways": check_ways_of_feeding,
    "gradients of hooks": check_hook_slopes,
    "gradients of edits": check_edit_slopes,
    "costs": check_costs,
    "nothing left": check_nothing_left,
}


def check(
    model: HookedRecurrentModel,
    x: Text | None = None,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    costs: bool = True,
    seed: int = 0,
    show: bool | Console | None = True,
) -> CheckResult:
    """Measure on your model, device, dtype and installed kernels that hooks and edits do what they claim.

    * With nothing attached, logits are bit for bit those of the unwrapped model; with ``kernels="writesae"`` they are
      the same but for rounding.
    * Hooks show what the recurrence runs on: token by token in float64, the cached quantities give what the heads read,
      and the states. What a hook gives back moves the logits as the model's own gradient says.
    * Every kind of edit is what the same change of the state does, token by token in float64.
    * It makes no difference whether a sequence is run at once, in pieces, token by token or padded, edited or not.
    * Time, and on CUDA memory, beside the unwrapped model. Nothing is demanded of these.

    What is allowed follows from the dtype and from how far the unwrapped model is from itself when it is fed in another
    way. A check that raises an error is a row that failed, with the error's text.

    Args:
        model: the model, with nothing attached. It is run in evaluation mode, and left as it was.
        x: a text or token ids, of which the first sequence is used; None: 72 random token ids.
        layers: the recurrent layers to look into; None: the first, the middle and the last; ``"all"``: every one.
        costs: measure time and memory too.
        seed: of the random token ids, edits and directions.
        show: progress bars, or a console to show them on; False or None for none.

    Raises:
        IndexError: a layer that is not recurrent.
        RuntimeError: something is attached to the model.
        ValueError: fewer than 32 tokens.

    >>> result = check(HookedRecurrentModel.from_pretrained("tiny-gdn"))
    >>> result.ok, len(result.rows)
    """
    if model.busy:
        raise RuntimeError(
            "something is attached to the model: check it outside of every `with` block, after model.reset_hooks()"
        )
    subject = Subject(model, _tokens(model, x, seed), _layers(model, layers), seed)
    chosen = {name: function for name, function in CHECKS.items() if costs or function is not check_costs}
    rows, start = [], time.perf_counter()
    with Bars(show, transient=True) as bars, torch.no_grad(), evaluating(model.hf_model):
        bar = bars.add("check", len(chosen))
        for done, (name, function) in enumerate(chosen.items()):
            bar(done, f"check: {name}")
            rows += _tried(name, function, subject)
        bar(len(chosen))
    return CheckResult(model.model_id, environment(model), tuple(rows), time.perf_counter() - start)


def _tried(name: str, function: Callable[[Subject], Iterator[Row]], subject: Subject) -> Iterator[Row]:
    """Its rows; an error is one of them, so that one broken kernel does not hide the rest."""
    try:
        yield from function(subject)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        yield Row(name, allowed=0.0, note=f"{type(error).__name__}: {text}")


def _layers(model: HookedRecurrentModel, layers: Sequence[int] | Literal["all"] | None) -> list[int]:
    every = [site.layer for site in model.sites]
    if layers is None:
        return sorted({every[0], every[len(every) // 2], every[-1]})
    return every if layers == "all" else [model.site(layer).layer for layer in layers]


def _tokens(model: HookedRecurrentModel, x: Text | None, seed: int) -> torch.Tensor:
    if x is None:
        n_vocab = model.hf_model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, n_vocab, (1, N_POS), generator=torch.Generator().manual_seed(seed))
        return ids.to(model.device)
    ids, mask = model.to_tokens(x)
    ids = ids[:1] if mask is None else ids[:1, mask[0].bool()]
    if ids.shape[1] < 2 * SHORT:
        raise ValueError(f"a text of {ids.shape[1]} tokens is too short to check with: give at least {2 * SHORT}")
    return ids[:, :N_POS]
