"""The SAE itself: factored equals dense, streaming equals states, files that come back equal or fail with a reason."""

import dataclasses
import hashlib
import itertools
import json
import os
import types

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from writesae.jobs.disk import read_json
from writesae.recurrence import Recurrence, Write, states
from writesae.recurrence.dynamics import States
from writesae.saes import VARIANTS, SAEConfig, WriteSAE, files
from writesae.saes.reconstruction import DenseActivations, Reading
from writesae.saes.sparsities.selection import topk
from writesae.saes.sparsities.thresholds import AboveThreshold, CountActive

SIZES = dict(d_key=6, d_value=5, n_atoms=12, k=3)
# Every encoder with every decoder and every sparsity; rank, centring and bias vary along.
KINDS = [
    dict(encoder=encoder, decoder=decoder, sparsity=sparsity, rank=1 + n % 2, target=("write", "delta", "state")[n % 3])
    | dict(decoder_bias=n % 4 > 1)
    for n, (encoder, decoder, sparsity) in enumerate(
        itertools.product(
            ("tied", "bilinear", "dense"), ("factored", "dense"), ("topk", "batch_topk", "jumprelu", "gated")
        )
    )
]
FORMS = ["write", "rank 2", "batches", "states", "states, a decay a key channel"]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(v) for v in kind.values()))


def make(seed=0, **changes):
    """A float64 SAE in which no parameter is trivial: encoder, biases, mean and thresholds are all random."""
    torch.manual_seed(seed)
    sae = WriteSAE(SAEConfig(**(SIZES | changes))).double()
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name.endswith("_enc") and name != "b_enc":
                p.normal_()
            elif name.startswith(("b_", "r_")):
                p.normal_(std=0.1)
            elif name == "log_threshold":
                p.uniform_(-1, 0)
        if sae.mean is not None:
            sae.mean.normal_()
        if sae.cfg.sparsity == "batch_topk":
            sae.threshold.fill_(0.7)
    return sae


def matrices_of(form, seed=1):
    torch.manual_seed(seed)
    if form.startswith("states"):
        decay = -torch.rand(2, 70, *((6,) if "channel" in form else ())).double()
        return States(Write(torch.randn(2, 70, 6).double(), torch.randn(2, 70, 5).double()), decay)
    lead, rank = ((2, 4) if form == "batches" else (7,)), 2 if form == "rank 2" else 1
    extra = () if rank == 1 else (rank,)
    return Write(torch.randn(*lead, *extra, 6).double(), torch.randn(*lead, *extra, 5).double(), rank=rank)


def gradients(sae, scalar):
    sae.zero_grad()
    scalar.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}")


