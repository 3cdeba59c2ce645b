"""What notebooks used to retype: the most likely next tokens, and how far predictions moved."""

from __future__ import annotations

import pytest
import torch

import writesae as ws

TEXT = "The state of the Union is"


@pytest.fixture(scope="module")
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_the_most_likely_next_tokens(model: ws.HookedRecurrentModel) -> None:
    logits = model(TEXT).detach()
    p = logits[0, -1].softmax(-1)
    found = model.likely(TEXT, n=3)
    assert [model.to_single_token(token) for token, _ in found] == p.topk(3).indices.tolist()
    assert [x for _, x in found] == pytest.approx(p.topk(3).values.tolist(), rel=1e-4)
    assert model.likely(logits, n=3)[0][0] == found[0][0] and model.likely(logits[0, -1])[0][0] == found[0][0]
    with model.intervene(ws.Delete(layer=2, head=0)):
        assert model.likely(TEXT, n=3) != found
    with pytest.raises(ValueError, match="likely is of one text"):
        model.likely([TEXT, TEXT])
    with pytest.raises(ValueError, match="n=0: allowed are 1 to"):
        model.likely(TEXT, n=0)


def test_the_divergence_is_torchs(model: ws.HookedRecurrentModel) -> None:
    native = model(TEXT).detach()
    with model.intervene(ws.Delete(layer=2, head=0), positions=[2]):
        edited = model(TEXT).detach()
    found = ws.kl_divergence(edited, native)
    p, q = edited.double().log_softmax(-1), native.double().log_softmax(-1)
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-3)
    assert found[0, :2].max() < 1e-6 < found[0, 2:].max()
    assert not torch.allclose(ws.kl_divergence(native, edited).double(), wanted, atol=1e-6)
