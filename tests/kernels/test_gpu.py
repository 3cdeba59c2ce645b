"""What can only be seen on an accelerator: the kernels that are installed there, and tensors in two places.

Where there is none, these tests are skipped; ``pytest tests/kernels/test_gpu.py --device cpu`` tries them on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import brute_force as bf
import writesae as ws
from architectures import Architecture, each_architecture, each_rule
from edit_cases import TOLERANCE, annotations_unchecked, cases, random_ids
from writesae.zoo import shipped_models

N_POS = 72
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TF32 = 2e-2  # of a logit: GPU kernels may multiply float32 with 10 bits


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    asked = request.config.getoption("--device")
    if asked is None and not torch.accelerator.is_available():
        pytest.skip("no accelerator here; --device cpu tries these tests on a CPU")
    with annotations_unchecked():
        yield torch.device(asked) if asked else torch.accelerator.current_accelerator()  # type: ignore[arg-type]


def wrapped(a: Architecture, device: torch.device, dtype: torch.dtype = torch.float32) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(a.build().to(device, dtype))


def tolerance(device: torch.device) -> float:
    return TOLERANCE if device.type == "cpu" else TF32


@each_architecture
def test_check(architecture: Architecture, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        result = ws.check(wrapped(architecture, device, dtype), costs=False, show=False)
        assert result.ok, str(result)
        assert str(device.type) in result.environment["device"]


@pytest.mark.parametrize("name", shipped_models())
def test_check_of_trained_models(name: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = ws.check(ws.HookedRecurrentModel.from_pretrained(name, dtype=dtype, device=device), show=False)
        assert result.ok, str(result)


@each_rule
@DTYPES
@torch.no_grad()
def test_edits_against_brute_force(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """In half precision, as near to brute force in float32 as the same model is on a CPU."""
    ids, those = random_ids(6, 1, N_POS), cases(architecture).any_length
    right = bf.brute_force(architecture, architecture.build(), ids.expand(len(those), -1), [c.dense for c in those])
    model, on_cpu = wrapped(architecture, device, dtype), wrapped(architecture, torch.device("cpu"), dtype)
    for case, wanted in zip(those, right, strict=True):
        with case.attach(model):
            error = (model(ids.to(device))[0].float().cpu() - wanted).abs().max()
        allowed = tolerance(device)
        if dtype != torch.float32:
            with case.attach(on_cpu):
                allowed += 2 * float((on_cpu(ids)[0].float() - wanted).abs().max())
        assert error <= allowed, case.name


def greedy(model: ws.HookedRecurrentModel, prompt: Tensor, n: int) -> Tensor:
    return model.generate(prompt, max_new_tokens=n, do_sample=False)


@each_rule
@DTYPES
@torch.no_grad()
def test_generate(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Under edits of prompt and new tokens: each new token is one that prefill of the whole puts first, or near it."""
    model, prompt = wrapped(architecture, device, dtype), random_ids(7, 1, 40).to(device)
    edit = lambda: model.intervene(ws.Delete(1), positions=slice(0, None, 2))  # noqa: E731
    with edit():
        made = greedy(model, prompt, 12)
        logits = model(made)[0].float()
    assert made.shape == (1, 52) and torch.equal(made[:, :40], prompt)
    chosen = logits[39:-1].gather(-1, made[0, 40:, None])[:, 0]
    slack = tolerance(device) + 32 * torch.finfo(dtype).eps * float(logits.abs().max())
    assert (logits[39:-1].amax(-1) - chosen).max() <= slack
    plain = model(made)[0].float()
    assert (plain - logits).abs().max() > 10 * tolerance(device), "the edit acts"


def test_an_sae_on_the_cpu_beside_a_model_on_the_device(device: torch.device) -> None:
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device=device)
    on_cpu, sae = ws.HookedRecurrentModel.from_pretrained("tiny-gdn"), ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
    text = "The state of the Union is strong, and the people are well."
    for attach in (
        lambda m: m.intervene(ws.Substitute(sae)),
        lambda m: m.intervene(sae, atom=3, scale=2.0),
        lambda m: nullcontext(),
    ):
        with torch.no_grad(), attach(model), attach(on_cpu):
            torch.testing.assert_close(model(text).cpu(), on_cpu(text), atol=tolerance(device), rtol=1e-3)
    found, wanted = (ws.attribute(m, text, saes=[sae]).contributions[2].cpu() for m in (model, on_cpu))
    torch.testing.assert_close(found, wanted, atol=tolerance(device), rtol=1e-2)
    assert model.encode(sae, text).indices.shape == on_cpu.encode(sae, text).indices.shape


def test_training_and_extraction(device: torch.device, tmp_path: Path) -> None:
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device=device)
    ids = random_ids(8, 8, 32)
    store = ws.extract(model, ids, [(0, 0), (2, 0)], tmp_path / "store", progress=False)
    assert store.n_sequences == 8 and store.context == 32
    for target in ("write", "state"):
        sae = ws.train_site(
            model, ids, 2, 0, target=target, context=32, n_atoms=16, k=2, steps=3, batch_size=64, progress=False
        )
        sae.check_fits(model)
        assert all(p.isfinite().all() for p in sae.parameters())


def test_device_map(device: torch.device) -> None:
    """All on the device, and with a layer on the CPU, where accelerate carries what lies in between."""
    text = "The state of the Union is strong."
    plain = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    with torch.no_grad():
        wanted = plain(text)
    named = [name for name, _ in plain.hf_model.model.named_children()]
    parts = {f"model.{name}": str(device) for name in named if name != "layers"} | {"lm_head": str(device)}
    layers = {f"model.layers.{i}": "cpu" if i == 1 else str(device) for i in range(4)}
    for device_map in ({"": str(device)}, parts | layers):
        model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device_map=device_map)
        with torch.no_grad():
            torch.testing.assert_close(model(text).cpu(), wanted, atol=tolerance(device), rtol=1e-3)
            with model.intervene([ws.Delete(0), ws.Delete(1)], positions=[2]):
                assert not torch.equal(model(text).cpu(), wanted)
        result = ws.check(model, costs=False, show=False)
        assert result.ok, str(result)
