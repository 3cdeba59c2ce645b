"""The replacement and population tests: planted atoms whose outcome is known, plain replays, statistics by hand."""

import dataclasses

import numpy as np
import pytest
import torch

import writesae as ws
from writesae.experiments import Rate, Run, wilson
from writesae.experiments.engine.conditions import CONDITIONS, DEFAULT, Generators, put_in, windows_of
from writesae.experiments.population import PopulationResult, population_test
from writesae.experiments.replacement import ReplacementResult
from writesae.hooks.sites import Head
from writesae.saes import SAEConfig
from writesae.zoo import heldout_documents, shipped_saes

CONTEXT = 48


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def sae():
    return ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")


@pytest.fixture(scope="module")
def documents():
    return heldout_documents()


@pytest.fixture(scope="module")
def result(model, sae, documents):
    return ws.replacement_test(model, sae, documents, n_firings=40, context=64, horizon=4)


def planted(model, ids, layer, head, *, flat=False, wrong=0):
    """An SAE whose atoms are what the head writes at the tokens of ``ids``, so that one of them is the write there.

    The last ``wrong`` atoms are random ones that fire in the place of the true ones.
    """
    _, cache = model.run_with_cache(ids, names=lambda n: f".{layer}." in n and "state" not in n)
    writes = cache.write(layer)[:, :, head]
    key, value = (torch.nn.functional.normalize(x.detach().flatten(0, 1), dim=-1) for x in (writes.key, writes.value))
    name, site = "FlatSAE" if flat else "WriteSAE", model.site(layer)
    n, training = len(key), dict(layer=layer, head=head, fingerprint=model.fingerprint(layer))
    cfg = SAEConfig.variant(name, d_key=site.d_key, d_value=site.d_value, n_atoms=n, k=1, target="write", **training)
    made = ws.WriteSAE(cfg)
    with torch.no_grad():
        if flat:
            made.A_dec.copy_(key[:, :, None] * value[:, None, :])
            made.A_enc.copy_(made.A_dec)
        else:
            for part, x in ((made.V_dec, key), (made.V_enc, key), (made.W_dec, value), (made.W_enc, value)):
                part.copy_(x)
            random = torch.randn(wrong, site.d_key, generator=torch.Generator().manual_seed(0))
            made.V_dec[n - wrong :] = torch.nn.functional.normalize(random, dim=-1)
    return made


# What is known beforehand --------------------------------------------------------------------------------------------


def test_an_atom_that_is_the_write_changes_nothing(model, documents):
    ids = windows_of(Run(model, documents[:1]), CONTEXT, 4).tokens
    ids = ids[:2]
    atoms, flat = planted(model, ids, 2, 0), planted(model, ids, 2, 0, flat=True)
    found = ws.replacement_test(
        model, atoms, ids, n_firings=16, context=CONTEXT, horizon=4, conditions=tuple(CONDITIONS), flat=flat
    )
    assert found.conditions == tuple(CONDITIONS)
    assert (found.cosine - 1).abs().max() < 1e-5
    for same in ("atom", "matched", "flat_svd"):
        assert float(found.kl[same].max()) < 1e-9 and float(found.divergence[same].max()) < 1e-5
        assert found.wins(same, "delete", "through").rate == 1
    for other in ("delete", "random", "random_matched", "orthogonal", "other_atom"):
        assert float(found.score(other, "through").min()) > 1e-9
    # Something orthogonal of the same norm is sqrt(2) times as far from the write as nothing is.
    ratio = found.divergence["orthogonal"][:, 0] / found.divergence["delete"][:, 0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2**0.5), atol=1e-4, rtol=0)


def test_a_planted_atom_that_is_not_the_write_loses(model, documents):
    """The twin of the test above: it must not be passed by anything that fires."""
    ids = windows_of(Run(model, documents[:1]), CONTEXT, 4).tokens
    n = 2 * CONTEXT
    wrong = planted(model, ids[:2], 2, 1, wrong=n)
    found = ws.replacement_test(model, wrong, ids[:2], n_firings=16, context=CONTEXT, horizon=4)
    assert found.wins("atom", "delete", "through").rate < 0.3 and float(found.cosine.abs().max()) < 0.9


