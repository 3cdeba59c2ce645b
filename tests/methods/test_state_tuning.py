"""State tuning: the gradient of an initial state is the slope of the loss, and training on it makes a text likelier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import N_VOCAB, Architecture, architecture_named, each_architecture, each_rule
from writesae.methods.state_tuning import backward, losses
from writesae.model.remembering import starting_from
from writesae.stores.windows import Windows

IDS = torch.randint(N_VOCAB, (3, 13), generator=torch.Generator().manual_seed(5))


def random_states(model: ws.HookedRecurrentModel, size: float = 0.3) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)  # with another, one model's loss may have a kink beside it
    return {s.layer: size * torch.randn(s.n_heads, s.d_key, s.d_value, generator=generator) for s in model.sites}


@each_architecture
def test_gradients_are_slopes(architecture: Architecture) -> None:
    """Along a random direction in each layer, against central differences; the twin takes it of another layer."""
    check_slopes(ws.HookedRecurrentModel(architecture.build()))


@each_rule
def test_gradients_through_our_kernels(architecture: Architecture) -> None:
    check_slopes(ws.HookedRecurrentModel(architecture.build(), kernels="writesae"))


def check_slopes(model: ws.HookedRecurrentModel) -> None:
    states = {layer: S.requires_grad_() for layer, S in random_states(model).items()}
    weights = [p.requires_grad for p in model.hf_model.parameters()]
    loss = backward(model, IDS, states)
    assert math.isclose(loss, float(losses(model, IDS, states, 2).mean()), rel_tol=1e-4)
    assert [p.requires_grad for p in model.hf_model.parameters()] == weights
    assert all(p.grad is None for p in model.hf_model.parameters())
    constant = {layer: S.detach() for layer, S in states.items()}
    slopes, measured = [], []
    for layer, S in states.items():
        assert S.grad is not None
        direction = S.grad / S.grad.norm() + torch.randn_like(S) / S.numel() ** 0.5
        slopes.append(float((S.grad * direction).sum()))
        step = 3e-3
        up, down = (
            losses(model, IDS, constant | {layer: constant[layer] + sign * step * direction}, 3).double().mean()
            for sign in (1, -1)
        )
        measured.append(float(up - down) / (2 * step))
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(slopes), rtol=0.03, atol=5e-4)
    assert (torch.tensor(measured) - torch.tensor(slopes).roll(1)).abs().max() > 2e-3


@each_architecture
@torch.no_grad()
def test_the_trained_state_is_that_of_a_memory(architecture: Architecture) -> None:
    """What training begins passes at, and the memory with these states, are one; the twin is turned over."""
    model = ws.HookedRecurrentModel(architecture.build())
    states, memory = random_states(model), model.memory()
    for layer, S in states.items():
        memory = memory.with_state(layer, S)
    with starting_from(model, {layer: S.expand(3, *S.shape) for layer, S in states.items()}):
        expected = model(IDS)
    torch.testing.assert_close(model(IDS, memory=memory), expected, rtol=0, atol=1e-4)
    with starting_from(model, {layer: S.flip(1).expand(3, *S.shape) for layer, S in states.items()}):
        assert (model(IDS) - expected).abs().max() > 1e-2


SHOUTED = [
    "I WAS NOW LEFT ALONE WITH THE OLD MAN, AND WE WALKED ALONG THE SHORE OF THE SEA. THE NIGHT WAS COLD, AND THE WIND "
    "WAS STRONG, AND THERE WAS NOT A SHIP IN ALL THE HARBOR THAT WOULD TAKE US.",
    "THE CONGRESS OF THE UNITED STATES HAS THE POWER TO LAY TAXES, AND THE PRESIDENT HAS THE POWER TO MAKE TREATIES "
    "WITH THE NATIONS OF THE WORLD. WE ARE A FREE PEOPLE, AND OUR GOVERNMENT IS STRONG.",
    "WHEN THE CAPTAIN CAME UPON THE DECK HE LOOKED AT THE SEA AND AT THE SKY, AND HE SAID NOTHING TO ANY OF THE MEN. "
    "BUT THE WHALE WAS THERE, AND ALL OF US KNEW IT AS WELL AS HE DID.",
]


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def test_a_style_is_learnt(name: str) -> None:
    model = ws.HookedRecurrentModel.from_pretrained(name)
    seen: list[int] = []
    tuned = ws.tune_memory(
        model, SHOUTED[:2], held_out=SHOUTED[2], steps=12, batch_size=2, context=48, progress=seen.append
    )
    before, after, change = (number.value for number in tuned.numbers())
    assert after < 0.95 * before and change < -0.05 and seen == list(range(1, 13))
    assert tuned.loss[-3:].mean() < tuned.loss[0]
    windows = Windows.cut(model, SHOUTED[2], 48).tokens
    with torch.no_grad():
        measured = model(windows, memory=tuned.memory, return_type="loss")
        plain = model(windows, return_type="loss")
    torch.testing.assert_close(measured, tuned.after.mean(), rtol=0, atol=1e-4)
    torch.testing.assert_close(plain, tuned.before.mean(), rtol=0, atol=1e-4)
    assert list(tuned.records().columns) == ["step", "loss"] and len(tuned.records()) == 12
    assert tuned.plot().axes and tuned.title in str(tuned.table().title)
    assert isinstance(model.generate("THE", memory=tuned.memory, max_new_tokens=3), str)


def test_what_is_learnt_by_heart_is_said() -> None:
    """With the numbers of the result; nothing is said of a memory that helps (above, where warnings are errors)."""
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    with pytest.warns(UserWarning, match="the held-out texts became less likely: perplexity") as said:
        tuned = ws.tune_memory(model, "The captain was called Henry.", held_out=SHOUTED[2], steps=12, context=6)
    before, after = (number.value for number in tuned.numbers()[:2])
    (words,) = (str(one.message) for one in said)
    assert after > before and f"{before:.4g} before, {after:.4g} after" in words
    assert "1 window seen 96 times each" in words


# A run that goes on -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = dict(held_out=IDS, steps=6, batch_size=2, context=6, checkpoint_every=2)


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    model = ws.HookedRecurrentModel(architecture_named("qwen3_5").build())
    whole = ws.tune_memory(model, IDS, **SETTINGS)

    def stop(step: int) -> None:
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        ws.tune_memory(model, IDS, out=tmp_path, progress=stop, **SETTINGS)
    done: list[int] = []
    again = ws.tune_memory(model, IDS, out=tmp_path, progress=done.append, **SETTINGS)
    assert done == [5, 6]  # from the checkpoint of step 4
    torch.testing.assert_close(again.loss, whole.loss, rtol=0, atol=1e-6)
    loaded = ws.Memory.load(tmp_path / "memory.safetensors")
    for layer in (0, 1, 3):
        torch.testing.assert_close(again.memory.state(layer), whole.memory.state(layer), rtol=1e-4, atol=1e-6)
        assert torch.equal(loaded.state(layer), again.memory.state(layer)) and bool(loaded.state(layer).any())
    with pytest.raises(ValueError, match=r"was begun otherwise: lr 1\.0 there, 0\.5 now"):
        ws.tune_memory(model, IDS, out=tmp_path, lr=0.5, **SETTINGS)
    with pytest.raises(ValueError, match="was begun otherwise: texts"):
        ws.tune_memory(model, IDS.flip(1), out=tmp_path, **SETTINGS)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is not a whole checkpoint of state tuning .*delete it to start anew"):
        ws.tune_memory(model, IDS, out=tmp_path, **SETTINGS)


def test_some_heads_alone() -> None:
    model = ws.HookedRecurrentModel(architecture_named("mamba2").build())
    memory = ws.tune_memory(model, IDS, heads=[(0, 1), (3, 2)], **SETTINGS).memory
    moved = {(layer, head) for layer, S in memory.states.items() for head in range(4) if bool(S[:, head].any())}
    assert moved == {(0, 1), (3, 2)}
    with torch.inference_mode():
        further = ws.tune_memory(model, IDS, layers=[1], start=memory, **SETTINGS).memory
    assert bool(further.state(1).any()) and not further.state(2).any()
    assert torch.equal(further.state(0), memory.state(0)) and torch.equal(further.state(3), memory.state(3))


def test_errors() -> None:
    model = ws.HookedRecurrentModel(architecture_named("qwen3_5").build())
    with pytest.raises(TypeError, match="layers= and heads= both say"):
        ws.tune_memory(model, IDS, layers=[0], heads=[(0, 0)], **SETTINGS)
    with pytest.raises(IndexError, match="layer 2 is not recurrent"):
        ws.tune_memory(model, IDS, layers=[2], **SETTINGS)
    with pytest.raises(IndexError, match="head 4 at layer 0"):
        ws.tune_memory(model, IDS, heads=[(0, 4)], **SETTINGS)
    with pytest.raises(ValueError, match="texts makes 0 windows"):
        ws.tune_memory(model, IDS[:, :4], **SETTINGS)
    with pytest.raises(ValueError, match="steps=0"):
        ws.tune_memory(model, IDS, **SETTINGS | {"steps": 0})
    with pytest.raises(ValueError, match="start= takes an empty memory"):
        ws.tune_memory(model, IDS, start=model.memory(IDS[:1]), **SETTINGS)
    with model.intervene(ws.Delete(0)), pytest.raises(ValueError, match="before anything is attached"):
        ws.tune_memory(model, IDS, **SETTINGS)
