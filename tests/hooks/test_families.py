"""The open registry of families: what `register` takes, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch

from writesae import HookedRecurrentModel
from writesae.hooks import FAMILIES, Quantity, register
from writesae.hooks.attachment import attached_to
from writesae.hooks.families import Family
from writesae.hooks.installing import Attachment
from writesae.recurrence.rules import RULES


@pytest.fixture
def mine() -> Iterator[Family]:
    """A family like Gated Linear Attention with another name, mixer and rule; forgotten after the test."""
    gla = next(family for family in FAMILIES if family.rule.name == "gla")
    families, rules = list(FAMILIES), dict(RULES)
    yield replace(gla, name="mine", mixers={"my_model": "Mixer"}, rule=replace(gla.rule, name="my_rule"))
    FAMILIES[:] = families
    RULES.clear()
    RULES.update(rules)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked: users have no such check either."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_register(mine: Family) -> None:
    n = len(FAMILIES)
    assert register(mine) is mine and register(mine) is mine
    assert len(FAMILIES) == n + 1 and FAMILIES[-1] is mine
    assert RULES["my_rule"] is mine.rule


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"name": "GLA of another"}, None, ""),
        ({"name": "Gated Linear Attention"}, ValueError, "registered already: give yours another name"),
        (
            {"mixers": {"writesae.models.gla": "GatedLinearAttention"}},
            ValueError,
            "gla.GatedLinearAttention belongs to the family 'Gated Linear Attention' already: leave it out",
        ),
        ({"mixers": {}}, TypeError, "mixers={}.*modeling module: name of its mixer class"),
        ({"kernels": ("",)[:0]}, ValueError, "name at least one function"),
        ({"kernels": "f"}, TypeError, r"kernels='f'.*give a tuple of names"),
        ({"sizes": ("n_heads",)}, ValueError, "n_heads, d_key and d_value"),
        ({"call": None}, TypeError, "give a KernelCall class"),
        ({"layers": ""}, TypeError, "layers='' of the family 'mine': name the list"),
        ({"needs_memory": torch.float16}, TypeError, r"needs_memory=torch.float16 .*give a tuple of dtypes"),
        ({"takes_cache": "c"}, TypeError, r"takes_cache='c'.*\(cache, text model, tokens\) -> cache"),
        ({"stream_norms": "n"}, TypeError, r"stream_norms='n'.*give a tuple of names"),
        ({"rule": "gla"}, TypeError, "give a writesae.recurrence.rules.Rule"),
        ({"raw": ("write",)}, ValueError, "quantity 'write'.*name each once"),
        ({"raw": ("q",)}, ValueError, "quantity 'q'.*name each once"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_register_checks(mine: Family, changes: dict[str, Any], error: type[Exception] | None, text: str) -> None:
    given, before = replace(mine, **changes), list(FAMILIES)
    if error is None:
        assert register(given) is given
        return
    with pytest.raises(error, match=text):
        register(given)
    assert before == FAMILIES and "my_rule" not in RULES


@pytest.mark.usefixtures("unchecked")
def test_rules_that_register_refuses(mine: Family) -> None:
    with pytest.raises(ValueError, match="another rule is named 'gla' already"):
        register(replace(mine, rule=replace(mine.rule, name="gla", delta_rank=2)))
    with pytest.raises(ValueError, match=r"has inputs .*: q must be among them"):
        register(replace(mine, rule=replace(mine.rule, inputs=("k", "v"))))
    with pytest.raises(TypeError, match="register takes a Family; got the class Family"):
        register(Family)  # type: ignore[arg-type]


def test_quantities_of_a_family_are_described(mine: Family) -> None:
    own = replace(mine, meanings={"surprise": Quantity("[batch, pos, head]", "how new it is")}, letters={"q": "r"})
    assert own.describe("surprise") == ("[batch, pos, head]", "how new it is")
    assert own.describe("q").meaning == "what reads the state, after any norm and scale (r)"
    assert own.describe("log_decay").shape == "[batch, pos, head, d_key]"
    assert own.describe("never named") == ("[batch, pos, head, ...]", "an input of the recurrence")


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own() -> None:
    """Hooks of torch are methods of our objects, which a deepcopy copies with the model."""
    model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    ids = torch.arange(12)[None]
    other = HookedRecurrentModel(copy.deepcopy(model.hf_model), model_id="copy")
    assert other.taps[0] is not model.taps[0] and other.taps[0].clock is not model.taps[0].clock
    text_models = [m for m in other.hf_model.modules() if attached_to(m, Attachment)]
    assert len(text_models) == 1
    seen: list[str] = []
    with other.hooks([("blocks.1.mixer.hook_v", lambda value, hook: seen.append(hook.name))]):
        model(ids)
        assert not seen
        assert torch.equal(other(ids), model(ids))
    assert seen == ["blocks.1.mixer.hook_v"]
