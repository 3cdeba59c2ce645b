"""What methods are asked about: one text, and a number after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients import Logit
from writesae.gradients.questions import in_ids
from writesae.hooks import ActivationCache
from writesae.model import HookedRecurrentModel, Text, late_logits

Metric: TypeAlias = Callable[[Float[Tensor, "batch 1 vocab"]], Float[Tensor, " batch"]]
"""A `Logit`, or another function of the logits after the last token."""


def one_text(model: HookedRecurrentModel, text: Text, name: str = "text") -> Int[Tensor, "1 pos"]:
    """Its token ids. Raises ValueError if there are several."""
    ids, _ = model.to_tokens(text)
    if len(ids) != 1:
        raise ValueError(f"{name} holds {len(ids)} texts: give one")
    return ids


def strings_of(model: HookedRecurrentModel, ids: Int[Tensor, "1 pos"]) -> tuple[str, ...]:
    """Its tokens as strings; without a tokenizer, their ids."""
    return tuple([str(i) for i in ids[0].tolist()] if model.tokenizer is None else model.to_str_tokens(ids))


def checked_metric(metric: Metric | str, model: HookedRecurrentModel) -> Metric:
    """The metric, with ids for texts (see `Logit`). Raises ValueError if it is about another token than the last."""
    asked: Metric = in_ids(metric, model)
    if isinstance(asked, Logit) and not (isinstance(asked.at, int) and asked.at == -1):
        raise ValueError(f"at={asked.at} in the metric: it is about what follows the last token; leave at= out")
    return asked


def answer(
    model: HookedRecurrentModel, ids: Int[Tensor, "1 pos"], metric: Metric, names: list[str]
) -> tuple[ActivationCache, float]:
    """What a run has at some points, and the number after it."""
    with late_logits(model) as end:
        _, cache = model.run_with_cache(ids, names=names)
    found = metric(end.of_last())
    if found.shape != (1,):
        raise ValueError(f"the metric gave {list(found.shape)} for one text: one number per text, [batch], is needed")
    return cache, float(found[0])