def explicit(sae, X, over_batch=True, chosen=None):
    """Codes and reconstruction of dense matrices, as one would write them down."""
    E = sae.encoder.dense() if isinstance(sae.encoder, Write) else sae.encoder
    A = sae.decoder.dense() if isinstance(sae.decoder, Write) else sae.decoder
    mean = torch.zeros(6, 5).double() if sae.mean is None else sae.mean
    pre = torch.einsum("nkv,...kv->...n", E, X - mean) + sae.b_enc
    if chosen is not None:
        codes = pre.relu() * chosen
    elif sae.cfg.sparsity == "topk":
        codes = pre.relu() * torch.zeros_like(pre).scatter(-1, pre.topk(sae.cfg.k).indices, 1.0)
    elif sae.cfg.sparsity == "batch_topk" and over_batch:
        best = pre.detach().flatten().topk(sae.cfg.k * pre[..., 0].numel()).values
        codes = pre.relu() * (pre >= best[-1])
    elif sae.cfg.sparsity == "batch_topk":
        codes = pre * (pre > sae.threshold)
    elif sae.cfg.sparsity == "jumprelu":
        codes = pre * (pre > sae.log_threshold.exp())
    else:
        codes = (pre > 0) * ((pre - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
    bias = sae.b_dec if sae.cfg.decoder_bias else 0
    return codes, torch.einsum("...n,nkv->...kv", codes, A) + bias + mean


@pytest.mark.parametrize("form", FORMS)
@each_kind
def test_codes_and_reconstructions_are_the_explicit_ones(kind, form):
    sae, x = make(**kind), matrices_of(form)
    X = x.dense()
    for over_batch in (True, False):
        codes, reconstruction = explicit(sae, X, over_batch)
        assert (codes > 0).any() and (codes == 0).any() and codes.shape == (*x.shape, 12)
        for given in (x, X):
            torch.testing.assert_close(sae.encode(given, over_batch=over_batch), codes)
            with torch.no_grad():
                torch.testing.assert_close(sae.encode(given, over_batch=over_batch), codes)
            torch.testing.assert_close(sae.sparsify(sae.pre(given), over_batch=over_batch)[0].sum(-1), codes.sum(-1))
        values, indices = sae.topk(x, over_batch=over_batch)
        assert (values.diff(dim=-1) <= 0).all() and values.shape == indices.shape
        assert sae.topk(x, 1, over_batch=over_batch)[0].equal(values[..., :1])
        torch.testing.assert_close(sae.decode(codes), reconstruction)
        constant = sae.decode(torch.zeros(12).double())
        torch.testing.assert_close(sae.decode_write(values, indices).dense() + constant, reconstruction)


@pytest.mark.parametrize("form", FORMS)
@each_kind
def test_loss_and_gradients_are_those_of_the_explicit_error(kind, form):
    sae, x = make(**kind), matrices_of(form)
    X = x.dense()
    mean = 0 if sae.mean is None else sae.mean
    codes, reconstruction = explicit(sae, X)
    nmse = (X - reconstruction).square().sum() / (X - mean).square().sum()
    expected = gradients(sae, nmse)
    if kind["sparsity"] == "jumprelu":  # thresholds have a straight-through gradient
        expected["log_threshold"] = None
    flat = {name for name, g in expected.items() if g is not None and g.abs().max() < 1e-4}
    assert flat == ({"b_enc"} if kind["sparsity"] == "gated" else set())  # a hard gate passes no gradient
    for given in (x, X):
        out = sae.loss(given)
        torch.testing.assert_close(out.nmse, nmse)
        found = gradients(sae, out.nmse)
        if kind["sparsity"] == "jumprelu":
            found["log_threshold"] = None
        assert_same(
            {n: g for n, g in found.items() if g is not None}, {n: g for n, g in expected.items() if g is not None}
        )
        torch.testing.assert_close(out.error2, (X - reconstruction).square().sum((-1, -2)))
        torch.testing.assert_close(out.norm2, (X - mean).square().sum((-1, -2)))
        assert out.fired.equal((codes > 0).flatten(0, -2).sum(0)) and out.l0 == (codes > 0).sum(-1).double().mean()
    if kind["sparsity"] in ("topk", "batch_topk"):  # the codes' own gradients, which a fused encoder can lose
        ours = sae.encode(x, over_batch=True).square().sum()
        assert_same(gradients(sae, ours), gradients(sae, explicit(sae, X)[0].square().sum()))


@pytest.mark.parametrize("form", FORMS)
@each_kind
def test_every_form_has_the_same_whole_loss_and_gradients(kind, form):
    """With dead atoms revived, penalties and gates: streaming, in factors and dense."""
    sae, x = make(**kind), matrices_of(form)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 4, 7, 8]] = True
    outs = []
    for given in (x, x.dense()):
        out = sae.loss(given, dead=dead, aux_k=2, aux_weight=0.5, sparsity_weight=0.3)
        outs.append((out.loss, out.aux, out.penalty, out.cosine, gradients(sae, out.loss)))
    for one, other in zip(outs[0][:4], outs[1][:4], strict=True):
        torch.testing.assert_close(one, other)
    assert_same(outs[0][4], outs[1][4])
    assert (out.aux > 0) == (kind["sparsity"] in ("topk", "batch_topk"))


