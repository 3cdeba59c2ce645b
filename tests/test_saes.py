"""The SAE itself: factored equals dense, streaming equals states, files that come back equal or fail with a reason."""

import hashlib
import json
import types

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from writesae.recurrence import Recurrence, Write, states
from writesae.saes import SAEConfig, WriteSAE, files, write_sae

SIZES = dict(d_key=6, d_value=5, n_atoms=12, k=3)
KINDS = [  # rank, target, tied, lead
    (1, "write", True, (7,)),
    (1, "delta", False, (2, 4)),
    (2, "write", False, (7,)),
    (3, "state", True, (2, 4)),
    (1, "state", False, (7,)),
]


def make(seed=0, **changes):
    """A float64 SAE in which no parameter is trivial: encoder, bias and mean are all random."""
    torch.manual_seed(seed)
    sae = WriteSAE(SAEConfig(**(SIZES | changes))).double()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        if sae.mean is not None:
            sae.mean.normal_()
        if not sae.cfg.tied:
            sae.V_enc.normal_()
            sae.W_enc.normal_()
    return sae


def matrices(rank=1, lead=(7,), seed=1):
    torch.manual_seed(seed)
    extra = () if rank == 1 else (rank,)
    return Write(torch.randn(*lead, *extra, 6).double(), torch.randn(*lead, *extra, 5).double(), rank=rank)


def gradients(sae, scalar):
    sae.zero_grad()
    scalar.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


def explicit_nmse(sae, x):
    """Reconstruction error as one would write it down: dense matrices, dense codes."""
    X = x.dense()
    V, W = sae.encoder()
    mean = torch.zeros_like(X[0, 0] if X.ndim == 4 else X[0]) if sae.mean is None else sae.mean
    pre = torch.einsum("nk,...kv,nv->...n", V, X - mean, W) + sae.b_enc
    kept = torch.zeros_like(pre).scatter(-1, pre.topk(sae.cfg.k).indices, 1.0)
    reconstruction = mean + torch.einsum("...n,nk,nv->...kv", (pre * kept).relu(), sae.V_dec, sae.W_dec)
    return (X - reconstruction).square().sum() / (X - mean).square().sum()


@pytest.mark.parametrize("rank, target, tied, lead", KINDS)
def test_factored_is_dense(rank, target, tied, lead):
    sae, x = make(target=target, tied=tied), matrices(rank, lead)
    torch.testing.assert_close(sae.pre(x), sae.pre(x.dense()))
    codes = sae.encode(x)
    assert codes.shape == (*lead, 12) and (codes > 0).any() and ((codes > 0).sum(-1) <= 3).all() and (codes >= 0).all()
    torch.testing.assert_close(codes, sae.encode(x.dense()))
    with torch.no_grad():
        torch.testing.assert_close(codes, sae.encode(x))  # the path without gradients
    values, indices = sae.topk(x)
    assert values.shape == (*lead, 3) and (values.diff(dim=-1) <= 0).all()
    mean = 0 if sae.mean is None else sae.mean
    torch.testing.assert_close(sae.decode(codes), sae.decode_write(values, indices).dense() + mean)
    factored, dense = sae.loss(x), sae.loss(x.dense())
    for name in ("loss", "nmse", "aux", "error2", "norm2", "cosine", "values"):
        torch.testing.assert_close(getattr(factored, name), getattr(dense, name), msg=name)


@pytest.mark.parametrize("rank, target, tied, lead", KINDS)
def test_loss_and_gradients_are_those_of_the_explicit_error(rank, target, tied, lead):
    sae, x = make(target=target, tied=tied), matrices(rank, lead)
    explicit = explicit_nmse(sae, x)
    expected = gradients(sae, explicit)
    assert all(g.abs().max() > 1e-4 for g in expected.values())
    for given in (x, x.dense()):
        out = sae.loss(given)
        torch.testing.assert_close(out.nmse, explicit)
        assert_same(gradients(sae, out.loss), expected)
    # the codes' own gradients, which a fused encoder can lose
    sum_of_codes = sae.encode(x).square().sum()
    V, W = sae.encoder()
    X = x.dense() if sae.mean is None else x.dense() - sae.mean
    pre = torch.einsum("nk,...kv,nv->...n", V, X, W) + sae.b_enc
    assert_same(gradients(sae, sum_of_codes), gradients(sae, pre.topk(3).values.relu().square().sum()))


