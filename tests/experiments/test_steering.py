"""Directions, sign test, erase, install and amplify: against plain replays, and where the answer is known."""

import dataclasses
import io

import jaxtyping
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LogitsProcessor

import writesae as ws
from architectures import architecture_named
from writesae.experiments.amplifying import METRICS, amplify, count_of
from writesae.experiments.engine import directions
from writesae.experiments.engine.directions import (
    Places,
    at_positions,
    choose_writes,
    formula_direction,
    gradient_directions,
    optimised_directions,
)
from writesae.experiments.engine.targets import ordinary_tokens, ranks, token_ids
from writesae.experiments.erasing import Effect, erase
from writesae.experiments.installing import included, install
from writesae.experiments.logit_changes import logit_change
from writesae.experiments.signs import sign_test
from writesae.futures.continuations import ENDED, CommonRandomNumbers, go_on
from writesae.gradients import gradient
from writesae.saes.activity.token_classes import choose_atoms
from writesae.stores import Windows
from writesae.zoo import heldout_documents

SITES = [("tiny-gdn", 2, 0), ("tiny-mamba2", 4, 3), ("tiny-rwkv7", 1, 2)]
PROMPTS = ["The captain of the ship", "It was a dark night and the old man"]


@pytest.fixture(scope="module")
def load():
    models = {}
    return lambda name: models.setdefault(name, ws.HookedRecurrentModel.from_pretrained(name))


@pytest.fixture(scope="module")
def gdn(load):
    return load("tiny-gdn")


@pytest.fixture(scope="module")
def sae():
    return ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")


@pytest.fixture(scope="module")
def text():
    return heldout_documents()[:4]


