"""Our own models in torch.export and torch.func: no branch on numbers where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES, PURE, Architecture

OURS = [a for a in ARCHITECTURES if a.modeling.__name__.startswith("writesae")]
IDS = torch.arange(210).reshape(3, 70) % 50
each_of_ours = pytest.mark.parametrize("architecture", OURS, ids=str)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def test_all_our_models_are_here() -> None:
    assert {a.name for a in OURS} >= {"rwkv7", "delta_net", "gla"} and all(a.layers == PURE for a in OURS)


@each_of_ours
@torch.no_grad()
def test_export(architecture: Architecture) -> None:
    """With other tokens than it was exported with, and so other decays.

    Strict export works too, but not with the checks of shapes that tests put around every function.
    """
    model = Logits(architecture.build())
    graph = torch.export.export(model, (IDS,), strict=False).module()
    other = IDS.flip(1)
    torch.testing.assert_close(graph(other), model(other), rtol=0, atol=1e-4)
    assert (graph(IDS) - model(other)).abs().max() > 1e-2


@each_of_ours
@torch.no_grad()
def test_vmap(architecture: Architecture) -> None:
    model = Logits(architecture.build())
    found = torch.func.vmap(lambda ids: model(ids[None])[0])(IDS)
    torch.testing.assert_close(found, model(IDS), rtol=0, atol=1e-4)
    assert (found - model(IDS.flip(1))).abs().max() > 1e-2
