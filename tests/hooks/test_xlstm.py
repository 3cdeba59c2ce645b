"""xLSTM: edits against transformers' own cell, what the normaliser counts, caches, padding, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.xlstm import modeling_xlstm
from transformers.models.xlstm.modeling_xlstm import xLSTMCache

import brute_force as bf
import writesae as ws
from architectures import architecture_named
from edit_cases import assert_close, random_ids, random_write
from writesae.hooks.families.xlstm import MatrixCache, MLSTMCall
from writesae.models.kinds import why_not

A, IDS = architecture_named("xlstm"), random_ids(8, 2, 70)
LAYER, HEAD, AT = 1, 2, 9


@pytest.fixture
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(A.build())


def by_the_cell(x: dict[str, Tensor], E: Tensor, also_n: bool = False) -> Tensor:
    """Reads of a head by transformers' function for one token, with a matrix added to what is kept after one of them;
    with ``also_n``, counted as if a token had written it."""
    C, n, m = torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16), torch.zeros(2, 1, 1)
    reads = []
    for t in range(IDS.shape[1]):
        q, k, v, i, f = (x[name][:, t, [HEAD]] for name in ("q_raw", "k_raw", "v", "igate", "fgate"))
        step = bf.native(modeling_xlstm.mlstm_recurrent_step_native)
        o, (C, n, m) = step(q, k, v, i[..., None], f[..., None], cstate=C, nstate=n, mstate=m)
        if t == AT:
            C, n = C + E, n + E.sum(-1) if also_n else n
        reads.append(o)
    return torch.stack(reads, 1)[:, :, 0]


@torch.no_grad()
def test_an_edit_is_what_the_models_own_cell_makes_of_it(model: ws.HookedRecurrentModel) -> None:
    E = random_write(A, 1, size=2.0)
    with model.intervene(ws.Add(LAYER, HEAD, write=E), positions=[AT], read="next"):
        _, cache = model.run_with_cache(IDS)
    x = {name: cache[name, LAYER] for name in (*A.rule.raw, "v")}
    found = cache["o", LAYER][:, :, HEAD]
    torch.testing.assert_close(found, by_the_cell(x, E.dense()), rtol=1e-4, atol=1e-4)
    for twin in (by_the_cell(x, E.dense(), also_n=True), by_the_cell(x, 0 * E.dense())):
        assert (found - twin).abs().max() > 1e-2


@torch.no_grad()
def test_what_is_of_the_matrix_alone(model: ws.HookedRecurrentModel) -> None:
    """Keys twice as large in the matrix are read twice as strongly; of the model's own keys, not where the normaliser
    is what reads are divided by."""
    before = model.run_with_cache(IDS)[1]
    found = {}
    for name in ("k", "k_raw"):
        with model.hooks([((name, LAYER), lambda x, _: 2 * x)]):
            found[name] = model.run_with_cache(IDS)[1]
    at = {name: cache["o", LAYER] / before["o", LAYER] for name, cache in found.items()}
    torch.testing.assert_close(at["k"], torch.full_like(at["k"], 2), rtol=1e-3, atol=1e-3)
    normalised = before["denominator", LAYER] > 2  # by far more than the least
    torch.testing.assert_close(at["k_raw"][normalised], torch.ones_like(at["k_raw"][normalised]), rtol=1e-3, atol=1e-3)
    assert 0.05 < normalised.float().mean() < 0.95
    assert torch.equal(found["k"]["denominator", LAYER], before["denominator", LAYER])
    assert not torch.equal(found["k_raw"]["denominator", LAYER], before["denominator", LAYER])


@torch.no_grad()
def test_reads_divided_by_the_denominator(model: ws.HookedRecurrentModel) -> None:
    _, cache = model.run_with_cache(IDS)
    scaled = cache["q_raw", LAYER] / 16**0.5
    torch.testing.assert_close(cache["q", LAYER] * cache["denominator", LAYER][..., None], scaled, rtol=1e-5, atol=1e-5)
    assert (cache["log_decay", LAYER] <= 0).all() and (cache["beta", LAYER] <= 1 + 1e-6).all()


# Memory --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_normaliser_and_stabiliser_are_remembered(
    model: ws.HookedRecurrentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, read = model(IDS)[:, 40:], model.memory(IDS[:, :40])
    assert_close(model(IDS[:, 40:], memory=read), expected)
    for part in ("1.recurrent_states.1", "1.recurrent_states.2"):
        without = replace(read, others={**read.others, part: torch.zeros_like(read.others[part])})
        assert (model(IDS[:, 40:], memory=without) - expected).abs().max() > 1e-3
    edit = ws.Add(LAYER, HEAD, write=random_write(A, 1, size=2.0))
    with model.intervene(edit, positions=[45]):
        expected = model(IDS)[:, 40:]
        assert_close(model(IDS[:, 40:], memory=read), expected)
        monkeypatch.setattr(MLSTMCall, "_part", lambda *_: None)  # the twin: edits read as after an empty one
        assert (model(IDS[:, 40:], memory=read) - expected).abs().max() > 1e-3


@torch.no_grad()
def in_pieces(model: Any, cache: Any) -> Tensor:
    pieces = [model(input_ids=piece, cache_params=cache, use_cache=True) for piece in IDS.split([9, 60, 1], 1)]
    return torch.cat([out.logits for out in pieces], 1)


def test_any_empty_cache_is_taken_and_stays_the_same_object(model: ws.HookedRecurrentModel) -> None:
    expected = model(IDS)
    own = xLSTMCache(model.config, len(IDS), dtype=torch.float32)
    for cache in (DynamicCache(config=model.config), DynamicCache(), own, model.new_cache(), model.new_cache(IDS)):
        assert_close(in_pieces(model.hf_model, cache), expected)
        assert type(cache) is MatrixCache and cache.seqlen_offset == IDS.shape[1]
    with torch.no_grad():
        assert type(model.hf_model(IDS).cache_params) is MatrixCache
        assert model.hf_model(IDS, use_cache=False).cache_params is None


def test_a_cache_that_is_not_taken(model: ws.HookedRecurrentModel) -> None:
    filled = xLSTMCache(model.config, len(IDS), dtype=torch.float32)
    with bf.untouched(A), torch.no_grad():
        A.build()(IDS, cache_params=filled)
    with pytest.raises(ValueError, match=r"this xLSTMCache was filled where writesae did not see it.*a new one"):
        model(IDS, cache_params=filled)
    assert len(filled.rnn_state) == 4
    with pytest.raises(ValueError, match="a cache of the class StaticCache: xLSTM takes"):
        model.hf_model(IDS, cache_params=StaticCache(config=model.config, max_cache_len=40))


@torch.no_grad()
def test_sizes_that_the_models_own_cache_has_not() -> None:
    """A config rounds its sizes up to multiples of 64, and the model does not."""
    a = replace(A, values=A.values | {"hidden_size": 48})
    raw, model = a.build(), ws.HookedRecurrentModel(a.build())
    assert (model.site(0).d_key, model.site(0).d_value) == (12, 12)
    with bf.untouched(a), pytest.raises(RuntimeError):
        raw(IDS, use_cache=True)
    assert_close(in_pieces(model.hf_model, model.new_cache()), model(IDS))


@torch.no_grad()
def test_projections_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, no module gives the gate alone."""
    monkeypatch.setattr(modeling_xlstm.xLSTMPreTrainedModel, "_init_weights", lambda *_: None)  # fails on them
    a = replace(A, values=A.values | {"weight_mode": "fused"})
    raw, model = a.build(), ws.HookedRecurrentModel(a.build())
    assert {f"blocks.0.mixer.hook_{q}" for q in a.quantities(0)} - set(model.hook_names) == {"blocks.0.mixer.hook_z"}
    with bf.untouched(a):
        expected = raw(IDS, use_cache=False).logits
    assert torch.equal(model(IDS), expected)
    dense = [[bf.DenseEdit(LAYER, HEAD, bf.delete, [AT])]] * 2
    with model.intervene(ws.Delete(LAYER, HEAD), positions=[AT]):
        assert_close(model(IDS), bf.brute_force(replace(a, outputs={}), raw, IDS, dense))