def test_all_heads_of_a_layer_and_two_layers_at_once(model, documents):
    ids = windows_of(Run(model, documents[:1]), CONTEXT, 4).tokens
    ids = ids[:2]
    for places in ([(1, 0), (1, 1), (1, 2), (1, 3)], [(0, 1), (2, 3)]):
        saes = [planted(model, ids, *place) for place in places]
        found = ws.replacement_test(model, saes, ids, n_firings=8, context=CONTEXT, horizon=4, together=True)
        assert found.n == 8 and (found.layer == -1).all() and (found.atom == -1).all()
        assert float(found.kl["atom"].max()) < 1e-8 and found.wins("atom", "delete").rate == 1
        alone = ws.replacement_test(model, saes[0], ids, n_firings=8, context=CONTEXT, horizon=4)
        assert found.score("delete").median() > alone.score("delete").median(), "more is deleted"
        assert list(found.by_site()) == [(-1, -1)] and "at once" in found.about


def test_several_sites_each_by_itself(model, documents):
    ids = windows_of(Run(model, documents[:1]), CONTEXT, 4).tokens
    saes = [planted(model, ids[:2], 2, 0), planted(model, ids[:2], 0, 1, wrong=2 * CONTEXT)]
    seen = []
    found = ws.replacement_test(model, saes, ids[:2], n_firings=10, context=CONTEXT, horizon=2, progress=seen.append)
    assert found.n == 20 and seen[-1] == 20 and seen == sorted(seen)
    good, bad = found.by_site()[2, 0], found.by_site()[0, 1]
    assert good.n == bad.n == 10 and good.wins("atom", "delete").rate == 1 > bad.wins("atom", "delete").rate
    one = ws.replacement_test(model, saes[1], ids[:2], n_firings=10, context=CONTEXT, horizon=2)
    assert torch.equal(one.position, bad.position) and torch.allclose(one.kl["atom"], bad.kl["atom"], atol=1e-7)
    names = {number.name: number.value for number in found.numbers()}
    assert names["atom beats deletion, L2H0"] == 1 and "atom beats deletion, mean of sites" in names


def test_what_is_put_in(sae):
    generator = torch.Generator().manual_seed(1)
    native = ws.Write(torch.randn(50, 32, generator=generator), torch.randn(50, 32, generator=generator))
    atom, activation = torch.arange(50), torch.rand(50, generator=generator) + 0.5
    put = {
        name: put_in(name, sae, native, atom, activation, Generators(3)) for name in CONDITIONS if name != "flat_svd"
    }
    close = lambda x, y: torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)  # noqa: E731
    close(put["atom"].norm(), activation)
    close(put["random"].norm(), activation)
    close(put["other_atom"].norm(), activation)
    for name in ("matched", "random_matched", "orthogonal"):
        close(put[name].norm(), native.norm())
    assert (put["delete"].norm() == 0).all()
    close(put["matched"].cosine(put["atom"]), torch.ones(50))
    off = put["orthogonal"]
    close((off.key * native.key).sum(-1) / native.key.norm(dim=-1), torch.zeros(50))
    close((off.value * native.value).sum(-1) / native.norm(), torch.zeros(50))
    assert put["random_matched"].cosine(native).abs().max() > 1e-3, "the twin: random ones are not orthogonal"
    assert put["other_atom"].cosine(put["atom"]).abs().max() < 0.999


# Against a plain replay ----------------------------------------------------------------------------------------------


