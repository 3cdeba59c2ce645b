"""Generation from a cache that was filled before, and of prompts fed in pieces: the same as without either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import writesae as ws
from architectures import N_VOCAB, Architecture, each_architecture

SETTINGS: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
N_POS, N_CACHED = 11, 7
IDS = torch.randint(N_VOCAB, (2, N_POS), generator=torch.Generator().manual_seed(3))


OF_EMBEDDINGS = ("qwen3_5_multimodal", "glm5_next")  # the text model is given no ids, so nobody knows what was fed


def filled(model: ws.HookedRecurrentModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.hf_model.config.get_text_config())
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@each_architecture
def test_a_filled_cache_takes_the_whole_text(architecture: Architecture) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    expected = model.generate(IDS, **SETTINGS)
    assert_same(model.generate(IDS, past_key_values=filled(model, IDS[:, :N_CACHED]), **SETTINGS), expected)
    other = (IDS[:, :N_CACHED] + 1) % N_VOCAB  # the twin: a memory of something else
    if architecture.name not in OF_EMBEDDINGS:
        with pytest.raises(ValueError, match="are not those that the cache has been fed"):
            model.generate(IDS, past_key_values=filled(model, other), **SETTINGS)
    found = model(IDS[:, N_CACHED:], past_key_values=filled(model, other), **architecture.place(N_CACHED, 4))[:, -1]
    assert (found - expected.logits[0]).abs().max() > 1e-2


@each_architecture
def test_edits_count_over_the_whole_text(architecture: Architecture) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    layer = model.sites[0].layer
    plain = model.generate(IDS, **SETTINGS)
    for edited in ([2, N_CACHED + 1, N_POS + 1], None):
        with model.intervene(ws.Delete(layer), positions=edited):
            expected = model.generate(IDS, **SETTINGS)
        with model.intervene(ws.Delete(layer), positions=edited):
            cache = filled(model, IDS[:, :N_CACHED])
            found = model.generate(IDS, past_key_values=cache, **SETTINGS)
        assert_same(found, expected)
        assert (plain.logits[0] - expected.logits[0]).abs().max() > 1e-3  # the twin: the edit is seen


@each_architecture
def test_a_cache_is_not_fed_twice(architecture: Architecture) -> None:
    """Going on a second time, from what the first generation left in it."""
    model = ws.HookedRecurrentModel(architecture.build())
    expected = model.generate(IDS, **SETTINGS | {"max_new_tokens": 8})
    cache = DynamicCache(config=model.hf_model.config.get_text_config())
    some = model.generate(IDS, past_key_values=cache, **SETTINGS | {"max_new_tokens": 4}).sequences
    found = model.generate(some, past_key_values=cache, **SETTINGS | {"max_new_tokens": 4})
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits[-1], expected.logits[-1], rtol=1e-3, atol=1e-3)


@each_architecture
def test_new_tokens_alone_are_refused(architecture: Architecture) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    cache = filled(model, IDS[:, :N_CACHED])
    for few in (IDS[:, N_CACHED:], IDS[:, :N_CACHED]):
        with pytest.raises(ValueError, match=f"was given {few.shape[1]} tokens, and the cache has been fed {N_CACHED}"):
            model.generate(few, past_key_values=cache, **SETTINGS)
    many = torch.cat([IDS[:, N_CACHED:], IDS], 1)  # new tokens alone, more of them than are cached
    if architecture.name not in OF_EMBEDDINGS:
        with pytest.raises(ValueError, match=f"their first {N_CACHED} are not those that the cache has been fed"):
            model.generate(many, past_key_values=cache, **SETTINGS)
    with pytest.raises(ValueError, match="a filled cache holds each text once, and 3 beams"):
        model.generate(IDS, past_key_values=cache, num_beams=3, **SETTINGS)


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def test_texts_with_padding(name: str) -> None:
    """Whole texts and their mask, of which the cache has been fed the first columns."""
    model = ws.HookedRecurrentModel.from_pretrained(name)
    ids, mask = model.to_tokens(["The state of the Union is strong and free", "The state of the Union is"])
    assert mask is not None
    expected = model.generate(ids, attention_mask=mask, **SETTINGS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-2], attention_mask=mask[:, :-2], past_key_values=cache)
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **SETTINGS)
    assert_same(found, expected)
    unmasked = model.generate(ids, **SETTINGS)  # the twin
    assert (unmasked.logits[0] - expected.logits[0]).abs().max() > 1e-2


@each_architecture
@pytest.mark.parametrize("size", [3, 11, 40])
def test_a_prompt_in_pieces(architecture: Architecture, size: int) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    layer = model.sites[0].layer
    with model.intervene(ws.Delete(layer), positions=[2, 8, N_POS + 1]):
        expected = model.generate(IDS, **SETTINGS)
    fed: list[int] = []
    with (
        model.intervene(ws.Delete(layer), positions=[2, 8, N_POS + 1]),
        model.hooks([(("resid_pre", layer), lambda x, _: fed.append(x.shape[1]))]),
    ):
        found = model.generate(IDS, prefill_chunk_size=size, **SETTINGS)
    assert_same(found, expected)
    assert max(fed) == min(size, N_POS) and sum(fed) == N_POS + 4


@pytest.mark.parametrize("name", ["tiny-mamba2", "tiny-rwkv7"])
def test_pieces_that_cannot_be(name: str) -> None:
    model = ws.HookedRecurrentModel.from_pretrained(name)
    for more, message in (
        ({"num_beams": 2}, "with 2 beams"),
        ({"use_cache": False}, "with use_cache=False"),
        ({"past_key_values": DynamicCache(config=model.config)}, "with past_key_values"),
    ):
        with pytest.raises(ValueError, match=f"prefill_chunk_size=2 {message}"):
            model.generate(IDS, prefill_chunk_size=2, **SETTINGS, **more)
    with pytest.raises(ValueError, match="prefill_chunk_size=0: give a whole number"):
        model.generate(IDS, prefill_chunk_size=0, **SETTINGS)


@each_architecture
def test_guidance(architecture: Architecture) -> None:
    """Against guidance worked out here, from two plain runs of the model per token."""
    model = ws.HookedRecurrentModel(architecture.build())
    if architecture.name == "qwen3_5_multimodal":
        pytest.skip("the plain transformers model fails: it keeps the positions of the other text's pass")
    scale, texts, negative = 1.7, IDS, IDS[:, -1:]
    for _ in range(3):
        logits, other = (model(x)[:, -1].log_softmax(-1) for x in (texts, negative))
        new = (scale * (logits - other) + other).argmax(-1, keepdim=True)
        texts, negative = torch.cat([texts, new], 1), torch.cat([negative, new], 1)
    settings: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, guidance_scale=scale)
    if architecture.cache_argument != "past_key_values":
        with pytest.raises(ValueError, match=r"would forget the unconditional text.*add use_cache=False"):
            model.generate(IDS, **settings)
        settings["use_cache"] = False
    assert torch.equal(model.generate(IDS, **settings), texts)
    with model.intervene(ws.Delete(model.sites[0].layer)):
        edited = model.generate(IDS, output_scores=True, return_dict_in_generate=True, **settings)
    plain = model.generate(IDS, output_scores=True, return_dict_in_generate=True, **settings)
    assert (edited.scores[0] - plain.scores[0]).abs().max() > 1e-3