@pytest.fixture
def as_users_run_it():
    """Without the checks of annotations, which would complain first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def numbers(result):
    return {number.name: number for number in result.numbers()}


def check_shape(result):
    """What the report needs of every result."""
    assert result.table().row_count == len(result.numbers()) == len(numbers(result)), "names are unique"
    assert len(result.records()) and result.plot().axes and len(result.title) < 120 and "Paper" in result.about


# Directions


def places_of(model, layer, head, n=3):
    ids, mask = model.to_tokens(PROMPTS)
    lengths = mask.sum(-1)
    positions = lengths[:, None] - n + torch.arange(n)
    write, query, _ = at_positions(model, layer, ids, mask, positions)
    targets = torch.tensor([700, 900])
    return Places(model, layer, head, ids, mask, positions, targets, write[:, :, head], query[:, :, head])


@torch.no_grad()
def test_formula_is_the_value_that_reaches_the_logit_best(gdn):
    v = formula_direction(gdn, 2, 1, torch.tensor([7, 300]))
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(2))
    reach = gdn.W_O(2)[1] @ gdn.W_U[:, [7, 300]]  # [d_value, 2]
    best = (v @ reach).diagonal()
    others = torch.nn.functional.normalize(torch.randn(500, 32), dim=-1)
    assert (best > (others @ reach).abs().max(0).values).all()
    torch.testing.assert_close(best, reach.norm(dim=0))


@torch.no_grad()
@pytest.mark.parametrize(("name", "layer", "head"), SITES)
@pytest.mark.parametrize("broken", [False, True], ids=["right", "another key"])
def test_the_edit_is_so_many_native_norms_in_that_direction(load, name, layer, head, broken):
    model = load(name)
    here = places_of(model, layer, head, n=1)
    (made,) = choose_writes([here], key="read" if broken else "native")
    ids, mask = here.tokens, here.mask
    _, native = model.run_with_cache(ids, attention_mask=mask)
    with model.intervene(ws.Add(layer, head, write=made, scale=2.5, relative=True), positions=here.positions):
        _, edited = model.run_with_cache(ids, attention_mask=mask)
    gain = (edited.state(layer, [-1], heads=[head]) - native.state(layer, [-1], heads=[head]))[:, 0, 0]
    write = native.write(layer)[:, -1, head]
    key = torch.nn.functional.normalize(write.factors()[0][:, 0], dim=-1)
    v = formula_direction(model, layer, head, here.targets)
    expected = 2.5 * write.norm()[:, None, None] * key[:, :, None] * v[:, None]
    assert torch.allclose(gain, expected, atol=1e-4 * float(expected.abs().max())) is not broken


def test_keys_and_directions(gdn):
    here = places_of(gdn, 2, 0)
    (signed,) = choose_writes([here], key="signed")
    assert ((signed.key * here.query).sum(-1) >= 0).all()
    torch.testing.assert_close(signed.cosine(choose_writes([here])[0]).abs(), torch.ones(2, 3))
    vector = torch.randn(32)
    torch.testing.assert_close(choose_writes([here], key=vector)[0].key[0, 0], vector / vector.norm())
    (own,) = choose_writes([here], lambda places: places.native * 3.0)
    torch.testing.assert_close(own.cosine(here.native), torch.ones(2, 3))
    torch.testing.assert_close(own.norm(), torch.ones(2, 3))
    drawn = [choose_writes([here], "random", generator=torch.Generator().manual_seed(s))[0].value for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])


def test_bad_keys_and_directions(gdn, as_users_run_it):
    here = places_of(gdn, 2, 0)
    with pytest.raises(ValueError, match="key='nothing': allowed are"):
        choose_writes([here], key="nothing")
    with pytest.raises(ValueError, match=r"key is \[5\]; the keys of layer 2 are \[32\]"):
        choose_writes([here], key=torch.ones(5))
    with pytest.raises(ValueError, match="allowed are 'formula', 'gradient', 'optimised', 'random' and a function"):
        choose_writes([here], "up")
    with pytest.raises(ValueError, match=r"returned a write \[2\] of 32 x 32; wanted is \[2, 3\]"):
        choose_writes([here], lambda places: places.native[:, 0])


def test_targets_are_single_tokens_of_the_vocabulary(gdn):
    one = token_ids(gdn, [" war", 5])
    assert gdn.tokenizer.decode([int(one[0])]) == " war" and int(one[1]) == 5
    with pytest.raises(ValueError, match=r"target 'war' is 2 tokens, \['w', 'ar'\]: .* one token; ' war' is one"):
        token_ids(gdn, "war")
    with pytest.raises(IndexError, match="target 4096 is outside the vocabulary: token ids are 0 to 4095"):
        token_ids(gdn, 4096)
    with pytest.raises(ValueError, match="targets is empty"):
        token_ids(gdn, [])
    assert not ordinary_tokens(gdn)[gdn.tokenizer.eos_token_id] and ordinary_tokens(gdn).sum() == gdn.n_vocab - 1


def test_positions_that_do_not_exist(gdn):
    ids, mask = gdn.to_tokens(PROMPTS)
    last = int(mask.sum(-1)[0])
    with pytest.raises(IndexError, match=rf"positions \[{last}\] of sequence 0, which has {last} tokens"):
        at_positions(gdn, 2, ids, mask, torch.tensor([[last], [0]]))


# Sign test


@torch.no_grad()
@pytest.mark.parametrize(("name", "layer", "head"), SITES)
@pytest.mark.parametrize("broken", [False, True], ids=["right", "off by one"])
def test_sign_test_equals_a_plain_replay(load, text, name, layer, head, broken):
    model = load(name)
    found = sign_test(model, layer, head, text, n=6, per_window=2, context=24, horizon=2, scale=1.5)
    windows = Windows.cut(model, text, 24).tokens
    for i in range(6):
        ids, t, target = windows[int(found.window[i])][None], int(found.position[i]), int(found.target[i])
        native, cache = model.run_with_cache(ids)
        write, q = cache.write(layer)[0, t, head], cache["q", layer][0, t, head]
        key = torch.nn.functional.normalize(write.factors()[0][0], dim=0)
        v = formula_direction(model, layer, head, found.target)[i]
        extra = 1.5 * write.norm() * key[:, None] * v

        def add(state, hook, extra=extra):
            state[0, 0, head] += extra

        hook = f"blocks.{layer}.mixer.hook_state"
        edited = model.run_with_hooks(ids, [(hook, add)], state_positions=[t - broken])
        change = (edited - native)[0, t:, target]
        near = torch.allclose(change, found.measured[i], atol=2e-5)
        if not near:
            break
        log_p = (edited.log_softmax(-1) - native.log_softmax(-1))[0, t:, target]
        torch.testing.assert_close(log_p, found.log_p[i], atol=2e-5, rtol=0)
        reach = (model.W_O(layer)[head] @ model.W_U[:, target]).norm()
        predicted = 1.5 * write.norm() * (key @ q) * reach
        torch.testing.assert_close(predicted, found.predicted[i, 0], atol=1e-4 * float(reach), rtol=1e-3)
    assert near is not broken


def test_sign_test_where_the_next_token_is_the_first_to_see_it(gdn, text):
    found = sign_test(gdn, 2, 0, text, n=8, context=24, read="next")
    assert (found.position == 22).all() and found.measured.shape == (8, 1) and (found.measured != 0).any()
    check_shape(found)
    assert "predicted +1" in found.records()


def test_sign_test_statistics_of_known_trials(gdn, text):
    made = sign_test(gdn, 2, 0, text, n=8, context=24)
    x = torch.tensor([[1.0], [2], [3], [-1], [1], [-2], [0.5], [-0.5]])
    made = dataclasses.replace(made, predicted=x, measured=2 * x, log_p=x)
    found = numbers(made)
    assert found["sign as predicted"].value == 1 and found["target's logit rises"].value == 5 / 8
    assert found["Pearson r"].value == pytest.approx(1) and found["median measured / predicted"].value == pytest.approx(
        2
    )
    assert found["R squared, one factor fitted"].value == pytest.approx(1) and found["R squared"].value < 0.8
    flipped = numbers(dataclasses.replace(made, measured=-2 * x))
    assert flipped["sign as predicted"].value == 0 and flipped["Pearson r"].value == pytest.approx(-1)
    flat = numbers(dataclasses.replace(made, measured=torch.zeros_like(x)))
    assert "Pearson r" not in flat and flat["target's logit rises"].value == 0


def test_targets_of_the_sign_test(gdn, text):
    top = sign_test(gdn, 2, 0, text, n=8, context=24, targets="top", top=3)
    windows = Windows.cut(gdn, text, 24).tokens
    logits = gdn(windows[top.window])[torch.arange(8), top.position]
    assert (ranks(logits, top.target) <= 3).all()
    given = sign_test(gdn, 2, 0, text, n=8, context=24, targets=[" war", " sea"])
    assert set(given.target.tolist()) <= set(token_ids(gdn, [" war", " sea"]).tolist())
    ticks = []
    sign_test(gdn, 2, 0, text, n=7, context=24, batch_size=1, progress=ticks.append)
    assert ticks == [4, 7]


def test_bad_sign_tests(gdn):
    with pytest.raises(ValueError, match=r"the text makes 0 windows of 64 tokens .*, and 125 are needed"):
        sign_test(gdn, 2, 0, "Call me Ishmael.")
    with pytest.raises(ValueError, match="a window holds the token written at and the 30 after it"):
        sign_test(gdn, 2, 0, "Call me Ishmael.", context=24, horizon=30)
    with pytest.raises(IndexError, match="head 4 at layer 2: allowed are 0 to 3"):
        sign_test(gdn, 2, 4, "Call me Ishmael.")
    with pytest.raises(IndexError, match="layer 3 is not recurrent"):
        sign_test(gdn, 3, 0, "Call me Ishmael.")


# Erase

PATTERN = " the captain of the ship was a good man and"


def planted(model, activation=1.0):
    """An SAE of layer 0, whose atom 0 is the write at one token of a repeated pattern and fires there alone.

    In layer 0 a write depends on the last four tokens, so it is the same at every repeat.
    """
    ids = model.to_tokens(PATTERN * 3)[0]
    period = ids.shape[1] // 3
    _, cache = model.run_with_cache(ids)
    write = cache.write(0)[0, period + 6, 0]
    site = {"d_key": 32, "d_value": 32, "layer": 0, "head": 0, "target": "write"}
    sae = ws.WriteSAE(ws.SAEConfig(n_atoms=2, k=1, encoder="bilinear", sparsity="jumprelu", **site))
    with torch.no_grad():
        for side in ("enc", "dec"):
            getattr(sae, f"V_{side}")[0] = write.key / write.key.norm()
            getattr(sae, f"W_{side}")[0] = write.value / write.value.norm()
        sae.V_enc *= activation
        sae.log_threshold[0] = torch.log(0.99 * activation * write.norm())
        sae.log_threshold[1] = 20.0
    return sae, int(ids[0, period + 6])


@pytest.mark.parametrize("activation", [1.0, 0.5], ids=["the write", "half the write"])
def test_subtracting_an_atom_that_is_the_write_deletes_it(gdn, activation):
    sae, token = planted(gdn, activation)
    made = [
        erase(gdn, sae, 0, [PATTERN * 40], n=16, mode=mode, context=32, doses=(0, 1), check_model=False)
        for mode in ("delete", "subtract")
    ]
    delete, subtract = (x.effects["erase, same firings"] for x in made)
    assert (delete.change != 0).any() and torch.equal(delete.position, subtract.position)
    same = torch.allclose(delete.change, subtract.change, atol=1e-4)
    assert same is (activation == 1)
    windows = Windows.cut(gdn, PATTERN * 40, 32).tokens
    assert made[0].fires == int((windows[:, 8:] == token).sum()) > 16, "it fires where it was planted, and only there"
    for name in ("minus 0", "no firing: plus 0"):
        assert (made[0].effects[name].change.abs() < 1e-5).all()
    torch.testing.assert_close(made[1].effects["minus 1"].change, made[1].erased.change)


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True], ids=["right", "off by one"])
def test_erasing_equals_a_replay_firing_by_firing(gdn, sae, text, frequent, broken):
    found = erase(gdn, sae, frequent, text, n=12, context=48, doses=())
    windows = Windows.cut(gdn, text, 48).tokens
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    e, errors = found.erased, []
    for i in range(len(e.change)):
        t = int(e.position[i])
        ids = windows[int(e.window[i])][None, : t + 1]

        def nothing(v, hook, at=t - broken):
            v[:, at, sae.cfg.head] = 0

        native, edited = gdn(ids)[0, -1], gdn.run_with_hooks(ids, [("blocks.2.mixer.hook_v", nothing)])[0, -1]
        change = (edited.log_softmax(-1) - native.log_softmax(-1))[found.token]
        errors.append(abs(float(change - e.change[i])))
        if not broken:
            assert int(e.native_rank[i]) == int(ranks(native[None], torch.tensor([found.token])))
            assert float(gdn.encode(sae, ids).atom(frequent)[0, t]) > 0
    assert (max(errors) < 1e-5) is not broken


@pytest.fixture(scope="module")
def frequent(gdn, sae, text):
    """The atom that fires most in that text."""
    windows = Windows.cut(gdn, text, 48).tokens
    return int(gdn.encode(sae, windows[:, 12:]).fired.argmax())


def test_the_token_is_chosen_on_other_windows_than_it_is_tested_on(gdn, sae, text, frequent):
    ticks = []
    found = erase(gdn, sae, frequent, text, n=12, context=48, doses=(1, 2), read="next", progress=ticks.append)
    tested, everywhere = set(found.erased.window.tolist()), set(found.effects["erase, same firings"].window.tolist())
    chosen_on = everywhere - tested
    assert chosen_on and max(chosen_on) < min(tested)
    assert ticks == sorted(ticks) and ticks[-1] >= 4 * 12
    check_shape(found)
    assert found.token_text in found.about and numbers(found)["p (Wilcoxon)"].value <= 1
    assert set(found.records()["condition"]) == set(found.effects)


def test_without_an_atom_the_one_that_fires_most_is_erased(gdn, sae, text, frequent):
    given, chosen = (erase(gdn, sae, atom, text, n=12, context=48, doses=()) for atom in (frequent, None))
    assert chosen.atom == frequent and chosen.numbers() == given.numbers()
    rare = erase(gdn, sae, None, text[:1], n=5000, context=48, doses=())
    assert len(rare.effects["erase, same firings"].window) == rare.fires < 5000


def test_effects_of_known_numbers():
    native = torch.tensor([-1.0, -2, -3, -4, -5, -6])
    effect = Effect(torch.arange(6), torch.arange(6), native, native - 0.5, torch.ones(6).long(), torch.ones(6).long())
    median, p = effect.numbers("")
    assert median.value == pytest.approx(-0.5) and p.value == pytest.approx(2 / 2**6)
    nothing = dataclasses.replace(effect, edited=native).numbers("")
    assert nothing[0].value == 0 and nothing[1].value == 1


def test_bad_erasures(gdn, sae, text, frequent, as_users_run_it):
    dead = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
    with torch.no_grad():
        dead.b_enc[3] = -100.0
    with pytest.raises(ValueError, match=r"atom 3 never fires at any of [\d,]+ tokens of the text; n=10 firings"):
        erase(gdn, dead, 3, text[:1], n=10)
    with pytest.raises(ValueError, match=r"fires at \d+ of [\d,]+ tokens of the text; n=5000 firings, and 2500 other"):
        erase(gdn, sae, frequent, text[:2], n=5000)
    with torch.no_grad():
        dead.b_enc[:] = -100.0
    with pytest.raises(ValueError, match=r"atom 0 never fires .* n=4 firings"):
        erase(gdn, dead, None, text[:1], n=10)
    with pytest.raises(ValueError, match="the text makes 0 windows of 64 tokens"):
        erase(gdn, sae, 3, "Call me Ishmael.")
    with pytest.raises(ValueError, match="mode='cut': allowed are 'delete' and 'subtract'"):
        erase(gdn, sae, 3, text, mode="cut")
    with pytest.raises(IndexError, match="atoms 0 to 2047"):
        erase(gdn, sae, 2048, text)


# Continuations


class Script(LogitsProcessor):
    """Makes the model say given tokens."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -1.0).scatter(1, torch.full((len(scores), 1), self.tokens.pop(0)), 1.0)


