"""Memory length: half-lives against states built token by token, reads against the pattern, ranks by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import writesae as ws
from architectures import Architecture, each_architecture
from writesae.methods import lengths as memory
from writesae.recurrence import Recurrence, Write
from writesae.recurrence.spec import states
from writesae.zoo import heldout_documents

N_POS = 24


@each_architecture
@torch.no_grad()
def test_what_is_left_and_who_reads_it(architecture: Architecture) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    ids = torch.randint(97, (2, N_POS), generator=torch.Generator().manual_seed(1))
    _, cache = model.run_with_cache(ids)
    layer = architecture.layers[-1]
    rec = model.family(layer).rule.recurrence(lambda quantity: cache[quantity, layer])
    write = cache.write(layer)

    at, lags = torch.tensor([2, 7]), 10
    keys = memory.keys_of(write)
    found = memory.survival(rec, keys, at, lags)
    for i, t in enumerate(at.tolist()):  # that write alone, in a memory that is built
        only = write * (torch.arange(N_POS) == t)[None, :, None].float()
        norms = torch.stack([S.norm(dim=(-1, -2)) for S in states(rec, only)], 1)
        expected = norms[:, t : t + lags + 1] / norms[:, t : t + 1]
        torch.testing.assert_close(found[:, :, i], expected, rtol=1e-3, atol=1e-5)
    decayed = memory.survival(rec, keys, at, lags, erases=False)
    if rec.a is None:
        assert torch.equal(decayed, found)
    else:
        assert (decayed - found).abs().max() > 1e-3  # the twin: without the erase it is something else
    if rec.log_decay.ndim == 3:
        summed = torch.stack([rec.log_decay[:, t + 1 : t + lags + 1].cumsum(1) for t in at.tolist()], 2).exp()
        torch.testing.assert_close(decayed[:, 1:], summed, rtol=1e-4, atol=1e-6)

    reads = [N_POS - 1, 5, 11]
    expected = cache.pattern(layer)[:, :, reads]  # [batch, head, read, source]
    if architecture.reads:  # weighted, so that values of the same length are not enough
        rows = memory.parts_of_reads(rec, write, reads)
        weights = cache["read_weights", layer][:, reads]
        expected = torch.einsum("bhnjsr,bjhsv,bnhrv->bhnjv", expected, write.value, weights).norm(dim=-1)
    else:
        rows = memory.read_from(rec, keys, reads)
    if architecture.steps and not architecture.reads:  # of values of other lengths, whose sums have the same length
        rows = rows.norm(dim=-1)
        expected = torch.einsum("bhrjs,bjhsv->bhrjv", expected, write.value).norm(dim=-1)
    if not architecture.reads:
        sizes = write.norm() / keys.flatten(3).norm(dim=-1)
        torch.testing.assert_close(memory.parts_of_reads(rec, write, reads), rows.abs() * sizes[..., None])
    torch.testing.assert_close(rows.permute(0, 2, 3, 1), expected, rtol=1e-3, atol=1e-5)
    assert (rows[:, 1:].permute(0, 2, 3, 1) - expected[..., :-1]).abs().max() > 1e-3  # the twin: of the token before


def test_a_head_that_halves_every_fourth_token() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 32, 2, 8, generator=generator) for _ in range(3))
    log_decay = torch.tensor([0.5, 1.0]).log().div(4).expand(1, 32, 2)
    rec = Recurrence(q, log_decay - 1e-6)
    lives = memory._lives(rec, k, 4)
    assert (lives["half_life_by_decay"][0, :, 0] == 4).all() and torch.isinf(lives["half_life_by_decay"][0, :, 1]).all()

    ids = torch.arange(32)[None] % 5
    found = memory._reads(rec, Write(k, v), 8, ids, torch.tensor([3]))
    at = memory.spread(32, 8, 16)
    assert at == [17, 19, 21, 23, 25, 27, 29, 31] and memory.spread(16, 4) == [3, 7, 11, 15]
    G = log_decay[0].cumsum(0).T
    parts = (torch.einsum("thd,jhd->htj", q[0], k[0]) * (G[:, :, None] - G[:, None, :]).exp()).tril()
    sizes = (parts.abs() * v[0].norm(dim=-1).T[:, None])[:, at]
    share = sizes / sizes.sum(-1, keepdim=True)
    torch.testing.assert_close(found["first"][0, 0], share[..., 0].mean(-1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found["own"][0, 0], torch.stack([share[:, i, t] for i, t in enumerate(at)]).mean(0),
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(found["delimiter"][0, 0], share[..., ids[0] == 3].sum(-1).mean(-1), rtol=1e-3, atol=1e-6)
    nearest = [[next(lag for lag in range(t + 1) if share[h, i, t - lag : t + 1].sum() >= 0.5)
                for i, t in enumerate(at)] for h in range(2)]  # fmt: skip
    assert found["read_distance"][0, 0].tolist() == torch.tensor(nearest).median(-1).values.tolist()
    later = [i for i, t in enumerate(at) if t > 20]
    expected = torch.stack([share[:, i, 20] * (at[i] + 1) for i in later]).mean(0)
    torch.testing.assert_close(found["received"][0, 20], expected, rtol=1e-3, atol=1e-5)
    assert torch.isnan(found["received"][0, 15]).all() and torch.isnan(found["received"][0, 31]).all()


def test_ranks() -> None:
    S = torch.zeros(1, 1, 3, 6, 5)
    S[..., 0, 0, 0] = 2.0  # of rank 1
    S[0, 0, 1, :4, :4] = torch.eye(4)
    S[0, 0, 2] = torch.randn(6, 5)
    found = memory._ranks(S)
    for name in ("participation", "entropy_rank"):
        torch.testing.assert_close(found[name][0, 0, :2], torch.tensor([1.0, 4.0]))
        assert 1.5 < float(found[name][0, 0, 2]) < 5
    G = S[0, 0, 2] @ S[0, 0, 2].T
    torch.testing.assert_close(found["participation"][0, 0, 2], G.trace() ** 2 / (G @ G).trace())


@pytest.fixture(scope="module")
def gdn() -> Any:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_the_whole(gdn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = dict(context=64, max_tokens=192, writes=4, reads=8, states=2, progress=False)
    found = ws.memory_length(gdn, heldout_documents(), **options)
    table = found.records()
    assert len(table) == 12 and list(table["layer"]) == [0] * 4 + [1] * 4 + [2] * 4
    longest = table.sort_values("half_life", ascending=False).iloc[0]
    assert (longest.layer, longest["head"]) == (2, 0)  # the one head of the model that remembers
    assert (table["half_life"] <= table["half_life_by_decay"]).all()  # erases only take away, in a delta rule
    assert ((table["participation"] >= 1) & (table["participation"] <= 32)).all()
    assert len(found.plot().axes) == 3 and len(found.numbers()) == 29
    words = found.tokens(1)
    assert words["count"].sum() == 192 and found.tokens(3)["count"].min() >= 3
    assert "," in {gdn.to_string(i) for i in found.delimiters}

    monkeypatch.setattr(memory, "BLOCK", 1)  # one head at a time
    pieces = ws.memory_length(gdn, heldout_documents(), **options, batch_size=2)
    for name in ("half_life_with_erase", "first", "received", "unread", "entropy_rank", "written", "strength_by_decay"):
        torch.testing.assert_close(getattr(pieces, name), getattr(found, name), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_token_ids_and_bad_input(gdn: Any) -> None:
    bare = ws.HookedRecurrentModel(gdn.hf_model)
    bare.tokenizer = None
    ids = torch.randint(4096, (2, 32), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(context=32, writes=2, reads=2, layers=[1], progress=False)
    unknown = ws.memory_length(bare, ids, **options)
    assert unknown.delimiter is None and "delimiter_share" not in unknown.records() and "not known" in unknown.about
    given = ws.memory_length(bare, ids, **options, delimiters=[int(ids[0, 3])])
    assert 0 < float(given.delimiter.sum()) < float(given.delimiter.numel())
    for more, error, match in [
        (dict(layers=[3]), IndexError, "layer 3 is not recurrent"),
        (dict(states=20), ValueError, "a window needs 40 tokens"),
        (dict(context=40), ValueError, "the text makes 0 windows of 40 tokens"),
        (dict(delimiters=[5000]), ValueError, "outside the model's vocabulary"),
    ]:
        with pytest.raises(error, match=match):
            ws.memory_length(bare, ids, **{**options, **more})
