"""`check` finds every model right, and finds what is broken: each twin names the row that must see it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import brute_force as bf
import writesae as ws
from architectures import Architecture, architecture_named, each_architecture, each_rule
from edit_cases import annotations_unchecked
from writesae.checking import CheckResult, Row, costs
from writesae.checking.run import CHECKS
from writesae.checking.slopes import Number
from writesae.checking.slopes import _row as slope_row
from writesae.checking.subject import Subject
from writesae.cli import app
from writesae.gradients import LayerGradient
from writesae.hooks import dispatch, tap
from writesae.hooks.clock import Pass
from writesae.hooks.detached import detached
from writesae.hooks.families.base import KernelCall
from writesae.hooks.families.gdn import GatedDeltaCall
from writesae.hooks.families.mamba1 import SelectiveScan
from writesae.hooks.families.mamba2 import ChunkScan
from writesae.hooks.families.ours import CanonicalCall
from writesae.hooks.families.xlstm import MLSTMCall
from writesae.zoo import shipped_models

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Annotations are checked in the tests of what `check` calls; here they would take most of the time."""
    with annotations_unchecked():
        yield


def wrapped(a: Architecture, dtype: torch.dtype = torch.float32) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(a.build().to(dtype), model_id=a.name)


def found(model: ws.HookedRecurrentModel, **options: Any) -> CheckResult:
    return ws.check(model, show=False, **{"costs": False, **options})


# Right ----------------------------------------------------------------------------------------------------------------


@each_architecture
def test_every_architecture(architecture: Architecture) -> None:
    result = found(wrapped(architecture))
    assert result.ok, str(result)
    looked_at = {row.where for row in result.rows}
    assert set(architecture.quantities(1)) - {"state"} <= looked_at, "each hook point has a row"
    assert {"prefill", "pieces", "decode", "left padding", f"layer {architecture.layers[0]}"} <= looked_at


@each_rule
def test_half_precision(architecture: Architecture) -> None:
    result = found(wrapped(architecture, HALF))
    assert result.ok, str(result)
    assert result.environment["dtype"] == "bfloat16"


@each_rule
def test_our_kernels(architecture: Architecture) -> None:
    """They are not bit for bit those of the model, and all else holds."""
    model = wrapped(architecture)
    model.kernels = "writesae"
    result = found(model)
    assert result.ok, str(result)
    assert "writesae's" in result.environment["kernels"] and model.kernels == "writesae"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models(name: str, dtype: torch.dtype) -> None:
    result = found(ws.HookedRecurrentModel.from_pretrained(name, dtype=dtype))
    assert result.ok, str(result)


def test_layers_texts_and_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.5)
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    text = "The state of the Union is strong, and the people of the country are well. " * 4
    result = found(model, x=text, layers="all", costs=True)
    assert result.ok, str(result)
    assert {f"layer {site.layer}" for site in model.sites} <= {row.where for row in result.rows}
    (ratio,) = (row for row in result.rows if (row.check, row.where) == ("time", "nothing attached"))
    assert ratio.unit == "x native" and 0.2 < (ratio.measured or 0) < 5 and ratio.verdict == "-"
    assert any("kernels='writesae'" in row.where for row in result.rows) and model.kernels == "native"
    assert {row.where for row in found(model, layers=[1]).rows if row.where.startswith("layer")} == {"layer 1"}


def test_the_model_is_left_as_it_was() -> None:
    a = architecture_named("qwen3_5")
    model = wrapped(a).train()
    model.hf_model.lm_head.eval()
    functions = [getattr(a.modeling, name) for name in a.rule.kernels]
    hooks = [list(module._forward_hooks) for module in model.modules()]
    found(model)
    assert model.hf_model.training and not model.hf_model.lm_head.training and not model.busy
    assert [getattr(a.modeling, name) for name in a.rule.kernels] == functions
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    assert all(p.requires_grad and p.grad is None for p in model.hf_model.parameters())