def test_what_follows_the_end_of_a_text_is_not_a_token(gdn):
    ids, mask = gdn.to_tokens(PROMPTS)
    end = gdn.tokenizer.eos_token_id
    new = go_on(gdn, ids, mask, 4, chance=Script([9, end, end, 7]))
    assert new.tolist() == [[9, end, ENDED, ENDED]] * 2
    assert included(new, torch.tensor([9, 7])).tolist() == [True, False]
    assert included(new, torch.tensor([ENDED + 1, end])).tolist() == [True, True], "0 is the end itself"
    plain = go_on(gdn, ids, mask, 4)
    expected = gdn.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, -4:]
    assert torch.equal(plain, expected)


def test_same_chance_samples_from_the_softmax_and_depends_on_the_prompt_alone():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draw = CommonRandomNumbers(torch.arange(2), temperature=0.5, seed=3)
    wide = CommonRandomNumbers(torch.tensor([1, 0, 1, 5]), temperature=0.5, seed=3)
    counts = torch.zeros(4)
    for _ in range(2000):
        one, more = (
            draw(torch.zeros(2, 1).long(), logits.expand(2, 4)),
            wide(torch.zeros(4, 1).long(), logits.expand(4, 4)),
        )
        counts += one.argmax(-1).bincount(minlength=4)
        assert torch.equal(more[[1, 0]], one) and torch.equal(more[0], more[2]) and not torch.equal(more[0], more[3])
    expected = 4000 * (logits / 0.5).softmax(-1)
    assert ((counts - expected).abs() < 4 * expected.sqrt() + 1).all()
    cold = 4000 * logits.softmax(-1)
    assert ((counts - cold).abs() > 4 * cold.sqrt()).any(), "at another temperature it is another distribution"


