"""Generation that goes on from a cache: the whole text is given, and what the cache has been fed is left out.

That is transformers' convention. It holds there for caches with an attention layer, which counts its tokens; a cache of
recurrent layers alone does not know its length, and Mamba-2's is not looked at. Here it holds for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache

from writesae.hooks.attachment import attached_to
from writesae.hooks.clock import Fed, Pass
from writesae.hooks.scope import owning
from writesae.models.arguments import CACHES, arguments_of
from writesae.models.wrappers import bare


def cache_argument(model: nn.Module) -> str:
    """What a model calls its cache."""
    takes = arguments_of(model)
    return next((name for name in CACHES if name in takes), CACHES[0])


def generation_keeps(name: str) -> bool:
    """Whether generation goes on from a cache of this name in all it does. From Mamba's and Mamba-2's it did not."""
    return name != "cache_params"


def tokens_in(cache: Any) -> int:
    """How many tokens a cache has been fed.

    Raises:
        ValueError: that cannot be known.
    """
    would = Pass({CACHES[0]: cache})
    would.begin()
    if would.past is None:
        raise ValueError(
            "this cache was filled where writesae did not see it, and has no attention layer that would know how many "
            "tokens are in it: fill it with the wrapped model"
        )
    return would.past


def check_continues(cache: Any, tokens: Mapping[str, Tensor], n_mask: int, copies: int) -> None:
    """Raise unless generation can go on from a cache.

    Args:
        cache: which may have been fed something, or nothing.
        tokens: ``input_ids`` or ``inputs_embeds`` given to ``generate``.
        n_mask: tokens that the attention mask is about.
        copies: beams, or sequences to return, per text.

    Raises:
        ValueError: these are not the whole text; several copies of what is cached are wanted.
    """
    past, n_tokens = tokens_in(cache), next(iter(tokens.values())).shape[1]
    if past and copies > 1:
        raise ValueError(
            f"a filled cache holds each text once, and {copies} beams or returned sequences of it are wanted: give the "
            f"whole text without a cache"
        )
    if n_tokens <= past and n_mask != past + n_tokens:
        raise ValueError(
            f"generate was given {n_tokens} tokens, and the cache has been fed {past}: give the whole text, that which "
            f"the cache has been fed and at least one token more, as transformers does"
        )
    fed = attached_to(cache, Fed)
    if n_tokens > past and fed is not None and "input_ids" in tokens and not fed.begins(tokens["input_ids"]):
        raise ValueError(
            f"generate was given {n_tokens} tokens, and their first {past} are not those that the cache has been fed: "
            f"give the whole text, that which the cache has been fed and what comes after it, as transformers does"
        )


@contextmanager
def going_on(model: nn.Module, cache: Any, n_tokens: int) -> Iterator[None]:
    """While the block runs, generation with this cache, from these ``n_tokens`` in all, feeds the new ones alone."""
    past, first = tokens_in(cache), True

    def leave_out(_model: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        nonlocal first
        if not first or not call.here:
            return None
        first = False
        cut = {name: x[:, past:] for name, x in tokens_of(given).items() if x.shape[1] == n_tokens}
        return args, {**given, **cut}

    with owning(everywhere=False) as call, _knowing_its_length(cache):
        handle = bare(model).register_forward_pre_hook(leave_out, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def positions_behind(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Positions that begin behind the padding, as generation gives them to attention layers: a cache is filled with
    one kind of position alone."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def feed_in_pieces(
    model: nn.Module, cache: DynamicCache, tokens: Mapping[str, Tensor], mask: Tensor, size: int, **last: Any
) -> DynamicCache:
    """A cache that has been fed all of a prompt but its last piece, ``size`` tokens at a time.

    Args:
        model: a model whose generation cannot do it: its cache is of recurrent layers alone.
        cache: an empty one.
        tokens: ``input_ids`` or ``inputs_embeds``.
        mask: which tokens are real ``[batch, pos]``.
        size: tokens per piece.
        **last: arguments for the model that have it make few logits.
    """
    for end in range(size, mask.shape[1], size):
        piece = {name: x[:, end - size : end] for name, x in tokens.items()}
        model(**piece, attention_mask=mask[:, :end], use_cache=True, **{cache_argument(model): cache}, **last)
    return cache


def knows_its_length(model: nn.Module, cache: DynamicCache) -> bool:
    """Whether a new cache of this model knows how many tokens are in it, and generation looks at it."""
    try:
        cache.get_seq_length()
    except ValueError:
        return False
    return generation_keeps(cache_argument(model))


@contextmanager
def _knowing_its_length(cache: Any) -> Iterator[None]:
    """Generation asks a cache for its length: for one that does not know it, what it has been fed answers."""
    try:
        cache.get_seq_length()
    except ValueError:
        pass
    else:
        yield
        return

    def length(*_: Any, **__: Any) -> int:
        fed = attached_to(cache, Fed)
        return 0 if fed is None else fed.n_tokens

    cache.get_seq_length = length
    try:
        yield
    finally:
        del cache.get_seq_length


def tokens_of(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """``input_ids`` or ``inputs_embeds`` among a model's arguments."""
    return {name: given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None}