def test_a_detached_model_has_nothing_of_ours() -> None:
    a = architecture_named("qwen3_5")
    model = wrapped(a)
    module_hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = module_hooks()
    seen: list[str] = []
    theirs = model.hf_model.lm_head.register_forward_hook(lambda *_: seen.append("theirs"))
    with detached(model.hf_model), model.intervene(ws.Delete(0)) as edited:
        assert module_hooks() == 1, "hooks of others stay"
        for name in a.rule.kernels:
            assert not hasattr(getattr(a.modeling, name), "writesae")
        plain = edited.hf_model(torch.arange(8)[None]).logits
    theirs.remove()
    assert module_hooks() == before and seen == ["theirs"]
    assert torch.equal(model(torch.arange(8)), plain)


# Broken ---------------------------------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def changed(cls: Any, name: str, change: Callable[..., Any]) -> Break:
    """A method of ours, or a property, becomes ``change(what it returns, self, *args)``."""

    def do(patch: pytest.MonkeyPatch) -> None:
        own = vars(cls)[name]
        if isinstance(own, property):
            patch.setattr(cls, name, property(lambda self: change(own.fget(self), self)))  # type: ignore[misc]
        else:
            patch.setattr(cls, name, lambda self, *args, **kwargs: change(own(self, *args, **kwargs), self, *args))

    return do


def transposed(state: Tensor | None, _call: Any) -> Tensor | None:
    if state is None or state.shape[-1] == 1:  # one column has no other way to lie
        return None if state is None else state.flip(-2)
    return state.mT.reshape(state.shape)


CALLS = {"gated_delta": GatedDeltaCall, "kimi_delta": GatedDeltaCall, "mamba1": SelectiveScan, "mamba2": ChunkScan}


def call_of(architecture: Architecture) -> type[KernelCall]:
    if architecture.rule is bf.MLSTM:
        return MLSTMCall
    ours = architecture.modeling_name.startswith("writesae.models")
    return CanonicalCall if ours else CALLS.get(architecture.rule.name, CanonicalCall)