# Install


@pytest.fixture(scope="module")
def installed(gdn):
    return install(gdn, 2, None, PROMPTS, key="read", scale=(4.0, 0.0), max_new_tokens=6, per_stratum=3)


@torch.no_grad()
def test_strata_hold_what_they_say(gdn, installed):
    bounds = {"ranks 2 to 10": (2, 10), "ranks 11 to 100": (11, 100), "ranks 101 to 1000": (101, 1000)}
    bounds |= {"ranks 1001 and up": (1001, 4096)}
    table = installed.records()
    for prompt, here in table[table.scale == 4].groupby("prompt"):
        logits = gdn(PROMPTS[prompt])[0, -1]
        assert here.stratum.value_counts().to_dict() == dict.fromkeys(bounds, 3)
        for row in here.itertuples():
            rank = 1 + int((logits > logits[row.target]).sum())
            low, high = bounds[row.stratum]
            assert rank == row.rank and low <= rank <= high
            assert row.target != gdn.tokenizer.eos_token_id and gdn.tokenizer.decode([row.target]) == row.target_text
            assert row.log_p == pytest.approx(float(logits.log_softmax(-1)[row.target]), abs=1e-4)
    check_shape(installed)


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True], ids=["right", "one position less"])
def test_installing_equals_editing_by_hand(gdn, installed, broken):
    same = []
    for i in range(0, 24, 5):
        ids, target = gdn.to_tokens(PROMPTS[int(installed.prompt[i])])[0], installed.target[i : i + 1]
        n = ids.shape[1]
        _, cache = gdn.run_with_cache(ids)
        q = torch.nn.functional.normalize(cache["q", 2][0, -3:], dim=-1)
        edits = [
            ws.Add(
                2,
                h,
                write=ws.Write(q[:, h], formula_direction(gdn, 2, h, target).expand(3, -1)),
                scale=4,
                relative=True,
            )
            for h in range(4)
        ]
        positions = [n - 3, n - 2, n - 1 - broken]
        if broken:
            edits = [dataclasses.replace(e, write=e.write[:2]) for e in edits]
            positions = positions[:2]
        with gdn.intervene(edits, positions=positions):
            logits = gdn(ids)[0, -1]
            out = gdn.generate(ids, max_new_tokens=6, do_sample=False)[0, n:]
        log_p = float(logits.log_softmax(-1)[target])
        same.append(abs(log_p - float(installed.log_p_after[0, i])) < 1e-4)
        if not broken:
            assert gdn.tokenizer.decode(out, skip_special_tokens=True) == installed.texts[i]
            assert bool((out == target).any()) == bool(installed.included[0, i])
    assert all(same) is not broken


