"""Atom classes and stability over seeds: against sums by hand on shipped models, and on atoms whose class is known."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

import writesae as ws
from writesae.experiments.classes import AtomClasses, atom_classes
from writesae.experiments.engine.mixture import fit_mixture
from writesae.experiments.report.paper import TABLE
from writesae.experiments.stability import seed_stability
from writesae.recurrence.matrices import dense
from writesae.saes.activity.firings import Seen
from writesae.saes.activity.reading import BLOCK
from writesae.stores import Windows
from writesae.zoo import heldout_documents

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def gdn():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def rwkv7():
    return ws.HookedRecurrentModel.from_pretrained("tiny-rwkv7")


def make(layer: int = 2, head: int = 0, n_atoms: int = 48, seed: int = 0, **kind: Any) -> ws.WriteSAE:
    """An untrained SAE of a shipped model's head, a few atoms active at a token."""
    torch.manual_seed(seed)
    values: dict[str, Any] = dict(encoder="bilinear", k=3, d_key=32, d_value=32) | kind
    sae = ws.WriteSAE(ws.SAEConfig(n_atoms=n_atoms, layer=layer, head=head, **values))
    if sae.cfg.sparsity == "batch_topk":
        sae.threshold.fill_(0.02)
    if sae.cfg.sparsity == "jumprelu":
        sae.log_threshold.data.fill_(-4.0)
    return sae


# Every firing, by hand -----------------------------------------------------------------------------------------------

KINDS = {
    "write": dict(target="write", encoder="tied"),
    "state, rank 2": dict(target="state", sparsity="batch_topk", rank=2),
    "delta, dense": dict(target="delta", encoder="dense", sparsity="jumprelu", decoder="dense"),
}


