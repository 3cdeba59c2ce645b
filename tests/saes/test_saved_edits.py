"""Interventions saved, loaded and attached again: the same logits; and files that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from writesae import HookedRecurrentModel, Intervention, Write, WriteSAE
from writesae.hooks import Moment
from writesae.jobs.tensors import read_tensors, write_tensors
from writesae.saes.saved_edits import KEY, WHAT

TEXT = "The state of the Union is strong, and the people of the country"


@pytest.fixture(scope="module")
def model() -> HookedRecurrentModel:
    return HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def sae() -> WriteSAE:
    return WriteSAE.from_pretrained("tiny-gdn/L2H1")


@dataclass(frozen=True)
class Halve(Intervention):
    """Somebody's own."""

    by: float = 0.5

    def edit(self, now: Moment) -> Write:
        return now.write * -self.by


def every_kind(model: HookedRecurrentModel, sae: WriteSAE) -> dict[str, tuple[Any, dict[str, Any]]]:
    layer = sae.place.layer
    write = Write(torch.randn(2, 32), torch.randn(2, 32), 2)
    _, cache = model.run_with_cache("The whale, the whale, and the sea, and the sea again")
    d_model = model(TEXT, stop_at_layer=1).shape[-1]
    return {
        "Add": (ws.Add(layer, [0, 2], write=write, scale=torch.tensor([1.5]), relative=True), {"positions": [3, 5]}),
        "Replace": (ws.Replace(layer, 1, write=write), {"positions": slice(2, 6), "read": "next"}),
        "Delete": (ws.Delete(layer), {"positions": 4}),
        "Substitute": (ws.Substitute(sae, norm="native"), {}),
        "Recode": (
            ws.Recode(sae, ablate=[3], scale={5: 2.0, 7: torch.tensor([0.5])}),
            {"positions": torch.tensor([4])},
        ),
        "Knockout": (ws.Knockout(layer, sources=[1, 2], targets=slice(5, None)), {}),
        "AddVector": (ws.AddVector(torch.randn(d_model), "blocks.1.hook_resid_post", 2.0), {"positions": [3]}),
        "Patch": ([ws.Patch(cache, "write", layer, 0, at=3), ws.Patch(cache, "k", layer, 1, at=2)], {}),
        "Patch of a state": (ws.Patch(cache, "state", layer, 0, at=[3], source=[5]), {}),
        "two with one SAE": ([ws.Substitute(sae), ws.Recode(sae, ablate=[2], error_term=True)], {}),
        "one's own": (Halve(layer, 0, by=0.3), {}),
    }


@torch.no_grad()
def test_every_kind_comes_back(model: HookedRecurrentModel, sae: WriteSAE, tmp_path: Path) -> None:
    native = model(TEXT)
    for name, (edits, given) in every_kind(model, sae).items():
        path = ws.save_interventions(tmp_path / "some" / f"{name}.safetensors", model, edits, **given)
        with model.intervene(edits, **given):
            expected = model(TEXT)
        with model.intervene(**ws.load_interventions(path, model)):
            assert torch.equal(model(TEXT), expected), name
        assert (expected - native).abs().max() > 1e-4, name
    size = (tmp_path / "some" / "two with one SAE.safetensors").stat().st_size
    assert size < 1.2 * (tmp_path / "some" / "Substitute.safetensors").stat().st_size, "the SAE is there once"


def test_files_that_are_refused(model: HookedRecurrentModel, sae: WriteSAE, tmp_path: Path) -> None:
    path = ws.save_interventions(tmp_path / "edit.safetensors", model, ws.Delete(1, 0), positions=[3])
    other = HookedRecurrentModel.from_pretrained("tiny-gdn")
    with torch.no_grad():
        for parameter in other.hf_model.model.layers[1].parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match=r"was made for layer 1 of tiny-gdn .* check_model=False uses it"):
        ws.load_interventions(path, other)
    with other.intervene(**ws.load_interventions(path, other, check_model=False)):
        other(TEXT)
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole.replace(b'"same\\"', b'"next\\"'), b"", whole[:20]):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole file of interventions"):
            ws.load_interventions(path, model)
    with pytest.raises(FileNotFoundError):
        ws.load_interventions(tmp_path / "nothing", model)
    own = ws.save_interventions(tmp_path / "own.safetensors", model, Halve(1, 0))
    tensors, about = read_tensors(own, KEY, WHAT, "")
    about["edits"][0]["class"] = "Quarter"
    write_tensors(own, KEY, tensors, about)
    with pytest.raises(ValueError, match="of the class Quarter, which is not known here: import the module"):
        ws.load_interventions(own, model)


def test_what_cannot_be_saved(model: HookedRecurrentModel, tmp_path: Path) -> None:
    class Foreign:
        cfg = type("cfg", (), {"hook_name": "blocks.1.hook_resid_post"})()
        W_dec = torch.randn(4, 192)

        def encode(self, x: Tensor) -> Tensor:
            return x[..., :4]

        def decode(self, x: Tensor) -> Tensor:
            return x @ self.W_dec

    with pytest.raises(TypeError, match=r"Steer.sae is a Foreign, which cannot be saved.*AddVector"):
        ws.save_interventions(tmp_path / "x", model, ws.Steer(Foreign(), atom=1))
    with pytest.raises(IndexError, match="layer 9"):
        ws.save_interventions(tmp_path / "x", model, ws.Delete(9))
    assert not (tmp_path / "x").exists()