# Padding -------------------------------------------------------------------------------------------------------------


def padded() -> dict[str, Tensor]:
    """The first row begins 5 tokens later."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0], mask[0, :5] = IDS[0].roll(5), 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_padding_is_no_token_whatever_is_attached(model: ws.HookedRecurrentModel) -> None:
    expected, raw = model(IDS), A.build()
    for attach in ([], [(("v", LAYER), lambda x, _: None)]):
        with model.hooks(attach):
            found = model.hf_model(**padded()).logits
            assert_close(found[0, 5:], expected[0, :-5])
            assert_close(found[1], expected[1])
    with bf.untouched(A):
        assert (raw(**padded()).logits[0, 5:] - expected[0, :-5]).abs().max() > 1e-2  # the twin
    ids, mask = padded().values()
    longer = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    alone = model.generate(IDS[:1, :-5], max_new_tokens=4, do_sample=False)
    assert torch.equal(longer[0, -4:], alone[0, -4:])


def test_gradients_beside_padding(model: ws.HookedRecurrentModel) -> None:
    given = padded()
    whole = ws.gradient(model, given["input_ids"], ws.Logit(5), attention_mask=given["attention_mask"])[LAYER]
    alone = ws.gradient(model, IDS[:1, :-5], ws.Logit(5))[LAYER]
    torch.testing.assert_close(whole.output[:1, 5:], alone.output, rtol=1e-3, atol=1e-5)
    assert not whole.output[0, :5].any()


# What transformers does otherwise ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pass_that_the_model_would_cut(model: ws.HookedRecurrentModel) -> None:
    raw = A.build()
    raw.config.max_inference_chunksize = model.config.max_inference_chunksize = 32
    with bf.untouched(A):
        expected = raw(IDS).logits
    assert torch.equal(model.hf_model(IDS).logits, expected)
    edit = model.intervene(ws.Delete(LAYER), positions=[40])
    with edit, pytest.raises(ValueError, match="a pass of 70 tokens, which xLSTMModel would cut into pieces of 32"):
        model(IDS)
    with pytest.raises(ValueError, match="would cut into pieces"):
        model.hf_model(**padded())
    with model.intervene(ws.Delete(LAYER), positions=[40]):
        cache = model.new_cache()
        pieces = torch.cat([model(piece, cache_params=cache) for piece in IDS.split(30, 1)], 1)
        model.config.max_inference_chunksize = 70
        assert_close(pieces, model(IDS))
    assert (pieces - expected).abs().max() > 1e-3


@torch.no_grad()
def test_half_precision_without_a_cache() -> None:
    raw, model = A.build().bfloat16(), ws.HookedRecurrentModel(A.build().bfloat16())
    with bf.untouched(A):
        with pytest.raises(RuntimeError, match="same dtype"):
            raw(IDS, use_cache=False)
        expected = raw(IDS, use_cache=True).logits
        short = raw(IDS[:, :9], use_cache=False).logits
    assert torch.equal(model(IDS), expected) and torch.equal(model.hf_model(IDS, use_cache=True).logits, expected)
    assert torch.equal(model(IDS[:, :9]), short)


def test_logits_that_are_capped() -> None:
    """As those of real models: no vector reads one off."""
    a = replace(A, values=A.values | {"output_logit_soft_cap": 3.0})
    model = ws.HookedRecurrentModel(a.build())
    with pytest.raises(ValueError, match="a softcap"):
        ws.direct_attribution(model, IDS[:1, :9], ws.Logit(5))
    with pytest.raises(ValueError, match="a softcap"):
        ws.circuit(model, IDS[0, :9], ws.Logit(5))


def test_layers_of_the_package() -> None:
    theirs = type("mLSTMLayer", (nn.Module,), {"__module__": "xlstm.xlstm_large.model"})
    match = "Sequential cannot be wrapped: its layers are those of the package xlstm, .*Uninstall xlstm"
    with pytest.raises(ValueError, match=match):
        ws.HookedRecurrentModel(nn.Sequential(theirs()))
    assert "package" not in why_not(nn.Sequential(), ())
