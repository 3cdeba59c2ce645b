"""Patching: every cell of a grid against one edited pass for it, on every architecture."""

from dataclasses import replace

import pytest
import torch

import writesae as ws
from architectures import ARCHITECTURES
from edit_cases import annotations_unchecked
from writesae.hooks.quantities import RESIDUAL
from writesae.methods import activation_patching as patching

N_POS = 11
DIFFERENT = 12  # the token that the two texts of the shipped model do not share
HEADS = ("write", "state", "k", "v")


def texts(n_vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts that differ in two tokens."""
    clean = torch.randint(n_vocab, (N_POS,), generator=torch.Generator().manual_seed(3))
    corrupted = clean.clone()
    corrupted[[3, 6]] = (clean[[3, 6]] + 1) % n_vocab
    return clean, corrupted


@torch.no_grad()
def one_cell(
    model: ws.HookedRecurrentModel,
    cache: ws.ActivationCache,
    corrupted: torch.Tensor,
    what: str,
    cell: tuple[int, int, int],
) -> torch.Tensor:
    """Logits after the corrupted text with one part of the clean run, by a pass of its own."""
    layer, head, t = cell
    if what == "write":
        with model.intervene(ws.Replace(layer, head, write=cache.write(layer)[0, t, head]), positions=t):
            return model(corrupted)[0, -1]
    place = (0, t) if what in RESIDUAL else (0, t, head)

    def put(x: torch.Tensor, hook: ws.HookPoint) -> torch.Tensor:
        x = x.clone()
        if what == "state":
            x[0, 0, head] = cache.state(layer, [t])[0, 0, head]
        else:
            x[place] = cache[what, layer][place]
        return x

    asked = [t] if what == "state" else None
    return model.run_with_hooks(corrupted, [((what, layer), put)], state_positions=asked)[0, -1]


@pytest.mark.parametrize("a", ARCHITECTURES, ids=str)
@annotations_unchecked()
def test_every_cell_is_an_edited_pass(a):
    model = ws.HookedRecurrentModel(a.build())
    clean, corrupted = texts(97)
    _, cache = model.run_with_cache(clean)
    metric = ws.Logit(5, minus=11)
    last = a.layers[-1]
    for what in (*HEADS, "resid_pre") if a.is_first_of_its_rule else ("write", "v"):
        found = ws.patching(model, clean, corrupted, metric, what)
        assert found.grid.shape == (len(found.layers), 1 if what in RESIDUAL else a.n_heads, N_POS)
        moved = 0.0
        for cell in ((a.layers[0], 1, 3), (last, 2, 6), (last, 0, N_POS - 1)):
            layer, head, t = cell
            head = 0 if what in RESIDUAL else head
            expected = one_cell(model, cache, corrupted, what, (layer, head, t))
            value = float(found.grid[found.layers.index(layer), head, t])
            assert value == pytest.approx(float(expected[5] - expected[11]), abs=2e-4), (what, cell)
            moved = max(moved, abs(value - found.corrupted))
        assert moved > 1e-4  # the twin: without the patch it would not hold
        untouched = found.grid[:, :, :3]  # before the first difference both runs are the same
        torch.testing.assert_close(untouched, torch.full_like(untouched, found.corrupted), rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def found():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    clean = model.to_tokens("The captain of the ship said that the name of the sea was")[0][0]
    corrupted = clean.clone()
    corrupted[DIFFERENT] = model.to_single_token(" men")
    first, second = model(clean[None])[0, -1].topk(2).indices.tolist()
    return model, clean, corrupted, ws.Logit(first, minus=second)


class Near(ws.ActivationCache):
    """A run whose quantities lie between those of two others, near the first."""

    def __init__(self, first: ws.ActivationCache, second: ws.ActivationCache, part: float):
        self.runs, self.part, self._values = (first, second), part, {}

    def __getitem__(self, name):
        first, second = (run[name] for run in self.runs)
        return first + self.part * (second - first)

    def write(self, layer):
        first, second = (run.write(layer) for run in self.runs)
        return first * (1 - self.part) + second * self.part

    def state(self, layer, positions):
        first, second = (run.state(layer, positions) for run in self.runs)
        return first + self.part * (second - first)


@pytest.mark.parametrize("what", [*HEADS, "log_decay", "mixer_out"])
def test_the_estimate_is_a_derivative(found, what):
    """A hundredth of the difference patched in moves the number by what the estimate says of a hundredth."""
    model, clean, corrupted, metric = found
    with torch.no_grad():
        (_, own), (_, other) = (model.run_with_cache(text[None]) for text in (corrupted, clean))
    pairs = torch.arange(len(clean))[:, None].expand(-1, 2)
    near, ids = Near(own, other, 0.01), corrupted[None]
    estimate = patching._first_order(model, ids, near, [1], pairs, metric, what)[0].flatten()
    measure = patching._writes if what == "write" else patching._points
    grid = torch.zeros(1 if what == "mixer_out" else 4, len(clean))
    with torch.no_grad():
        before = float(metric(model(ids))[0])
        for head, at, value in measure(model, ids, near, what, 1, pairs, metric, 64):
            grid[head, at] = value - before
    measured = grid.flatten()
    big = estimate.abs() > 0.1 * estimate.abs().max()
    assert float(measured[big].abs().max()) > 1e-4
    torch.testing.assert_close(measured[big], estimate[big], rtol=0.2, atol=3e-5)
    rolled = grid.roll(1, -1).flatten()  # the twin: of the token before
    assert (rolled[big] - estimate[big]).abs().max() > 0.5 * estimate.abs().max()


def test_the_whole_stream_restores_everything(found):
    """The embedding of the one token that differs is all that differs."""
    model, clean, corrupted, metric = found
    result = ws.patching(model, clean, corrupted, metric, "resid_pre", layers=[0])
    assert result.restored[0, 0, DIFFERENT] == pytest.approx(1, abs=1e-4)
    assert result.top(1)[0][:3] == (0, 0, DIFFERENT)
    assert result.restored[0, 0, [t for t in range(len(clean)) if t != DIFFERENT]].abs().max() < 1e-3


def test_positions_that_do_not_align(found):
    model, clean, corrupted, metric = found
    longer = torch.cat([corrupted[:1], corrupted])
    pairs = [(t, t + 1) for t in range(len(clean))]
    result = ws.patching(model, clean, longer, metric, "v", positions=pairs)
    assert result.grid.shape[-1] == len(longer) and (result.grid[:, :, 0] == result.corrupted).all()
    _, cache = model.run_with_cache(clean)

    def put(x: torch.Tensor, hook: ws.HookPoint) -> torch.Tensor:
        x = x.clone()
        x[0, 14, 3] = cache["v", 2][0, 13, 3]
        return x

    with torch.no_grad():
        logits = model.run_with_hooks(longer, [(("v", 2), put)])
    assert float(result.grid[result.layers.index(2), 3, 14]) == pytest.approx(float(metric(logits)[0]), abs=1e-4)


def test_numbers_records_and_picture(found):
    model, clean, corrupted, metric = found
    result = ws.patching(model, clean, corrupted, metric, layers=[1, 2])
    records = result.records()
    assert len(records) == result.grid.numel() and set(records["layer"]) == {1, 2}
    row = records[(records["layer"] == 2) & (records["head"] == 3) & (records["position"] == 4)].iloc[0]
    assert row.patched == pytest.approx(float(result.grid[1, 3, 4])) and row.token == result.tokens[4]
    assert any("correlation" in number.name for number in result.numbers()) and len(result.plot().axes) >= 2
    long = replace(result, tokens=result.tokens * 9, grid=result.grid.repeat(1, 1, 9), estimate=None).plot()
    labels = [label.get_text() for label in long.axes[0].get_xticklabels()]
    assert long.get_figwidth() == 9 and 40 < len(labels) < 9 * len(result.tokens)
    assert f"(1 of {-(-9 * len(result.tokens) // len(labels))} named)" in long.axes[0].get_xlabel()
    assert result.plot().get_figwidth() < 13 and not result.plot().axes[0].get_xlabel(), "all are named"
    done: list[int] = []
    ws.patching(model, clean, corrupted, metric, layers=[2], estimate=False, progress=done.append)
    assert done[-1] == result.grid[1].numel() and done == sorted(done)


def test_bad_input(found):
    model, clean, corrupted, metric = found
    for given, error, match in (
        ((clean, corrupted[:-1], metric), ValueError, r"the clean text has 15 tokens and the corrupted one 14"),
        ((clean, corrupted, metric, "w"), ValueError, r"what='w': no layer has such a hook point; there are"),
        ((clean, clean, metric), ValueError, r"after both texts, so nothing can be restored"),
        ((["a", "b"], corrupted, metric), ValueError, r"clean holds 2 texts"),
        ((clean, corrupted, ws.Logit(1, at=3)), ValueError, r"at=3 in the metric"),
        ((clean, corrupted, ws.Logit(10**6)), IndexError, r"token id 1000000 is out of range"),
        ((clean, corrupted, lambda logits: logits.sum()), ValueError, r"one number per text"),
    ):
        with pytest.raises(error, match=match):
            ws.patching(model, *given)
    with pytest.raises(IndexError, match=r"layer 3 has no write; layers that do: \[0, 1, 2\]"):
        ws.patching(model, clean, corrupted, metric, layers=[3])
    with pytest.raises(IndexError, match=r"position 17 of the corrupted text: allowed are 0 to 14"):
        ws.patching(model, clean, corrupted, metric, positions=[(0, 17)])
    with pytest.raises(ValueError, match="twice"):
        ws.patching(model, clean, corrupted, metric, positions=[(0, 1), (1, 1)])