@pytest.mark.parametrize("form", ["rank 2", "states"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k["sparsity"] in ("topk", "batch_topk")], ids=str)
def test_auxiliary_loss_is_the_residual_rebuilt_by_dead_atoms(kind, form):
    sae, X = make(**kind), matrices_of(form).dense()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 4, 7, 8]] = True
    left = (X - explicit(sae, X)[1]).detach()
    chosen = torch.zeros(*X.shape[:-2], 12).double()
    chosen.scatter_(-1, sae.pre(X).detach().masked_fill(~dead, -torch.inf).topk(2).indices, 1.0)
    rebuilt = explicit(sae, X, chosen=chosen)[1] - explicit(sae, X, chosen=0 * chosen)[1]
    aux = (left - rebuilt).square().sum() / left.square().sum()
    expected = {name: g for name, g in gradients(sae, aux).items() if name != "b_dec"}
    for given in (matrices_of(form), X):
        out = sae.loss(given, dead=dead, aux_k=2, aux_weight=0.5)
        torch.testing.assert_close(out.aux, aux)
        torch.testing.assert_close(out.loss, out.nmse + 0.5 * out.aux)
        found = gradients(sae, out.aux)
        assert found.pop("b_dec", torch.zeros(1)).abs().max() == 0  # only the dead atoms learn from what is left
        assert_same(found, expected)
        assert out.n_dead == 4


def test_gates_alone_reconstruct_with_the_decoder_as_it_is():
    sae, X = make(sparsity="gated", encoder="bilinear", decoder_bias=True), matrices_of("write").dense()
    gates = (torch.einsum("nkv,bkv->bn", sae.encoder.dense(), X) + sae.b_enc).relu()
    alone = X - sae.b_dec.detach() - torch.einsum("bn,nkv->bkv", gates, sae.decoder.dense().detach())
    power = X.square().sum()
    expected = sae.loss(X).nmse + alone.square().sum() / power + 0.3 * gates.sum() / (7 * power).sqrt()
    whole = sae.loss(X, sparsity_weight=0.3).loss
    torch.testing.assert_close(whole, expected)
    assert_same(gradients(sae, whole), gradients(sae, expected))


@pytest.mark.parametrize("n, k", [(2048, 32), (2048, 1), (64, 8), (60, 8), (63, 1), (64, 9)])
def test_topk_by_groups_is_topk(n, k):
    torch.manual_seed(0)
    for x in (torch.randn(3, 50, n), torch.randint(0, 5, (40, n)).float(), torch.zeros(2, n)):
        values, indices = topk(x, k)
        assert values.equal(x.topk(k).values) and x.gather(-1, indices).equal(values)
        assert all(len(row.unique()) == k for row in indices.flatten(0, -2))


def test_thresholds_have_the_straight_through_gradient():
    torch.manual_seed(0)
    pre, log_threshold, h = torch.rand(50, 4).double(), torch.full((4,), -0.7).double(), 0.4
    pre.requires_grad_()
    log_threshold.requires_grad_()
    weight = torch.randn(50, 4).double()
    theta = log_threshold.exp()
    near = ((pre - theta).abs() < h * theta / 2).double()
    assert 5 < near.sum() < 100
    (AboveThreshold.apply(pre, log_threshold, h) * weight).sum().backward()
    # theta / width = 1 / h; and d theta / d log_threshold = theta
    torch.testing.assert_close(log_threshold.grad, (-(theta / (h * theta)) * near * weight).sum(0) * theta)
    torch.testing.assert_close(pre.grad, weight * (pre > theta))
    log_threshold.grad = pre.grad = None
    (CountActive.apply(pre, log_threshold, h) * weight[:, 0]).sum().backward()
    torch.testing.assert_close(log_threshold.grad, (-near / (h * theta) * weight[:, :1]).sum(0) * theta)
    assert pre.grad is None


