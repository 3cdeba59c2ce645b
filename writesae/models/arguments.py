"""Arguments of a forward pass: one that a model would ignore is an error, and so is one that packs several texts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from writesae.models.wrappers import bare

# What models call their cache: from transformers 5.24 on, all of them the last.
CACHES = ("past_key_values", "cache_params", "cache")
if hasattr(BaseModelOutputWithPast, "cache"):
    CACHES = CACHES[::-1]
# Arguments that transformers uses for every model, beside those of the model's own forward; and a mask, at which a
# wrapped one looks whether its own forward does or not.
OF_EVERY_MODEL = (
    "attention_mask", "output_hidden_states", "output_attentions", "output_router_logits", "num_items_in_batch",
    "return_dict",
)  # fmt: skip
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def arguments_of(model: nn.Module) -> list[str]:
    """The names of the arguments that a model has of its own. It may take others, and ignore them."""
    parameters = inspect.signature(bare(model).forward).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def check_arguments(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise unless a model has these arguments, and they do not pack several texts into one row.

    Args:
        model: the model.
        given: the arguments.

    Raises:
        TypeError: an argument that the model would ignore; the message names the nearest that it has.
        ValueError: texts are packed into one row, where the memory of one would run on into the next.
    """
    if not given:  # asked in every pass, of every token that is generated
        return
    known = dict.fromkeys([*arguments_of(model), *OF_EVERY_MODEL])
    check_no_packing(given)
    for name in given:
        if name not in known and name not in PACKING:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            say = f"nearest: {near[0]}" if near else f"it has {', '.join(known)}"
            raise TypeError(f"{type(bare(model)).__name__} has no argument {name!r}; {say}")


_UNPACKED = "give each text a row of its own, padded on the left, and an attention_mask"


def check_no_packing(given: Mapping[str, Any]) -> None:
    """Raise ValueError if arguments of a model say that several texts are packed into one row."""
    for name in PACKING:
        if given.get(name) is not None:
            raise ValueError(f"{name} packs several texts into one row, which nothing here keeps apart: {_UNPACKED}")
    check_not_packed(given.get("position_ids"), given.get("attention_mask"))


def check_not_packed(position_ids: Any, mask: Any = None) -> None:
    """Raise ValueError if positions begin again within a row: several texts are packed into it."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return
    again = position_ids[:, 1:] <= position_ids[:, :-1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= position_ids.shape[1]:
        real = mask[:, -position_ids.shape[1] :].bool()
        again = again & real[:, 1:] & real[:, :-1]
    if bool(again.any()):
        row, at = again.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids begin again in row {row} at token {at + 1}: several texts are packed into it, which nothing "
            f"here keeps apart: {_UNPACKED}"
        )
