"""Texts packed into one row, given to a model of transformers itself while something is attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import writesae as ws
from architectures import N_VOCAB, Architecture, each_architecture
from writesae.models.arguments import arguments_of

IDS = torch.randint(N_VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
AGAIN = torch.tensor([[0, 1, 2, 0, 1, 2]])


@each_architecture
@torch.no_grad()
def test_packed_texts_are_refused(architecture: Architecture) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    hf_model, layer = model.hf_model, model.sites[0].layer
    takes = "position_ids" in arguments_of(hf_model)
    inner: Any = hf_model if architecture.vision else hf_model.base_model
    for attached in (model.intervene(ws.Delete(layer)), model.hooks([(("k", layer), lambda value, _: None)])):
        with attached:
            expected = hf_model(IDS).logits
            if takes:
                found = hf_model(IDS, position_ids=torch.arange(6)[None]).logits  # the twin: one text
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                with pytest.raises(ValueError, match="position_ids begin again in row 0 at token 3"):
                    inner(IDS, position_ids=AGAIN)
            with pytest.raises((ValueError, TypeError), match=r"packs several texts|no argument|unexpected keyword"):
                inner(IDS, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
            torch.testing.assert_close(hf_model(IDS).logits, expected)  # a call that was refused leaves no trace


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def test_padding_is_no_packing(name: str) -> None:
    """Generation gives padded rows positions that stand still at first."""
    model = ws.HookedRecurrentModel.from_pretrained(name)
    ids, mask = model.to_tokens(["The state of the Union", "The state"])
    with model.intervene(ws.Delete(1)):
        made = model.hf_model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert torch.equal(made, model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))
        for cache in ("static",) if name == "tiny-gdn" else ():
            again = model.hf_model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=cache
            )
            assert torch.equal(made, again)