@pytest.mark.parametrize("form", ["write", "states"])
@pytest.mark.parametrize("broken", ["no values in the Gram matrix", "no decay", "no offset"])
@torch.no_grad()
def test_what_is_left_out_is_noticed(form, broken):
    sae, x = make(encoder="bilinear", target="state"), matrices_of(form)
    nmse = float(sae.loss(x.dense()).nmse)
    torch.testing.assert_close(float(sae.loss(x).nmse), nmse)
    if broken == "no decay" and form == "states":
        x = States(x.gain, 0.9 * x.log_decay)
    batch = sae.batch(x)
    if broken == "no offset":
        batch.encoding = Reading(x, sae.encoder)
    active = sae.sparsity.activations(sae, batch, over_batch=True, bandwidth=0.5)
    if broken == "no values in the Gram matrix":
        active = dataclasses.replace(active, rows=Write(active.rows.key, 0 * active.rows.value))
    found = float(batch.error2(active)[0].sum() / batch.power)
    if broken == "no decay" and form == "write":  # which has none: what is whole stays as it is
        torch.testing.assert_close(found, nmse)
    else:
        assert abs(found - nmse) > 1e-3


def test_loss_reports_the_top_atom():
    sae = make(k=2)
    with torch.no_grad():
        sae.b_enc.zero_()
    x = sae.atom(torch.tensor([3, 5])) * 2.5
    out = sae.loss(x)
    values, indices = sae.topk(x)
    assert indices[:, 0].tolist() == [3, 5]
    torch.testing.assert_close(out.cosine, torch.ones(2).double())
    torch.testing.assert_close(values[:, 0], torch.full((2,), 2.5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.norm2, torch.full((2,), 6.25).double(), atol=1e-5, rtol=0)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing fires: nothing is reconstructed
    out = sae.loss(x)
    assert out.l0 == 0 and out.nmse == 1 and (out.cosine == 0).all()
    assert (sae.encode(x) == 0).all()


def test_many_active_atoms_of_one_matrix_cost_no_gram_matrix_each():
    """One matrix with everything active, among others with nothing: codes of all atoms, and the same loss."""
    sae = make(sparsity="batch_topk", k=4)
    x = matrices_of("write") * torch.tensor([100.0, 1, 1, 1, 1, 1, 1]).double()
    indices, active = sae.sparsity.choose(sae, sae.pre(x), over_batch=True)
    form = sae.batch(x).chosen(indices, active)
    wide = type(form)
    codes, reconstruction = explicit(sae, x.dense())
    for given in (x, x.dense()):
        torch.testing.assert_close(sae.loss(given).error2, (x.dense() - reconstruction).square().sum((-1, -2)))
    torch.testing.assert_close(form.spread(12), codes)
    assert wide is DenseActivations or active.shape[-1] < 12


def test_a_batch_topk_reads_single_matrices_by_its_threshold():
    sae, x = make(sparsity="batch_topk"), matrices_of("states")
    sae.threshold.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"no threshold yet .*calibrate"):
        sae.encode(x)
    sae.calibrate(x)
    assert (sae.encode(x) > 0).sum() == 3 * 2 * 70
    torch.testing.assert_close(sae.encode(x), sae.encode(x, over_batch=True))
    torch.testing.assert_close(sae.encode(x[:1]), sae.encode(x)[:1])  # whatever it is seen with
    assert not torch.allclose(sae.encode(x[:1], over_batch=True), sae.encode(x)[:1])
    with pytest.raises(ValueError, match="calibrate is for batch_topk; this SAE has sparsity 'topk'"):
        make().calibrate(x)


