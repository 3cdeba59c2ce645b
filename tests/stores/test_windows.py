"""Texts in windows: which tokens each has, what is dropped, what is drawn, and one message for "too short"."""

import pytest
import torch

import writesae as ws
from writesae.stores import Windows
from writesae.stores.windows import at_most, each_window, together

ROWS = [torch.arange(11), torch.arange(100, 103), torch.arange(200, 208)]


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_windows_never_cross_texts_and_drop_the_remainder():
    found = Windows.of_rows(ROWS, 4)
    assert found.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [200, 201, 202, 203], [204, 205, 206, 207]]
    assert found.document.tolist() == [0, 0, 2, 2] and found.start.tolist() == [0, 4, 0, 4]
    assert (len(found), found.context, found.longest) == (4, 4, 11)
    some = found[1:3]
    assert some.document.tolist() == [0, 2] and torch.equal(some.tokens, found.tokens[1:3]) and some.longest == 11
    assert Windows.of_rows([row.int() for row in ROWS], 4).tokens.dtype == torch.int32


def test_texts_are_cut_as_their_tokens_are(model):
    texts = ["The State of the Union is strong. " * 4, "The sea."]
    rows = [model.to_tokens(text)[0][0] for text in texts]
    for given in (texts, iter(texts)):
        assert torch.equal(Windows.cut(model, given, 5).tokens, Windows.of_rows(rows, 5).tokens)
    assert torch.equal(Windows.cut(model, texts[0], 5).tokens, Windows.of_rows(rows[:1], 5).tokens)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(Windows.cut(model, ids, 5).tokens, torch.cat([ids[:, :5], ids[:, 5:10]], 1).view(4, 5))


def test_too_short_is_said_with_the_numbers():
    found = Windows.of_rows(ROWS, 4)
    assert found.enough(4) is found
    says = r"the text makes 4 windows of 4 tokens \(the longest text has 11\), and 5 are needed: give .* lower context"
    with pytest.raises(ValueError, match=says):
        found.enough(5)
    with pytest.raises(ValueError, match=r"moby\.txt makes 0 windows of 12 .* and 1 is needed: .* lower n_prompts"):
        Windows.of_rows(ROWS, 12).enough(of="moby.txt", lower="n_prompts")
    nothing = Windows.of_rows([], 4)
    assert nothing.tokens.shape == (0, 4) and len(nothing.spread(None)) == 0
    with pytest.raises(ValueError, match=r"makes 0 windows of 4 tokens \(the longest text has 0\)"):
        nothing.enough()


def test_windows_are_spread_evenly_and_drawn_without_repeats():
    found = Windows.of_rows([torch.arange(40)], 4)
    assert found.spread(3 * 4 + 1).start.tolist() == [0, 12, 24]
    assert torch.equal(found.spread(None).tokens, found.tokens) and len(found.spread(10**9)) == 10
    with pytest.raises(ValueError, match="max_tokens=3 is less than one window of 4 tokens"):
        found.spread(3)
    assert at_most(9, 4) == 2
    drawn = [found.draw(6, torch.Generator().manual_seed(seed)).start.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 6


def test_each_window_keeps_every_token(model):
    ids = torch.arange(22).view(2, 11)
    found = list(each_window(model, ids, 4))
    assert [(w.document, w.start, len(w.tokens)) for w in found] == [
        (0, 0, 4), (0, 4, 4), (0, 8, 3), (1, 0, 4), (1, 4, 4), (1, 8, 3)
    ]  # fmt: skip
    assert torch.equal(torch.cat([w.tokens for w in found]), ids.flatten())
    assert not list(each_window(model, ["", ""], 4))


def test_rows_of_a_batch_are_padded_on_the_left():
    ids, given = together([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and given["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, given = together([torch.tensor([5, 6]), torch.tensor([8, 9])])
    assert ids.tolist() == [[5, 6], [8, 9]] and given == {}
