"""MiniMax's cache: which ones a wrapped model takes, and what transformers' own loses."""

import pytest
import torch
from transformers import DynamicCache, DynamicLayer, StaticCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

import brute_force as bf
from architectures import architecture_named
from edit_cases import assert_close, random_ids
from writesae import HookedRecurrentModel
from writesae.hooks.families.minimax import LightningCache

A, IDS = architecture_named("minimax"), random_ids(8, 2, 21)


@torch.no_grad()
def in_pieces(model, cache) -> torch.Tensor:
    pieces = [model(input_ids=piece, past_key_values=cache, use_cache=True) for piece in IDS.split([9, 11, 1], 1)]
    return torch.cat([out.logits for out in pieces], 1)


def test_any_empty_cache_is_taken_and_stays_the_same_object() -> None:
    model = HookedRecurrentModel(A.build())
    expected = model(IDS)
    for cache in (DynamicCache(config=model.config), DynamicCache(), MiniMaxCache(), LightningCache(model.config)):
        assert_close(in_pieces(model.hf_model, cache), expected)
        assert type(cache) is LightningCache and cache.get_seq_length() == IDS.shape[1]
        assert isinstance(cache.layers[2], DynamicLayer) and cache.get_linear_cache(0) is not None
    with torch.no_grad():
        assert type(model.hf_model(IDS).past_key_values) is LightningCache
        assert model.hf_model(IDS, use_cache=False).past_key_values is None


def test_what_is_not_taken_is_said() -> None:
    raw, model = A.build(), HookedRecurrentModel(A.build())
    filled = MiniMaxCache()
    with bf.untouched(A), torch.no_grad():
        raw(IDS, past_key_values=filled)
    with pytest.raises(ValueError, match=r"filled where writesae did not see it.*begin with a new one"):
        model(IDS, past_key_values=filled)
    with pytest.raises(ValueError, match="a cache of the class StaticCache: MiniMax takes"):
        model.hf_model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=40))


def test_transformers_own_cache_does_not_go_on() -> None:
    """The twin: should it do so in a later version, ours can go."""
    raw = A.build()
    with bf.untouched(A):
        expected = raw(IDS, use_cache=False).logits
        assert (in_pieces(raw, MiniMaxCache()) - expected)[:, 9:].abs().max() > 1e-2
        assert_close(in_pieces(raw, LightningCache(raw.config)), expected)


def test_a_model_in_half_precision_goes_on_from_a_memory_in_float32() -> None:
    """transformers' function computes with the state in the model's dtype, and takes no other."""
    full, half = HookedRecurrentModel(A.build()), HookedRecurrentModel(A.build().bfloat16())
    memory = full.memory(IDS[:, :12])
    with torch.no_grad():
        expected, rounded = full(IDS)[:, 12:], half(IDS)[:, 12:].float()
        after = half(IDS[:, 12:], memory=memory).float()
        from_nothing = half(IDS[:, 12:]).float()
    rounding = (rounded - expected).abs().max()
    assert (after - expected).abs().max() <= 1.5 * rounding
    assert (from_nothing - expected).abs().max() > 5 * rounding  # the twin: without the memory
