"""One-text methods over several texts: each as by itself, and means that a loop makes."""

from __future__ import annotations

import numpy as np
import pytest

import writesae as ws
from writesae import HookedRecurrentModel

TOLD = ["The captain was called{}. It was written that the captain was called",
        "The surgeon was called{}. The people of the town said that the surgeon was called"]  # fmt: skip
TEXTS = [TOLD[0].format(" Henry"), "The people of the United", TOLD[1].format(" Henry")]


@pytest.fixture(scope="module")
def model() -> HookedRecurrentModel:
    return HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_attributions_of_several_texts(model: HookedRecurrentModel) -> None:
    answers = [model.to_single_token(word) for word in (" Henry", " States", " Henry")]
    own = [{"of": ws.Logit(answer)} for answer in answers]
    found = ws.each_text(ws.direct_attribution, model, TEXTS, by="head", per_text=own)
    alone = [ws.direct_attribution(model, t, by="head", **given) for t, given in zip(TEXTS, own, strict=True)]
    by_hand: dict[tuple[str, int, int], list[float]] = {}
    for result in alone:
        for part, layer, head, x in zip(result.part, result.layer, result.head, result.contribution, strict=True):
            by_hand.setdefault((part, int(layer), int(head)), []).append(float(x))
    table = found.mean()
    assert len(table) == len(by_hand) and list(table.columns) == ["part", "layer", "head", "contribution"]
    for part, layer, head, x in table.to_numpy():
        assert x == pytest.approx(np.mean(by_hand[part, layer, head]))
    assert (table.contribution.abs().diff().dropna() <= 0).all()
    assert set(found.records().text) == {0, 1, 2} and len(found) == 3 and found[1].title == alone[1].title
    numbers = {number.name: number for number in found.numbers()}
    assert numbers["sum of all parts"].value == pytest.approx(np.mean([result.value for result in alone]))
    top = numbers["contribution of part head, layer 2, head 1"]
    assert top.low is not None and top.low < top.value < top.high  # type: ignore[operator]
    assert found.plot().axes
    # The twin: of fewer texts the means are others.
    fewer = ws.each_text(ws.direct_attribution, model, TEXTS[:2], by="head", per_text=own[:2])
    assert fewer.mean().contribution[0] != pytest.approx(table.contribution[0], abs=1e-3)


def test_pairs_and_sweeps(model: HookedRecurrentModel) -> None:
    name = ws.Logit(model.to_single_token(" Henry"), minus=model.to_single_token(" Robert"))
    pairs = [(text.format(" Henry"), text.format(" Robert")) for text in TOLD]
    done: list[int] = []
    found = ws.each_text(ws.patching, model, pairs, name, "write", progress=done.append)
    assert done == [1, 2] and tuple(found.mean().loc[0, ["layer", "head"]]) == (2, 1)
    alone = [ws.patching(model, *pair, name, "write").restored[2, 1].sum() for pair in pairs]
    assert found.mean().restored[0] == pytest.approx(float(sum(alone)) / 2, abs=1e-5)
    sweep = ws.each_text(ws.knockout_sweep, model, [TEXTS[0], TEXTS[2]], name, sources=slice(3, 8), by_head=True)
    assert tuple(sweep.mean().loc[0, ["first_layer", "head"]]) == (2, 1)
    patterns = ws.each_text(ws.pattern, model, [TEXTS[0], TEXTS[2]], 2, 1)
    assert {" Henry", " called"} <= set(patterns.mean("query_token").query_token)


def test_what_is_refused(model: HookedRecurrentModel) -> None:
    with pytest.raises(ValueError, match="texts= must be several texts, in a list"):
        ws.each_text(ws.pattern, model, TEXTS[0], 2, 3)
    with pytest.raises(ValueError, match=r"1 entries in per_text= for 3 texts"):
        ws.each_text(ws.pattern, model, TEXTS, 2, 3, per_text=[{}])
    with pytest.raises(ValueError, match="text 1: the clean text has"):
        pairs = [(TEXTS[0], TOLD[0].format(" Robert")), (TEXTS[0], TEXTS[1])]
        ws.each_text(ws.patching, model, pairs, ws.Logit(5), "write")
    found = ws.each_text(ws.pattern, model, TEXTS[:2], 2, 3)
    with pytest.raises(KeyError, match="no column 'heads' in the records"):
        found.mean("heads")