def by_hand(model: Any, sae: ws.WriteSAE, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes, and the cosine of every atom to the dense write, at every token of each window; nothing batched."""
    codes, cosines = [], []
    A = dense(sae.decoder).detach().flatten(1)
    for row in windows:
        codes.append(model.encode(sae, row).dense()[0])
        with torch.no_grad():
            W = model.run_with_cache(row)[1].write(sae.cfg.layer)[0, :, sae.cfg.head].dense().flatten(1)
        cosines.append(torch.nn.functional.normalize(W, dim=1) @ torch.nn.functional.normalize(A, dim=1).T)
    return torch.stack(codes), torch.stack(cosines)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("architecture", ["gdn", "rwkv7"])
def test_firings_and_cosines_are_those_of_dense_codes_and_writes(architecture, kind, request):
    model = request.getfixturevalue(architecture)
    sae = make(layer=2 if architecture == "gdn" else 3, **KINDS[kind])
    text = heldout_documents()[0]
    result = atom_classes(model, sae, text, context=64, max_tokens=256, batch_size=3, threshold=0.05)
    windows = Windows.cut(model, text, 64).spread(256).tokens
    codes, cosines = by_hand(model, sae, windows)
    assert result.n_tokens == windows.numel() == 256
    assert torch.equal(result.firings, (codes > 0).sum((0, 1)))
    some = [atom for atom in result.firings.argsort(descending=True).tolist() if 1 < result.firings[atom] < 200][:5]
    assert len(some) == 5, "atoms that fire at some tokens and not at others"
    twins = []
    for atom in some:
        at = codes[..., atom] > 0
        activation, cosine = codes[..., atom][at].numpy(), cosines[..., atom][at].numpy()
        assert float(result.mean_activation[atom]) == pytest.approx(activation.mean(), rel=1e-4)
        assert float(result.max_activation[atom]) == pytest.approx(activation.max(), rel=1e-4)
        assert float(result.cosine[atom]) == pytest.approx(np.median(cosine), abs=1e-5)
        twins.append(np.median(cosines[..., atom].roll(1, 1)[at].numpy()))
    assert result.cosine[some].tolist() != pytest.approx(twins, abs=1e-5), "the writes one token off must differ"
    assert result.key_cosine.isnan().all() == (kind != "write"), "factors have a cosine only where atoms have rank 1"
    never = result.firings == 0
    assert result.cosine[never].isnan().all() and result.max_activation[never].isnan().all()


def test_cosines_of_factors(gdn):
    """At one firing, the product of the factors' cosines is the matrices', up to sign."""
    sae = make(encoder="tied")
    result = atom_classes(gdn, sae, heldout_documents()[0], context=64, max_tokens=64, threshold=0.05)
    once = result.firings == 1
    assert once.sum() >= 3
    torch.testing.assert_close((result.key_cosine * result.value_cosine)[once], result.cosine[once].abs())


def test_batches_change_nothing_and_progress_counts_tokens(gdn):
    sae, seen = make(), []
    runs = [
        atom_classes(
            gdn,
            sae,
            heldout_documents()[:2],
            context=48,
            max_tokens=480,
            batch_size=n,
            progress=seen.append,
            threshold=0.1,
        )
        for n in (3, 7)
    ]
    assert seen == [144, 288, 432, 480, 336, 480]
    for name in ("firings", "mean_activation", "max_activation", "cosine", "key_cosine", "value_cosine"):
        torch.testing.assert_close(getattr(runs[0], name), getattr(runs[1], name), equal_nan=True)


# Planted atoms -------------------------------------------------------------------------------------------------------


def planted(model, n_null: int = 20, shuffle: bool = False) -> tuple[ws.WriteSAE, str, np.ndarray]:
    """An SAE that has an atom for every token of a text, its text, and its atoms' classes.

    Each atom reads one native write and fires there. Half of them write it too, the others a random matrix; a few more
    never fire. ``shuffle`` exchanges what they write, for the broken twin.
    """
    text = heldout_documents()[3]
    ids = Windows.cut(model, text, 128)[:1].tokens
    with torch.no_grad():
        write = model.run_with_cache(ids)[1].write(2)[0, :, 0]
    n = len(ids[0]) + n_null
    sae = make(n_atoms=n, k=1)
    names = np.array(["register", "bundle"] * (len(ids[0]) // 2) + ["null"] * n_null)
    with torch.no_grad():
        unit = [torch.nn.functional.normalize(x, dim=-1) for x in (write.key, write.value)]
        sae.V_enc[: len(ids[0])], sae.W_enc[: len(ids[0])] = unit
        registers = torch.from_numpy(np.flatnonzero(names == "register"))
        place = registers.flip(0) if shuffle else registers
        sae.V_dec[place], sae.W_dec[place] = (x[registers] for x in unit)
        sae.b_enc[len(ids[0]) :] = -1e6
    return sae, model.tokenizer.decode(ids[0]), names


def test_planted_registers_and_bundles_are_recovered(gdn):
    sae, text, names = planted(gdn)
    result = atom_classes(gdn, sae, text, context=128)
    assert result.n_tokens == 128
    fired = (result.firings > 0).numpy()
    assert fired[:128].sum() > 120 and not fired[128:].any(), "writes that recur share the first of their atoms"
    assert (result.classes[fired] == names[fired]).all() and (result.classes[~fired] == "null").all()
    assert result.two_supported and result.mixtures[1].separation > 2
    for name in ("register", "bundle", "null"):
        assert sorted(result.atoms(name)) == np.flatnonzero(result.classes == name).tolist()
    of_registers = result.cosine[torch.from_numpy(result.classes == "register")]
    torch.testing.assert_close(of_registers, torch.ones_like(of_registers))
    assert (result.classes == atom_classes(gdn, sae, text, context=128, threshold=0.5).classes).all()


def test_exchanged_atoms_are_no_registers(gdn):
    """The twin: the same matrices, each put in where another is written."""
    sae, text, names = planted(gdn, shuffle=True)
    result = atom_classes(gdn, sae, text, context=128, threshold=0.5)
    fired = (result.firings > 0).numpy()
    assert (result.classes[fired] == names[fired]).mean() < 0.8


# The mixture and the numbers -----------------------------------------------------------------------------------------


def test_the_mixture_of_known_gaussians():
    x = np.concatenate([RNG.normal(0.0, 0.03, 300), RNG.normal(0.3, 0.1, 700)])
    two = fit_mixture(x, 2)
    assert two.means == pytest.approx((0, 0.3), abs=0.02) and two.sds == pytest.approx((0.03, 0.1), abs=0.02)
    assert two.weights == pytest.approx((0.3, 0.7), abs=0.04)
    assert two.bic < fit_mixture(x, 1).bic - 100 and two.bic < fit_mixture(x, 3).bic
    grid = np.linspace(-2, 2, 40001)
    assert np.trapezoid(two.density(grid).sum(0), grid) == pytest.approx(1)
    # BIC by hand: -2 log likelihood + parameters log n.
    likelihood = np.log(two.density(x).sum(0)).sum()
    assert two.bic == pytest.approx(-2 * likelihood + 5 * np.log(len(x)))
    assert two.separation == pytest.approx(2**0.5 * 0.3 / (0.03**2 + 0.1**2) ** 0.5, rel=0.1)


def test_the_fit_goes_on_to_the_end():
    """Components that overlap take hundreds of steps; the twin stops where scikit-learn does by default."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(0.80, 0.09, 1500), rng.normal(0.93, 0.03, 300)])
    found = fit_mixture(x, 2)
    best = min(
        (GaussianMixture(2, tol=1e-12, max_iter=20000, random_state=i).fit(x[:, None]) for i in range(2)), key=bic(x)
    )
    assert found.bic == pytest.approx(bic(x)(best), abs=0.1)
    assert found.means == pytest.approx(sorted(best.means_[:, 0]), abs=0.003)
    assert bic(x)(GaussianMixture(2, random_state=0).fit(x[:, None])) > found.bic + 5


def bic(x: np.ndarray) -> Any:
    return lambda model: model.bic(x[:, None])


def test_a_wide_component_does_not_reach_around_a_narrow_one():
    x = np.concatenate([RNG.normal(0.0, 0.01, 500), RNG.normal(0.3, 0.15, 500)])
    two = fit_mixture(x, 2)
    grid = np.linspace(-1, 1, 2001)
    assert two.density(grid).argmax(0)[0] == 1, "far to the left the wide one is the likelier one"
    upper = two.upper(grid)
    assert not upper[0] and upper[-1] and (np.diff(upper.astype(int)) >= 0).all()


def made(cosine: np.ndarray, firings: np.ndarray | None = None, **values: Any) -> AtomClasses:
    """A result from cosines and counts; NaN never fired."""
    firings = np.where(np.isnan(cosine), 0, 7) if firings is None else firings
    alive = cosine[firings > 0]
    column = torch.tensor(cosine, dtype=torch.float32)
    settings: dict[str, Any] = dict(n_tokens=1000, context=10, min_firings=1, max_firings=5, threshold=None) | values
    mixtures = tuple(fit_mixture(alive, n) for n in (1, 2, 3))
    cfg = make(n_atoms=len(cosine)).cfg
    return AtomClasses(cfg, firings=torch.tensor(firings), mixtures=mixtures, **settings, **dict.fromkeys(
        ("mean_activation", "max_activation", "cosine", "key_cosine", "value_cosine", "elsewhere"), column
    ))  # fmt: skip


def numbers(result: Any) -> dict[str, Any]:
    found = {number.name: number for number in result.numbers()}
    assert len(found) == len(result.numbers())
    return found


@functools.cache
def two_populations() -> tuple[np.ndarray, AtomClasses]:
    """40 atoms that look like writes and fire often, 60 that do not, and five that never fire."""
    rng = np.random.default_rng(0)
    cosine = np.concatenate([rng.normal(0.6, 0.05, 40), rng.normal(0.0, 0.02, 60), np.full(5, np.nan)])
    firings = np.concatenate([np.full(40, 9), np.full(60, 4), np.zeros(5, int)])
    return cosine, made(cosine, firings)


def test_one_population_is_called_one():
    result = made(np.append(RNG.normal(0.5, 0.1, 300), np.nan))
    found = numbers(result)
    assert not result.two_supported and found["components that BIC prefers"].value == 1
    assert found["dBIC, two components against one"].value > 0
    assert "BIC prefers one component here, so that two classes are not supported" in result.about


def test_one_population_of_another_shape_is_two_components_and_not_two_groups():
    """The twin: BIC alone would be fooled by heavy tails."""
    result = made(np.concatenate([RNG.normal(0.5, 0.02, 500), RNG.normal(0.5, 0.1, 500)]))
    assert result.two_supported and result.mixtures[1].separation < 1 and "they overlap (separation" in result.about


def test_numbers_of_two_populations():
    cosine, result = two_populations()
    found = numbers(result)
    counts = {name: found[name].value for name in ("registers", "bundles", "null atoms", "alive atoms")}
    assert counts == {"registers": 40, "bundles": 60, "null atoms": 5, "alive atoms": 100}
    assert found["median cosine, registers"].value == pytest.approx(np.median(cosine[:40]))
    assert found["median cosine, bundles"].low < 0.01 and found["median cosine, bundles"].n == 60
    assert found["dBIC, two components against one"].value < -50
    assert found["Cliff's delta of firings, registers against bundles"].value == 1
    assert found["registers at cosine >= 0.10"].value == 40
    assert found["registers at cosine >= 0.02"].value == 40 + (cosine[40:100] >= 0.02).sum()
    assert "are not supported" not in result.about and "overlap" not in result.about
    often = dataclasses.replace(result, min_firings=5)
    assert (often.classes[40:] == "null").all() and "fewer than 5 times" in often.about


def test_the_papers_numbers_are_found_by_id():
    classes = [two_populations()[1]] * 2
    saes = [make(n_atoms=105, seed=seed) for seed in range(2)]
    for experiment, result in (("atom_classes", classes[0]), ("seed_stability", seed_stability(saes, classes=classes))):
        ids = {number.id for number in result.numbers()}
        for wanted in (number for of, number in TABLE if of == experiment):
            assert wanted in ids, f"no number is called {wanted!r}"


def test_a_threshold_instead():
    cosine = np.append(RNG.uniform(0, 1, 50), np.nan)
    result = made(cosine, threshold=0.25)
    assert result.atoms("register") == [i for i in range(50) if np.float32(cosine[i]) >= 0.25]
    assert "whose cosine is at least 0.25" in result.about
    with pytest.raises(ValueError, match=r"class 'registers': allowed are register, bundle, null"):
        result.atoms("registers")


def test_records_and_plots():
    result = two_populations()[1]
    records = result.records()
    assert len(records) == 105 and list(records["class"]) == list(result.classes)
    assert (records.rate == records.firings / 1000).all() and records.cosine.isna().sum() == 5
    assert len(result.plot().axes) == 2
    assert result.table().row_count == len(result.numbers())
    assert len(made(np.full(20, 0.5)).plot().axes) == 2, "all atoms alike"


def test_a_fair_sample_of_firings_is_kept():
    """Counts are exact, and late firings are as likely to be kept as early ones."""
    seen, generator = Seen(3, most=40, ahead=50), torch.Generator().manual_seed(0)
    for start in range(0, 4000, 20):
        when = torch.arange(start, start + 20)
        columns = when.float()[:, None].expand(-1, 4)
        seen.add(when % 2, torch.ones(20), columns, torch.rand(20, generator=generator))
    assert seen.firings.tolist() == [2000, 2000, 0] and seen.total.tolist() == [2000, 2000, 0]
    median = seen.medians()["cosine"]
    assert all(1200 < float(median[i]) < 2800 for i in (0, 1)) and median[2].isnan()
    assert max(len(part[0]) for part in seen.kept) == 80


# Stability -----------------------------------------------------------------------------------------------------------

FORMS = {"rank 1": {}, "rank 2": dict(rank=2), "dense": dict(decoder="dense", encoder="dense")}


def twin_of(sae: ws.WriteSAE, order: Tensor, changed: Tensor) -> ws.WriteSAE:
    """The same atoms in another order and of the other sign, some of them replaced by random ones."""
    other = ws.WriteSAE(sae.cfg)  # random unit atoms
    with torch.no_grad():
        for name in ("W_dec", "A_dec"):
            if hasattr(sae, name):
                getattr(other, name)[~changed] = -getattr(sae, name)[order][~changed]
        if hasattr(sae, "V_dec"):
            other.V_dec[~changed] = sae.V_dec[order][~changed]
    return other


@pytest.mark.parametrize("form", FORMS)
def test_partners_are_found(form):
    sae = make(n_atoms=40, d_key=256, d_value=256, **FORMS[form])
    assert 2 * BLOCK < 40 * 256 * 256, "atoms are compared in several blocks"
    order, changed = torch.randperm(40), torch.arange(40) % 4 == 0
    other = twin_of(sae, order, changed)
    result = seed_stability([sae, other], threshold=0.9)
    found = numbers(result)
    assert found["atoms with a partner"].value == 0.75 and found["atoms with a partner"].n == 80
    forth, back = result.matches
    assert (forth.sae, forth.other, back.sae, back.other) == (0, 1, 1, 0)
    assert torch.equal(back.partner[~changed], order[~changed])
    A, B = (dense(x.decoder).detach().flatten(1) for x in (sae, other))
    best = (A @ B.T).abs() / (A.norm(dim=1)[:, None] * B.norm(dim=1))
    torch.testing.assert_close(forth.cosine, best.max(1).values)
    torch.testing.assert_close(back.cosine, best.max(0).values)
    if hasattr(sae, "V_dec"):
        with torch.no_grad():  # the twin: atoms with their factors exchanged are others
            other.V_dec.copy_(other.V_dec.roll(1, 0))
        assert numbers(seed_stability([sae, other]))["atoms with a partner"].value == 0


def test_three_saes_and_their_classes():
    saes = [make(n_atoms=60, seed=seed) for seed in range(3)]
    cosine = np.concatenate([np.linspace(0.5, 0.7, 30), np.linspace(-0.02, 0.02, 20), np.full(10, np.nan)])
    classes = [made(x) for x in (np.where(np.arange(60) < 6, np.nan, cosine), np.roll(cosine, 5), np.roll(cosine, 10))]
    result = seed_stability(saes, classes=classes)
    found = numbers(result)
    assert len(result.matches) == 6 and len(result.records()) == 2 * (44 + 50 + 50)
    counts = np.array([24, 30, 30])
    assert found["variation of the number of registers"].value == pytest.approx(counts.std(ddof=1) / counts.mean())
    assert found["variation of the number of bundles"].value == 0
    assert found["atoms with a partner"].value == 0 and set(result.shares().values()) == {0.0}
    assert set(result.records()["class"]) == {"register", "bundle"}
    assert len(result.plot().axes) == 2 and len(seed_stability(saes).plot().axes) == 1
    assert numbers(seed_stability([saes[0], saes[0]]))["atoms with a partner"].value == 1
    with pytest.raises(ValueError, match="in the same order"):
        seed_stability(saes, classes=classes[:2])


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_saes_that_can_not_be_compared():
    sae = make()
    with pytest.raises(ValueError, match="two or more SAEs; got 1"):
        seed_stability([sae])
    with pytest.raises(ValueError, match="these differ in head: 0, 1"):
        seed_stability([sae, make(head=1)])
    with pytest.raises(ValueError, match="these differ in target: write, state"):
        seed_stability([make(target="write"), make(target="state")])
    with pytest.raises(ValueError, match=r"threshold=1\.0"):
        seed_stability([sae, sae], threshold=1.0)
    nobody = made(np.append(np.full(20, 0.1), np.full(28, np.nan)))
    with pytest.raises(ValueError, match="no atom of SAE 1 is alive"):
        seed_stability([sae, sae], classes=[nobody, dataclasses.replace(nobody, min_firings=10**6)])


def test_too_little_text_and_too_few_atoms(gdn):
    sae = make()
    with pytest.raises(ValueError, match="the text makes 0 windows of 256 tokens"):
        atom_classes(gdn, sae, "The state of the Union is strong.")
    with pytest.raises(ValueError, match="max_tokens=100 is less than one window of 256 tokens"):
        atom_classes(gdn, sae, heldout_documents(), max_tokens=100)
    with pytest.raises(ValueError, match="min_firings=0: it must be at least 1"):
        atom_classes(gdn, sae, heldout_documents(), min_firings=0)
    with pytest.raises(ValueError, match=r"0 of 48 atoms fire 1000 times or more in 64 tokens; a mixture needs 10"):
        atom_classes(gdn, sae, heldout_documents()[0], context=64, max_tokens=64, min_firings=1000)
    few = atom_classes(gdn, sae, heldout_documents()[0], context=64, max_tokens=64, min_firings=1000, threshold=0.05)
    assert (few.classes == "null").all() and "registers" in numbers(few) and not few.two_supported
    with pytest.raises(ValueError, match="at least 10 values; got 3"):
        fit_mixture(np.ones(3), 2)


def test_no_atom_ever_fires(gdn):
    sae = make()
    with torch.no_grad():
        sae.b_enc -= 1e6
    result = atom_classes(gdn, sae, heldout_documents()[0], context=64, max_tokens=128, threshold=0.05)
    assert result.firings.sum() == 0 and numbers(result)["null atoms"].value == 48
    assert len(result.records()) == 48
