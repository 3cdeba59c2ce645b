"""What cannot be wrapped is refused with its reason, and no model type of the libraries is forgotten."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from writesae import HookedRecurrentModel
from writesae.hooks.installing import install
from writesae.models.kinds import OF_FLA, OF_TRANSFORMERS
from writesae.models.load import OURS, load_model

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("model_types", DOCS / "model_types.py")
assert spec is not None and spec.loader is not None
model_types = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model_types)

_TINY: dict[str, Any] = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2)
_ATTENTION: dict[str, Any] = dict(num_attention_heads=1, num_key_value_heads=1)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rwkv": ("Rwkv", dict(attention_hidden_size=8), "RWKV-4 keeps vectors per layer, .*, not a matrix"),
    "recurrent_gemma": (
        "RecurrentGemma", _ATTENTION | dict(lru_width=8, intermediate_size=16),
        r"RecurrentGemma \(RG-LRU\) keeps a vector per layer, not a matrix",
    ),
    "lfm2": (
        "Lfm2", _ATTENTION | dict(layer_types=["conv", "conv"], intermediate_size=16),
        "attention and short convolutions: it remembers the last few tokens",
    ),
    "llama": ("Llama", _ATTENTION | dict(intermediate_size=16), "it is attention: it remembers keys and values"),
}  # fmt: skip


def test_the_page_is_what_the_script_writes() -> None:
    written = model_types.PAGE.read_text("utf-8")
    assert model_types.page() == written, "run python docs/model_types.py"


@pytest.mark.skipif(model_types.of_fla() is None, reason="needs the package flash-linear-attention, not fla-core alone")
def test_every_kind_of_flash_linear_attention_is_known() -> None:
    assert set(model_types.of_fla()) <= {*OURS, *OF_FLA, *model_types.AS_TRANSFORMERS}


def test_a_new_model_type_is_noticed() -> None:
    """The twin: a type without adapter and reason, one with both."""
    for kind in ("minimax", "rwkv"):
        kinds, reasons = model_types.of_transformers(), dict(OF_TRANSFORMERS)
        assert kind in kinds
        model_types.table(kinds, model_types.adapted(), reasons)
        ours = dict(model_types.adapted())
        if reasons.pop(kind, None) is None:
            ours.pop(kind)
        with pytest.raises(ValueError, match=f"{kind}: each needs an adapter .* or a reason"):
            model_types.table(kinds, ours, reasons)
    both = {**model_types.adapted(), "rwkv": next(iter(model_types.adapted().values()))}
    with pytest.raises(ValueError, match="rwkv: each needs"):
        model_types.table(model_types.of_transformers(), both, OF_TRANSFORMERS)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_it_is_and_why_not(kind: str, tmp_path: Path) -> None:
    prefix, sizes, why = REFUSED[kind]
    config = getattr(transformers, f"{prefix}Config")(**_TINY | sizes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with pytest.raises(ValueError, match=rf"{prefix}ForCausalLM (cannot be wrapped|has no recurrent layer): .*{why}"):
        HookedRecurrentModel(model)
    if kind in OF_TRANSFORMERS:  # before its weights are fetched: there are none here
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"is a '{kind}' of transformers, which cannot be wrapped: .*{why}"):
            load_model(tmp_path)


def test_mixers_of_nobody_we_know() -> None:
    match = r"Linear has no recurrent layer that writesae knows; known mixers: .*Qwen3_5Gated.*\. Make one .*register"
    with pytest.raises(ValueError, match=match):
        install(nn.Linear(2, 2))


def test_reasons_are_of_what_cannot_be_wrapped() -> None:
    assert not OF_TRANSFORMERS.keys() & model_types.adapted().keys() and not OF_FLA.keys() & OURS.keys()
    assert set(OF_TRANSFORMERS) <= set(model_types.of_transformers())
