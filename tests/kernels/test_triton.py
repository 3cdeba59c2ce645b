# ruff: noqa: E402  # what is imported has to wait for what is set before it
"""The GPU kernels that models use, run on a CPU by Triton's interpreter: the ways to them, and edits around them.

A process of its own runs this, since Triton reads what it is to do when it is imported::

    WRITESAE_TRITON=1 pytest tests/kernels/test_triton.py

It needs triton, fla-core, and for Mamba-2 the source of mamba-ssm: ``python tests/kernels/get_mamba_ssm.py FOLDER``,
then ``MAMBA_SSM=FOLDER``. The interpreter shows that kernels are called right, with the right numbers coming back. It
says nothing of how fast they are, nor of what a compiler makes of them.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("WRITESAE_TRITON"):
    pytest.skip("in its own process: WRITESAE_TRITON=1 pytest tests/kernels/test_triton.py", allow_module_level=True)
for needed in ("triton", "fla"):
    if find_spec(needed) is None:  # importing it would be too early: see `triton_on_cpu`
        pytest.skip(f"needs {needed}", allow_module_level=True)

import triton_on_cpu  # isort: skip  # before all that imports triton

if os.environ.get("MAMBA_SSM"):
    triton_on_cpu.use_mamba_ssm(Path(os.environ["MAMBA_SSM"]))

import torch
from torch import Tensor

import brute_force as bf
from architectures import ARCHITECTURES, Architecture
from edit_cases import annotations_unchecked, assert_close, cases, random_ids
from writesae import HookedRecurrentModel
from writesae.models.gpu import as_if_on_gpu

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore")]

# Their kernels run in half precision alone.
OURS = (
    "rwkv6", "rwkv7", "delta_net", "delta_net_no_gate", "gated_delta_net", "gla", "gla_grouped", "hgrn2", "retnet",
    "linear_attn", "kda", "comba", "gated_delta_product", "mamba3", "gdn2", "gsa",
)  # fmt: skip
SLOW = ("kimi_linear", "bailing_hybrid", "glm5_next")  # ten times as slow as the others: the first stands for all three
OF_MAMBA = [a.name for a in ARCHITECTURES if a.rule is bf.MAMBA2]


def chosen(a: Architecture) -> Any:
    missing = a.name in OF_MAMBA and not os.environ.get("MAMBA_SSM")
    marks = [pytest.mark.skip(reason="needs the source of mamba-ssm: MAMBA_SSM=FOLDER")] if missing else []
    return pytest.param(a, id=a.name, marks=marks)


def each(which: Callable[[Architecture], bool]) -> Any:
    return pytest.mark.parametrize("a", [chosen(a) for a in ARCHITECTURES if which(a)])


# Mamba-1's scan of many tokens is compiled for GPUs, and not in Triton; those of MiniMax and xLSTM are torch code, as
# is ours for tokens that read several times.
NONE = (bf.MAMBA1, bf.LIGHTNING, bf.MLSTM, bf.MAMBA3_MIMO)
on_kernels = each(lambda a: a.name not in (*OURS, *SLOW[1:]) and a.rule not in NONE)
first_of_rule = each(lambda a: a.is_first_of_its_rule and a.name not in OURS and a.rule not in NONE)
N_POS = 12


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    with annotations_unchecked(), torch.no_grad():
        yield


@functools.cache
def wrapped(a: Architecture, dtype: torch.dtype = torch.float32) -> HookedRecurrentModel:
    return HookedRecurrentModel(a.build().to(dtype))


def ids(n: int = N_POS, batch: int = 1) -> Tensor:
    return random_ids(6, batch, n)


@functools.cache
def expected(a: Architecture) -> list[Tensor]:
    """What brute force says of each case of any length, with the torch functions."""
    those = cases(a).any_length
    return list(bf.brute_force(a, a.build(), ids().expand(len(those), -1), [case.dense for case in those]))


def fed(a: Architecture, model: Any, tokens: Tensor, pieces: list[int], **arguments: Any) -> Tensor:
    """Logits of tokens fed in pieces with a cache, of a transformers model."""
    cache, start, found = a.new_cache(model), 0, []
    for n in pieces:
        mask = {name: value[:, : start + n] for name, value in arguments.items()}
        found.append(model(tokens[:, start : start + n], **cache, **mask, **a.place(start, n)).logits)
        start += n
    return torch.cat(found, 1)


# Nothing attached -----------------------------------------------------------------------------------------------------


@on_kernels
def test_nothing_attached_nothing_changed(a: Architecture) -> None:
    """Wrapped and unwrapped take the same kernels, bit for bit; and these say what the torch functions say."""
    model, raw = wrapped(a), a.build()
    on_torch = model(ids())
    with as_if_on_gpu():
        ours = fed(a, model.hf_model, ids(), [N_POS - 1, 1])
        with bf.untouched(a):  # what transformers bound to the kernels when it was imported
            theirs = fed(a, raw, ids(), [N_POS - 1, 1])
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, on_torch), "the kernels did not run"
    assert_close(ours, on_torch)


@first_of_rule
def test_longer_than_a_chunk(a: Architecture) -> None:
    n = 20 if a.name in SLOW else 70
    model = wrapped(a)
    with as_if_on_gpu():
        found = model(ids(n))
    assert_close(found, model(ids(n)))


# Every kind of edit, in every mode ------------------------------------------------------------------------------------


def prefill(a: Architecture, model: HookedRecurrentModel) -> Tensor:
    return model(ids())[0]


def pieces_and_decode(a: Architecture, model: HookedRecurrentModel) -> Tensor:
    return fed(a, model.hf_model, ids(), [7, 1, 1, 3])[0]


def left_padded(a: Architecture, model: HookedRecurrentModel) -> Tensor:
    tokens = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids()], 1)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return model(tokens, attention_mask=mask)[0, 5:]


MODES = {mode.__name__: mode for mode in (prefill, pieces_and_decode, left_padded)}


@on_kernels
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_edits(a: Architecture, mode: Callable[..., Tensor]) -> None:
    if mode is not pieces_and_decode and (a.name in SLOW or not a.is_first_of_its_rule):
        pytest.skip("pieces are a prefill, too, and the first architecture of a rule has the other modes")
    model = wrapped(a)
    for case, right in zip(cases(a).any_length, expected(a), strict=True):
        with as_if_on_gpu(), case.attach(model):
            assert_close(mode(a, model), right)


@first_of_rule
def test_every_quantity(a: Architecture) -> None:
    """What hooks see on the kernels' way is what they see on the torch functions' way; states too."""
    model = wrapped(a)
    _, on_torch = model.run_with_cache(ids())
    with as_if_on_gpu():
        _, found = model.run_with_cache(ids())
    assert list(found) == list(on_torch)
    for name in found:
        if not name.endswith("hook_write"):
            torch.testing.assert_close(found[name], on_torch[name], rtol=1e-3, atol=1e-4, msg=name)
    for layer in a.layers:
        torch.testing.assert_close(found.state(layer, [3, 11]), on_torch.state(layer, [3, 11]), rtol=1e-3, atol=1e-4)


# Half precision -------------------------------------------------------------------------------------------------------


@each(lambda a: (a.is_first_of_its_rule or a.name in OURS) and a.rule not in NONE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(a: Architecture, dtype: torch.dtype) -> None:
    """Plain, edited, and in pieces: as near to the model in float32 as the torch functions are in half precision."""
    model, exact = wrapped(a, dtype), wrapped(a)
    if dtype is torch.float16 and a.name not in ("qwen3_5", "mamba2"):
        pytest.skip("one dtype of half precision is as good as another here")
    for i, case in enumerate((None, *cases(a).any_length)):
        attach = (lambda model: nullcontext()) if case is None else case.attach
        pieces = [8, 1, 3] if i < 2 and a.name not in SLOW else None  # every edit in pieces: `test_edits`
        with attach(exact):
            right = exact(ids())
        with attach(model):
            on_torch = model(ids()).float()
            with as_if_on_gpu():
                found = model(ids()).float()
                in_pieces = fed(a, model.hf_model, ids(), pieces).float() if pieces else found
        rounding = (on_torch - right).abs().max() + 1e-2
        assert (found - right).abs().max() <= 2 * rounding
        assert (in_pieces - right).abs().max() <= 2 * rounding
        assert not torch.equal(found, on_torch), "the kernels did not run"


# Twins: something broken on the way to the kernel ---------------------------------------------------------------------


def without_initial_state(arguments: dict[str, Any]) -> None:
    for name in ("initial_state", "initial_states"):
        if arguments.get(name) is not None:
            arguments[name] = torch.zeros_like(arguments[name])


def state_transposed(arguments: dict[str, Any]) -> None:
    for name in ("initial_state", "initial_states"):
        if (state := arguments.get(name)) is not None:
            arguments[name] = state.mT.reshape(state.shape)


def gates_of_one_head(arguments: dict[str, Any]) -> None:
    for name in ("g", "dt"):
        if name in arguments:
            arguments[name] = arguments[name][:, :, :1].expand_as(arguments[name]).contiguous()


@first_of_rule
@pytest.mark.parametrize("broken", [without_initial_state, state_transposed, gates_of_one_head])
def test_twins(a: Architecture, broken: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks what a kernel is given; the comparison of edits in pieces must notice."""
    if a.name in SLOW:
        pytest.skip("this kernel takes minutes; Gated DeltaNet's adapter is the same")
    model = wrapped(a)
    for name in a.rule.kernels:
        stand_in = getattr(a.modeling, name, None)
        if stand_in is None:
            continue

        def spoiled(*args: Any, _of: Any = stand_in, **kwargs: Any) -> Any:
            names = list(inspect.signature(_of).parameters)[: len(args)]
            everything = dict(zip(names, args, strict=True)) | kwargs
            broken(everything)
            by_place = [everything.pop(name) for name in names]
            return _of(*by_place, **everything)

        monkeypatch.setattr(a.modeling, name, spoiled)
    case, right = cases(a).any_length[0], expected(a)[0]
    with as_if_on_gpu(), case.attach(model), pytest.raises(AssertionError, match="not close"):
        assert_close(fed(a, model.hf_model, ids(), [7, 2, 3])[0], right)
