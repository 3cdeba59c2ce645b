"""What the weights of quantised layers are: what the layer computes with, in every library; or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import writesae as ws
from writesae.models.fingerprint import same_weights
from writesae.models.load import load_model
from writesae.models.wrappers import weights
from writesae.zoo import shipped_model

LAYER = 2


def load() -> Any:
    return load_model(str(shipped_model("tiny-gdn")), dtype=torch.float32).eval()


def mixers_linears(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Of one mixer: the modules around its linear layers, and these."""
    mixer = model.model.layers[LAYER].linear_attn
    return [(mixer, name, m) for name, m in mixer.named_children() if isinstance(m, nn.Linear)]


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Any:
    model = load()
    for parent, name, linear in mixers_linears(model):
        setattr(parent, name, make(linear))
    return model


class Codes(nn.Module):
    """A quantised layer of a library that nobody knows: eight bits and a scale per row, under names of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x) * self.scales.to(x)).T  # type: ignore[operator, union-attr]


class OtherCodes(Codes):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("only on a GPU")


def dynamic() -> Any:
    return torch.ao.quantization.quantize_dynamic(load(), {nn.Linear})


def int8() -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return replaced(make)


def nf4() -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return replaced(make)


def torchao() -> Any:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = load()
    ao.quantize_(
        model, ao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_" not in name
    )
    return model


def quanto() -> Any:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = load()
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


KINDS = {
    "torch": dynamic, "unknown": lambda: replaced(Codes), "int8": int8, "nf4": nf4, "torchao": torchao, "quanto": quanto
}  # fmt: skip
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, about their own futures


@each_kind
@torch.no_grad()
def test_weights_are_what_the_layer_computes(make: Callable[[], Any]) -> None:
    quantised = make()
    model, plain = ws.HookedRecurrentModel(quantised), ws.HookedRecurrentModel(load())
    project = quantised.model.layers[LAYER].linear_attn.out_proj
    wanted = project(torch.eye(project.in_features))
    found = model.W_O(LAYER)
    assert (found.flatten(0, 1) - wanted).norm() < 0.02 * wanted.norm()
    assert (found - plain.W_O(LAYER)).norm() < 0.15 * found.norm()
    assert found.norm() > 0.9 * plain.W_O(LAYER).norm()
    assert (found / 2 - plain.W_O(LAYER)).norm() > 0.15 * found.norm(), "a wrong scale is seen"
    found = model.fingerprint(LAYER)
    assert found == model.fingerprint(LAYER) != plain.fingerprint(LAYER)
    assert same_weights(found, plain.fingerprint(LAYER)) and not same_weights(found, plain.fingerprint(0))


@torch.no_grad()
def test_scales_are_in_the_fingerprint() -> None:
    model = ws.HookedRecurrentModel(quantised := replaced(Codes))
    before, W_O = model.fingerprint(LAYER), model.W_O(LAYER)
    quantised.model.layers[LAYER].linear_attn.out_proj.scales.mul_(2)
    assert not same_weights(model.fingerprint(LAYER), before)
    assert torch.allclose(model.W_O(LAYER), 2 * W_O)


def test_codes_that_nobody_can_read() -> None:
    model = ws.HookedRecurrentModel(replaced(OtherCodes))
    for ask in (model.W_O, model.fingerprint):
        with pytest.raises(TypeError, match=r"OtherCodes are codes that writesae cannot read.*without quantisation"):
            ask(LAYER)


def test_codes_beside_linear_layers_are_refused() -> None:
    layer = nn.Conv1d(2, 2, 1)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="Conv1d are codes"):
        dict(weights(layer))
