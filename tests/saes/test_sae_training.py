"""Training finds planted atoms, keeps its promises about norms and held-out data, and goes on where it stopped."""

import signal
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import writesae as ws
from writesae.recurrence import Write
from writesae.saes import SAEConfig, WriteSAE, collect, evaluate, train_sae, train_site
from writesae.saes.training.data import InMemory, spread
from writesae.saes.training.run import Run, Settings


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sharing matrices this small among threads only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CFG = SAEConfig(d_key=12, d_value=10, n_atoms=32, k=1)
SETTINGS = dict(steps=40, batch_size=256, progress=False)


def planted(n_planted=30, n=3000, noise=0.03, per_sample=1, seed=3):
    """Writes made of random planted rank-1 atoms, at random scales and with noise in each factor."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=random)  # noqa: E731
    V, W = F.normalize(draw(n_planted, 12), dim=-1), F.normalize(draw(n_planted, 10), dim=-1)
    chosen = torch.stack([torch.randperm(n_planted, generator=random)[:per_sample] for _ in range(n)])
    scale = torch.rand(n, per_sample, 1, generator=random) + 0.2
    key, value = V[chosen] + noise * draw(n, per_sample, 12), scale * (W[chosen] + noise * draw(n, per_sample, 10))
    data = Write(key[:, 0], value[:, 0]) if per_sample == 1 else Write(key, value, rank=per_sample)
    return Write(V, W), data


def found(sae, atoms):
    """For each planted atom the cosine of the nearest one that was learnt."""
    learnt = sae.atom(torch.arange(sae.cfg.n_atoms))
    return atoms[:, None].cosine(learnt[None]).amax(1)


def equal(a, b):
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("encoder, k, steps", [("tied", 1, 100), ("bilinear", 1, 100), ("bilinear", 2, 200)])
def test_planted_atoms_are_found(encoder, k, steps):
    atoms, data = planted(per_sample=k)
    cfg = SAEConfig(d_key=12, d_value=10, n_atoms=40, k=k, encoder=encoder)
    sae = train_sae(cfg, data, steps=steps, batch_size=256, lr=1e-2, validation=2500, progress=False)
    assert (found(sae, atoms) > 0.95).float().mean() > 0.9
    assert (found(WriteSAE(cfg), atoms) > 0.95).float().mean() < 0.1
    measured = sae.cfg.training["held_out"]
    assert measured["n"] == 500 and measured["cosine"] > (0.95 if k == 1 else 0.7) and measured["nmse"] < 0.15
    torch.testing.assert_close(sae.atom(torch.arange(40)).norm(), torch.ones(40))


def test_dense_data_trains_the_same_sae():
    _, data = planted()
    factored, dense = (train_sae(CFG, x, **SETTINGS) for x in (data, data.dense()))
    atoms = torch.arange(32)  # an atom's factors may both have changed sign
    torch.testing.assert_close(factored.atom(atoms).dense(), dense.atom(atoms).dense(), atol=1e-3, rtol=0)


def test_small_writes_count_as_much_as_large_ones():
    _, data = planted()
    scale = torch.logspace(-3, 3, 3000)
    one, other = train_sae(CFG, data, **SETTINGS), train_sae(CFG, data * scale, **SETTINGS)
    torch.testing.assert_close(one.V_dec, other.V_dec, atol=1e-3, rtol=0)
    large_only = train_sae(CFG, data * scale, unit_norm=False, **SETTINGS)
    small = data[:1500]
    assert evaluate(other, small)["cosine"] > evaluate(large_only, small)["cosine"] + 0.02


def test_nothing_held_out_is_learnt_from():
    _, data = planted()
    other = Write(data.key.clone(), data.value.clone())
    other.value[2000:] = 1.0
    a, b = (train_sae(CFG, x, validation=2000, **SETTINGS) for x in (data, other))
    assert equal(a, b) and a.cfg.training["held_out"] != b.cfg.training["held_out"]
    assert a.cfg.training["held_out"] == evaluate(a, data[2000:])
    assert "held_out" not in train_sae(CFG, data, **SETTINGS).cfg.training


def test_states_are_centred():
    _, data = planted()
    shifted = data.dense() + 5 * torch.outer(torch.ones(12), torch.ones(10))
    cfg = SAEConfig(d_key=12, d_value=10, n_atoms=32, k=2, target="state")
    sae = train_sae(cfg, shifted, **SETTINGS)
    torch.testing.assert_close(sae.mean, shifted.mean(0))
    assert evaluate(sae, shifted)["nmse"] < 0.6  # about the mean: 1 for the mean alone


def run_with_dead_atoms(**changes):
    """A training in which half the atoms read every write as negative, so that they never fire."""
    data = Write(torch.rand(500, 12), torch.rand(500, 10))  # all positive
    settings = dict(
        steps=100, batch_size=128, lr=1e-3, warmup=1, train_bias=False, aux_weight=0.0, aux_k=8, dead_after=3,
        resample_every=0, seed=0, unit_norm=False, bandwidth=0.5,
    )  # fmt: skip
    run = Run(CFG, InMemory(data), Settings(**settings | changes))
    with torch.no_grad():
        run.sae.V_dec[16:] *= -1
    for _ in range(20):
        run.one_step()
    return run


def test_dead_atoms_stay_dead_when_nothing_is_done():
    run = run_with_dead_atoms()
    assert run.dead()[16:].all() and run.n_resampled == 0


def test_dead_atoms_start_anew():
    run = run_with_dead_atoms(resample_every=5)
    assert run.dead()[16:].float().mean() < 0.5 and run.n_resampled >= 16


def test_the_auxiliary_loss_revives_dead_atoms():
    """An atom that reads a little of what is left, though never enough to be chosen, learns to read more of it."""
    fired = {}
    for weight in (0.0, 1.0):
        run = run_with_dead_atoms(lr=3e-2, aux_weight=weight)
        with torch.no_grad():
            run.sae.V_dec[16:] = F.normalize(run.sae.V_dec[16:].abs() + 3 * torch.randn(16, 12), dim=-1)
        before = run.sae.W_dec[16:].clone()
        for state in run.adam.state.values():
            state["exp_avg"].zero_()
        for _ in range(2):
            run.one_step()
        fired[weight] = (run.sae.W_dec[16:] - before).norm()
    assert fired[0.0] < 0.01 < 0.1 < fired[1.0]


@contextmanager
def counted_steps(interrupt_at=None):
    """Counts the optimiser's steps while the block runs, by torch's own hook; Ctrl-C in the middle of one of them."""
    steps = []

    def after(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(after)
    try:
        yield steps
    finally:
        hook.remove()


@pytest.mark.parametrize("encoder", ["tied", "bilinear"])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, encoder):
    _, data = planted()
    cfg = SAEConfig(d_key=12, d_value=10, n_atoms=200, k=2, encoder=encoder)  # many, so that some die
    settings = SETTINGS | dict(dead_after=4, resample_every=5, train_bias=True, validation=2500)
    whole = train_sae(cfg, data, **settings)
    assert whole.cfg.training["resampled"] > 0
    path = tmp_path / "folder" / "checkpoint.safetensors"
    before = signal.getsignal(signal.SIGINT)
    with counted_steps(interrupt_at=13), pytest.raises(KeyboardInterrupt, match="after step 13 of 40"):
        train_sae(cfg, data, checkpoint=path, **settings)
    assert signal.getsignal(signal.SIGINT) is before
    torch.manual_seed(99)  # what else is drawn makes no difference
    with counted_steps() as steps:
        resumed = train_sae(cfg, data, checkpoint=path, checkpoint_every=7, **settings)
    assert len(steps) == 40 - 13
    assert equal(resumed, whole) and resumed.cfg == whole.cfg
    with counted_steps() as steps:
        assert equal(train_sae(cfg, data, checkpoint=path, **settings), whole) and steps == []  # nothing left to do
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.safetensors"]


def test_checkpoints_of_another_training_are_refused(tmp_path):
    _, data = planted()
    path = tmp_path / "checkpoint"
    train_sae(CFG, data, checkpoint=path, **SETTINGS)
    other = SAEConfig(d_key=12, d_value=10, n_atoms=33, k=1)
    for arguments, named in (
        ((other, data, SETTINGS), "its sae differ"),
        ((CFG, data, SETTINGS | dict(seed=1)), "its settings differ"),
        ((CFG, planted(seed=4)[1], SETTINGS), "its data differ"),
        ((CFG, Write(data.key, data.value.flip(0)), SETTINGS), "its data differ"),
    ):
        cfg, x, settings = arguments
        with pytest.raises(ValueError, match=f"checkpoint of another training: {named}.*delete it to start anew"):
            train_sae(cfg, x, checkpoint=path, **settings)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint is not a whole checkpoint .*delete it to start anew"):
        train_sae(CFG, data, checkpoint=path, **SETTINGS)
    WriteSAE(CFG).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint of an SAE's training"):
        train_sae(CFG, data, checkpoint=tmp_path / "sae_weights.safetensors", **SETTINGS)


def test_training_draws_nothing_from_the_callers_generator():
    _, data = planted()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_sae(CFG, data, **SETTINGS | dict(steps=2))
    assert torch.rand(1) == expected


def test_what_cannot_be_trained_on():
    _, data = planted()
    for bad in (data.dense()[0], Write(data.key[None], data.value[None]), data.dense().mT, data[:0]):
        with pytest.raises(ValueError, match=r"an SAE of 12x10 learns from \[N, 12, 10\]"):
            train_sae(CFG, bad, **SETTINGS)
    broken = Write(data.key, data.value.clone())
    broken.value[7, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite; leave them out"):
        train_sae(CFG, broken, **SETTINGS)
    untied = SAEConfig(d_key=12, d_value=10, n_atoms=32, k=1, encoder="bilinear")
    with pytest.raises(FloatingPointError, match=r"training diverged: the loss of step \d+ is .*; lower lr=1e\+30"):
        train_sae(untied, data, lr=1e30, **SETTINGS)
    for boundary in (0, 3000):
        with pytest.raises(ValueError, match=f"validation={boundary} must split the 3000 samples: 1 to 2999"):
            train_sae(CFG, data, validation=boundary, **SETTINGS)
    few = train_sae(CFG, data[:5], **SETTINGS)  # fewer samples than atoms is no error
    assert evaluate(few, data[:5])["nmse"] < 0.01


# On a model


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def test_collected_are_the_caches_own(model):
    torch.manual_seed(0)
    tokens = torch.randint(100, 500, (5, 24))
    layer, head = model.sites[1].layer, 2
    _, cache = model.run_with_cache(tokens)
    for target, whole in (("write", cache.write(layer)), ("delta", cache.delta(layer))):
        got = collect(model, tokens, layer, head, target, batch_size=2, progress=False)
        assert got.shape == (5 * 24,)
        torch.testing.assert_close(got.dense(), whole[:, :, head].dense().flatten(0, 1))
    got = collect(model, tokens, layer, head, "state", batch_size=2, progress=False)
    assert got.shape == (5, 24)  # not built
    torch.testing.assert_close(got.dense(), cache.state(layer, range(24))[:, :, head])
    rwkv = ws.HookedRecurrentModel.from_pretrained("tiny-rwkv7")
    got = collect(rwkv, tokens, 3, 2, "state", stride=10, batch_size=2, progress=False)  # a decay a key channel: built
    _, cache = rwkv.run_with_cache(tokens)
    torch.testing.assert_close(got, cache.state(3, [9, 19])[:, :, 2].flatten(0, 1))
    with pytest.raises(IndexError, match=f"head 4 of layer {layer}: allowed are 0 to 3"):
        collect(model, tokens, layer, 4)


def test_train_site(model, tmp_path):
    site = model.sites[-1]
    text = "The state of the Union is strong, and the people of these States are its strength. " * 12
    settings = dict(context=16, n_atoms=16, steps=5, batch_size=64, progress=False)
    sae = train_site(model, [text, text], site.layer, 1, **settings)
    sae.check_fits(model)
    c = sae.cfg
    assert (c.layer, c.head, c.target, c.fingerprint) == (site.layer, 1, "write", model.fingerprint(site.layer))
    assert c.model_id == "tiny-gdn" and c.training["context"] == 16 and c.training["steps"] == 5
    assert c.training["held_out"]["n"] > 0 and c.training["held_out"]["n"] % 16 == 0
    assert (c.encoder, c.k) == ("tied", 1)
    assert WriteSAE.from_pretrained(sae.save_pretrained(tmp_path)).cfg == c
    states = train_site(model, text, site.layer, 0, target="state", k=4, **settings)
    assert states.mean.abs().max() > 0 and states.cfg.encoder == "bilinear"
    with pytest.raises(ValueError, match=r"makes 0 windows of 512 tokens .*and 2 are needed: give more or longer text"):
        train_site(model, "Too short.", site.layer, 0)


def test_another_seed_is_another_training():
    """torch's generator takes 32 bits of a seed: what tells seeds of ours apart must lie in these."""
    _, data = planted()
    one, same, other = (train_sae(CFG, data, **SETTINGS | dict(seed=seed)) for seed in (1, 1, 2))
    assert equal(one, same) and not equal(one, other)
    drawn = [
        tuple(torch.randint(2**31, (2,), generator=torch.Generator().manual_seed(spread(seed, which))).tolist())
        for seed in (0, 1, 2, 5000)
        for which in (0, 1, 2**20)
    ]
    assert len(set(drawn)) == len(drawn)


def test_where_gradients_are_switched_off():
    """As at the top of many a notebook: training switches them on for itself, and leaves them as they were."""
    _, data = planted()
    expected = train_sae(CFG, data, **SETTINGS)
    with torch.no_grad():
        assert equal(train_sae(CFG, data, **SETTINGS), expected) and not torch.is_grad_enabled()