def test_the_gradient_lifts_more_than_the_formula_and_the_optimised_more_than_the_gradient(gdn):
    lifts = {}
    for direction in ("formula", "gradient", "optimised"):
        found = install(gdn, 2, 0, PROMPTS, direction=direction, scale=3.0, max_new_tokens=2, per_stratum=4)
        lifts[direction] = found.log_p_after - found.log_p
    assert lifts["gradient"][0].mean() > lifts["formula"][0].mean() + 0.1
    assert (lifts["optimised"][0] >= lifts["gradient"][0] - 1e-4).all(), "each row keeps the best that it saw"
    assert lifts["optimised"][0].mean() > lifts["gradient"][0].mean() + 0.1
    assert lifts["gradient"][1].mean() < 0.1, "a random value at the same keys does not"


def test_optimised_for_another_size_is_worse(gdn):
    """Of writes that are optimised at a tenth of the size that they are added at, the gain is less."""

    def lift(size: float) -> float:
        def direction(places: Places) -> ws.Write:
            return optimised_directions([dataclasses.replace(places, scale=size)])[0]

        found = install(gdn, 2, 0, PROMPTS, direction=direction, scale=3.0, max_new_tokens=1, per_stratum=4)
        return float((found.log_p_after - found.log_p)[0].mean())

    assert lift(3.0) > lift(0.3) + 0.05


