# ruff: noqa: E402  # what is imported has to wait for what is set before it
"""Mamba-3 against mamba-ssm's own layer on its own Triton kernels, run on a CPU by Triton's interpreter.

Like test_triton.py it wants a process of its own, triton, and the source of mamba-ssm::

    WRITESAE_TRITON=1 MAMBA_SSM=FOLDER pytest tests/kernels/test_mamba3.py
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("WRITESAE_TRITON") or not os.environ.get("MAMBA_SSM") or find_spec("triton") is None:
    needed = "WRITESAE_TRITON=1 MAMBA_SSM=FOLDER pytest tests/kernels/test_mamba3.py, with triton installed"
    pytest.skip(f"in its own process: {needed}", allow_module_level=True)

import triton_on_cpu  # isort: skip  # before all that imports triton

triton_on_cpu.use_mamba_ssm(Path(os.environ["MAMBA_SSM"]))

import torch
from torch import Tensor
from transformers import DynamicCache

from edit_cases import annotations_unchecked
from writesae.models.mamba3 import Mamba3, Mamba3Config, Mamba3MIMO

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore")]
combined: Any = importlib.import_module("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
layers: Any = importlib.import_module("mamba_ssm.modules.mamba3")

D, D_KEY, D_HEAD, N_POS = 32, 16, 16, 40
KINDS = {
    "plain": {},
    "norm, groups": dict(is_outproj_norm=True, n_groups=2),
    "all turned": dict(rope_fraction=1.0),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    with annotations_unchecked(), torch.no_grad():
        yield


def with_weights_of(theirs: Any, ours: Any) -> Any:
    """Our layer, with the random weights that theirs is given."""
    generator = torch.Generator().manual_seed(3)
    for name, p in theirs.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if "proj" in name else 0.5) + p * 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours


def both(kind: str) -> tuple[Any, Mamba3, DynamicCache]:
    """Their layer and ours with the same random weights, and a cache for ours."""
    config = Mamba3Config(
        hidden_size=D, state_size=D_KEY, head_dim=D_HEAD, num_hidden_layers=1, vocab_size=8, **KINDS[kind]
    )
    theirs = layers.Mamba3(
        D, D_KEY, headdim=D_HEAD, ngroups=config.n_groups, rope_fraction=config.rope_fraction,
        is_outproj_norm=config.is_outproj_norm, chunk_size=16, layer_idx=0,
    )  # fmt: skip
    return theirs, with_weights_of(theirs, Mamba3(config, 0)), DynamicCache(config=config)


def inputs() -> Tensor:
    return torch.randn(2, N_POS, D, generator=torch.Generator().manual_seed(4))


class Kernel:
    """Their kernels in the place of their layer's call, without its casts to bfloat16 if told so. It goes on from the
    states of the call before."""

    def __init__(self, half: bool = False):
        self.half, self.states = half, (None,) * 4

    def __call__(self, *, Input_States: None, return_final_states: bool, cu_seqlens: None, **values: Any) -> Tensor:
        if self.half:
            return combined.mamba3_siso_combined(**values)
        chunk = values.pop("chunk_size")
        y, *self.states = combined._Mamba3Function.apply(*values.values(), *self.states, None, chunk, True)
        return y


@each_kind
def test_it_is_mamba_ssms_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in pieces from where the last one ended, and what is kept between them."""
    (theirs, ours, cache), x = both(kind), inputs()
    monkeypatch.setattr(layers, "mamba3_siso_combined", kernel := Kernel())
    want = theirs(x)
    assert want.std() > 0.2 and (ours(x, None, None) - want).abs().max() < 1e-4
    kernel.states = (None,) * 4
    for piece in x.split([17, 1, 22], 1):
        want = theirs(piece)
        assert (ours(piece, None, cache) - want).abs().max() < 1e-4
        kept: Any = cache.layers[0]
        angle, state, k, v = kernel.states
        assert (kept.recurrent_states[0] - state.mT).abs().max() < 1e-4
        for i, theirs_kept in enumerate((k, v)):
            assert (kept.conv_states[i][..., 0] - theirs_kept.flatten(1)).abs().max() < 1e-4
        turned = kept.conv_states[2][..., 0].float() - angle.flatten(1)
        assert (turned.cos() - 1).abs().max() < 1e-6, "angles are the same on the circle"