def test_soft_gates_of_the_papers_code():
    sae, x = make(sparsity="gated", gate_temperature=0.1), matrices_of("write")
    pre = sae.pre(x)
    strength = ((pre - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
    torch.testing.assert_close(sae.encode(x), torch.sigmoid(pre / 0.1) * strength)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_by_name(name):
    cfg = SAEConfig.variant(name, **SIZES)
    assert (cfg.encoder, cfg.decoder) == (VARIANTS[name]["encoder"], VARIANTS[name]["decoder"])
    sae = WriteSAE(cfg)
    torch.testing.assert_close(sae.atom(torch.arange(12)).norm(), torch.ones(12))
    names = {n for n, _ in sae.named_parameters()}
    assert ("A_dec" in names) == (cfg.decoder == "dense") and ("A_enc" in names) == (cfg.encoder == "dense")
    assert ("V_enc" in names) == (cfg.encoder == "bilinear") and ("V_dec" in names) == (cfg.decoder == "factored")
    rank = {"dense": 5}.get(cfg.decoder, cfg.rank)
    assert sae.atom(3).rank == rank
    atoms = sae.decoder if isinstance(sae.decoder, torch.Tensor) else sae.decoder.dense()
    torch.testing.assert_close(sae.atom(torch.tensor([3, 4])).dense(), atoms[3:5])


def test_an_unknown_variant():
    with pytest.raises(ValueError, match="no variant 'FlatterSAE': allowed are WriteSAE, BilinearSAE"):
        SAEConfig.variant("FlatterSAE", **SIZES)


@pytest.mark.parametrize("kind", [dict(rank=1), dict(rank=3), dict(decoder="dense")], ids=str)
def test_atoms_are_brought_back_to_norm_1(kind):
    sae = make(encoder="bilinear", **kind)
    with torch.no_grad():
        for name in ("V_dec", "W_dec", "A_dec"):
            if hasattr(sae, name):
                getattr(sae, name).mul_(torch.rand(12, *[1] * (getattr(sae, name).ndim - 1)).double() + 0.5)
    before = sae.atom(torch.arange(12))
    assert (before.norm() - 1).abs().max() > 0.1
    sae.normalize_decoder()
    after = sae.atom(torch.arange(12))
    torch.testing.assert_close(after.norm(), torch.ones(12).double())
    torch.testing.assert_close(before.cosine(after), torch.ones(12).double())  # the same matrix but for its size


@pytest.mark.parametrize("per_token", [1, 2])
def test_streaming_codes_are_those_of_the_states(per_token):
    torch.manual_seed(0)
    batch, pos, head = 2, 70, 2
    q, k = (F.normalize(torch.randn(batch, pos, head, 6).double(), dim=-1) for _ in range(2))
    log_decay, beta = -torch.rand(batch, pos, head).double(), torch.rand(batch, pos, head, 1).double()
    extra = () if per_token == 1 else (per_token,)
    write = Write(torch.randn(batch, pos, head, *extra, 6).double(), torch.randn(batch, pos, head, *extra, 5).double())
    if per_token == 2:
        write = Write(write.key, write.value, rank=2)
    rec = Recurrence(q, log_decay, -beta * log_decay.exp()[..., None] * k, k)
    initial = torch.randn(batch, head, 6, 5).double()
    S = torch.stack(list(states(rec, write, initial)), 1)
    before = torch.cat([initial[:, None], S[:, :-1]], 1)
    erased = (rec.b[..., None, :] @ before).squeeze(-2)
    delta = write + Write(rec.a, erased)  # what each token adds to the decayed state

    sae, h = make(target="state"), 1
    expected = sae.pre(S[:, :, h])
    streamed = sae.encode_states(delta[:, :, h], log_decay[:, :, h], sae.pre(initial[:, h]))
    torch.testing.assert_close(streamed, expected)
    torch.testing.assert_close(sae.sparsify(streamed), sae.topk(S[:, :, h]))
    first = sae.encode_states(delta[:, :30, h], log_decay[:, :30, h], sae.pre(initial[:, h]))
    rest = sae.encode_states(delta[:, 30:, h], log_decay[:, 30:, h], first[:, -1])
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)
    # the native write in place of the delta forgets the erase: it must not pass
    wrong = sae.encode_states(write[:, :, h], log_decay[:, :, h], sae.pre(initial[:, h]))
    assert (wrong - expected).abs().max() > 0.1
    # without a first state
    from_nothing = torch.stack(list(states(Recurrence(q, log_decay), write)), 1)
    torch.testing.assert_close(sae.encode_states(write[:, :, h], log_decay[:, :, h]), sae.pre(from_nothing[:, :, h]))


def test_streaming_needs_states_and_one_decay():
    delta = matrices_of("batches")
    with pytest.raises(ValueError, match="target 'state'; this SAE reads each write: use encode"):
        make().encode_states(delta, torch.zeros(2, 4).double())
    with pytest.raises(ValueError, match=r"\[batch, pos\], one decay per token; got \[2, 4, 6\].*encode dense states"):
        make(target="state").encode_states(delta, torch.zeros(2, 4, 6).double())


def test_atoms():
    sae = make()
    assert sae.atom(3).shape == () and sae.atom(torch.tensor([[0, 11]])).shape == (1, 2)
    everything = sae.atom(torch.arange(12))
    torch.testing.assert_close(everything.norm(), torch.ones(12).double())
    torch.testing.assert_close(everything.dense()[4], torch.outer(sae.V_dec[4], sae.W_dec[4]))
    for bad, named in ((12, 12), (-1, -1), (torch.tensor([3, 99]), 99)):
        with pytest.raises(IndexError, match=f"atom {named}: this SAE has atoms 0 to 11"):
            sae.atom(bad)
    with pytest.raises(TypeError, match="whole number"):
        sae.atom(True)
    values, indices = make(k=1).topk(matrices_of("write"))
    assert make(k=1).decode_write(values, indices).rank == 1


def test_matrices_of_another_size_are_refused():
    sae = make()
    for x in (torch.zeros(3, 5, 6), Write(torch.zeros(3, 5), torch.zeros(3, 6))):
        with pytest.raises(ValueError, match=r"reads matrices \[..., 6, 5\]; got \[..., 5, 6\]"):
            sae.encode(x)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=13), "k=13 active atoms out of n_atoms=12: k must be 1 to n_atoms"),
        (dict(k=0), "k must be a whole number of at least 1; got 0"),
        (dict(n_atoms=0), "n_atoms must be a whole number of at least 1; got 0"),
        (dict(target="query"), "no target 'query': allowed are write, delta, state"),
        (dict(model_id=3), "model_id must be text or None; got 3"),
        (dict(sparsity="l1"), "no sparsity 'l1': allowed are topk, batch_topk, jumprelu, gated"),
        (dict(rank=6), "rank=6: 6x5 matrices have rank 1 to 5"),
        (dict(gate_temperature=-1), "gate_temperature must be a number of at least 0; got -1"),
        (dict(head=-1), "head must be a whole number of at least 0, or None; got -1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig.from_dict(dict(target="write", encoder="tied") | SIZES | changes)
    with pytest.raises(ValueError, match="type must be write_sae; got 'flat'"):
        SAEConfig(**SIZES, type="flat")


# Files


@each_kind
def test_saved_and_loaded_are_equal(tmp_path, kind):
    sae = make(**kind, layer=9, head=4, model_id="a/b", training={"steps": 3}).float()
    sae.normalize_decoder()
    assert sae.save_pretrained(tmp_path / "new" / "sae") == tmp_path / "new" / "sae"
    for back in (WriteSAE.from_pretrained(tmp_path / "new" / "sae"), WriteSAE.from_pretrained(tmp_path / "new", "sae")):
        assert back.cfg == sae.cfg
        assert {n: t.tolist() for n, t in back.state_dict().items()} == {
            n: t.tolist() for n, t in sae.state_dict().items()
        }
    assert sorted(p.name for p in (tmp_path / "new" / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    described = json.loads((tmp_path / "new" / "sae" / "cfg.json").read_text())
    assert described["type"] == "write_sae" and described["layer"] == 9


def test_half_precision_files_come_back_as_float32_unit_atoms(tmp_path):
    sae = make().float()
    sae.save_pretrained(tmp_path, dtype=torch.float16)
    assert safetensors.torch.load_file(tmp_path / files.WEIGHTS)["V_dec"].dtype == torch.float16
    back = WriteSAE.from_pretrained(tmp_path)
    assert back.V_dec.dtype == torch.float32
    torch.testing.assert_close(back.V_dec, sae.V_dec, atol=1e-3, rtol=0)
    torch.testing.assert_close(back.atom(torch.arange(12)).norm(), torch.ones(12))


def rewrite_config(folder, **changes):
    values = read_json(folder / "cfg.json") | changes
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in values.items() if v != "drop"}))


