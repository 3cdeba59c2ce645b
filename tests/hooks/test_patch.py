"""Parts of one run put into another, as an intervention: against hooks, and a whole run brought over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import brute_force as bf
import writesae as ws
from architectures import ARCHITECTURES, Architecture

CLEAN = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(1))
WHATS = ("write", "state", "k", "v", "log_decay", "o", "resid_pre", "mixer_out")


def by_hook(model: ws.HookedRecurrentModel, cache: Any, what: str, head: int, at: int, source: int) -> Tensor:
    """Logits of the other text with one thing of the clean run, put in by a hook."""
    layer = 1

    def put(x: Any, _hook: ws.HookPoint) -> Any:
        if what == "write":
            found = cache.write(layer)
            key, value = x.key.clone(), x.value.clone()
            key[:, at, head], value[:, at, head] = found.key[0, source, head], found.value[0, source, head]
            return replace(x, key=key, value=value)
        x = x.clone()
        if what == "state":
            x[0, 0, head] = cache.state(layer, [source])[0, 0, head]
        elif what in ("resid_pre", "mixer_out"):
            x[:, at] = cache[what, layer][:, source]
        else:
            x[:, at, head] = cache[what, layer][:, source, head]
        return x

    return model.run_with_hooks(OTHER, [((what, layer), put)], state_positions=[at] if what == "state" else None)


@pytest.mark.parametrize("a", ARCHITECTURES, ids=str)
@torch.no_grad()
def test_a_patch_is_a_hook(a: Architecture) -> None:
    """At one position and at a mapped one; from another position it is another."""
    model = ws.HookedRecurrentModel(a.build())
    _, cache = model.run_with_cache(CLEAN)
    for what in (what for what in WHATS if what in a.points(1) or what == "mixer_out"):
        head = None if what in ("resid_pre", "mixer_out") else 2
        by_hand = {source: by_hook(model, cache, what, 2, 5, source) for source in (5, 3)}
        for source in (5, 3):
            with model.intervene(ws.Patch(cache, what, 1, head, at=5, source=source)):
                ours = model(OTHER)
            torch.testing.assert_close(ours, by_hand[source], atol=1e-4, rtol=0)
            other = by_hand[8 - source]
            # It is fixed, or 0 in units of the stabiliser wherever no new write is larger than what is left of the old.
            if what == "log_decay" and (a.rule.name == bf.SIMPLE_GLA.name or a.rule is bf.MLSTM):
                assert torch.equal(ours, other)
            else:
                assert (ours - other).abs().max() > 1e-4, what


@pytest.mark.parametrize("a", [a for a in ARCHITECTURES if a.is_first_of_its_rule], ids=str)
@torch.no_grad()
def test_whole_points_bring_the_whole_run(a: Architecture) -> None:
    """The last layer's stream of the clean run makes its logits; batches and padding find their own rows."""
    model = ws.HookedRecurrentModel(a.build())
    clean, last = model(CLEAN), model.n_layers - 1
    _, cache = model.run_with_cache(CLEAN, remove_batch_dim=True)
    with model.intervene(ws.Patch(cache, "resid_post", last)):
        torch.testing.assert_close(model(OTHER), clean, atol=1e-4, rtol=0)
    both, mask = torch.cat([CLEAN, OTHER]), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    _, two = model.run_with_cache(both, attention_mask=mask)
    with model.intervene([ws.Patch(two, "resid_post", last, at=list(range(8)))]):
        ours = model(both.flip(0))
    torch.testing.assert_close(ours[0, :8], model(CLEAN)[0, :8], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1, :8], model(OTHER[:, 4:])[0], atol=1e-4, rtol=0)
    with model.intervene(ws.Patch(two, "write", 0, [0, 3], at=[2, 5], source=[5, 2])):
        swapped = model(both.flip(0))
    assert (swapped - model(both.flip(0))).abs().max() > 1e-3
    _, of_clean = model.run_with_cache(CLEAN)
    with model.intervene(ws.Patch(of_clean, "write", 0, [0, 3], at=[2, 5], source=[5, 2])):
        torch.testing.assert_close(swapped[:1], model(OTHER), atol=1e-4, rtol=0)


def test_what_cannot_be_patched() -> None:
    model = ws.HookedRecurrentModel(ARCHITECTURES[0].build())
    _, cache = model.run_with_cache(CLEAN, names=[("k", 1), ("resid_post", 1)])
    with pytest.raises(ValueError, match="give one position of the other run for each"):
        ws.Patch(cache, "k", 1, at=[1, 2], source=[1])
    with pytest.raises(ValueError, match="of the residual stream, which has no heads: leave it out"):
        ws.Patch(cache, "resid_post", 1, 2, at=3)
    cases: list[tuple[ws.Patch, dict[str, Any], type[Exception], str]] = [
        (ws.Patch(cache, "k", 1, at=3), {"positions": [3]}, ValueError, "a Patch, which says itself where it acts"),
        (ws.Patch(cache, "write", 1, at=3), {"positions": [3]}, KeyError, "was not cached; ask for it in names="),
        (ws.Patch(cache, "k", 1, at=3), {"read": "next"}, ValueError, "an edit at a hook point is seen at once"),
        (ws.Patch(cache, "k", 1, at=12), {}, IndexError, "position 12 of sequence 0: this pass has its positions"),
    ]
    for patch, given, kind, text in cases:
        with pytest.raises(kind, match=text), model.intervene(patch, **given):
            pass
    no_head = ws.Patch(cache, "k", 1, 4, at=3)
    with pytest.raises(IndexError, match=r"head 4 of blocks.1.mixer.hook_k: it has heads 0"), model.intervene(no_head):
        model(OTHER)
    _, wide = model.run_with_cache(CLEAN.expand(2, -1))
    for what in ("k", "write", "state"):
        two = ws.Patch(wide, what, 1, at=3)
        with pytest.raises(ValueError, match="a cache of 2 sequences for a batch of 3"), model.intervene(two):
            model(OTHER.expand(3, -1))


@torch.no_grad()
def test_a_strength_for_each_row_of_the_stream() -> None:
    model = ws.HookedRecurrentModel(ARCHITECTURES[0].build())
    both, strengths = torch.cat([CLEAN, OTHER]), torch.tensor([2.0, -1.0])
    vector = torch.randn(model(CLEAN, stop_at_layer=1).shape[-1], generator=torch.Generator().manual_seed(2))
    with model.intervene(ws.AddVector(vector, "blocks.1.hook_resid_post", strengths), positions=[4]):
        ours = model(both)
    for row, strength in enumerate(strengths.tolist()):
        with model.intervene(ws.AddVector(vector, "blocks.1.hook_resid_post", strength), positions=[4]):
            torch.testing.assert_close(ours[row : row + 1], model(both[row : row + 1]), atol=1e-4, rtol=0)
    wrong = ws.AddVector(vector, "blocks.1.hook_resid_post", torch.ones(3))
    with pytest.raises(ValueError, match=r"scale \[3\] for a batch of 2"), model.intervene(wrong):
        model(both)
