"""What methods are asked about: one text, and a number after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients import Logit
from writesae.gradients.questions import in_ids
from writesae.hooks import ActivationCache
from writesae.hooks.names import name_of
from writesae.hooks.positions import Positions
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


def layers_with(model: HookedRecurrentModel, what: str, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, all of which have such a point.

    Raises:
        ValueError: no layer has one, or none was asked for.
        IndexError: one of those asked for has none.
    """
    have = [layer for layer in range(model.n_layers) if name_of(what, layer) in model.hook_names]
    if not have:
        known = sorted({name.rsplit("hook_", 1)[1] for name in model.hook_names})
        raise ValueError(f"what={what!r}: no layer has such a hook point; there are {', '.join(known)}")
    if layers is not None and not len(layers):
        raise ValueError(f"layers=[] asks for nothing: give some of {have}, or None for all")
    for layer in have if layers is None else layers:
        if layer not in have:
            raise IndexError(f"layer {layer} has no {what}; layers that do: {have}")
    return have if layers is None else list(dict.fromkeys(layers))


def listed(asked: Positions, n_pos: int, name: str) -> list[int]:
    """Positions of a text of known length, each as it counts from the beginning."""
    if asked is None or isinstance(asked, slice):
        return list(range(n_pos))[asked or slice(None)]
    found = torch.as_tensor(asked).reshape(-1).tolist()
    for t in found:
        if not -n_pos <= t < n_pos:
            raise IndexError(f"{name} at position {t}: allowed are {-n_pos} to {n_pos - 1}")
    return [t % n_pos for t in found]