@each_kind
def test_as_it_is_called_in_half_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs, ours, _), x = both(kind), inputs()
    monkeypatch.setattr(layers, "mamba3_siso_combined", Kernel(half=True))
    want = theirs(x)
    assert (ours(x, None, None) - want).norm() < 0.03 * want.norm()


# Several inputs and outputs per head: their kernels are in TileLang and CuTe, which nothing interprets. So their
# layer's own decoding step runs on the function that they check that step with, and on their Triton rotation.

STEP = "ops/cute/mamba3/mamba3_step_fn.py", "selective_state_update_fused_ref_v2"


def step_function() -> Any:
    """That function, out of a file that cannot be imported without CuTe."""
    path = Path(os.environ["MAMBA_SSM"]) / "mamba_ssm" / STEP[0]
    found = [node for node in ast.parse(path.read_text("utf-8")).body if getattr(node, "name", "") == STEP[1]]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    reference = names[STEP[1]]

    def step(
        state: Tensor, B_state: Tensor, x_state: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, x: Tensor,
        dt: Tensor, trap: Tensor, xproj: Tensor, *, out: Tensor, z: Tensor, zproj: Tensor, outproj: Tensor, **_: Any,
    ) -> None:  # fmt: skip
        o, after = reference(state, A, B, C, xproj, x, zproj, z, dt, B_state, x_state, trap, D, outproj)
        state.copy_(after)
        out.copy_(o)

    return step


def mimo(monkeypatch: pytest.MonkeyPatch, **config: Any) -> tuple[Any, Mamba3MIMO, DynamicCache]:
    """Their layer and ours with the same random weights, and a cache for ours."""
    monkeypatch.setattr(layers, "mamba3_mimo_combined", object())  # it only has to be there
    monkeypatch.setattr(layers, "mamba3_step_fn", step_function())
    made = Mamba3Config(
        hidden_size=D, state_size=D_KEY, head_dim=D_HEAD, num_hidden_layers=1, vocab_size=8, is_mimo=True, **config
    )
    theirs = layers.Mamba3(
        D, D_KEY, headdim=D_HEAD, rope_fraction=made.rope_fraction, is_mimo=True, mimo_rank=made.mimo_rank, layer_idx=0
    )
    return theirs, with_weights_of(theirs, Mamba3MIMO(made, 0)), DynamicCache(config=made)


def by_steps(theirs: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    kept, outputs = theirs.allocate_inference_cache(len(x), x.shape[1]), []
    for t in range(x.shape[1]):
        outputs.append(theirs.step(x[:, t], *kept)[0])
    return torch.stack(outputs, 1), kept


@pytest.mark.parametrize("config", [dict(mimo_rank=4), dict(mimo_rank=2, rope_fraction=1.0)], ids=str)
def test_mimo_is_mamba_ssms_layer(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs, ours, cache), x = mimo(monkeypatch, **config), inputs()
    want, (_, state, k, _) = by_steps(theirs, x)
    assert want.std() > 0.2 and (ours(x, None, None) - want).abs().max() < 1e-4
    found = torch.cat([ours(piece, None, cache) for piece in x.split([17, 1, 22], 1)], 1)
    assert (found - want).abs().max() < 1e-4
    kept: Any = cache.layers[0]
    assert (kept.recurrent_states[0] - state.mT).abs().max() < 1e-4
    assert (kept.conv_states[0][..., 0] - k.transpose(1, 2).flatten(1)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mimo_x", "mimo_z", "mimo_o", "B_bias", "C_bias", "D"])
def test_mimo_with_another_weight_it_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs, ours, _), x = mimo(monkeypatch, mimo_rank=4), inputs()[:, :8]
    weight = ours.get_parameter(name)
    weight.copy_(weight.roll(1, -1))
    assert (ours(x, None, None) - by_steps(theirs, x)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "D", "norm.weight"])
def test_with_another_weight_it_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs, ours, _), x = both("norm, groups"), inputs()
    monkeypatch.setattr(layers, "mamba3_siso_combined", Kernel())
    weight = ours.get_parameter(name)
    weight.copy_(weight.roll(1, 0))
    assert (ours(x, None, None) - theirs(x)).abs().max() > 1e-2
