"""Lenses: every cell against the unwrapped model, whose last layer is made to give an earlier stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import Architecture, each_architecture
from writesae.methods import lenses
from writesae.methods.cells import Cells
from writesae.zoo import heldout_documents

TEXTS = ["The state of the Union", "It was the captain of the ship who said that"]
LANES = {"qwen4_exp", "glm5_next"}  # streams of several lanes, of which a mixer gives one


def tokens(n_vocab: int = 97) -> Tensor:
    return torch.randint(n_vocab, (2, 7), generator=torch.Generator().manual_seed(1))


def by_hand(architecture: Architecture, ids: Tensor, stream: Tensor) -> Tensor:
    """Logits of the unwrapped model if this had been its stream after the last layer."""
    raw = architecture.build()
    last = next(x for m in raw.modules() if len(x := getattr(m, architecture.stack, ())) >= 4)[-1]
    last.register_forward_hook(lambda _m, _a, out: (stream, *out[1:]) if isinstance(out, tuple) else stream)
    return raw(input_ids=ids, use_cache=False).logits


@each_architecture
@torch.no_grad()
def test_what_a_layer_would_predict(architecture: Architecture) -> None:
    model, ids = ws.HookedRecurrentModel(architecture.build()), tokens()
    logits, cache = model.run_with_cache(ids)
    found = ws.logit_lens(model, ids, ["resid_pre", "resid_post"], layers=[1, model.n_layers - 1], k=3)
    assert [str(place) for place in found.places[:2]] == ["resid_pre 1", "resid_post 1"]
    final = logits.log_softmax(-1).flatten(0, 1)
    for i, place in enumerate(found.places):
        expected = by_hand(architecture, ids, cache[place.what, place.layer]).log_softmax(-1).flatten(0, 1)
        p = expected.exp()
        torch.testing.assert_close(found.kl[i], (final.exp() * (final - expected)).sum(-1), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(found.entropy[i], -(p * expected).sum(-1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.top_probability[i], p.topk(3).values, rtol=1e-3, atol=1e-5)
        goal = final.argmax(-1)
        assert torch.equal(found.target, goal)
        torch.testing.assert_close(found.probability[i], p.gather(-1, goal[:, None])[:, 0], rtol=1e-3, atol=1e-5)
    assert found.kl[-1].max() < 1e-6 and (found.rank[-1] == 0).all()  # after the last layer it is the model's own
    assert found.kl[0].min() > (1e-3 if architecture.d_value > 1 else 5e-4)  # the twin: before it, it is not


@each_architecture
@torch.no_grad()
def test_parts_of_heads_are_what_the_mixer_gives(architecture: Architecture) -> None:
    model, ids = ws.HookedRecurrentModel(architecture.build()), tokens()
    places = lenses._places(model, ["head_out", "mixer_out"], None)
    assert sum(place.what == "head_out" for place in places) == len(architecture.layers) * architecture.n_heads
    kept = lenses.read_points(model, ids, None, places, Cells.of(ids, None))
    for layer in architecture.layers:
        parts = torch.einsum("nhv,hvd->nhd", kept["head_out", layer], model.W_O(layer))
        torch.testing.assert_close(parts.sum(1), kept["mixer_out", layer], rtol=1e-4, atol=1e-5)
        assert (parts[:, 1:].sum(1) - kept["mixer_out", layer]).abs().max() > 1e-3  # the twin: one head is left out
    layer = architecture.layers[0]
    if architecture.name in LANES:
        with pytest.raises(ValueError, match="do not fit the last norm, which takes the residual stream"):
            ws.logit_lens(model, ids, "head_out")
        return
    found = ws.logit_lens(model, ids, "head_out", layers=[layer], positions=[2])
    x = torch.zeros(2, 7, kept["mixer_out", layer].shape[-1])
    x[:, 2] = (kept["head_out", layer].unflatten(0, (2, 7))[:, 2, 1]) @ model.W_O(layer)[1]
    expected = by_hand(architecture, ids, x)[:, 2].log_softmax(-1)
    torch.testing.assert_close(found.entropy[1], -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4)
    assert (found.entropy[0] - found.entropy[1]).abs().max() > 1e-4


@pytest.fixture(scope="module")
def gdn() -> Any:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_padded_texts_are_as_alone(gdn: Any) -> None:
    both = ws.logit_lens(gdn, TEXTS, ["resid_post", "mlp_out"], target=" the")
    for i, text in enumerate(TEXTS):
        alone, here = ws.logit_lens(gdn, text, ["resid_post", "mlp_out"], target=" the"), both.sequence == i
        torch.testing.assert_close(both.kl[:, here], alone.kl, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(both.probability[:, here], alone.probability, rtol=1e-3, atol=1e-5)
        assert both.words_at(0, i) == alone.words_at(0)
    last = ws.logit_lens(gdn, TEXTS, positions=[-1, 0])
    assert last.position.tolist() == [int((both.sequence == 0).sum()) - 1, 0, int((both.sequence == 1).sum()) - 1, 0]


def test_pieces_change_nothing(gdn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ws.logit_lens(gdn, TEXTS[0])
    monkeypatch.setattr(lenses, "LOGITS", 2 * gdn.n_vocab)
    done: list[int] = []
    pieces = ws.logit_lens(gdn, TEXTS[0], progress=done.append)
    torch.testing.assert_close(pieces.kl, whole.kl, rtol=1e-4, atol=1e-5)
    assert len(done) > 1 and done[-1] == len(whole.position)


@torch.no_grad()
def test_edits_in_force_act_once(gdn: Any) -> None:
    vector = torch.randn(gdn.W_E.shape[1], generator=torch.Generator().manual_seed(0))
    with gdn.intervene([ws.AddVector(vector, "blocks.3.hook_resid_post"), ws.Delete(1)], positions=[2]):
        logits = gdn(TEXTS[0])[0]
        found = ws.logit_lens(gdn, TEXTS[0])
    assert torch.equal(found.target, logits.argmax(-1)) and found.kl[-1].max() < 1e-6
    assert (gdn(TEXTS[0])[0, 2] - logits[2]).abs().max() > 0.1


def test_result_and_ids_without_tokenizer(gdn: Any) -> None:
    bare = ws.HookedRecurrentModel(gdn.hf_model, False)
    bare.tokenizer = None
    ids = gdn.to_tokens(TEXTS[0])[0]
    found, named = (ws.logit_lens(m, ids, ["resid_post", "head_out"]) for m in (bare, gdn))
    first = int(ids[0, 0])
    assert found.words[first] == str(first) and named.words[first] == "The"
    table = named.records()
    assert len(table) == named.kl.numel() and set(table["what"]) == {"resid_post", "head_out"}
    assert len(named.numbers()) == 2 * (gdn.n_layers + 10) and len(named.plot().axes) == 2
    assert len(named.plot(first=3).axes[0].texts) == 2 * len(named.places)
    with pytest.raises(IndexError, match="sequence=0, first=5: there is no such token"):
        named.plot(first=5)
    assert not named.plot().axes[0].get_title()
    last, some = (named.plot(tokens=tokens).axes[0] for tokens in (slice(-2, None), [1, 3]))
    assert last.get_title() == "tokens 3 to 4, of 0 to 4" and some.get_title() == "tokens 1, 3, of 0 to 4"
    assert [label.get_text() for label in some.get_xticklabels()] == [named.words[int(i)] for i in ids[0, [1, 3]]]
    with pytest.raises(IndexError, match=r"tokens=\[5\]: 5 was not looked at; there are 0 to 4"):
        named.plot(tokens=[5])
    with pytest.raises(IndexError, match="are none"):
        named.plot(tokens=slice(7, 9))
    with pytest.raises(ValueError, match="not both"):
        named.plot(first=1, tokens=[1])
    long = ws.logit_lens(gdn, ids.repeat(1, 8), "resid_post")
    first, whole = long.plot().axes[0], long.plot(tokens=slice(None)).axes[0]
    assert first.get_title() == "tokens 0 to 23, of 0 to 39" and len(first.texts) == 24 * len(long.places)
    assert "without words" in whole.get_title() and not whole.texts and whole.figure.get_figwidth() < 17
    shifted = ws.logit_lens(gdn, ids, target=ids.roll(-1, 1))
    assert torch.equal(shifted.target, ids[0].roll(-1))


@pytest.fixture(scope="module")
def windows(gdn: Any) -> Tensor:
    rows = [gdn.to_tokens(text)[0][0, :33] for text in heldout_documents()]
    return torch.stack([row for row in rows if len(row) == 33])


def test_a_tuned_lens_beats_the_logit_lens(gdn: Any, windows: Tensor, tmp_path: Path) -> None:
    train, held_out = windows[:-6], windows[-6:]
    settings: dict[str, Any] = dict(context=33, steps=24, batch_size=4, lr=3e-3, progress=False, layers=[0, 2])
    lens = ws.tune_lens(gdn, train, **settings, out=tmp_path / "a", save_every=10)
    plain, tuned = (ws.logit_lens(gdn, held_out, "resid_pre", layers=[0, 2], lens=x).kl.mean(1) for x in (None, lens))
    assert tuned[0] < 0.7 * plain[0] and tuned[1] < 0.9 * plain[1]

    again = ws.TunedLens.load(lens.save(tmp_path / "b"))
    assert again.training == lens.training
    x = torch.randn(5, gdn.W_E.shape[1])
    assert torch.equal(again.translate(x, "resid_post", 1), lens.translate(x, "resid_pre", 2))
    assert torch.equal(again.translate(x, "resid_post", gdn.n_layers - 1), x)

    # A training that was stopped after 20 steps and goes on is the same; another is refused.
    whole = ws.tune_lens(gdn, train, **settings)
    stopped = tmp_path / "c"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ws.TunedLens, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        ws.tune_lens(gdn, train, **settings, out=stopped, save_every=10)
    assert not (stopped / "tuned_lens.safetensors").exists()
    resumed = ws.tune_lens(gdn, train, **settings, out=stopped)
    assert torch.equal(resumed.translate(x, "resid_pre", 2), whole.translate(x, "resid_pre", 2))
    with pytest.raises(ValueError, match=r"was begun otherwise: seed 0 there, 1 now"):
        ws.tune_lens(gdn, train, **settings, out=stopped, seed=1)
    checkpoint = stopped / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4] + b"abcd")
    with pytest.raises(
        ValueError,
        match=r"is not a whole checkpoint of a lens in training \(its tensors were altered",
    ):
        ws.tune_lens(gdn, train, **settings, out=stopped)
    (tmp_path / "b").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a whole tuned lens"):
        ws.TunedLens.load(tmp_path / "b")

    other = ws.HookedRecurrentModel.from_pretrained("tiny-mamba2")
    with pytest.raises(ValueError, match=r"this lens was trained on tiny-gdn, whose 4 layers have other weights"):
        ws.logit_lens(other, TEXTS[0], lens=lens)
    with pytest.raises(ValueError, match=r"resid_pre of layer 1: this lens has translators before layers \[0, 2\]"):
        ws.logit_lens(gdn, TEXTS[0], "resid_pre", lens=lens)
    with pytest.raises(ValueError, match="a tuned lens translates the stream itself"):
        ws.logit_lens(gdn, TEXTS[0], "mixer_out", lens=lens)


def test_bad_input(gdn: Any) -> None:
    for options, error, match in [
        (dict(at="resid_mid"), ValueError, "at='resid_mid': the lens looks at resid_pre, mixer_out"),
        (dict(layers=[9]), IndexError, r"layer 9 has no resid_post; layers that do: \[0, 1, 2, 3\]"),
        (dict(at="head_out", layers=[3]), IndexError, r"layer 3 has no head_out; layers that do: \[0, 1, 2\]"),
        (dict(positions=[40]), IndexError, "position 40 is out of range: sequence 0 has 5 tokens"),
        (dict(positions=[]), ValueError, r"positions=\[\] asks for nothing"),
        (dict(k=0), ValueError, "k=0: give 1 to 4096"),
        (dict(target=10**6), ValueError, "outside the model's vocabulary"),
    ]:
        with pytest.raises(error, match=match):
            ws.logit_lens(gdn, TEXTS[0], **options)
    with pytest.raises(IndexError, match="layer 7: this model has layers 0 to 3"):
        ws.tune_lens(gdn, TEXTS, layers=[7])
    with pytest.raises(ValueError, match=r"the text makes 0 windows of 128 tokens"):
        ws.tune_lens(gdn, TEXTS)
