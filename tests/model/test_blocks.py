"""What people of neighbouring tools write: blocks opened twice or never, wrapped wrappers, ``device=``, ``sae(x)``."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import writesae as ws
from architectures import N_VOCAB, Architecture, each_architecture
from writesae.zoo import shipped_models, shipped_saes

TEXT = "The state of the Union"
MADE: dict[str, Callable[[ws.HookedRecurrentModel], Any]] = {
    "intervene": lambda model: model.intervene(ws.Delete(0)),
    "hooks": lambda model: model.hooks([(("k", 0), lambda value, _: value * 0)]),
}
each_block = pytest.mark.parametrize("name", MADE)


@pytest.fixture(scope="module")
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@each_block
def test_a_block_never_opened_is_said(model: ws.HookedRecurrentModel, name: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"model.{name}\(...\) was called and its block never opened"):
        MADE[name](model)
        gc.collect()
    with warnings.catch_warnings():  # the twin: nothing is said of one that was
        warnings.simplefilter("error")
        with MADE[name](model):
            model(TEXT)
        gc.collect()


@each_block
@torch.no_grad()
def test_a_block_opened_again(model: ws.HookedRecurrentModel, name: str) -> None:
    before, made = model(TEXT), MADE[name](model)
    found = []
    for _ in range(2):
        with made as given:
            assert given is model
            found.append(model(TEXT))
        assert torch.equal(model(TEXT), before)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], before)
    with made, pytest.raises(RuntimeError, match=rf"this block of model.{name}\(...\) is open already"), made:
        pass
    assert torch.equal(model(TEXT), before) and not model.busy
    assert torch.equal(made(model)(TEXT), found[0])  # as a decorator
    assert torch.equal(model(TEXT), before)


def test_a_block_that_fails_can_be_opened_again(model: ws.HookedRecurrentModel) -> None:
    made = model.intervene(ws.Delete(3))  # no recurrent layer
    for _ in range(2):
        with pytest.raises(IndexError, match="layer 3 is not recurrent"), made:
            pass


@each_architecture
@torch.no_grad()
def test_a_wrapper_of_a_wrapper(architecture: Architecture) -> None:
    one = ws.HookedRecurrentModel(architecture.build(), model_id="mine")
    two = ws.HookedRecurrentModel(one)
    ids, layer = torch.randint(N_VOCAB, (1, 6)), one.sites[0].layer
    assert two.hf_model is one.hf_model and two.model_id == "mine" and two.hook_names == one.hook_names
    assert torch.equal(one(ids), two(ids))
    with one.intervene(ws.Delete(layer)):
        edited = two(ids)
    with two.intervene(ws.Delete(layer)):
        assert torch.equal(one(ids), edited)
    assert not torch.allclose(edited, one(ids))


def test_its_tokenizer_and_another(model: ws.HookedRecurrentModel) -> None:
    assert ws.HookedRecurrentModel(model).tokenizer is model.tokenizer
    other = object()
    assert ws.HookedRecurrentModel(model, other, model_id="other").tokenizer is other


@each_architecture
def test_gradients_under_inference_mode(architecture: Architecture) -> None:
    model, layer = ws.HookedRecurrentModel(architecture.build()), architecture.layers[0]
    ids = torch.randint(N_VOCAB, (2, 6))
    of = lambda logits: logits[:, -1, 5]  # noqa: E731
    expected = ws.gradient(model, ids, of)
    with torch.inference_mode():
        found = ws.gradient(model, ids.clone(), of)
    torch.testing.assert_close(found.value, expected.value)
    prices = [g[layer].price(g.cache.write(layer)) for g in (found, expected)]
    torch.testing.assert_close(prices[0], prices[1])
    assert prices[1].abs().max() > 0  # the twin: gradients that were lost would be zero


def test_a_model_that_was_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
        model.hf_model.lm_head.weight = torch.nn.Parameter(model.hf_model.lm_head.weight.clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"loaded under torch.inference_mode\(\).*load it outside"):
        ws.gradient(model, TEXT, lambda logits: logits[:, -1, 5])


def test_device() -> None:
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sae = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1", device="meta")
    assert {p.device.type for p in sae.parameters()} == {"meta"}
    with pytest.raises(TypeError, match="device and device_map both say where"):
        ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device="cpu", device_map="cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", shipped_models())
def test_calling_an_sae(name: str) -> None:
    sae, model = ws.WriteSAE.from_pretrained(shipped_saes(name)[-1]), ws.HookedRecurrentModel.from_pretrained(name)
    x = model.run_with_cache(TEXT)[1].write(sae.cfg.layer)[0, :, sae.cfg.head].dense()
    assert torch.equal(sae(x), sae.decode(sae.encode(x))) and not torch.allclose(sae(x), sae(2 * x))


def test_calling_a_compiled_sae() -> None:
    """In a process of its own: the checks of shapes that tests run with are nothing that can be compiled."""
    code = """
import torch, writesae as ws
sae = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
x = torch.randn(5, sae.cfg.d_key, sae.cfg.d_value)
found = torch.compile(sae, backend="eager")(x)
torch.testing.assert_close(found, sae(x))
assert not torch.allclose(found, sae(-x))
model, text = ws.HookedRecurrentModel.from_pretrained("tiny-gdn"), "The state"
compiled = torch.compile(sae, backend="eager")
with torch.no_grad():
    before = model(text)
    with model.intervene(ws.Substitute(sae)): expected = model(text)
    with model.intervene(ws.Substitute(compiled)): torch.testing.assert_close(model(text), expected)
    assert not torch.allclose(expected, before)
    with model.intervene(sae, atom=5, scale=1.0): expected = model(text)
    with model.intervene(compiled, atom=5, scale=1.0): torch.testing.assert_close(model(text), expected)
    assert not torch.allclose(expected, before)
assert torch.equal(model.encode(compiled, text).indices, model.encode(sae, text).indices)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
