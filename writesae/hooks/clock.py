"""Which positions the tokens of the running pass have, and how that is read off the arguments and the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from writesae.hooks.attachment import attach, attached_to
from writesae.hooks.positions import PAD

CACHES = ("past_key_values", "cache_params")  # what models call their cache


@dataclass
class Fed:
    """What a cache has been fed, kept on the cache itself, so that its copies know it too.

    Caches without any attention layer do not know how many tokens they have seen, and transformers feeds pure Mamba
    models no attention mask after the prompt, though the prompt may have been padded.
    """

    n_tokens: int
    mask: Tensor | None  # [batch, tokens], of the first of them; those after it are real


class Clock:
    """Knows which positions the tokens of the running forward pass have. One per model; `begin` tells it of each pass.

    Costs nothing until somebody asks: `positions` works it out and keeps it for the pass.
    """

    def __init__(self, parameters: Sequence[str]):
        self.parameters = parameters  # names, in order, of what the model's forward takes
        self._call: dict[str, Any] = {}
        self._positions: Tensor | None = None
        self._past: int | None = 0  # tokens before the pass; None if that cannot be known
        self._before: Fed | None = None
        self._padding: tuple[Tensor | None] | None = None  # None: not asked for yet in this pass

    @classmethod
    def of(cls, text_model: nn.Module) -> Clock:
        _self, *parameters = inspect.signature(type(text_model).forward).parameters  # instances' may be replaced
        return cls(parameters)

    def __reduce__(self) -> tuple[type[Clock], tuple[Sequence[str]]]:
        return Clock, (self.parameters,)  # copies and pickles of a model start anew

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self._call = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self._positions = self._padding = None
        cache = _cache_in(self._call)
        self._before = attached_to(cache, Fed)
        self._past = _length(cache)
        if cache is not None:
            attach(cache, self._after())

    def end(self, output: Any = None) -> None:
        made = _cache_in(output)
        if made is not None and _cache_in(self._call) is None:  # the model made the cache
            attach(made, self._after())
        self._call = {}  # positions stay: gradient checkpointing runs layers again after the pass

    def positions(self) -> Int[Tensor, "batch pos"]:
        """The position of each token of the running pass; `PAD` for padding.

        Raises:
            ValueError: the attention mask does not say which tokens are padding.
        """
        if self._positions is None:
            self._positions = self._work_out()
        return self._positions

    def try_positions(self) -> Int[Tensor, "batch pos"] | None:
        """`positions`, or None where they cannot be known."""
        try:
            return self.positions()
        except ValueError:
            return None

    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens of the running pass are padding; None if none is, or if that cannot be known."""
        if self._padding is None:
            self._padding = (self._find_padding(),)
        return self._padding[0]

    def _find_padding(self) -> Tensor | None:
        if self._positions is None and self._call.get("attention_mask") is None:
            return None  # tokens without a mask are real
        positions = self.try_positions()
        return positions == PAD if positions is not None and bool((positions == PAD).any()) else None

    def _shape(self) -> torch.Size:
        ids, embeds = self._call.get("input_ids"), self._call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ValueError("the text model was called with neither input_ids nor inputs_embeds")
        return tokens.shape[:2]

    def _after(self) -> Fed | None:
        """What the cache has been fed after this pass; None if its mask does not say."""
        mask = self._call.get("attention_mask")
        if self._past is None:
            return None
        total = self._past + self._shape()[1]
        if mask is None:
            return Fed(total, None if self._before is None else self._before.mask)
        return Fed(total, mask) if _covers(mask, total) else None

    def _work_out(self) -> Tensor:
        batch, n_pos = self._shape()
        if self._past is None:
            raise ValueError(
                "positions are not known: this cache was filled where writesae did not see it, and has no attention "
                "layer that would know how many tokens are in it. Fill it with the wrapped model."
            )
        mask, total = self._call.get("attention_mask"), self._past + n_pos
        if mask is None and self._before is not None and self._before.mask is not None:
            before = self._before.mask[:, : self._past]
            mask = F.pad(before, (0, total - before.shape[1]), value=1)
        if mask is None:
            ids = self._call.get("input_ids")
            device = (ids if ids is not None else self._call["inputs_embeds"]).device
            return torch.arange(self._past, total, device=device).expand(batch, n_pos)
        if not _covers(mask, total):
            got = f"a tensor {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"positions need an attention mask [batch, {total}] over the whole sequence ({self._past} cached and "
                f"{n_pos} new tokens); got {got}. Pass a 2-D mask of that length, or none if nothing is padded."
            )
        real = mask.bool()
        return (real.long().cumsum(-1) - 1).masked_fill(~real, PAD)[:, -n_pos:]


def _cache_in(found: Any) -> Any:
    """The cache among a model's arguments, or in its output."""
    get = found.get if isinstance(found, Mapping) else lambda name: getattr(found, name, None)
    return next((get(name) for name in CACHES if get(name) is not None), None)


def _covers(mask: Any, n_tokens: int) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == n_tokens


def _length(cache: Any) -> int | None:
    """How many tokens are in a cache; None if neither it nor we know."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no attention layer in it
        pass
    fed = attached_to(cache, Fed)
    filled = any(map(_filled, cache.layers)) if hasattr(cache, "layers") else fed is not None
    if not filled:
        return 0
    return None if fed is None else fed.n_tokens


def _filled(layer: Any) -> bool:
    """Whether a layer of a cache holds anything."""
    if any(getattr(layer, "is_conv_states_initialized", {}).values()):
        return any(layer.has_previous_state.values())
    states = getattr(layer, "recurrent_states", {}).values()  # without a convolution, `has_previous_state` stays False
    return any(state is not None and bool(state.any()) for state in states)
