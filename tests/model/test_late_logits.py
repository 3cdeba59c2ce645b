"""Logits made after the pass: the same as in it, on every architecture, compiled, and with a gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import writesae as ws
from architectures import ARCHITECTURES
from writesae.gradients import batches, gradient, in_batches
from writesae.model import late_logits

ROWS, COLUMNS = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[3, 0], [-1, 2]])


def tokens(n_vocab: int = 97) -> torch.Tensor:
    return torch.randint(n_vocab, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("a", ARCHITECTURES, ids=str)
@torch.no_grad()
def test_they_are_those_of_the_pass(a):
    model = ws.HookedRecurrentModel(a.build())
    expected = model(tokens())
    with late_logits(model) as end:
        last = model(tokens())
    assert last.shape[1] == 1 and end.shape == (2, 7)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(end.at(ROWS, COLUMNS), expected[ROWS, COLUMNS], rtol=0, atol=1e-5)
    assert (end.at(ROWS, COLUMNS - 1) - expected[ROWS, COLUMNS]).abs().max() > 1e-3  # the twin: of the token before
    kept = end.last()
    every = torch.tensor([0, 1])
    torch.testing.assert_close(kept.at(every, torch.zeros_like(every)), expected[:, -1], rtol=0, atol=1e-5)
    assert torch.equal(model(tokens()), expected)  # nothing is left behind


@torch.no_grad()
def test_edits_that_are_in_force_are_in_them_and_are_not_asked_again():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    with model.intervene(ws.Delete(1), positions=[2]):
        expected = model(tokens())
        with late_logits(model) as end:
            model(tokens())
        found = end.at(ROWS, COLUMNS)  # the block is open: an edit that acts on nothing would be an error
    torch.testing.assert_close(found, expected[ROWS, COLUMNS], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    expected = model(tokens())
    compiled = ws.HookedRecurrentModel(torch.compile(model.hf_model, backend="eager"))
    with late_logits(compiled) as end:
        compiled(tokens())
    torch.testing.assert_close(end.at(ROWS, COLUMNS), expected[ROWS, COLUMNS], rtol=0, atol=1e-4)
    assert end.last().at(torch.tensor([1]), torch.tensor([0])).shape == (1, 4096)


def test_a_gradient_of_one_column_is_that_of_all():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    question = ws.Logit(torch.tensor([5, 7]), at=torch.tensor([4, -1]))
    whole = gradient(model, tokens(), lambda logits: question(logits), [1])
    one = gradient(model, tokens(), question, [1])
    given = gradient(model, tokens(), lambda x: ws.Logit(question.token)(x), [1], at=question.at)
    for found in (one, given):
        torch.testing.assert_close(found.value, whole.value)
        torch.testing.assert_close(found[1].output, whole[1].output, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.logits, whole.logits, rtol=0, atol=1e-5)
    moved = gradient(model, tokens(), ws.Logit(question.token, at=3), [1])  # the twin: at another column
    assert (moved[1].output - whole[1].output).abs().max() > 1e-4
    with pytest.raises(IndexError, match=r"position 9 is out of range: allowed are -7 to 6"):
        gradient(model, tokens(), ws.Logit(5, at=9))


def test_rows_go_together_as_far_as_there_is_room(monkeypatch):
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    ids = torch.randint(4096, (9, 12), generator=torch.Generator().manual_seed(2))
    whole = gradient(model, ids, ws.Logit(5), [1])[1].output

    def run(rows: slice) -> torch.Tensor:
        return gradient(model, ids[rows], ws.Logit(5), [1])[1].output

    sizes = []
    for room in (1, 2**21, 2**30):
        monkeypatch.setattr(batches, "ROOM", room)
        parts = list(in_batches(model, 9, run))
        assert [row for rows, _ in parts for row in range(9)[rows]] == list(range(9))
        torch.testing.assert_close(torch.cat([part for _, part in parts]), whole, rtol=1e-2, atol=2e-4)
        sizes.append(max(len(range(9)[rows]) for rows, _ in parts))
    assert sizes[0] == 1 < sizes[1] < 8 == sizes[2]  # the first row goes alone, and says how many fit


class Heads(TorchDispatchMode):
    """Counts products in which every sequence has a copy of the head."""

    def __init__(self, n_vocab):
        super().__init__()
        self.n_vocab, self.found = n_vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.bmm and self.n_vocab in args[1].shape:
            self.found += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_head_is_not_copied_for_each_sequence(rows):
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", dtype=torch.bfloat16)
    with Heads(model.n_vocab) as heads:
        gradient(model, tokens()[:rows], ws.Logit(5), [1], at=-1)
    assert heads.found == 0
    model.hf_model.requires_grad_(False)  # the twin: a view of the last tokens, as transformers makes it
    with Heads(model.n_vocab) as heads, torch.no_grad():
        model.hf_model(tokens()[:rows], logits_to_keep=1)
    assert heads.found == 1
