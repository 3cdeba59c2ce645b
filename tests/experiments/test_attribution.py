"""Attribution of logits to writes: sums, atoms, real deletions, and what it says when asked wrongly."""

import dataclasses

import pytest
import torch

import writesae as ws
from writesae.experiments.attribution import attribute
from writesae.experiments.deletions import PREDICTIONS, attribution_test
from writesae.gradients import Logit, gradient
from writesae.recurrence import Write
from writesae.zoo import heldout_documents, shipped_saes

TEXT = "The Congress of the United States has the power to declare war, and the people of the United"
MODELS = ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return ws.HookedRecurrentModel.from_pretrained(request.param)


@pytest.fixture(scope="module")
def saes(model):
    return [ws.WriteSAE.from_pretrained(folder) for folder in shipped_saes(model.model_id)]


def test_contributions_sum_to_outputs_and_atoms_to_writes(model, saes):
    found = attribute(model, TEXT, saes=saes)
    assert found.tokens == model.to_str_tokens(TEXT)
    for site in model.sites:
        made = found.contributions[site.layer]
        assert made.shape == (len(found.tokens), site.n_heads)
        torch.testing.assert_close(made.sum(0), found.outputs[site.layer], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.by_token.sum(), sum(x.sum() for x in found.outputs.values()), rtol=1e-3, atol=1e-5)
    # An SAE whose atoms are the writes themselves leaves nothing out.
    sae = saes[0]
    layer, head = sae.cfg.layer, sae.cfg.head
    _, cache = model.run_with_cache(TEXT)
    write = cache.write(layer)[0, :, head].detach()
    exact = ws.WriteSAE(dataclasses.replace(sae.cfg, n_atoms=write.shape[0], k=1))
    with torch.no_grad():
        unit = write * (1 / write.norm())
        exact.V_dec.copy_(unit.key), exact.W_dec.copy_(unit.value)
    again = attribute(model, TEXT, saes=[exact], check_model=False)
    indices, values = again.atoms[layer, head]
    torch.testing.assert_close(values[:, 0], found.contributions[layer][:, head], rtol=1e-3, atol=1e-5)
    assert (indices[:, 0] == torch.arange(len(indices))).float().mean() > 0.9
    assert len(again.atom_records()) == int((values != 0).sum())


def test_later_tokens_and_texts_with_dollars_change_nothing(model):
    whole = attribute(model, TEXT, " States", position=9)
    part = model.to_tokens(TEXT)[0][:, :10]
    alone = attribute(model, part, " States")
    torch.testing.assert_close(whole.contributions[0], alone.contributions[0], rtol=1e-3, atol=1e-5)
    assert whole.question == alone.question
    attribute(model, "It cost $5 and $_6^7 {more} than\n").plot()  # plain text, not formulas


def test_a_difference_of_logits_is_the_difference(model):
    one, other, both = (attribute(model, TEXT, *tokens) for tokens in ((" States",), (" people",), (" States",)))
    both = attribute(model, TEXT, " States", minus=" people")
    for layer in both.contributions:
        torch.testing.assert_close(
            both.contributions[layer], one.contributions[layer] - other.contributions[layer], rtol=1e-3, atol=1e-4
        )
    assert both.value == pytest.approx(one.value - other.value, abs=1e-4)
    assert "' States' minus that of ' people'" in both.question


def test_results_are_readable(model):
    found = attribute(model, TEXT, deletions=True)
    records = found.records()
    assert len(records) == sum(s.n_heads for s in model.sites) * len(found.tokens)
    layer, head, position, value = found.top(1)[0]
    assert (
        float(found.contributions[layer][position, head])
        == value
        == records.contribution.abs().max() * (1 if value > 0 else -1)
    )
    assert found.plot().axes and found.table().row_count == len(found.numbers()) > 3
    assert records["deletion"].corr(records["contribution"]) < -0.3


@pytest.mark.parametrize("broken", [False, True], ids=["right", "of another token"])
def test_predictions_agree_with_real_deletions(model, broken):
    found = attribution_test(model, heldout_documents(), n_deletions=128, n_prompts=16, context=48)
    assert set(found.predicted) == set(PREDICTIONS) and len(found.measured) == 128
    if broken:
        found = dataclasses.replace(found, predicted={n: x.roll(1) for n, x in found.predicted.items()})
    assert (found.correlation("exact through the norm") > 0.9) is not broken
    numbers = {n.name: n for n in found.numbers()}
    r = numbers["correlation with deletions, exact through the norm"]
    assert r.low <= r.value <= r.high
    if not broken:
        assert len(found.records()) == 128 and len(found.plot().axes) == len(PREDICTIONS)


@torch.no_grad()
def test_a_planted_write_gets_its_due(model):
    """A write added to the last token's state at the last layer, along the best direction, is what its price says."""
    layer = model.sites[-1].layer
    ids, _ = model.to_tokens(TEXT)
    of = Logit(100)
    found = gradient(model, ids, of)
    t = ids.shape[1] - 1
    best = found[layer].best([t], [0])[0, 0, 0]
    size = 0.1 * float(found[layer].write.norm()[0, t, 0])  # much less is lost in the rounding of a logit
    with model.intervene(ws.Add(layer, 0, write=best * size), positions=[t]):
        raised = of(model(ids)) - found.value
    promised = size * float((Write(best.key, best.value).dense() * found[layer].at([t], [0])[0, 0, 0]).sum())
    assert promised > 0 and float(raised) == pytest.approx(promised, rel=0.1)


def test_deletions_of_a_model_in_half_precision_can_be_looked_at():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", dtype="bfloat16")
    found = attribute(model, "The captain and the", deletions=True).records()
    assert found["deletion"].abs().max() > 0 and found["deletion"].dtype == "float32"
    test = attribution_test(model, heldout_documents(), n_prompts=8, n_deletions=48)
    numbers = test.records()[["measured", *PREDICTIONS]]
    assert (numbers.dtypes == "float32").all() and numbers["measured"].abs().max() > 0
    test.table(), test.plot()
    with pytest.raises(ValueError, match=r'model in bfloat16 rounds.*load it with dtype="float32"'):
        ws.circuit(model, "The captain and the", " war")


def test_bad_questions(model):
    with pytest.raises(ValueError, match="attribute takes one text; got 2"):
        attribute(model, ["one", "two"])
    with pytest.raises(ValueError, match=r"'Constantinople' is \d+ tokens"):
        attribute(model, TEXT, "Constantinople")
    with pytest.raises(ValueError, match=f"token id 99999 is outside the model's vocabulary of {model.n_vocab}"):
        attribute(model, TEXT, 99999)
    with pytest.raises(IndexError, match=r"position 99 is out of range: the text has \d+ tokens"):
        attribute(model, TEXT, position=99)
    with pytest.raises(ValueError, match=r"the text makes 0 windows of 96 tokens .*, and 32 are needed"):
        attribution_test(model, "Too short.")
    other = "tiny-gdn" if model.model_id != "tiny-gdn" else "tiny-rwkv7"
    with pytest.raises(ValueError):
        attribute(model, TEXT, saes=[ws.WriteSAE.from_pretrained(shipped_saes(other)[0])])
