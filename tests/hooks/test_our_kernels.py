"""``kernels="writesae"``: the recurrence on our kernels is the model's own, in every mode and with every edit.

Both run on the same wrapped model. That the model's own is right, with edits and without, is `test_parity.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from architectures import Architecture, architecture_named, each_architecture, each_rule
from edit_cases import annotations_unchecked, assert_close, cases, random_ids
from writesae import Add, HookedRecurrentModel
from writesae.hooks.families.base import KernelCall

N_POS = 130


def in_every_mode(model: HookedRecurrentModel, a: Architecture) -> dict[str, Tensor]:
    """Logits of real tokens, and final states: prefill, in pieces with decoding between, left-padded, generated."""
    longer, n_pad = random_ids(11, 2, N_POS + 40), 40
    ids, mask = longer[:, :N_POS], torch.ones_like(longer)
    mask[0, :n_pad] = 0
    cache, start, pieces = DynamicCache(config=model.config), 0, []
    for n in (3, 1, 1, 64, 1, 60):
        piece = ids[:, start : start + n]
        pieces.append(model(piece, past_key_values=cache, **a.place(start, n)))
        start += n
    padded = model(longer, attention_mask=mask)
    return {
        "prefill": model(ids),
        "pieces": torch.cat(pieces, 1),
        "states": torch.cat([a.slot(cache, layer).flatten() for layer in a.layers]),
        "padded": torch.cat([padded[0, n_pad:], padded[1]]),
        "generated": model.generate(longer, attention_mask=mask, max_new_tokens=3, do_sample=False).float(),
    }


@torch.no_grad()
@annotations_unchecked()
def check_modes(a: Architecture, edited: bool) -> dict[str, float]:
    """Ours against the model's own; how far apart they are in each mode."""
    model = HookedRecurrentModel(a.build())
    case = cases(a).combined[0]
    found = []
    for kernels in ("native", "writesae"):
        model.kernels = kernels
        if edited:
            with case.attach(model):
                found.append(in_every_mode(model, a))
        else:
            found.append(in_every_mode(model, a))
    native, ours = found
    assert_close(ours["pieces"], ours["prefill"])  # the native ones may go on from a memory on our kernels, too
    return {name: assert_close(ours[name], native[name]) for name in native}


@each_architecture
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_modes(architecture: Architecture, edited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[str, int]] = []
    for name in ("run", "compute"):  # which of the two computes calls of which length
        for cls in {KernelCall, *all_subclasses(KernelCall)}:
            if name in vars(cls) and not getattr(vars(cls)[name], "__isabstractmethod__", False):
                monkeypatch.setattr(cls, name, noted(vars(cls)[name], name, lengths))
    check_modes(architecture, edited)
    assert {n for name, n in lengths if name == "compute"} >= {3, 64, 60, N_POS}
    assert 1 not in {n for name, n in lengths if name == "compute"}


def all_subclasses(cls: type) -> set[type]:
    return {deeper for sub in cls.__subclasses__() for deeper in {sub, *all_subclasses(sub)}}


def noted(fn: Callable[..., Any], name: str, lengths: list[tuple[str, int]]) -> Callable[..., Any]:
    def run(call: KernelCall, *args: Any) -> Any:
        lengths.append((name, call.get("v").shape[1]))
        return fn(call, *args)

    return run


# Broken twins: `check_modes` notices each of them.


def initial_state_dropped(call: KernelCall) -> tuple[Tensor, Tensor]:
    return call.family.rule.run(call.get)


def state_transposed(call: KernelCall) -> tuple[Tensor, Tensor]:
    o, state = compute(call)
    return o, state.mT.reshape(state.shape) if state.shape[-1] > 1 else state.flip(-2)


def state_not_returned(call: KernelCall) -> tuple[Tensor, Tensor | None]:
    o, state = compute(call)
    return o, torch.zeros_like(state)


def what_hooks_made_dropped(call: KernelCall) -> tuple[Tensor, Tensor]:
    call.changed = {}
    return compute(call)


compute = KernelCall.compute


@each_rule
@pytest.mark.parametrize(
    "broken", [initial_state_dropped, state_transposed, state_not_returned, what_hooks_made_dropped]
)
def test_modes_twin(architecture: Architecture, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelCall, "compute", broken)
    with pytest.raises(AssertionError, match="not close"):
        check_modes(architecture, edited=broken is what_hooks_made_dropped)


def check_gradients(architecture: Architecture) -> None:
    """Of a sum over logits, for every weight; with an edit."""
    found = []
    for kernels in ("native", "writesae"):
        model = HookedRecurrentModel(architecture.build(), kernels=kernels)
        write = cases(architecture)["add, same"] if architecture.is_first_of_its_rule else None
        with write.attach(model) if write else model.intervene(Add(1, 2, scale=0.5), positions=slice(3, 9)):
            logits = model(random_ids(12, 1, 70))
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        weights = model.hf_model.named_parameters()
        found.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in weights})
    native, ours = found
    for name, gradient in native.items():
        scale = gradient.abs().max().clamp_min(1)
        assert_close(ours[name] / scale, gradient / scale)


@each_rule
def test_gradients(architecture: Architecture) -> None:
    check_gradients(architecture)


@each_rule
def test_gradients_twin(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(call: KernelCall) -> tuple[Tensor, Tensor]:
        return call.family.rule.run(lambda name: call.get(name).detach() if name == "k" else call.get(name))

    monkeypatch.setattr(KernelCall, "compute", detached)
    with pytest.raises(AssertionError, match="not close"):
        check_gradients(architecture)


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
@torch.no_grad()
def test_trained_models(name: str) -> None:
    model = HookedRecurrentModel.from_pretrained(name, kernels="writesae")
    assert model.kernels == "writesae"
    text = "The state of the Union is strong, and the memory of a head is a matrix. " * 12
    ours = model(text)
    model.kernels = "native"
    assert_close(ours, model(text))


@torch.no_grad()
def test_half_precision() -> None:
    """Ours computes in float32, and returns what the mixer expects."""
    a, ids = architecture_named("qwen3_5"), random_ids(13, 1, 40)
    model = HookedRecurrentModel(a.build().bfloat16())
    native = model(ids)
    model.kernels = "writesae"
    ours = model(ids)
    assert ours.dtype == native.dtype == torch.bfloat16
    assert_close(ours.float(), native.float(), 0.1)


def test_choosing() -> None:
    a = architecture_named("mamba2")
    hf_model = a.build()
    model = HookedRecurrentModel(hf_model)
    assert model.kernels == "native"
    model.kernels = "writesae"
    assert HookedRecurrentModel(hf_model).kernels == "writesae", "it belongs to the model"
    assert HookedRecurrentModel(copy.deepcopy(hf_model), kernels="native").kernels == "native"
    assert model.kernels == "writesae" and not model.busy
    with pytest.raises(ValueError, match="kernels='fla': allowed are 'native' and 'writesae'"):
        model.kernels = "fla"
    with pytest.raises(ValueError, match="kernels='fla'"):
        HookedRecurrentModel(hf_model, kernels="fla")
    with pytest.raises(ValueError, match="kernels='fla'"):  # before anything is loaded
        HookedRecurrentModel.from_pretrained("there/is no such model", kernels="fla")
    with pytest.raises(ValueError, match="packs several texts"):  # which ours would mix
        model(random_ids(14, 1, 6), cu_seq_lens_q=torch.tensor([0, 3, 6], dtype=torch.int32))