def rewrite_weights(folder, change):
    tensors = safetensors.torch.load_file(folder / files.WEIGHTS)
    change(tensors)
    data = safetensors.torch.save(tensors)
    (folder / files.WEIGHTS).write_bytes(data)
    rewrite_config(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def flip_a_bit(folder):
    data = bytearray((folder / files.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / files.WEIGHTS).write_bytes(data)


DAMAGE = {
    "no weights": (
        lambda f: (f / files.WEIGHTS).unlink(),
        FileNotFoundError,
        "sae_weights.safetensors is missing: an SAE folder holds cfg.json and sae_weights.safetensors",
    ),
    "no config": (lambda f: (f / "cfg.json").unlink(), FileNotFoundError, "cfg.json is missing"),
    "cut off": (
        lambda f: (f / files.WEIGHTS).write_bytes((f / files.WEIGHTS).read_bytes()[:-40]),
        ValueError,
        "is not a whole safetensors file .*: cut off, or of another kind; fetch or save it again",
    ),
    "empty": (lambda f: (f / files.WEIGHTS).write_bytes(b""), ValueError, "is not a whole safetensors file"),
    "foreign": (
        lambda f: torch.save({"a": torch.ones(1)}, f / files.WEIGHTS),
        ValueError,
        "is not a whole safetensors file",
    ),
    "bit rot": (flip_a_bit, ValueError, "is not the file that cfg.json was written with .*damaged or exchanged"),
    "config cut off": (
        lambda f: (f / "cfg.json").write_text((f / "cfg.json").read_text()[:50]),
        ValueError,
        "cfg.json is not JSON .*fetch or save it again",
    ),
    "no type": (lambda f: rewrite_config(f, type="drop"), ValueError, 'cfg.json does not say its "type"'),
    "another type": (
        lambda f: rewrite_config(f, type="gated"),
        ValueError,
        "cfg.json says type 'gated'; this version can load: write_sae",
    ),
    "no checksum": (lambda f: rewrite_config(f, weights_sha256="drop"), ValueError, "lacks weights_sha256"),
    "field missing": (lambda f: rewrite_config(f, k="drop"), ValueError, "the configuration lacks k; its fields"),
    "field unknown": (lambda f: rewrite_config(f, size=2), ValueError, "cfg.json: the configuration has unknown size"),
    "k too large": (lambda f: rewrite_config(f, k=13), ValueError, "cfg.json: k=13 active atoms out of n_atoms=12"),
    "k is text": (lambda f: rewrite_config(f, k="3"), ValueError, "cfg.json: k must be a whole number"),
    "tensor missing": (
        lambda f: rewrite_weights(f, lambda t: t.pop("b_enc")),
        ValueError,
        "sae_weights.safetensors does not fit cfg.json beside it: b_enc is missing",
    ),
    "tensor unknown": (
        lambda f: rewrite_weights(f, lambda t: t.update(extra=torch.zeros(1))),
        ValueError,
        "extra is unknown",
    ),
    "other shape": (
        lambda f: rewrite_weights(f, lambda t: t.update(W_dec=torch.zeros(12, 6))),
        ValueError,
        r"W_dec is \[12, 6\], not \[12, 5\]",
    ),
    "several at once": (
        lambda f: rewrite_weights(f, lambda t: (t.pop("b_enc"), t.update(c=torch.zeros(1)))),
        ValueError,
        "b_enc is missing; c is unknown",
    ),
    "not a number": (
        lambda f: rewrite_weights(f, lambda t: t["W_dec"][2, 3:].fill_(torch.nan)),
        ValueError,
        "sae_weights.safetensors is not usable: 2 of 60 numbers in W_dec are NaN or infinite",
    ),
    "not unit norm": (
        lambda f: rewrite_weights(f, lambda t: t["V_dec"].mul_(2)),
        ValueError,
        "atoms must have norm 1; one is off by 1",
    ),
}


@pytest.mark.parametrize("damage, error, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_say_what_is_wrong(tmp_path, damage, error, message):
    make().float().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        WriteSAE.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_nothing_is_saved_that_is_not_finite(tmp_path):
    sae = make().float()
    with torch.no_grad():
        sae.b_enc[0] = 1e6
    with pytest.raises(ValueError, match="not saved: 1 of 12 numbers in b_enc are NaN or infinite"):
        sae.save_pretrained(tmp_path, dtype=torch.float16)  # too large for float16
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_saving_leaves_the_old_files(tmp_path, monkeypatch):
    old, new = make(0).float(), make(1).float()
    old.save_pretrained(tmp_path)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert (WriteSAE.from_pretrained(tmp_path).V_dec == old.V_dec).all()


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub

    make().float().save_pretrained(tmp_path / "layer_9")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name == "no/such":
            raise huggingface_hub.errors.LocalEntryNotFoundError("404 for no/such")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert WriteSAE.from_pretrained("owner/saes", "layer_9", revision="v1").cfg.k == 3
    wanted = ["layer_9/cfg.json", "layer_9/sae_weights.safetensors"]
    assert asked == [("owner/saes", dict(revision="v1", allow_patterns=wanted))]
    with pytest.raises(FileNotFoundError, match="no/such is no folder here, and the hub did not give it: 404"):
        WriteSAE.from_pretrained("no/such")
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder here nor a hub id of the form owner/name"):
        WriteSAE.from_pretrained("nowhere")


# Models


class StandIn:
    """As much of a hooked model as `check_fits` looks at."""

    def __init__(self):
        self.sites = [types.SimpleNamespace(layer=n, n_heads=4, d_key=6, d_value=5, rule="gdn") for n in (0, 2)]

    def fingerprint(self, layer):
        return f"abc{layer}"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer=None, head=None), r"does not say its layer and head.*dataclasses.replace\(sae.cfg, layer="),
        (dict(layer=1, head=0), "for layer 1, not recurrent here; recurrent layers: 0, 2"),
        (dict(layer=2, head=4), "for head 4; layer 2 has heads 0 to 3"),
        (dict(layer=2, head=3, d_value=7), "reads 6x7 matrices; layer 2 writes 6x5"),
        (
            dict(layer=2, head=3, fingerprint="xyz", model_id="a/b"),
            r"layer 2 of a/b \(fingerprint xyz\); the weights of that layer here are others \(abc2\)",
        ),
    ],
)
def test_check_fits(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).check_fits(StandIn())


def test_what_fits():
    make(layer=2, head=3, fingerprint="abc2").check_fits(StandIn())
    make(layer=2, head=3).check_fits(StandIn())
    make(layer=2, head=3, fingerprint="xyz").check_fits(StandIn(), check_model=False)
