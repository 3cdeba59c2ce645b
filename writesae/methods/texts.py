"""The one text that a method is about."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from writesae.model import HookedRecurrentModel, Text


def one_text(model: HookedRecurrentModel, text: Text, name: str = "text") -> Int[Tensor, "1 pos"]:
    """Its token ids. Raises ValueError if there are several."""
    ids, _ = model.to_tokens(text)
    if len(ids) != 1:
        raise ValueError(f"{name} holds {len(ids)} texts: give one")
    return ids


def strings_of(model: HookedRecurrentModel, ids: Int[Tensor, "1 pos"]) -> tuple[str, ...]:
    """Its tokens as strings; without a tokenizer, their ids."""
    return tuple([str(i) for i in ids[0].tolist()] if model.tokenizer is None else model.to_str_tokens(ids))
