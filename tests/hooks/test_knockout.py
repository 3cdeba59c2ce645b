"""Who does not read whom: knockouts against patterns, and against brute force in every way of feeding a text."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import brute_force as bf
import writesae as ws
from architectures import Architecture, architecture_named, each_architecture, each_rule
from edit_cases import annotations_unchecked, assert_close, random_ids, random_write
from writesae.hooks import response
from writesae.recurrence import Recurrence

N_POS = 76  # more than one chunk
EFFECT = 1e-3
# layer, head, sources, targets: before, behind and across a chunk's border, and into what is decoded
KNOCKOUTS: list[tuple[int, int, Any, Any]] = [
    (0, 1, 3, None),
    (1, 0, [2, 40], [41, 70, 75]),
    (3, 2, slice(0, 30), slice(31, None, 2)),
    (3, 3, None, [75]),
]


def attached(model: ws.HookedRecurrentModel) -> AbstractContextManager[Any]:
    return model.intervene([ws.Knockout(layer, h, sources=s, targets=t) for layer, h, s, t in KNOCKOUTS])


def dense() -> list[bf.DenseKnockout]:
    def listed(asked: Any) -> tuple[int, ...]:
        every = tuple(range(N_POS))
        return (
            every
            if asked is None
            else every[asked]
            if isinstance(asked, slice)
            else tuple(torch.tensor([asked]).flatten().tolist())
        )

    return [bf.DenseKnockout(layer, h, listed(s), None if t is None else listed(t)) for layer, h, s, t in KNOCKOUTS]


def expected(a: Architecture, ids: Tensor) -> Tensor:
    return bf.brute_force(a, a.build(), ids, [dense()] * len(ids))


@torch.no_grad()
def in_every_mode(model: ws.HookedRecurrentModel, a: Architecture, ids: Tensor) -> dict[str, Tensor]:
    """Logits of one text ``[pos, vocab]``: whole, in pieces, decoded, and beside a longer text."""

    def feed(batch: Tensor, pieces: list[int], mask: Tensor) -> Tensor:
        cache, start, logits = DynamicCache(config=model.config), 0, []
        with attached(model):
            for n in pieces:
                now = {"attention_mask": mask[:, : start + n]} | a.place(start, n)
                logits.append(model(batch[:, start : start + n], past_key_values=cache, **now))
                start += n
        return torch.cat(logits, 1)

    n_pad = 9
    longer = torch.cat([torch.zeros(1, n_pad, dtype=torch.long), ids], 1)
    batch = torch.cat([longer, torch.cat([ids, random_ids(3, 1, n_pad)], 1)])
    mask = torch.ones_like(batch)
    mask[0, :n_pad] = 0
    with attached(model):
        found = {"whole": model(ids)[0], "padded": model(batch, attention_mask=mask)[0, n_pad:]}
    if a.forgets_positions or hasattr(model.hf_model.base_model, "rope_deltas"):
        mask = mask[:1, n_pad:]
        batch, n_pad = ids, 0
    found["pieces"] = feed(ids, [5, 1, 30, 1, 1, 38], torch.ones_like(ids))[0]
    found["padded pieces"] = feed(batch, [n_pad + 40, *[1] * 4, batch.shape[1] - n_pad - 44], mask)[0, n_pad:]
    return found


@each_architecture
@annotations_unchecked()
def test_modes(architecture: Architecture) -> None:
    a, ids = architecture, random_ids(1, 1, N_POS)
    model = ws.HookedRecurrentModel(a.build())
    theirs = expected(a, ids)[0]
    with torch.no_grad():
        assert (theirs - model(ids)[0]).abs().max() > EFFECT
    for name, ours in in_every_mode(model, a, ids).items():
        assert_close(ours, theirs), name
    if a.is_first_of_its_rule:
        model.kernels = "writesae"
        for ours in in_every_mode(model, a, ids).values():
            assert_close(ours, theirs)


@each_architecture
@torch.no_grad()
def test_a_read_misses_its_entries_of_the_pattern(architecture: Architecture) -> None:
    a, ids = architecture, random_ids(2, 2, 40)
    model = ws.HookedRecurrentModel(a.build())
    layer, sources, targets = a.layers[-1], [3, 11, 35], [5, 11, 39]
    _, cache = model.run_with_cache(ids)
    with model.intervene(ws.Knockout(layer, sources=sources, targets=targets)):
        _, cut = model.run_with_cache(ids)
    written = cache.write(layer).value.float()
    before = torch.ones(40, 40).tril(-1)[(..., *(None,) * len(a.steps + a.reads))]
    pattern = cache.pattern(layer) * before  # its own write a token reads in any case
    terms, reads = "s" * len(a.steps), "r" * len(a.reads)
    weights = cache["read_weights", layer][:, targets] if reads else torch.ones(2, 3, a.n_heads, a.d_value)
    missing = torch.einsum(
        f"bhqk{terms}{reads},bkh{terms}v,bqh{reads}v->bqhv",
        pattern[:, :, targets][:, :, :, sources],
        written[:, sources],
        weights,
    )
    expected = cache["o", layer].float().clone()
    expected[:, targets] -= missing
    torch.testing.assert_close(cut["o", layer].float(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - cache["o", layer]).abs().max() > EFFECT
    last = [39]
    torch.testing.assert_close(cut.state(layer, last), cache.state(layer, last), rtol=0, atol=0)  # carried on as it was
    with model.intervene(ws.Delete(layer), positions=sources):  # the twin: taken away from everybody
        _, deleted = model.run_with_cache(ids)
    assert (deleted["o", layer].float() - expected).abs().max() > EFFECT


@each_rule
def test_a_wrong_response_would_be_noticed(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins: without the erase (or the decay, where nothing is erased; or with one, where nothing is forgotten either);
    what is hidden forgotten between calls."""
    a, ids = architecture, random_ids(1, 1, N_POS)
    theirs, model = expected(a, ids)[0], ws.HookedRecurrentModel(a.build())
    chunked = response.chunked

    def without(rec: Recurrence, *args: Any, **kwargs: Any) -> Any:
        left_out = rec.log_decay * 0 if rec.log_decay.any() else rec.log_decay - 0.1
        rec = replace(rec, log_decay=rec.log_decay if rec.a is not None else left_out, a=None, b=None)
        return chunked(rec, *args, **kwargs)

    monkeypatch.setattr(response, "chunked", without)
    with torch.no_grad(), attached(model), pytest.raises(AssertionError, match="not close"):
        assert_close(model(ids)[0], theirs)
    monkeypatch.undo()
    monkeypatch.setattr(
        response, "chunked", lambda *args, **kwargs: [x * (i == 0) for i, x in enumerate(chunked(*args, **kwargs))]
    )
    with pytest.raises(AssertionError, match="not close"):
        assert_close(in_every_mode(model, a, ids)["pieces"], theirs)


