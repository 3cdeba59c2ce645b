"""Sweeps of knockouts: each number against a pass of its own."""

import pytest
import torch

import writesae as ws

TEXT = "The captain of the ship said that the name of the sea was"


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@torch.no_grad()
def number(model, ids, metric, cuts):
    with model.intervene(cuts):
        return float(metric(model(ids)))


def test_every_number_is_a_pass_of_its_own(model):
    ids, _ = model.to_tokens(TEXT)
    last, metric = ids.shape[1] - 1, ws.Logit(5, minus=11)
    sources = [last - 2, last - 1]
    found = ws.knockout_sweep(model, TEXT, metric, sources=[-3, -2], window=2)
    assert found.windows == ((0, 1), (1, 2)) and found.sources == tuple(sources) and found.targets == (last,)
    assert found.uncut == pytest.approx(number(model, ids, metric, []), abs=1e-5)
    for layers, value in zip(found.windows, found.grid[:, 0].tolist(), strict=True):
        cuts = [ws.Knockout(layer, sources=sources, targets=last) for layer in layers]
        assert value == pytest.approx(number(model, ids, metric, cuts), abs=1e-5)
        assert abs(value - found.uncut) > 1e-3
        other = [ws.Knockout(layer, sources=[0, 1], targets=last) for layer in layers]  # the twin: other sources
        assert abs(value - number(model, ids, metric, other)) > 1e-3


def test_by_head(model):
    ids, _ = model.to_tokens(TEXT)
    done = []
    metric = lambda logits: logits[:, 0].logsumexp(-1)  # noqa: E731
    found = ws.knockout_sweep(model, ids, metric, sources=slice(None, -1), targets=slice(-2, None), layers=[1, 2],
                              by_head=True, progress=done.append)  # fmt: skip
    assert found.grid.shape == (2, 4) and done == list(range(1, 9))
    layers, head, change = found.top(1)[0]
    n = ids.shape[1]
    cut = ws.Knockout(layers[0], head, sources=list(range(n - 1)), targets=[n - 2, n - 1])
    assert found.uncut + change == pytest.approx(number(model, ids, lambda x: metric(x[:, -1:]), [cut]), abs=1e-4)
    assert abs(change) > 1e-4
    records = found.records()
    assert len(records) == 8 and set(records["first_layer"]) == {1, 2}
    assert "layer" in found.numbers()[1].name and "head" in found.numbers()[1].name
    assert len(found.plot().axes) == 2 and "window" in found.title and "do not see" in found.about


def test_bad_input(model):
    metric = ws.Logit(5)
    for given, error, match in (
        (dict(window=4), ValueError, r"window=4: give a number of layers, 1 to 3"),
        (dict(window=2, by_head=True), ValueError, r"by_head=True with window=2"),
        (dict(layers=[3]), IndexError, r"layer 3 is not recurrent"),
        (dict(sources=17), IndexError, r"source at position 17: allowed are -15 to 14"),
        (dict(sources=-1), ValueError, r"each source needs a target after it"),
        (dict(text=["a", "b"]), ValueError, r"text holds 2 texts"),
        (dict(metric=ws.Logit(5, at=3)), ValueError, r"at=3 in the metric"),
        (dict(metric=lambda logits: logits.sum()), ValueError, r"one number per text"),
    ):
        given = {"text": TEXT, "metric": metric, "sources": 2, **given}
        with pytest.raises(error, match=match):
            ws.knockout_sweep(model, given.pop("text"), given.pop("metric"), **given)