def alone(directions):
    """The same direction, worked out for each head by itself."""

    def direction(places: Places) -> ws.Write:
        return directions([places])[0]

    return direction


def test_heads_optimised_together_lift_more_than_heads_optimised_alone(gdn):
    lifts = []
    for direction in ("optimised", alone(optimised_directions)):
        found = install(gdn, 2, None, PROMPTS, direction=direction, max_new_tokens=1, per_stratum=4)
        lifts.append(float((found.log_p_after - found.log_p)[0].mean()))
    assert lifts[0] > lifts[1] + 0.5


def test_one_gradient_serves_all_heads_and_sizes(gdn, monkeypatch):
    passes = []

    def counted(*args, **kwargs):
        passes.append(1)
        return gradient(*args, **kwargs)

    monkeypatch.setattr(directions, "gradient", counted)
    options = dict(scale=[3.0, 1.5], max_new_tokens=1, per_stratum=2)
    shared, shared_passes = install(gdn, 2, None, PROMPTS, direction="gradient", **options), len(passes)
    each = install(gdn, 2, None, PROMPTS, direction=alone(gradient_directions), **options)
    torch.testing.assert_close(shared.log_p_after[0], each.log_p_after[0], atol=1e-4, rtol=1e-4)
    assert len(passes) - shared_passes == 4 * 2 * shared_passes, "four heads at two sizes, one by one"


def test_a_write_of_size_nothing_changes_nothing(installed):
    none = installed.of_scale(0.0)
    for i in (0, 1):
        assert torch.equal(installed.rank_after[i, none], installed.rank[none])
        assert torch.equal(installed.included[i, none], installed.native[none])
    alone = dataclasses.replace(installed, scales=(0.0, 4.0))
    assert numbers(alone)["p (McNemar)"].value == 1 and numbers(alone)["median rank shift"].value == 0


def test_the_direction_works_and_a_random_value_does_not(installed):
    found = numbers(installed)
    assert found["first-step lift"].low > 0.5 > found["first-step lift, random value"].value
    assert not torch.equal(installed.rank_after[0], installed.rank_after[1])


def test_inclusion_and_mcnemar_of_known_trials(installed):
    n = len(installed.prompt)
    first = installed.of_scale(4.0)
    native, edited = torch.zeros(n, dtype=torch.bool), torch.zeros(2, n, dtype=torch.bool)
    edited[0, first.nonzero()[:8, 0]] = True
    native[first.nonzero()[7, 0]] = True
    native[first.nonzero()[8, 0]] = True
    found = numbers(dataclasses.replace(installed, native=native, included=edited))
    assert (found["inclusion"].value, found["inclusion, unmodified"].value) == (8 / 24, 2 / 24)
    # 7 gained, 1 lost: P(X <= 1) + P(X >= 7) of 8 fair coins
    assert found["p (McNemar)"].value == pytest.approx(2 * (1 + 8) / 2**8) and found["p (McNemar)"].n == 8
    assert found["inclusion at 0x"].value == 0


def test_one_prompt_shows_its_texts(gdn):
    found = install(gdn, 2, [0, 1], "The captain", targets=[" war"], max_new_tokens=5, n_positions=1)
    console = Console(width=100, file=io.StringIO())
    console.print(found.table())
    shown = console.file.getvalue()
    assert "' war'" in shown and repr(found.natives[0])[:12] in shown and "after" in shown
    by_ids = install(gdn, 2, [0, 1], gdn.to_tokens("The captain")[0], targets=[" war"], max_new_tokens=5, n_positions=1)
    assert by_ids.texts == found.texts and by_ids.prompts == ("The captain",)
    assert found.strata[int(found.stratum[0])] == "ranks 1001 and up"
    likely = install(gdn, 2, 0, "The captain", targets=[int(gdn("The captain")[0, -1].argmax())], max_new_tokens=2)
    assert likely.strata[int(likely.stratum[0])] == "ranks below 2" and bool(likely.native[0])