@pytest.fixture(scope="module")
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(architecture_named("qwen3_5").build())


@torch.no_grad()
def test_generation(model: ws.HookedRecurrentModel) -> None:
    """Sources and targets in the prompt, and targets among what is generated: the logits of the whole text, cut."""
    prompt = random_ids(4, 2, 30)
    for targets in ([10, 29], [20, 31, 33], None):
        cut = ws.Knockout(1, sources=[2, 5], targets=targets)
        seen: list[Tensor] = []
        handle = model.hf_model.lm_head.register_forward_hook(lambda _m, _a, x, seen=seen: seen.append(x[:, -1]))
        with handle, model.intervene(cut):
            text = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        with model.intervene(cut):
            whole = model(text)
        assert_close(torch.stack(seen, 1), whole[:, 29:-1])
        if targets != [10, 29]:  # the twin: those of the model as it is
            assert (whole - model(text))[:, 31].abs().max() > 1e-4


@torch.no_grad()
def test_each_row_its_own(model: ws.HookedRecurrentModel) -> None:
    ids = random_ids(5, 2, 20)
    with model.intervene(ws.Knockout(1, 2, sources=torch.tensor([[3, 4], [8, 9]]), targets=torch.tensor([[7], [12]]))):
        together = model(ids)
    for row, (sources, target) in enumerate((([3, 4], 7), ([8, 9], 12))):
        with model.intervene(ws.Knockout(1, 2, sources=sources, targets=target)):
            assert_close(model(ids[row : row + 1]), together[row : row + 1])


