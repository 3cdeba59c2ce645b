"""Attention that sees only the tokens just before, so that what is farther back has to come from a recurrent memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "writesae_near"
_sees: ContextVar[int | None] = ContextVar("sees", default=None)


@contextmanager
def attention_sees(model: PreTrainedModel, tokens: int | None) -> Iterator[None]:
    """Within the block, attention layers of `model` see the `tokens` last tokens, their own included (None: all).

    For passes over whole texts, without a cache and without padding on the left. Recurrent layers are as they were.
    """
    before, token = model.config._attn_implementation, _sees.set(tokens)
    model.config._attn_implementation = NAME if tokens is not None else before
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _sees.reset(token)


def _near(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    back = torch.arange(query.shape[2], device=query.device)
    back = back[:, None] - back
    near = ((back >= 0) & (back < (_sees.get() or 0)))[None, None]
    return sdpa_attention_forward(module, query, key, value, near, **kwargs)


AttentionInterface.register(NAME, _near)
AttentionMaskInterface.register(NAME, sdpa_mask)