@each_rule
@pytest.mark.parametrize("spoil", [transposed, lambda _state, _call: None], ids=["transposed", "dropped"])
def test_an_adapter_that_spoils_the_state(
    architecture: Architecture, spoil: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(call_of(architecture), "initial_state", spoil)(monkeypatch)
    failed = {row.check for row in found(wrapped(architecture), layers=[1]).failed}
    assert failed & {"inputs give states", "recurrences"}, "a wrong number, or an error where a shape does not fit"


@each_rule
def test_an_adapter_that_mixes_up_heads(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "v" if architecture.rule is bf.MAMBA1 else "k"  # which each head has its own of
    mixed = lambda value, _call, quantity, *_: value.roll(1, 2) if quantity == own else value  # noqa: E731
    changed(call_of(architecture), "canonical", mixed)(monkeypatch)
    assert "inputs give o" in {row.check for row in found(wrapped(architecture), layers=[1]).failed}


def another_tensor(shown: tuple[Tensor, bool], call: KernelCall, quantity: str) -> tuple[Tensor, bool]:
    return (call.get("k").clone(), True) if quantity == "q" else shown


def ignoring_beta(patch: pytest.MonkeyPatch) -> None:
    own = GatedDeltaCall.set
    patch.setattr(GatedDeltaCall, "set", lambda self, q, value: None if q == "beta" else own(self, q, value))


def gates_shown_doubled(patch: pytest.MonkeyPatch) -> None:
    own = tap.Tap.show
    patch.setattr(tap.Tap, "show", lambda self, q, given, *more: own(self, q, 2 * given if q == "z" else given, *more))


def one_bit(output: Any, _tap: Any, _module: Any, _args: Any, given: Tensor) -> Tensor:
    return torch.nextafter(given, given + 1)


def final_state_forgotten(patch: pytest.MonkeyPatch) -> None:
    own = tap.respond
    patch.setattr(
        tap, "respond", lambda rec, write, record, o, state, hidden: (own(rec, write, record, o, state)[0], state)
    )


def read_too_early(patch: pytest.MonkeyPatch) -> None:
    own = tap.Tap._edit

    def edit(self: Any, *args: Any) -> Any:
        made = own(self, *args)
        if made is not None:
            made.read = "same"
        return made

    patch.setattr(tap.Tap, "_edit", edit)


def one_position_late(patch: pytest.MonkeyPatch) -> None:
    own = Pass.positions
    patch.setattr(Pass, "positions", lambda self: own(self) - 1)


def stays_attached(patch: pytest.MonkeyPatch) -> None:
    def forgets(subject: Any) -> Iterator[Row]:
        subject.model.add_hook(("v", 0), lambda v, hook: 1.01 * v)
        yield Row("forgets")

    patch.setitem(CHECKS, "recurrences", forgets)


def fails(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GatedDeltaCall, "run", lambda *_: 1 / 0)


TWINS: dict[str, tuple[Break, str, str]] = {
    "a wrapper that changes a bit": (changed(tap.Tap, "leave", one_bit), "nothing attached", "prefill"),
    "a hook that shows another tensor": (
        changed(KernelCall, "to_show", another_tensor), "hooks given own values", "every hook",
    ),
    "a gate that is shown doubled": (gates_shown_doubled, "hooks given own values", "every hook"),
    "a hook that is not heard": (ignoring_beta, "gradient of a hook", "beta"),
    "an edit that the final state lacks": (final_state_forgotten, "edited, against prefill", "decode"),
    "an edit that is read too early": (read_too_early, "add, next read: o", "layer 3"),
    "an edit one token late": (one_position_late, "replace: logits", "together"),
    "a price that is twice the effect": (
        changed(LayerGradient, "price", lambda price, *_: 2 * price), "price of an edit", "layer 0",
    ),
    "a hook that stays": (stays_attached, "nothing left behind", "prefill"),
    "a kernel that raises": (fails, "recurrences", ""),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "check", "where"), TWINS.values(), ids=TWINS)
def test_what_is_broken_is_found(broken: Break, check: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    result = found(wrapped(architecture_named("qwen3_5")))
    assert not result.ok
    assert (check, where) in {(row.check, row.where) for row in result.failed}, str(result)


OURS_TWINS: dict[str, tuple[Break, str, str]] = {
    "a read a hundredth too large": (
        changed(KernelCall, "compute", lambda result, *_: (1.01 * result[0], result[1])), "nothing attached", "prefill",
    ),
    "a final state that is lost": (
        changed(KernelCall, "compute", lambda result, *_: (result[0], 0 * result[1])), "nothing attached", "pieces",
    ),
    "a hook that stays": TWINS["a hook that stays"],
}  # fmt: skip


@pytest.mark.parametrize(("broken", "check", "where"), OURS_TWINS.values(), ids=OURS_TWINS)
def test_what_is_broken_in_our_kernels_is_found(
    broken: Break, check: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(architecture_named("qwen3_5"))
    model.kernels = "writesae"
    broken(monkeypatch)
    result = found(model)
    assert (check, where) in {(row.check, row.where) for row in result.failed}, str(result)


@pytest.mark.parametrize("broken", ["a hook that shows another tensor", "an edit that is read too early"])
def test_it_is_found_in_half_precision(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, check, where = TWINS[broken]
    break_it(monkeypatch)
    result = found(wrapped(architecture_named("qwen3_5"), HALF))
    assert (check, where) in {(row.check, row.where) for row in result.failed}, str(result)


def test_a_raised_error_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch)
    result = found(wrapped(architecture_named("qwen3_5")))
    assert "ZeroDivisionError: division by zero" in str(result)
    assert any(row.check == "nothing attached" and row.ok for row in result.rows), "the others are still made"


def test_what_is_wrong_with_a_row() -> None:
    assert Row("x", measured=1.0, allowed=1.0).ok and Row("x").ok
    assert not Row("x", measured=math.nan, allowed=1.0).ok
    assert not Row("x", measured=None, allowed=1.0).ok
    assert Row("x", measured=1e-6, allowed=1e-5, moves=1e-3).ok
    weak = Row("x", measured=1e-6, allowed=1e-5, moves=3e-6)
    assert not weak.ok and "shows nothing of it" in weak.reason
    assert not Row("x", measured=0.0, allowed=0.0, moves=0.0).ok, "an edit that did nothing"
    assert Row("x", measured=5.0).verdict == "-"


# Errors, files, the command -------------------------------------------------------------------------------------------


def test_what_cannot_be_checked() -> None:
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    with pytest.raises(IndexError, match="layer 7 is not recurrent"):
        found(model, layers=[7])
    with pytest.raises(ValueError, match=r"a text of \d tokens is too short to check with: give at least 32"):
        found(model, x="The state")
    with model.intervene(ws.Delete(0)), pytest.raises(RuntimeError, match="something is attached"):
        found(model)


def test_records(tmp_path: Path) -> None:
    rows = (Row("a", "layer 0", 0.5, 1.0), Row("b", measured=math.nan, allowed=1.0, note="why"))
    result = CheckResult("m", {"dtype": "float32"}, rows, 1.0)
    assert [row.check for row in result.failed] == ["b"]
    assert result.to_dataframe()["ok"].tolist() == [True, False]
    result.save(tmp_path / "records.json")
    saved = json.loads((tmp_path / "records.json").read_text())
    assert saved["ok"] is False and saved["rows"][0]["measured"] == 0.5 and saved["rows"][1]["measured"] is None
    assert saved["environment"] == {"dtype": "float32"}
    assert "b, : why" in str(result)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records.json"
    command = ["check", "tiny-gdn", "--dtype", "bfloat16", "--no-costs"]
    result = runner.invoke(app, [*command, "--json", str(records)])
    assert result.exit_code == 0, result.output
    for part in ("torch ", "dtype: bfloat16", "device: cpu", "torch_chunk_gated_delta_rule", "checks ok"):
        assert part in result.output
    assert json.loads(records.read_text())["ok"] is True
    read_too_early(monkeypatch)
    result = runner.invoke(app, command)
    assert result.exit_code == 1 and "FAIL" in result.output and "checks FAILED" in result.output


def test_models_that_cannot_be_checked(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name, text in ((str(tmp_path), "has no recurrent layer"), ("no-such-model", "tiny-gdn")):
        result = runner.invoke(app, ["check", name])
        assert result.exit_code == 1 and text in result.output and "Traceback" not in result.output
    result = runner.invoke(app, ["check", "tiny-gdn", "--dtype", "int8"])
    assert result.exit_code == 1 and "dtype='int8': allowed are float32, bfloat16" in " ".join(result.output.split())


def test_the_functions_that_ran_are_named() -> None:
    def from_a_package() -> None: ...

    def bound(implementation: Any) -> Any:
        return lambda: implementation()

    from writesae.checking.environment import _implementation

    assert _implementation(bound(from_a_package)) is from_a_package
    assert _implementation(dispatch.native) is dispatch.native


def test_slopes_that_cannot_be_judged() -> None:
    """Of half a model's rounding nothing can be said; a hook that no gradient reaches is broken."""
    subject = Subject(wrapped(architecture_named("qwen3_5")), torch.arange(40)[None], [0])
    with torch.no_grad():
        number = Number(subject)
    number.noise = 0.01
    right = slope_row("x", "k", 1.0, 1.01, number)
    assert right.ok and right.allowed is not None and right.allowed < 0.1
    assert not slope_row("x", "k", 1.0, 0.0, number).ok, "not heard"
    unclear = slope_row("x", "k", 0.02, 0.0, number)
    assert unclear.verdict == "-" and "not judged" in unclear.note
    for nothing in (0.0, math.nan):
        assert not slope_row("x", "k", nothing, 0.5, number).ok