@torch.no_grad()
def test_beside_other_edits(model: ws.HookedRecurrentModel) -> None:
    """What is hidden is what is left of the native write, as hooks made it; what edits write is read."""
    ids, source, target = random_ids(6, 1, 20), 4, 9
    cut, a = ws.Knockout(1, 2, sources=source, targets=target), architecture_named("qwen3_5")

    def read(*edits: Any, hooks: Any = ()) -> tuple[ws.ActivationCache, Tensor]:
        with model.hooks(list(hooks)), model.intervene([*edits, ws.Add(0, 0, write=other, scale=0)], positions=source):
            with model.intervene(cut):
                _, with_cut = model.run_with_cache(ids)
            _, without = model.run_with_cache(ids)
        return without, (without["o", 1] - with_cut["o", 1])[0, target, 2]

    other = random_write(a, 1)
    plain, missing = read()
    expected = plain.pattern(1, 2)[0, target, source] * plain.write(1).value[0, source, 2]
    torch.testing.assert_close(missing, expected, rtol=1e-4, atol=1e-6)
    assert missing.abs().max() > EFFECT
    _, beside = read(ws.Add(1, 2, write=other))
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=1e-6)  # the native write alone, not what was added
    for instead in (ws.Delete(1, 2), ws.Replace(1, 2, write=other)):
        _, gone = read(instead)
        torch.testing.assert_close(gone, torch.zeros_like(gone), rtol=0, atol=1e-7)

    def doubled(write: ws.Write, hook: ws.HookPoint) -> ws.Write:
        return write * 2

    _, hooked = read(hooks=[(("write", 1), doubled)])
    torch.testing.assert_close(hooked, 2 * expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_cache_knows_what_was_hidden_in_it(model: ws.HookedRecurrentModel) -> None:
    ids = random_ids(7, 1, 24)
    cut = ws.Knockout(1, sources=3, targets=[20])
    with model.intervene(cut):
        whole = model(ids)
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], past_key_values=cache)
        copied = copy.deepcopy(cache)
        for fed in (cache, copied):
            assert_close(model(ids[:, 10:], past_key_values=fed), whole[:, 10:])
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    with (
        pytest.raises(ValueError, match=r"sources=3, targets=\[20\]\): its sources were fed in an earlier call"),
        model.intervene(cut),
    ):
        model(ids[:, 10:], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="its sources were fed in an earlier call"), model.intervene(cut):
        model(ids[:, :10], past_key_values=cache)
        with model.intervene(ws.Knockout(1, 0, sources=3)):  # another knockout knows nothing of it
            model(ids[:, 10:], past_key_values=cache)
    with (
        pytest.raises(ValueError, match="a target after the prompt, and several beams or sequences per text"),
        model.intervene(cut),
    ):
        model.generate(ids[:, :15], max_new_tokens=8, num_beams=2)
    assert not model.busy


@torch.no_grad()
def test_bad_input(model: ws.HookedRecurrentModel) -> None:
    ids = random_ids(8, 1, 20)
    for sources, targets in ((5, 5), ([3, 9], [7, 9]), ([5], [3, 7]), (None, 0), (slice(4, None), slice(0, 5)),
                             (torch.tensor([[1], [9]]), torch.tensor([[4], [6]]))):  # fmt: skip
        with (
            pytest.raises(ValueError, match=r"(?s)sources=.* and targets=.*: a token reads what earlier ones wrote"),
            model.intervene(ws.Knockout(1, sources=sources, targets=targets)),
        ):
            model(ids)
    for given, error, match in (
        (dict(sources=5, positions=3), ValueError, r"positions=3 with a Knockout"),
        (dict(sources=5, read="next"), ValueError, r"read='next' with a Knockout"),
        (dict(sources=-1), ValueError, r"positions=-1: positions count from 0"),
        (dict(sources=5, targets=20), IndexError, r"position 20 is out of range: sequence 0 has 20 tokens"),
        (dict(sources=25), IndexError, r"position 25 is out of range"),
        (dict(sources=5, head=4), IndexError, r"head 4 at layer 1"),
        (dict(sources=5, layer=2), IndexError, r"layer 2 is not recurrent"),
    ):
        where = {name: given[name] for name in ("positions", "read") if name in given}
        cut = ws.Knockout(**{"layer": 1, **{name: x for name, x in given.items() if name not in where}})
        with pytest.raises(error, match=match), model.intervene(cut, **where):
            model(ids)
    with (
        pytest.raises(IndexError, match=r"never reached position 40"),
        model.intervene(ws.Knockout(1, sources=2, targets=[5, 40])),
    ):
        model(ids, past_key_values=DynamicCache(config=model.config))