def test_records_are_of_the_shape_promised(result):
    assert result.conditions == DEFAULT and result.n == 40 and result.horizon == 4
    for kl in result.kl.values():
        assert kl.shape == (40, 5) and torch.isfinite(kl).all() and (kl >= 0).all()
    assert (result.position >= 16).all() and (result.position <= 64 - 1 - 4).all()
    assert result.window.bincount().max() == 8, "several of a window share its native pass"
    pairs = set(zip(result.window.tolist(), result.position.tolist(), strict=True))
    assert len(pairs) == 40, "none is drawn twice"
    assert (result.activation > 0).all() and (result.native_norm > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("read", ["same", "next"])
@pytest.mark.parametrize("broken", [False, True], ids=["right", "off by one"])
def test_equal_to_a_replay_firing_by_firing(model, sae, documents, read, broken):
    found = ws.replacement_test(model, sae, documents, n_firings=5, context=CONTEXT, horizon=3, read=read, seed=1)
    windows = windows_of(Run(model, documents), CONTEXT, 3)
    ids, document = windows.tokens, windows.document
    assert torch.equal(found.document, document[found.window])
    edits = {"atom": ws.Substitute(sae), "matched": ws.Substitute(sae, norm="native"), "delete": ws.Delete(2, 1)}
    errors = []
    for i, (w, t) in enumerate(zip(found.window.tolist(), found.position.tolist(), strict=True)):
        here = slice(t + (read == "next"), t + 4)
        native = model(ids[w : w + 1])[0, here].double().log_softmax(-1)
        for name, edit in edits.items():
            with model.intervene(edit, positions=t - broken, read=read):
                edited = model(ids[w : w + 1])[0, here].double().log_softmax(-1)
            kl = (edited.exp() * (edited - native)).sum(-1)
            errors.append(float((kl - found.kl[name][i]).abs().max()))
            assert bool(found.flips[name][i]) == bool(edited[0].argmax() != native[0].argmax()) or broken
    assert (max(errors) < 1e-6) is not broken


def test_the_atom_beats_deletion_and_random_loses(result):
    assert result.wins("atom", "delete", "through").rate > 0.7
    assert result.wins("atom", "random", "through").rate > 0.7
    assert result.wins("delete", "delete").count == 0, "a tie is no win"
    assert str(result.wins("atom", "delete")).count("%") == 1


def test_conditions_and_batches_do_not_change_each_other(model, sae, documents, result):
    asked = dict(n_firings=40, context=64, horizon=4)
    few = ws.replacement_test(model, sae, documents, conditions=("random",), **asked)
    assert few.conditions == ("atom", "delete", "random") and torch.equal(few.position, result.position)
    torch.testing.assert_close(few.kl["random"], result.kl["random"], atol=1e-7, rtol=1e-3)
    other = ws.replacement_test(model, sae, documents, seed=1, **asked)
    assert not torch.equal(other.position, result.position)


def test_one_atom_only(model, sae, documents, result):
    atom = int(result.atom.mode().values)
    alone = ws.replacement_test(model, sae, documents, n_firings=2, context=64, horizon=0, atom=atom)
    assert (alone.atom == atom).all() and alone.kl["atom"].shape == (2, 1)
    assert not any("in total" in number.name for number in alone.numbers())


# Statistics ----------------------------------------------------------------------------------------------------------


def by_hand(kl, atom=None, window=None, matched=None, cosine=None):
    """A result with these records: for each firing the KL of atom, delete and random."""
    n = len(kl)
    kl = {
        name: torch.tensor(x)[:, None]
        for name, x in zip(("atom", "delete", "random"), zip(*kl, strict=True), strict=True)
    }
    if matched is not None:
        kl["matched"] = torch.tensor(matched)[:, None]
    whole = lambda x: torch.arange(n) if x is None else torch.tensor(x)  # noqa: E731
    return ReplacementResult(
        layer=torch.full((n,), 2), head=torch.zeros(n, dtype=torch.long), window=whole(window), document=whole(window),
        position=whole(None), atom=whole(atom), activation=torch.ones(n), native_norm=torch.ones(n),
        cosine=torch.linspace(0.1, 0.9, n) if cosine is None else torch.tensor(cosine), kl=kl,
        flips={name: torch.zeros(n, dtype=torch.bool) for name in kl}, divergence=kl, places=(Head(2, 0),),
    )  # fmt: skip


def test_rates_orders_and_quarters_by_hand():
    kl = [(1.0, 2.0, 3.0), (1.0, 2.0, 1.5), (3.0, 2.0, 4.0), (2.0, 2.0, 9.0)]
    made = by_hand(kl)
    assert made.wins("atom", "delete").count == 2 and made.chain().count == 1
    assert made.wins("delete", "random").count == 3
    numbers = {number.name: number for number in made.numbers()}
    assert numbers["atom beats deletion"].value == 0.5 and numbers["atom beats deletion"].n == 4
    assert numbers["atom < deletion < random"].value == 0.25
    assert numbers["median KL, deletion"].value == 2.0 and numbers["median KL, atom"].value == 1.5
    assert numbers["Cliff's delta"].value == (8 - 4) / 16  # of 16 pairs 8 above, 4 below
    assert numbers["ratio of median KL, deletion : atom"].value == pytest.approx(2 / 1.5)
    # Effects 1 to 8; the atom loses where they are smallest.
    rising = by_hand([(1.5 if i < 2 else 0.5, 1.0 + i, 20.0) for i in range(8)])
    assert [rate.rate for rate in rising.quartiles()] == [0.5, 1, 1, 1]


def test_intervals_by_cluster_are_wider_where_clusters_agree():
    kl = [(1.0, 2.0, 3.0) if i < 60 else (2.0, 1.0, 3.0) for i in range(80)]
    numbers = {number.name: number for number in by_hand(kl, atom=[i // 20 for i in range(80)]).numbers()}
    wide, narrow = numbers["cluster bootstrap by atom"], numbers["cluster bootstrap by window"]
    assert wide.value == narrow.value == 0.75
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_few_firings_have_numbers_without_intervals():
    for n in (1, 2, 3):
        made = by_hand([(1.0, 2.0, 3.0)] * n, window=[0] * n)
        names = [number.name for number in made.numbers()]
        assert "atom beats deletion" in names and "cluster bootstrap by window" not in names
        assert not any("quarter" in name for name in names)
        assert len(made.records()) == n and made.plot().axes


def test_the_result_can_be_shown(result):
    assert result.table().row_count == len(result.conditions)
    records = result.records()
    assert len(records) == 40 and {"layer", "head", "atom", "kl_atom", "kl_total_delete"} <= set(records.columns)
    assert len(result.plot().axes) == 3
    assert "section 3.2" in result.about and "same" not in result.title
    assert all(np.isfinite(number.value) for number in result.numbers())
    assert isinstance(result.wins("atom", "delete"), Rate) and wilson(5, 10).rate == 0.5


# Population ----------------------------------------------------------------------------------------------------------


def test_the_population_counts_atoms_alike(model, documents):
    """Half of the atoms are the writes, half are wrong ones: each atom counts once, however often it fires."""
    ids = windows_of(Run(model, documents[:1]), CONTEXT, 2).tokens
    ids = ids[:2]
    made = planted(model, ids, 2, 0, wrong=CONTEXT)  # right in the first window, wrong in the second
    classes = np.array(["register"] * CONTEXT + ["bundle"] * CONTEXT)
    seen = []
    found = population_test(
        model, made, ids, min_firings=1, context=CONTEXT, horizon=2, classes=classes, progress=seen.append
    )
    atoms = found.atoms
    right = atoms.index < CONTEXT
    assert found.firings.n == seen[-1] == atoms["firings"].sum() and right.any() and (~right).any()
    assert (atoms["wins"][right] == 1).all() and (atoms["cosine"][right] > 0.999).all()
    assert atoms["wins"][~right].mean() < 0.5 and atoms["cosine"][~right].max() < 0.99
    numbers = {number.name: number for number in found.numbers()}
    assert numbers["atom beats deletion, mean over atoms"].value == pytest.approx(atoms["wins"].mean())
    assert numbers["atom beats deletion, register atoms"].value == 1
    assert numbers["Spearman rho, cosine and win rate"].value > 0.5
    assert numbers["Mann-Whitney p, register against bundle, win rate"].value < 0.01
    assert found.plot().axes and len(found.records()) == len(atoms)


def test_firings_an_atom_are_capped_and_rare_atoms_left_out(model, sae, documents):
    found = population_test(model, sae, documents[:6], min_firings=5, max_firings=7, n_atoms=6, context=64, horizon=2)
    assert len(found.atoms) == 6 and found.atoms["firings"].between(5, 7).all()
    assert found.n_alive > 100
    again = population_test(model, sae, documents[:6], min_firings=5, max_firings=7, n_atoms=6, context=64, horizon=2)
    assert found.atoms.equals(again.atoms)


def test_inversion_at_the_native_norm_by_hand():
    """Atom 0 wins at its coefficient and loses at the native norm; atom 1 wins both; atom 2 loses both."""
    kl = [(1.0, 2.0, 9.0)] * 8 + [(3.0, 2.0, 9.0)] * 4
    made = by_hand(kl, atom=[0] * 4 + [1] * 4 + [2] * 4, matched=[5.0] * 4 + [1.0] * 4 + [5.0] * 4)
    found = PopulationResult(made, 1, 30, 3)
    assert found.atoms["inverts"].tolist() == [True, False, False]
    numbers = {number.name: number.value for number in found.numbers()}
    assert numbers["atoms that invert at the native norm"] == pytest.approx(1 / 3)
    assert numbers["atom beats deletion, mean over atoms"] == pytest.approx(2 / 3)
    assert numbers["matched-norm atom beats deletion, mean over atoms"] == pytest.approx(1 / 3)
    without = dataclasses.replace(made, kl={k: v for k, v in made.kl.items() if k != "matched"})
    assert "inverts" not in PopulationResult(without, 1, 30, 3).atoms


# Mistakes ------------------------------------------------------------------------------------------------------------


def silent(sae):
    """An SAE no atom of which is ever active."""
    made = ws.WriteSAE(sae.cfg)
    torch.nn.init.constant_(made.b_enc, -1e9)
    return made


def test_too_little_text_or_too_few_firings_is_an_error(model, sae, documents):
    short = "The state of the Union is strong. "
    with pytest.raises(
        ValueError, match=r"the text makes 0 windows of 96 tokens \(the longest text has \d+\), and 1 is needed"
    ):
        ws.replacement_test(model, sae, short)
    with pytest.raises(ValueError, match=r"the SAE at layer 2 head 1 fired at only \d+ tokens of \d+ windows of 96"):
        ws.replacement_test(model, sae, short * 40)
    with pytest.raises(
        ValueError, match=r"context=20 leaves no token with 5 tokens before it and 16 \(horizon\) after"
    ):
        ws.replacement_test(model, sae, documents, context=20)
    with pytest.raises(ValueError, match=r"fired at only 0 tokens"):
        ws.replacement_test(model, silent(sae), documents[:1])
    with pytest.raises(ValueError, match=r"atom 7 at layer 2 head 1 fired at only \d+ tokens"):
        ws.replacement_test(model, sae, documents[:1], atom=7)
    with pytest.raises(ValueError, match=r"no atom of the SAE fires 5 times in \d+ windows.*most frequent one 0 times"):
        population_test(model, silent(sae), documents[:1])
    with pytest.raises(ValueError, match=r"min_firings=9, max_firings=5: 1 <= min_firings <= max_firings"):
        population_test(model, sae, documents[:1], min_firings=9, max_firings=5)


def test_what_does_not_exist_or_fit_is_an_error(model, sae, documents):
    run = lambda given=sae, **more: ws.replacement_test(model, given, documents[:1], **more)  # noqa: E731
    with pytest.raises(IndexError, match="atoms 0 to"):
        run(atom=10**6)
    with pytest.raises(ValueError, match=r"no condition 'erase': allowed are atom, matched, delete"):
        run(conditions=("erase",))
    with pytest.raises(ValueError, match=r"'flat_svd' and flat=, an SAE of the same head, come together"):
        run(conditions=("flat_svd",))
    with pytest.raises(ValueError, match=r"no flat SAE for layer 2 head 1: flat= has layer 0 head 0"):
        run(flat=ws.WriteSAE.from_pretrained("tiny-gdn/L0H0"))
    with pytest.raises(ValueError, match=r"two SAEs of layer 2 head 1"):
        run([sae, sae])
    with pytest.raises(ValueError, match=r"no SAE given"):
        run([])
    with pytest.raises(ValueError, match=r"atom=3 means an atom of one SAE; 2 were given"):
        run([sae, ws.WriteSAE.from_pretrained("tiny-gdn/L0H0")], atom=3)
    with pytest.raises(ValueError, match=r"n_firings=0: it must be at least 1"):
        run(n_firings=0)
    with pytest.raises(ValueError, match=r"classes of 2 atoms; this SAE has 2048"):
        population_test(model, sae, documents[:1], classes=["register", "bundle"])
    deeper = ws.WriteSAE.from_pretrained(shipped_saes("tiny-mamba2")[-1])
    with pytest.raises(ValueError, match=rf"this SAE is for layer {deeper.cfg.layer}, not recurrent here"):
        run(deeper)
