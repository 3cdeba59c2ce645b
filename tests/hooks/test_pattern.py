"""Who reads whom: patterns against what heads read, and against one write taken out after the other."""

import pytest
import torch

import writesae as ws
from architectures import ARCHITECTURES
from writesae.recurrence import Recurrence, Write
from writesae.recurrence.kernels import chunked


@pytest.mark.parametrize("a", ARCHITECTURES, ids=str)
@torch.no_grad()
def test_a_pattern_times_what_was_written_is_what_is_read(a):
    model = ws.HookedRecurrentModel(a.build())
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(ids)
    for layer in (a.layers[0], a.layers[-1]):
        pattern, written = cache.pattern(layer), cache.write(layer).value.float()
        assert pattern.shape == (2, a.n_heads, 40, 40, *a.steps, *a.reads)
        terms, reads = "s" * len(a.steps), "r" * len(a.reads)
        weights = cache["read_weights", layer] if reads else torch.ones(2, 40, a.n_heads, a.d_value)
        formula = f"bhqk{terms}{reads},bkh{terms}v,bqh{reads}v->bqhv"
        read = torch.einsum(formula, pattern, written, weights)
        if reads:  # the twin: the weights of the other read
            other = torch.einsum(formula, pattern, written, weights.flip(3))
            assert (other - read).abs().max() > 1e-2
        torch.testing.assert_close(read, cache["o", layer].float(), rtol=1e-4, atol=1e-5)
        assert (pattern.movedim((2, 3), (-2, -1)).triu(1) == 0).all()
        torch.testing.assert_close(cache.pattern(layer, 1), pattern[:, 1])
        if a.rule.name != "mamba2" and "beta" in a.rule.inputs:  # the twin: without the erase it is another
            rec = model.family(layer).rule.recurrence(lambda q, layer=layer: cache[q, layer])
            if rec.a is not None:
                one_hot = torch.eye(40)[None, :, None].expand(2, 40, a.n_heads, 40)
                plain = Recurrence(rec.q, rec.log_decay)
                key, first = cache.write(layer).factors()[0][..., 0, :], pattern[..., 0] if terms else pattern
                other = chunked(plain, Write(key, one_hot))[0].transpose(1, 2)
                assert (other - first).abs().max() > 1e-3


@torch.no_grad()
def test_a_write_taken_out_is_missed_by_as_much():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    text = "The state of the Union is strong, and the people of the States"
    _, cache = model.run_with_cache(text)
    pattern, written = cache.pattern(2, 0)[0], cache.write(2).value[0, :, 0]
    for j in (0, 3, 7):
        with model.intervene(ws.Delete(2, 0), positions=j):
            _, without = model.run_with_cache(text)
        missed = cache["o", 2][0, :, 0] - without["o", 2][0, :, 0]
        torch.testing.assert_close(missed, pattern[:, j, None] * written[j], rtol=1e-4, atol=1e-6)
    assert (pattern[:, 3, None] * written[7] - missed).abs().max() > 1e-3  # the twin: of another token


@torch.no_grad()
def test_bad_input():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    _, cache = model.run_with_cache("The state of the Union")
    with pytest.raises(IndexError, match=r"layer 3 is not recurrent"):
        cache.pattern(3)
    with pytest.raises(IndexError, match=r"head 9 at layer 1: allowed are 0 to 3"):
        cache.pattern(1, 9)
    _, few = model.run_with_cache("The state of the Union", names=[("v", 1)])
    with pytest.raises(KeyError, match="was not cached"):
        few.pattern(1)

    def doubled(write: Write, hook: ws.HookPoint) -> Write:
        return write + write

    with model.hooks([(("write", 1), doubled)]):
        _, cache = model.run_with_cache("The state of the Union")
    whole = torch.einsum("bhqks,bkhsv->bqhv", cache.pattern(1), cache.write(1).value)
    torch.testing.assert_close(whole, cache["o", 1], rtol=1e-4, atol=1e-5)  # of two terms
