"""Padding: a memory never goes through it. Where a model would, it is an error before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import N_VOCAB, Architecture, each_architecture
from writesae.recurrence import Write

# These pass over padding wherever it is: no convolution, and padding does not decay.
LOOK_AT_NOTHING_ELSE = ("xlstm", "gla", "hgrn2", "retnet", "linear_attn")
LEFT, RIGHT, MIDDLE = ([0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1])


@pytest.fixture
def tiny(architecture: Architecture) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(architecture.build())


def masked(*rows: list[int]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor(rows)
    return torch.randint(N_VOCAB, mask.shape), mask


def is_untouched(cache: Any) -> bool:
    states = [s for layer in cache.layers for s in getattr(layer, "recurrent_states", {}).values()]
    return not any(s is not None and bool(s.any()) for s in states)


@each_architecture
@torch.no_grad()
def test_padding_in_the_middle_is_an_error(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    ids, mask = masked(MIDDLE, [1] * 7)
    for call in (tiny, tiny.generate):
        with pytest.raises(ValueError, match="padding between the tokens of a text: token 2 of row 0 is padding"):
            call(ids, attention_mask=mask)
    cache = architecture.new_cache(tiny)
    with tiny.intervene(ws.Delete(1)), pytest.raises(ValueError, match="padding between the tokens"):
        tiny.hf_model(ids, attention_mask=mask, **cache)
    assert is_untouched(next(iter(cache.values())))
    # The twin: transformers computes something there, and it is not what the text alone gives.
    unpadded = tiny.hf_model(ids[:1, mask[0].bool()], use_cache=False).logits[0, -1]
    if architecture.name not in LOOK_AT_NOTHING_ELSE:
        assert (tiny.hf_model(ids, attention_mask=mask, use_cache=False).logits[0, -1] - unpadded).abs().max() > 1e-3


@each_architecture
@torch.no_grad()
def test_a_second_turn_of_unequal_length(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    """With ids and the whole mask: the shorter text has padding between its turns."""
    (first, before), (second, more) = masked(LEFT, [1] * 7), masked([0, 0, 1, 1], [1, 1, 1, 1])
    cache = architecture.new_cache(tiny)
    tiny(first, attention_mask=before, **cache)
    whole = torch.cat([before, more], 1)
    with pytest.raises(ValueError, match="padding between the tokens of a text: token 7 of row 0"):
        tiny(second, attention_mask=whole, **cache, **architecture.place(7, 4))
    with tiny.intervene(ws.Delete(1)), pytest.raises(ValueError, match="padding between the tokens of a text"):
        tiny.hf_model(second, attention_mask=whole, **cache, **architecture.place(7, 4))
    # Of equal length, the same continues what it continued.
    found = tiny(
        second, attention_mask=torch.cat([before, torch.ones_like(more)], 1), **cache, **architecture.place(7, 4)
    )
    expected = tiny(torch.cat([first, second], 1), attention_mask=torch.cat([before, torch.ones_like(more)], 1))
    if not architecture.forgets_positions:  # told one position for rows that have two
        torch.testing.assert_close(found, expected[:, 7:], rtol=0, atol=1e-4)


@each_architecture
@torch.no_grad()
def test_a_token_after_padding_on_the_right(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    ids, mask = masked(RIGHT, [1] * 7)
    last = torch.randint(N_VOCAB, (2, 1))
    cache = architecture.new_cache(tiny)
    padded = tiny(ids, attention_mask=mask, **cache)  # by itself it is right
    alone = tiny(ids[:1, :5])
    torch.testing.assert_close(padded[:1, :5], alone, rtol=0, atol=1e-4)
    whole = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    for given in ({"attention_mask": whole}, {}):  # without a mask, the cache still knows what it was fed
        with pytest.raises(ValueError, match="padding between the tokens of a text: token 5 of row 0"):
            tiny(last, **given, **cache, **architecture.place(7, 1))
    expected = tiny(torch.cat([ids[:1, :5], last[:1]], 1))[0, -1]
    found = tiny.hf_model(last, attention_mask=whole, **cache, **architecture.place(7, 1)).logits[0, -1]
    if architecture.name not in LOOK_AT_NOTHING_ELSE:
        assert (found - expected).abs().max() > 1e-3  # the twin: the unwrapped model goes on, and is wrong


@each_architecture
@torch.no_grad()
def test_padding_fed_token_by_token(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    ids, mask = masked(LEFT, [1] * 7)
    with pytest.raises(ValueError, match="padding fed by itself: models take a single token for a real one"):
        tiny(ids[:, :1], attention_mask=mask[:, :1], **architecture.new_cache(tiny))


@each_architecture
@torch.no_grad()
def test_a_mask_that_does_not_say_which_tokens_are_padding(
    architecture: Architecture, tiny: ws.HookedRecurrentModel
) -> None:
    """A hook may look; one that changes something would change padding, too."""
    if architecture.layers != (0, 1, 3):
        pytest.skip("without an attention layer it takes no such mask")
    ids = torch.randint(N_VOCAB, (2, 6))
    causal = torch.ones(6, 6).tril().bool()[None, None].expand(2, 1, 6, 6)
    try:
        plain = tiny(ids, attention_mask=causal)
    except Exception:
        pytest.skip("takes no 4-D mask")
    seen: list[Tensor] = []
    look = [("blocks.1.mixer.hook_v", lambda value, hook: seen.append(value))]
    assert torch.equal(tiny.run_with_hooks(ids, look, attention_mask=causal), plain) and len(seen) == 1
    for name, change in (
        ("v", lambda value, hook: 2 * value),
        ("o", lambda value, hook: 2 * value),
        ("write", lambda write, hook: write * 2.0),
    ):
        with pytest.raises(ValueError, match="positions need an attention mask"):
            tiny.run_with_hooks(ids, [(f"blocks.1.mixer.hook_{name}", change)], attention_mask=causal)


STATIC = dict(cache_implementation="static", max_new_tokens=5, do_sample=False)


def edits(tiny: ws.HookedRecurrentModel, batch: int) -> dict[str, Any]:
    """What to attach, by a name."""
    site = tiny.site(1)
    write = Write(torch.randn(batch, 1, site.d_key), torch.randn(batch, 1, site.d_value))
    twice = [("blocks.1.mixer.hook_v", lambda value, hook: 2 * value)]
    return {
        "deleted": lambda: tiny.intervene(ws.Delete(1), positions=[2, 7]),
        "added to each its own": lambda: tiny.intervene(
            ws.Add(1, 0, write=write), positions=torch.arange(batch)[:, None] + 3
        ),
        "hooked": lambda: tiny.hooks(twice),
        "state hooked": lambda: tiny.hooks(
            [("blocks.1.mixer.hook_state", lambda state, hook: 0.5 * state)], state_positions=[3, 6]
        ),
    }


@each_architecture
@torch.no_grad()
def test_edits_in_a_static_cache(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    """With a row that is padded: as in a dynamic cache, and each row as alone."""
    if architecture.own_cache:
        pytest.skip("transformers refuses a static cache beside a cache that is given, and it has one of its own")
    ids, mask = masked(LEFT, [1] * 7)
    plain = tiny.generate(ids, attention_mask=mask, **STATIC)
    for name, attach in edits(tiny, 2).items():
        with attach():
            found = tiny.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **STATIC)
            dynamic = {**STATIC, "cache_implementation": None}
            expected = tiny.generate(
                ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **dynamic
            )
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4, msg=name)
    assert plain.shape == (2, 12)


@each_architecture
@torch.no_grad()
def test_each_row_its_own_with_several_sequences_returned(
    architecture: Architecture, tiny: ws.HookedRecurrentModel
) -> None:
    """Positions and writes of each row of a batch go to all of its beams."""
    ids, mask = masked(LEFT, [1] * 7)
    for name, attach in edits(tiny, 2).items():
        if name == "hooked":
            continue
        with attach():
            one = tiny.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            beams = tiny.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=3)
            both = tiny.generate(
                ids, attention_mask=mask, max_new_tokens=5, num_return_sequences=2, top_k=1, do_sample=True
            )
        assert torch.equal(both, one.repeat_interleave(2, 0)), name
        assert beams.shape == one.shape
