"""Predicted logit changes: factors against plain sums, fits against planted ones, and the shipped models' changes."""

import dataclasses

import pytest
import torch

import writesae as ws
from writesae.experiments.logit_changes import PREDICTIONS, LogitChange, gated, logit_change
from writesae.recurrence import Recurrence
from writesae.recurrence.kernels import carried
from writesae.stores import Windows
from writesae.zoo import heldout_documents, shipped_saes


@pytest.fixture(scope="module", params=["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def found(request):
    model = ws.HookedRecurrentModel.from_pretrained(request.param)
    sae = ws.WriteSAE.from_pretrained(shipped_saes(request.param)[0])
    result = logit_change(
        model, sae, heldout_documents(), atoms=4, n_prompts=16, context=32, lags=(0, 3), epsilons=(0.03, 1.0)
    )
    return model, sae, result


def test_first_order_predicts_small_changes_with_nothing_fitted(found):
    _, _, result = found
    for name in ("first order", "exact through the norm"):
        assert result.r_squared(name, 0) > 0.97
    assert result.r_squared("exact through the norm", 1) > 0.8
    shuffled = {name: x.roll(1, 0) for name, x in result.predicted.items()}
    broken = dataclasses.replace(result, predicted=shuffled)
    assert broken.r_squared("first order", 0) < 0.5


@torch.no_grad()
def test_three_factors_are_equation_1(found):
    """Gates, key factor with the query, value factor with the output embedding: each by itself, one record after the
    other."""
    model, sae, result = found
    layer, head = result.layer, result.head
    windows = Windows.cut(model, heldout_documents(), 32).tokens
    ids = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:16]]
    _, cache = model.run_with_cache(ids)
    rec = model.family(layer).rule.recurrence(lambda quantity: cache[quantity, layer])
    norm = cache.write(layer).norm()
    mixer = next(m for m in model.hf_model.modules() if getattr(m, "layer_idx", None) == layer and hasattr(m, "hook_o"))
    projection = (mixer.out_proj if hasattr(mixer, "out_proj") else mixer.o_proj).weight  # [d_model, head * d_value]
    d = sae.cfg.d_value
    for prompt, lag, atom, e in ((0, 0, 1, 0), (3, 1, 2, 1), (9, 1, 0, 0)):
        t0 = int(result.position[prompt])
        t = t0 + result.lags[lag]
        a = sae.atom(int(result.atoms[atom]))
        gates = rec.log_decay[prompt, t0 + 1 : t + 1, head].sum(0).exp()
        key = (gates * a.key * rec.q[prompt, t, head]).sum()
        value = projection[:, head * d : (head + 1) * d] @ a.value
        logit = value @ model.hf_model.get_output_embeddings().weight[result.token[prompt, lag]]
        expected = result.epsilons[e] * norm[prompt, t0, head] * key * logit / a.norm()
        torch.testing.assert_close(
            result.predicted["three factors"][prompt, lag, atom, e], expected, rtol=1e-3, atol=1e-5
        )


def test_without_erases_the_layer_is_its_gates():
    draw = lambda *size: torch.randn(2, 9, 1, *size, dtype=torch.float64)  # noqa: E731
    plain = Recurrence(draw(4), -draw().abs())
    erasing = Recurrence(plain.q, plain.log_decay, a=-0.5 * draw(4), b=draw(4))
    keys, positions = torch.randn(2, 3, 4).double(), torch.tensor([[0, 2, 5], [1, 1, 8]])
    torch.testing.assert_close(gated(erasing, keys, positions), carried(plain, keys, positions))
    assert (gated(erasing, keys, positions) - carried(erasing, keys, positions)).abs().max() > 0.01


def planted(n=40):
    """Measured changes that are known factors times one prediction."""
    factors = torch.tensor([[3.0, 30.0], [-2.0, 0.5], [1.0, 1.0]])
    x = torch.randn(n, 2, 3, 2)
    predicted = dict.fromkeys(PREDICTIONS, x)
    return factors, LogitChange(
        1, 2, torch.arange(3), (0.1, 1.0), (0, 4), x * factors, predicted, torch.arange(n), torch.zeros(n, 2).long()
    )


def test_prefactors_of_planted_factors_are_found_and_judged_on_other_prompts():
    factors, made = planted()
    torch.testing.assert_close(made.prefactor("three factors"), factors)
    assert made.r_squared("three factors", 0, fitted=True) == pytest.approx(1)
    assert made.r_squared("three factors", 0) < 0.5
    # a change of the prompts fitted on moves the fit, not what it is judged by
    half = dataclasses.replace(made, measured=torch.cat([made.measured[:20] * 2, made.measured[20:]]))
    torch.testing.assert_close(half.prefactor("three factors"), 2 * factors)
    assert half.r_squared("three factors", 0, fitted=True) < 0.5
    torch.testing.assert_close(half.r_squared("first order", 0), made.r_squared("first order", 0))


def test_proportional_knows_nothing_but_the_other_epsilon():
    _, made = planted()
    measured = torch.stack([0.1 * made.measured[..., 0], made.measured[..., 0]], -1)
    straight = dataclasses.replace(made, measured=measured)
    torch.testing.assert_close(straight.proportional, measured)
    bent = dataclasses.replace(made, measured=measured.pow(3))
    assert bent.r_squared("proportional", 1) < 0.5


def test_numbers_records_and_picture(found):
    _, _, result = found
    numbers = {n.name: n for n in result.numbers()}
    assert numbers["R², first order, epsilon 0.03"].value == result.r_squared("first order", 0)
    assert "R², three factors, prefactor fitted, epsilon 1" in numbers and "R², proportional, epsilon 0.03" in numbers
    records = result.records()
    assert len(records) == result.measured.numel()
    row = records.iloc[37]
    index = torch.nonzero(torch.ones_like(result.measured))[37].tolist()
    assert row.measured == pytest.approx(float(result.measured[tuple(index)]))
    assert row.atom == int(result.atoms[index[2]]) and row.epsilon == pytest.approx(result.epsilons[index[3]])
    assert len(result.plot().axes) == len(PREDICTIONS) + 1 and result.title and "prefactor" in result.about


def test_bad_input(found):
    model, sae, _ = found
    with pytest.raises(ValueError, match=r"the text makes 0 windows of 64 tokens .*, and 64 are needed"):
        logit_change(model, sae, "Too short.")
    with pytest.raises(ValueError, match=r"lags=\(40,\), context=64.*lags are 0 to 31"):
        logit_change(model, sae, heldout_documents(), lags=(40,))
    with pytest.raises(IndexError, match=f"atoms 0 to {sae.cfg.n_atoms - 1}"):
        logit_change(model, sae, heldout_documents(), atoms=[5000], n_prompts=8)
    with pytest.raises(ValueError, match=r"2000 atoms were asked for, and \d+ fire in the prompts"):
        logit_change(model, sae, heldout_documents(), atoms=2000, n_prompts=8)
