"""Steering by contrast: means by plain loops, edits against edits by hand, doses against passes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import Architecture, each_architecture
from writesae.methods import dose

POSITIVE = ["It was a very good day", "I love the sea", "They were happy and", "She is a kind"]
NEGATIVE = ["It was a bad", "I hate the sea very much", "They were sad and angry", "He is a cruel man"]
PROMPTS = ["I think that the", "The man was", "It is a", "I think the"]


def tokens(n: int, n_vocab: int = 97) -> Tensor:
    return torch.randint(n_vocab, (4, 6), generator=torch.Generator().manual_seed(n))


@each_architecture
@torch.no_grad()
def test_it_is_the_difference_of_means_and_its_intervention_adds_it(architecture: Architecture) -> None:
    model, kind, unkind = ws.HookedRecurrentModel(architecture.build()), tokens(1), tokens(2)
    layer, prompt = architecture.layers[1], tokens(3)
    native = model(prompt)
    every = (("resid_post", layer), ("write", layer, 2), ("state", layer, 2))
    for at in every if architecture.is_first_of_its_rule else every[2:]:
        values = []
        for ids in (kind, unkind):
            _, cache = model.run_with_cache(ids)
            if at[0] == "state":  # token by token
                values.append(list(cache.dynamics(layer).each_state())[-1][:, 2])
            elif at[0] == "write":
                values.append(cache.write(layer)[:, -1, 2].dense())
            else:
                values.append(cache["resid_post", layer][:, -1])
        difference = values[0].mean(0) - values[1].mean(0)
        rank = min(3, architecture.d_value) if len(at) == 3 else 1
        vector = ws.steering_vector(model, kind, unkind, at, rank=rank, batch_size=3)
        if at[0] == "resid_post":
            expected, found = difference, vector.direction
        else:
            U, S, Vh = torch.linalg.svd(difference)
            expected, found = (U[:, :rank] * S[:rank]) @ Vh[:rank], vector.direction.dense()
            assert vector.kept == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), rel=1e-3)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert (found + expected).norm() > found.norm()  # the twin: not the other way round

        def put(x: Tensor, hook: ws.HookPoint, expected: Tensor = expected) -> Tensor:
            x = x.clone()
            if hook.quantity == "state":
                x[:, 0, 2] += 0.7 * expected
            else:
                x[:, 3] += 0.7 * expected
            return x

        point, state = ("resid_post", layer), ("state", layer)
        by_hand = (
            model.run_with_hooks(prompt, [(point, put)])
            if at[0] == "resid_post"
            else model.run_with_hooks(prompt, [(state, put)], state_positions=[3])
        )
        with model.intervene(vector.intervention(0.7), positions=3):
            steered = model(prompt)
        torch.testing.assert_close(steered, by_hand, rtol=0, atol=1e-4)
        assert (steered - native).abs().max() > 1e-3


@each_architecture
@torch.no_grad()
def test_doses_are_passes_with_the_intervention(architecture: Architecture) -> None:
    model, prompts = ws.HookedRecurrentModel(architecture.build()), tokens(3)
    metric = ws.Logit(torch.tensor([1, 2, 3, 4]), minus=7)
    state, stream = ("state", architecture.layers[1], 1), ("resid_pre", 2)
    for at in (state, stream) if architecture.is_first_of_its_rule else (state,):
        vector = ws.steering_vector(model, tokens(1), tokens(2), at)
        found = ws.dose_response(model, vector, prompts, metric, scales=(1, -2), positions=[-2], batch_size=7)
        assert found.conditions == ("vector", "negated", "random", "shuffled")
        for c, (drawn, scale) in enumerate(
            (([vector], -2), ([vector], 2), *((x, -2) for x in vector.controls().values()))
        ):
            expected = []
            for one in drawn:
                assert one.norm == pytest.approx(vector.norm, rel=1e-4)
                with model.intervene(one.intervention(scale), positions=4):
                    expected.append(metric(model(prompts)))
            torch.testing.assert_close(found.values[c, 1], torch.stack(expected).mean(0), rtol=0, atol=2e-4)
        torch.testing.assert_close(found.native, metric(model(prompts)), rtol=0, atol=2e-4)
        assert found.change.abs().amax((1, 2)).min() > 1e-3  # the twin: no row is that of another condition
        assert (found.values[:, 0] - found.values[:, 1]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def gdn() -> Any:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@torch.no_grad()
def test_padded_prompts_both_ways(gdn: Any) -> None:
    metric = ws.Logit(gdn.to_single_token(" the"), minus=gdn.to_single_token(" a"))
    vector = ws.steering_vector(gdn, POSITIVE, NEGATIVE, ("write", 2, 1), positions=[-2, -1], rank=2)
    found = ws.dose_response(gdn, vector, PROMPTS, metric)
    ids, mask = gdn.to_tokens(PROMPTS)
    doses = [(vector, float(s)) for s in (0.5, 1, 2, 4)]
    plain = torch.zeros(5, len(PROMPTS))
    for i, rows, values in dose._by_passes(gdn, ids, mask, [-1], doses, metric, 3):
        plain[i, rows] = values
    torch.testing.assert_close(found.values[0], plain[1:], rtol=0, atol=2e-4)
    for i, text in enumerate(PROMPTS):
        alone = ws.dose_response(gdn, vector, text, metric, scales=[4])
        torch.testing.assert_close(alone.values[0, 0], found.values[0, 3, i : i + 1], rtol=0, atol=2e-4)
    everywhere = ws.dose_response(gdn, vector, PROMPTS, metric, scales=[4], positions=None)
    assert (everywhere.values[0, 0] - found.values[0, 3]).abs().max() > 1e-3
    assert len(found.records()) == 4 * 4 * len(PROMPTS) and len(found.numbers()) == 8 and found.plot().axes


@torch.no_grad()
def test_files_and_generation(gdn: Any, tmp_path: Path) -> None:
    for at in (("resid_post", 1), ("state", 2, 1)):
        vector = ws.steering_vector(gdn, POSITIVE, NEGATIVE, at)
        again = ws.SteeringVector.load(vector.save(tmp_path / at[0]))
        assert again.at == at and again.kept == vector.kept
        for one, other in ((again, vector), (again.controls()["shuffled"][2], vector.controls()["shuffled"][2])):
            with gdn.intervene(one.intervention(3), positions=[3]):
                loaded = gdn(PROMPTS[0])
            with gdn.intervene(other.intervention(3), positions=[3]):
                assert torch.equal(gdn(PROMPTS[0]), loaded)
    with gdn.intervene(vector.intervention(8), positions=slice(0, None)):
        assert gdn.generate(PROMPTS[0], max_new_tokens=4, do_sample=False)
    other = ws.HookedRecurrentModel.from_pretrained("tiny-mamba2")
    with pytest.raises(
        ValueError, match="this vector was made with tiny-gdn, which has other weights than tiny-mamba2"
    ):
        ws.dose_response(other, vector, PROMPTS, ws.Logit(1))
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"state is not a whole steering vector \(its tensors were altered"):
        ws.SteeringVector.load(tmp_path / "state")


def test_bad_input(gdn: Any) -> None:
    for at, options, error, match in [
        (("o", 1), {}, ValueError, r"at=\('o', 1\): give \(point, layer\) with one of resid_pre"),
        (("state", 1), {}, ValueError, "a memory belongs to one head"),
        (("state", 3, 0), {}, IndexError, "layer 3 is not recurrent"),
        (("write", 1, 9), {}, IndexError, "head 9 at layer 1: allowed are 0 to 3"),
        (("write", 1, 0), dict(rank=33), ValueError, "rank=33: states of 32 x 32 allow 1 to 32"),
        (("resid_post", 9), {}, IndexError, "layer 9 has no resid_post"),
        (("resid_post", 1), dict(rank=2), ValueError, "neither heads nor ranks"),
        (("resid_post", 1), dict(positions=[70]), IndexError, "position 70 is out of range"),
    ]:
        with pytest.raises(error, match=match):
            ws.steering_vector(gdn, POSITIVE, NEGATIVE, at, **options)
    with pytest.raises(ValueError, match="no negative texts"):
        ws.steering_vector(gdn, POSITIVE, [], ("resid_post", 1))
    with pytest.raises(ValueError, match="the same mean"):
        ws.steering_vector(gdn, POSITIVE, POSITIVE, ("resid_post", 1))
    one = ws.steering_vector(gdn, POSITIVE[0], NEGATIVE[0], ("resid_post", 1))
    assert one.shuffled is None and ws.dose_response(gdn, one, PROMPTS, ws.Logit(1)).conditions[-1] == "random"
    for options, match in [
        (dict(scales=[0, 1]), r"scales=\[0, 1\]: give one or more other than 0"),
        (dict(metric=ws.Logit(1, at=2)), "at=2 in the metric"),
        (dict(metric=lambda x: x.sum()), "one number each"),
    ]:
        with pytest.raises(ValueError, match=match):
            ws.dose_response(gdn, one, PROMPTS, **{"metric": ws.Logit(1), **options})
    wrong = ws.AddVector(torch.ones(10), "blocks.1.hook_resid_post")
    with (
        pytest.raises(ValueError, match=r"a vector of shape \[10\] does not fit blocks.1.hook_resid_post"),
        gdn.intervene(wrong),
    ):
        gdn(PROMPTS[0])
