"""The replacement test on the shipped model: its numbers against a plain replay, its statistics against known cases."""

import dataclasses

import pytest
import torch

import writesae as ws
from writesae.experiments import wilson
from writesae.experiments.replacement import CONDITIONS
from writesae.zoo import heldout_documents, shipped_saes


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def sae():
    return ws.WriteSAE.from_pretrained(shipped_saes("tiny-gdn")[0])


@pytest.fixture(scope="module")
def result(model, sae):
    return ws.replacement_test(model, sae, heldout_documents(), n_firings=24, context=64, horizon=4, batch_size=16)


def test_wilson_interval_of_known_counts():
    # The paper's headline, 92.4% of 4,851 (section 3.2), has the Wilson interval [91.6, 93.1].
    rate = wilson(round(0.924 * 4851), 4851)
    assert (round(100 * rate.low, 1), round(100 * rate.high, 1)) == (91.6, 93.1)
    assert wilson(0, 10).low == 0 and 0.25 < wilson(0, 10).high < 0.32
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_records_are_of_the_shape_promised(result):
    assert set(result.kl) == set(CONDITIONS) and result.n == 24
    for kl in result.kl.values():
        assert kl.shape == (24, 5) and torch.isfinite(kl).all() and (kl > -1e-9).all()
    assert (result.position >= 16).all() and (result.position <= 64 - 1 - 4).all()
    assert len(set(result.window.tolist())) == 24, "each firing comes from a window of its own"
    assert (result.activation > 0).all() and (result.native_norm > 0).all()


def replay(model, ids, edit):
    """KL(edited || native) at the last token, in a plain way: the write's value set by a hook on v, one sequence."""
    native = model(ids)[0, -1].double().log_softmax(-1)
    edited = model.run_with_hooks(ids, [edit])[0, -1].double().log_softmax(-1)
    return float((edited.exp() * (edited - native)).sum())


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True], ids=["right", "off by one"])
def test_deletion_equals_a_replay_firing_by_firing(model, sae, result, broken):
    windows = torch.cat(
        [
            ids[0, : ids.shape[1] // 64 * 64].reshape(-1, 64)
            for ids in (model.to_tokens(d)[0] for d in heldout_documents())
        ]
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    errors = []
    for firing in range(6):
        t = int(result.position[firing])
        ids = windows[order][int(result.window[firing])][None, : t + 1]

        def nothing(v, hook, at=t - broken):
            v[:, at, sae.cfg.head] = 0

        kl = replay(model, ids, (f"blocks.{sae.cfg.layer}.mixer.hook_v", nothing))
        errors.append(abs(kl - float(result.kl["delete"][firing, 0])))
    assert (max(errors) < 1e-5) is not broken


def test_the_atom_beats_deletion_and_random_loses(result):
    assert result.wins("atom", "delete", "through").rate > 0.7
    assert result.wins("atom", "random", "through").rate > 0.7
    assert result.wins("delete", "delete").count == 0, "a tie is no win"
    assert str(result.wins("atom", "delete")).count("%") == 1


def test_scores_and_table_follow_the_records(result):
    kl = {name: torch.zeros(3, 2) for name in CONDITIONS}
    kl["atom"] = torch.tensor([[1.0, 0], [1, 5], [3, 0]])
    kl["delete"] = torch.tensor([[2.0, 0], [2, 0], [2, 0]])
    kl["random"] = torch.tensor([[3.0, 0], [1, 0], [3, 0]])
    columns = ("window", "position", "atom", "activation", "native_norm", "cosine")
    made = dataclasses.replace(result, kl=kl, **{name: getattr(result, name)[:3] for name in columns})
    assert made.wins("atom", "delete").count == 2 and made.wins("atom", "delete", "through").count == 1
    assert made.chain().count == 1
    assert made.table().row_count == len(CONDITIONS)


def test_one_atom_only(model, sae, result):
    atom = int(result.atom.mode().values)
    alone = ws.replacement_test(model, sae, heldout_documents(), n_firings=2, context=64, horizon=0, atom=atom)
    assert (alone.atom == atom).all()


def test_too_little_text_or_too_few_firings_is_an_error(model, sae):
    with pytest.raises(ValueError, match=r"300 firings need as many windows of 96 tokens; the text has \d+"):
        ws.replacement_test(model, sae, "The state of the Union is strong. " * 40)
    with pytest.raises(IndexError, match="atoms 0 to"):
        ws.replacement_test(model, sae, heldout_documents(), atom=10**6)