@pytest.mark.parametrize(("name", "layer", "head"), SITES[1:])
def test_install_on_other_architectures_in_batches(load, name, layer, head):
    ticks = []
    model = load(name)
    whole = install(model, layer, head, PROMPTS, max_new_tokens=4, per_stratum=1, progress=ticks.append)
    parts = install(model, layer, head, PROMPTS, max_new_tokens=4, per_stratum=1, batch_size=3)
    assert whole.texts == parts.texts and ticks[-1] == 2 + 2 * 8
    torch.testing.assert_close(whole.log_p_after[0], parts.log_p_after[0], atol=1e-4, rtol=0)


def test_bad_installs(gdn):
    with pytest.raises(ValueError, match="n_positions=3, but prompt 1 has 1 tokens"):
        install(gdn, 2, 0, ["The captain", " war"])
    with pytest.raises(ValueError, match="ranks 2 to 2 have 1 tokens to choose from, per_stratum=2 are wanted"):
        install(gdn, 2, 0, PROMPTS, strata=(2, 3))
    with pytest.raises(ValueError, match="ranks from 1 on that rise"):
        install(gdn, 2, 0, PROMPTS, strata=(11, 2))
    with pytest.raises(IndexError, match="head 7 at layer 2: allowed are 0 to 3"):
        install(gdn, 2, [0, 7], PROMPTS)
    with pytest.raises(ValueError, match="several different ones, or None for all"):
        install(gdn, 2, [1, 1], PROMPTS)
    with pytest.raises(ValueError, match="' strange words' is"):
        install(gdn, 2, 0, PROMPTS, targets=[" strange words"])


# Amplify


@pytest.fixture(scope="module")
def commas(gdn, sae, text):
    return choose_atoms(gdn, sae, text, "comma", n=4, context=128)


@pytest.fixture(scope="module")
def amplified(gdn, commas):
    prompts = [*PROMPTS, "A whale", "The law of the land", "My dear friend"]
    return amplify(gdn, commas, prompts, ["commas", "word length"], doses=(0, 300), n_tokens=16)


@pytest.mark.parametrize("where", ["at", "before"])
@pytest.mark.parametrize("broken", [False, True], ids=["right", "the other place"])
def test_atoms_of_a_class_have_the_largest_contrast(gdn, sae, text, where, broken):
    found = choose_atoms(gdn, sae, text[:1], lambda token: "," in token, n=4, context=128, where=where)
    ids = Windows.cut(gdn, text[:1], 128).tokens
    codes = gdn.encode(sae, ids).dense()
    comma = torch.tensor([["," in gdn.tokenizer.decode([i]) for i in row] for row in ids.tolist()])
    if (where == "before") is not broken:
        comma, codes = comma[:, 1:], codes[:, :-1]
    contrast = codes[comma].mean(0) - codes[~comma].mean(0)
    same = torch.allclose(found.contrast, contrast.topk(4).values, atol=1e-6)
    assert same is not broken
    if not broken:
        assert found.n_class == int(comma.sum()) and not set(found.pool.tolist()) & set(found.atoms.tolist())
        torch.testing.assert_close(found.on_class, codes[comma].mean(0)[found.atoms])


def test_the_control_has_the_same_norm(commas):
    rows = torch.stack([commas.atoms, commas.pool[:4], commas.pool[4:8]])
    made = commas.write(rows)
    assert made.shape == (3,) and made.rank == 4
    torch.testing.assert_close(made.norm(), made.norm()[:1].expand(3))
    assert (made[1:].cosine(made[:1].expand(2)) < 0.9).all(), "and is something else"
    by_hand = sum(c * commas.sae.atom(a).dense() for c, a in zip(commas.on_class, commas.atoms, strict=True))
    torch.testing.assert_close(made[0].dense(), by_hand)


def test_dose_nothing_is_the_baseline_and_a_large_dose_is_not(gdn, amplified):
    texts = amplified.texts
    assert texts["0x"] == texts["baseline"] == texts["random 0x"]
    assert texts["300x"] != texts["baseline"] and texts["300x"] != texts["random 300x"]
    found = numbers(amplified)
    assert found["p, 0x"].value == 1 and found["Cohen's d, 0x"].value == 0 and found["change of commas, 0x"].value == 0
    for base, edited in zip(texts["baseline"], texts["300x"], strict=True):
        # The prompt is as it was, so the first new token is too.
        assert edited.startswith(gdn.tokenizer.decode(gdn.to_tokens(base)[0][0, :1])[:1])
    check_shape(amplified)
    assert len(amplified.records()) == 5 * 5


