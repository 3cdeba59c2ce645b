"""Each deletion of a sweep against an edited pass of its own, on every update rule."""

import pytest
import torch

import writesae as ws
from architectures import each_rule
from edit_cases import annotations_unchecked

TEXT = "The captain of the ship said that the name of the sea was"
OF = ws.Logit(5, minus=11)


@torch.no_grad()
def number(model, ids, metric, layer, head, t):
    with model.intervene(ws.Delete(layer, head), positions=t):
        return float(metric(model(ids)[:, -1:])[0])


@each_rule
@annotations_unchecked()
def test_every_cell_is_an_edited_pass(architecture):
    model = ws.HookedRecurrentModel(architecture.build())
    ids = torch.randint(97, (1, 7), generator=torch.Generator().manual_seed(3))
    found = ws.deletion_sweep(model, ids, OF)
    assert found.layers == architecture.layers and found.grid.shape == (len(found.layers), architecture.n_heads, 7)
    last = architecture.layers[-1]
    for layer, head, t in ((architecture.layers[0], 1, 3), (last, 2, 5), (last, 0, 6)):
        value = float(found.grid[found.layers.index(layer), head, t])
        assert value == pytest.approx(number(model, ids, OF, layer, head, t), abs=2e-4)
        assert abs(value - number(model, ids, OF, layer, head, t - 1)) > 1e-4  # the twin: the write before


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_some_layers_and_positions(model):
    """Of any number; what was not deleted has the native one."""
    ids, _ = model.to_tokens(TEXT)
    done: list[int] = []
    native = model(ids)[:, -1].detach()
    metric = lambda logits: ws.kl_divergence(logits[:, -1], native.expand_as(logits[:, -1]))  # noqa: E731
    found = ws.deletion_sweep(model, TEXT, metric, layers=[2], positions=[-1, 3, 3], progress=done.append)
    assert found.native == pytest.approx(0, abs=1e-6) and done[-1] == 8 and done == sorted(done)
    assert {t for *_, t, x in found.top(8) if x != 0} == {3, ids.shape[1] - 1}
    layer, head, t, change = found.top(1)[0]
    assert change == pytest.approx(number(model, ids, metric, layer, head, t), rel=1e-3) and change > 1e-3
    records = found.records()
    assert len(records) == found.grid.numel() and list(records.columns)[-2:] == ["number", "change"]
    assert found.numbers()[1].name.startswith(f"layer 2 head {head}, ") and found.plot().axes
    assert "Deleted writes" in found.title and "stand in for each other" in found.about


def test_bad_input(model):
    for given, error, match in (
        (dict(layers=[3]), IndexError, r"layer 3 has no write; layers that do: \[0, 1, 2\]"),
        (dict(layers=[]), ValueError, r"layers=\[\] asks for nothing"),
        (dict(positions=15), IndexError, r"deletion at position 15: allowed are -15 to 14"),
        (dict(positions=[]), ValueError, r"positions=\[\] names no token"),
        (dict(text=["a", "b"]), ValueError, r"text holds 2 texts"),
        (dict(metric=ws.Logit(5, at=3)), ValueError, r"at=3 in the metric"),
    ):
        given = {"text": TEXT, "metric": OF, **given}
        with pytest.raises(error, match=match):
            ws.deletion_sweep(model, given.pop("text"), given.pop("metric"), **given)
