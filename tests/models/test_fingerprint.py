"""Fingerprints of layers: the same for every load of a checkpoint, others for other weights."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from writesae.models.fingerprint import fingerprint_of, same_weights
from writesae.models.load import load_model
from writesae.zoo import shipped_model


def load(dtype: torch.dtype = torch.float32) -> Any:
    return load_model(str(shipped_model("tiny-gdn")), dtype=dtype).eval()


def random_layer(seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    sizes = {"in.weight": (256, 64), "out.weight": (64, 128), "A_log": (8,), "norm.weight": (16,)}
    return {name: torch.randn(size, generator=gen) * 0.1 for name, size in sizes.items()}


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
def test_one_fingerprint_for_all_dtypes(first: torch.dtype) -> None:
    """Rounded to float16, some weights round to other numbers of bfloat16 than before; it stays the same layer."""
    weights = random_layer()
    one = fingerprint_of((name, x.to(first)) for name, x in weights.items())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_weights(one, fingerprint_of((name, x.to(dtype)) for name, x in weights.items()))
    halves = [x.half().bfloat16() == x.bfloat16() for x in weights.values()]
    assert not all(bool(same.all()) for same in halves)  # or there was nothing to get wrong


@pytest.mark.parametrize("name", random_layer())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_have_other_fingerprints(name: str, dtype: torch.dtype) -> None:
    weights = random_layer()
    one = fingerprint_of((k, x.to(dtype)) for k, x in weights.items())
    for change in (lambda x: x * 1.05, lambda x: x + 0.05 * torch.randn_like(x) * x.std(), lambda x: x.flip(0)):
        other = weights | {name: change(weights[name])}
        assert not same_weights(one, fingerprint_of(other.items()))
    assert not same_weights(one, fingerprint_of(random_layer(1).items()))


def test_fingerprints_of_010() -> None:
    """The shipped SAEs have them: exact in float32 and bfloat16, taken as they are, with a warning, in others."""
    cfg = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1").cfg
    assert cfg.fingerprint is not None
    cfg = dataclasses.replace(cfg, fingerprint=cfg.fingerprint.partition("-")[0])
    wrong = dataclasses.replace(cfg, fingerprint="0" * 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            model = ws.HookedRecurrentModel(load(dtype))
            cfg.check_fits(model)
            with pytest.raises(ValueError, match="was trained on layer 2"):
                wrong.check_fits(model)
    with pytest.warns(UserWarning, match=r"made by writesae 0\.1\.0, and can be checked only against"):
        cfg.check_fits(ws.HookedRecurrentModel(load(torch.float16)))


def test_fingerprints_of_other_forms() -> None:
    """Of a model of somebody's own: equal or not."""
    assert same_weights("my-model", "my-model")
    for other in ("my-other", "0" * 16, f"-{'0' * 64}", ""):
        assert not same_weights("my-model", other)


@torch.no_grad()
def test_an_sae_acts_in_every_dtype() -> None:
    """Refused in float16 before, though right: the edit's effect is that in float32, within the dtype's rounding."""
    text = "The captain was called Henry. The ship went out of the harbour. It was written that the captain was called"
    ids = ws.HookedRecurrentModel.from_pretrained("tiny-gdn").to_tokens(text)[0]
    sae = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
    effects = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = ws.HookedRecurrentModel(load(dtype))
        sae.cfg = dataclasses.replace(sae.cfg, fingerprint=model.fingerprint(2))
        before = model(ids).float()
        with model.intervene(ws.Substitute(sae)):
            effects[dtype] = model(ids).float() - before
    right = effects.pop(torch.float32)
    assert right.norm() > 100, "where it is small, it drowns in the rounding of logits"
    for dtype, found in effects.items():
        assert (found - right).norm() < right.norm() * 16 * torch.finfo(dtype).eps


def test_a_model_in_other_dtypes_than_the_sae_recorded() -> None:
    cfg = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1").cfg
    models = [ws.HookedRecurrentModel(load(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    for trained in models:
        of_layer = dataclasses.replace(cfg, fingerprint=trained.fingerprint(2))
        of_other = dataclasses.replace(cfg, fingerprint=trained.fingerprint(1))
        for model in models:
            of_layer.check_fits(model)
            with pytest.raises(ValueError, match="was trained on layer 2"):
                of_other.check_fits(model)