def test_a_gram_matrix_without_the_values_fails(monkeypatch):
    sae, x = make(), matrices()
    monkeypatch.setattr(write_sae, "gram", lambda v1, w1, v2, w2: v1 @ v2.mT)
    assert (sae.loss(x).nmse - explicit_nmse(sae, x)).abs() > 1e-3


@pytest.mark.parametrize("rank, target, tied, lead", KINDS)
def test_auxiliary_loss_is_the_residual_rebuilt_by_dead_atoms(rank, target, tied, lead):
    sae, x = make(target=target, tied=tied), matrices(rank, lead)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 4, 7, 8]] = True
    X = x.dense()
    left = (X - sae.decode(sae.encode(x))).detach()
    pre = sae.pre(X)[..., dead]
    values, indices = pre.topk(2)
    rebuilt = sum(
        values[..., j, None, None].relu()
        * sae.V_dec[dead][indices[..., j]][..., :, None]
        * sae.W_dec[dead][indices[..., j]][..., None, :]
        for j in range(2)
    )
    aux = (left - rebuilt).square().sum() / left.square().sum()
    expected = gradients(sae, aux)
    for given in (x, X):
        out = sae.loss(given, dead=dead, aux_k=2, aux_weight=0.5)
        torch.testing.assert_close(out.aux, aux)
        torch.testing.assert_close(out.loss, out.nmse + 0.5 * out.aux)
        assert_same(gradients(sae, out.aux), expected)
        assert out.n_dead == 4


def test_loss_reports_the_top_atom():
    sae = make(k=2)
    with torch.no_grad():
        sae.b_enc.zero_()
    x = sae.atom(torch.tensor([3, 5])) * 2.5
    out = sae.loss(x)
    assert out.indices[:, 0].tolist() == [3, 5]
    torch.testing.assert_close(out.cosine, torch.ones(2).double())
    torch.testing.assert_close(out.values[:, 0], torch.full((2,), 2.5).double())
    torch.testing.assert_close(out.norm2, torch.full((2,), 6.25).double())
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing fires: nothing is reconstructed
    out = sae.loss(x)
    assert out.l0 == 0 and out.nmse == 1 and (out.cosine == 0).all()
    assert (sae.encode(x) == 0).all()


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
    delta = matrices(lead=(2, 4))
    with pytest.raises(ValueError, match="target 'state'; this SAE reads each write: use encode"):
        make().encode_states(delta, torch.zeros(2, 4).double())
    with pytest.raises(ValueError, match=r"\[batch, pos\], one decay a token; got \[2, 4, 6\].*encode dense states"):
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
    values, indices = make(k=1).topk(matrices())
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
        (dict(target="query"), "target must be one of write, delta, state; got 'query'"),
        (dict(model_id=3), "model_id must be text or None; got 3"),
        (dict(head=-1), "head must be a whole number of at least 0, or None; got -1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig.from_dict(dict(target="write", tied=True) | SIZES | changes)
    with pytest.raises(ValueError, match="its type is write_sae"):
        WriteSAE(SAEConfig(**SIZES, type="flat"))


# Files


@pytest.mark.parametrize("rank, target, tied, lead", KINDS)
def test_saved_and_loaded_are_equal(tmp_path, rank, target, tied, lead):
    sae = make(target=target, tied=tied, layer=9, head=4, model_id="a/b", training={"steps": 3}).float()
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
    values = json.loads((folder / "cfg.json").read_text()) | changes
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
    "field unknown": (lambda f: rewrite_config(f, rank=2), ValueError, "cfg.json: the configuration has unknown rank"),
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
        "rows of V_dec must have norm 1.*off by 1",
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

    monkeypatch.setattr(files.os, "replace", full)
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
