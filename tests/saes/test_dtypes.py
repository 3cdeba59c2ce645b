"""Every dtype of a model with every dtype of an SAE, under autocast or not: right within the coarsest rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import Architecture, each_architecture
from writesae.recurrence import Write
from writesae.zoo import heldout_documents

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
IDS = torch.arange(48).reshape(2, 24) + 40
NAME = "tiny-gdn/L0H0"


def autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def substituted(model: Any, sae: ws.WriteSAE) -> Tensor:
    with torch.no_grad(), model.intervene(ws.Substitute(sae), check_model=False):
        return model(IDS)


def steered(model: Any, sae: ws.WriteSAE) -> Tensor:
    with torch.no_grad(), model.intervene(sae, atom=3, scale=2.0, check_model=False):
        return model(IDS)


def prices(model: Any, sae: ws.WriteSAE) -> Tensor:
    return ws.gradient(model, IDS, ws.Logit(3))[2].prices(0, sae.decoder).detach()


def contributions(model: Any, sae: ws.WriteSAE) -> Tensor:
    return ws.attribute(model, IDS[:1], saes=[sae], check_model=False).contributions[2]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, ws.HookedRecurrentModel]:
    return {dtype: ws.HookedRecurrentModel.from_pretrained("tiny-gdn", dtype=dtype) for dtype in (F32, BF16, F16)}


@pytest.mark.parametrize("use", [substituted, steered, prices, contributions])
@pytest.mark.parametrize("of_model", [F32, BF16, F16], ids=str)
def test_all_dtypes(use: Callable[..., Tensor], of_model: torch.dtype, models: Any) -> None:
    wanted = use(models[F32], ws.WriteSAE.from_pretrained(NAME))
    for of_sae in (F32, BF16, F16, F64):
        sae = ws.WriteSAE.from_pretrained(NAME).to(of_sae)
        for cast in (None, BF16, F16):
            with autocast(cast):
                found = use(models[of_model], sae)
                assert models[of_model].encode(sae, IDS, check_model=False).n_tokens == IDS.numel()
            coarse = BF16 in (of_model, of_sae, cast) or F16 in (of_model, of_sae, cast)
            assert error(found, wanted) < (0.06 if coarse else 1e-5), (of_sae, cast)
    other = ws.WriteSAE.from_pretrained(NAME)
    with torch.no_grad():
        other.V_dec.copy_(-other.V_dec)
    if use is not contributions:  # which are of writes, whatever the SAE
        assert error(use(models[F32], other), wanted) > 0.06, "an error is seen"


@pytest.mark.parametrize("of_sae", [BF16, F16, F64], ids=str)
def test_experiments_with_saes_of_other_dtypes(of_sae: torch.dtype, models: Any) -> None:
    texts, of = heldout_documents()[:8], dict(context=32, check_model=False)
    model, plain = models[F32], ws.WriteSAE.from_pretrained(NAME)
    sae = ws.WriteSAE.from_pretrained(NAME).to(of_sae)
    replaced = ws.replacement_test(model, sae, texts, n_firings=8, horizon=4, conditions=("atom", "random"), **of)
    assert replaced.kl["atom"].isfinite().all()
    assert (
        ws.population_test(model, sae, texts, min_firings=2, max_firings=4, n_atoms=3, horizon=4, **of).records().size
    )
    found, wanted = (ws.logit_change(model, x, texts, atoms=[3, 5], n_prompts=4, **of).measured for x in (sae, plain))
    assert error(found, wanted) < 0.06
    other = ws.logit_change(model, sae, texts, atoms=[7, 9], n_prompts=4, **of).measured
    assert error(other, wanted) > 0.06


class _AddsTheState(ws.Delete):
    """Writes a part of the state once more, so that it has to be walked through."""

    @property
    def needs_state(self) -> bool:
        return True

    @property
    def replaces(self) -> bool:
        return False

    def edit(self, now: Any) -> Write:
        U, _, V = torch.linalg.svd(now.state.float())
        return Write(U[..., :, 0][:, None], V[..., 0, :][:, None]) * now.write.norm()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # a norm of torch, about its speed
@each_architecture
@torch.no_grad()
def test_edits_that_read_states_under_autocast(architecture: Architecture) -> None:
    model, layer = ws.HookedRecurrentModel(architecture.build()), architecture.layers[0]
    ids = torch.arange(12)[None] % 50
    plain = model(ids)
    with torch.autocast("cpu", BF16):
        cast = model(ids)
        with model.intervene(_AddsTheState(layer, 0), positions=[3, 6]):
            edited = model(ids)
    with model.intervene(_AddsTheState(layer, 0), positions=[3, 6]):
        wanted = model(ids)
    assert float((wanted - plain).norm()) > 0
    assert error(edited, wanted) < 3 * error(cast, plain) + 0.02