def test_texts_do_not_depend_on_the_batch_and_follow_the_model(gdn, commas, amplified):
    ticks = []
    prompts = list(amplified.prompts)
    again = amplify(gdn, commas, prompts, "commas", doses=(0, 300), n_tokens=16, batch_size=3, progress=ticks.append)
    assert again.texts == amplified.texts and ticks[-1] == 25
    other = amplify(gdn, commas, prompts, "commas", doses=(0,), n_tokens=16, seed=1)
    assert other.texts["baseline"] != amplified.texts["baseline"]
    # By hand: one prompt, the same noise, the atoms at every new token; and in the prompt too, which is another thing.
    write, everywhere = commas.write(commas.atoms[None])[0] * 300.0, []
    for i, prompt in enumerate(prompts):
        ids = gdn.to_tokens(prompt)[0]
        for positions in (slice(ids.shape[1], None), None):
            with gdn.intervene(ws.Add(2, commas.sae.cfg.head, write=write), positions=positions):
                new = go_on(gdn, ids, None, 16, chance=CommonRandomNumbers(torch.tensor([i]), 0.7, 0), whole=True)
            everywhere.append(gdn.tokenizer.decode(new[0]))
    assert everywhere[::2] == list(amplified.texts["300x"]) != everywhere[1::2]


def test_statistics_of_known_scores(amplified):
    base, drop = np.array([1.0, 2, 3, 4, 5]), np.array([2, 2.5, 2, 1.5, 2])
    scores = {
        "baseline": base,
        "0x": base,
        "random 0x": base,
        "300x": base - drop,
        "random 300x": base + 1,
    }
    found = numbers(dataclasses.replace(amplified, scores={"commas": scores}))
    assert found["commas, 300x"].value == pytest.approx(1) and found["change of commas, 300x"].value == pytest.approx(
        -2
    )
    assert found["Cohen's d, 300x"].value == pytest.approx(-2 / drop.std(ddof=1))
    assert (
        found["p adjusted, 300x"].value == pytest.approx(2 * found["p, 300x"].value)
        and found["p, random 300x"].value == 0
    )


def test_one_prompt_has_no_test(gdn, commas):
    found = amplify(gdn, commas, "The captain", {"whales": count_of("whale")}, doses=(50,), n_tokens=4)
    assert [number.name for number in found.numbers()] == ["whales, baseline", "whales, 50x", "whales, random 50x"]


def test_metrics():
    text = "One two.\n\nThree, four!\n"
    expected = {
        "newlines": 3,
        "paragraphs": 2,
        "capitalised words": 0.5,
        "commas": 1,
        "sentence ends": 2,
        "word length": 3.75,
    }
    assert {name: measure(text) for name, measure in METRICS.items()} == expected
    assert all(measure("") == 0 for measure in METRICS.values())


def test_bad_amplifications(gdn, sae, text, commas):
    with pytest.raises(ValueError, match="metric 'poems': there are newlines, paragraphs"):
        amplify(gdn, commas, PROMPTS, "poems")
    with pytest.raises(ValueError, match=r"doses=\[\]"):
        amplify(gdn, commas, PROMPTS, doses=())
    with pytest.raises(ValueError, match="is_class='vowels': there are boundary"):
        choose_atoms(gdn, sae, text, "vowels")
    with pytest.raises(ValueError, match=r"0 of [\d,]+ tokens are of the class"):
        choose_atoms(gdn, sae, text[:1], lambda token: False)
    with pytest.raises(ValueError, match=r"only \d+ atoms are more active on the class"):
        choose_atoms(gdn, sae, text[:1], "comma", n=2000)
    with pytest.raises(ValueError, match="the text makes 0 windows of 256 tokens"):
        choose_atoms(gdn, sae, "Call me Ishmael.", "comma")
    with pytest.raises(ValueError, match="the control needs"):
        amplify(gdn, dataclasses.replace(commas, pool=commas.pool[:2]), PROMPTS)


def test_a_token_of_several_reads_has_no_one_query() -> None:
    """Refused by name, before anything runs; a token with one is not."""
    ids, said = torch.arange(24).view(2, 12), "mamba3_mimo reads it several times"
    model = ws.HookedRecurrentModel(architecture_named("mamba3_mimo").build())
    with pytest.raises(ValueError, match=f"this experiment takes the one vector .* {said}"):
        at_positions(model, 1, ids, None, torch.tensor([[3], [4]]))
    with pytest.raises(ValueError, match=f"this experiment takes the one vector .* {said}"):
        sign_test(model, 1, 0, ids, n=2, targets=[5], context=12, per_window=1)
    sae = ws.WriteSAE(ws.SAEConfig(d_key=16, d_value=12, n_atoms=4, k=1, layer=1, head=0))
    with pytest.raises(ValueError, match=f"logit_change, whose closed form has one query, takes .* {said}"):
        logit_change(model, sae, ids, check_model=False)
    plain = ws.HookedRecurrentModel(architecture_named("mamba3").build())
    assert at_positions(plain, 1, ids, None, torch.tensor([[3], [4]]))[1].shape == (2, 1, 4, 16)
