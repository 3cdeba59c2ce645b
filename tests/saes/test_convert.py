"""Checkpoints of the paper's own code: the same numbers, every layout, nothing run; and the way to the hub."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reference_sae
from writesae.cli import app
from writesae.jobs.disk import read_json
from writesae.saes import SAEConfig, WriteSAE
from writesae.saes.paper.convert import convert, load_reference

N, D_K, D_V, K = 24, 6, 5, 4
KINDS = [
    (sae_type, rank, over_batch)
    for sae_type in reference_sae.TYPES
    for rank in (1, 2)
    for over_batch in (False, True)
    if not (sae_type == "flat" and rank == 2) and not (over_batch and sae_type.endswith(("gated", "jumprelu")))
]


def describe(sae_type="bilinear", rank=1, over_batch=False, **changes):
    """A configuration as its training writes it."""
    return dict(
        sae_type=sae_type, layer=9, head=4, n_features=N, d_k=D_K, d_v=D_V, d_in=D_K * D_V, expansion_factor=0, k=K,
        rank=rank, use_batchtopk=over_batch, seed=42, lr=3e-4, device="cuda", code_sha="abc1234",
    ) | changes  # fmt: skip


def make(folder, sae_type="bilinear", rank=1, name="best.pt", config=None, **changes):
    """A checkpoint as its training writes it; returns its tensors."""
    tensors = reference_sae.random_tensors(sae_type, N, D_K, D_V, rank)
    payload = {
        "model_state_dict": tensors,
        "config": config or describe(sae_type, rank),
        "epoch": 3,
        "step": 700,
        "val_mse": 0.25,
    }
    save(folder / name, payload | changes)
    return tensors


def save(path, payload):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(payload, path)
    return path


def difference(sae, sae_type, tensors, over_batch=False):
    """Largest difference of an activation or of a number in a reconstruction, as a share of the largest."""
    X = torch.randn(16, D_K, D_V)
    expected = reference_sae.codes(sae_type, tensors, X, K, over_batch)
    found = sae.encode(X, over_batch=over_batch)
    assert (expected > 0).sum() >= 16 and expected.max() > 0.1
    pairs = (found, expected), (sae.decode(found), reference_sae.reconstruction(sae_type, tensors, expected).view_as(X))
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)) for ours, theirs in pairs)


@pytest.mark.parametrize("sae_type, rank, over_batch", KINDS)
@torch.no_grad()
def test_every_type_computes_the_same(tmp_path, sae_type, rank, over_batch):
    tensors = make(tmp_path, sae_type, rank, config=describe(sae_type, rank, over_batch))
    sae = load_reference(tmp_path / "best.pt")
    assert difference(sae, sae_type, tensors, over_batch) < 1e-6
    assert (sae.cfg.layer, sae.cfg.head, sae.cfg.target, sae.cfg.unit_atoms) == (9, 4, "state", False)
    assert sae.cfg.sparsity == ("batch_topk" if over_batch else {"gated": "gated", "jumprelu": "jumprelu"}.get(
        sae_type.removeprefix("bilinear_"), "topk"
    ))  # fmt: skip
    record = sae.cfg.training["reference"]
    assert (record["val_mse"], record["step"], record["seed"], record["code_sha"]) == (0.25, 700, 42, "abc1234")
    assert record["assumed"] == [] and not record["verified"]
    if over_batch:
        with pytest.raises(ValueError, match="no threshold yet"):
            sae.encode(torch.randn(2, D_K, D_V))
    (folder,) = convert(tmp_path, tmp_path / "ours")
    ours = WriteSAE.from_pretrained(folder)
    assert ours.cfg == sae.cfg
    assert difference(ours, sae_type, tensors, over_batch) < 1e-6


BREAK = {  # what of a checkpoint could be mixed up, so that the comparison above must notice it
    "factors of the decoder": lambda t: t.update(V_dec=t["V_dec"].roll(1, 0)),
    "encoder for decoder": lambda t: t.update(V_enc=t["V_dec"], W_enc=t["W_dec"]),
    "no bias": lambda t: t["bias"].zero_(),
    "no encoder bias": lambda t: t["b_enc"].zero_(),
    "norms": lambda t: t.update(V_dec=torch.nn.functional.normalize(t["V_dec"], dim=-1)),
    "gate for magnitude": lambda t: t.update(b_gate=t["b_mag"], b_mag=t["b_gate"]),
    "no magnitudes": lambda t: t["r_mag"].zero_(),
    "thresholds not logarithms": lambda t: t["log_threshold"].exp_(),
    "columns for rows": lambda t: t.update(
        {"decoder.weight": t["decoder.weight"].T.reshape(t["decoder.weight"].shape)}
    ),
    "values before keys": lambda t: t.update(
        {"encoder.weight": t["encoder.weight"].view(N, D_K, D_V).mT.reshape(N, -1)}
    ),
}


@pytest.mark.parametrize("sae_type", reference_sae.TYPES)
@torch.no_grad()
def test_the_comparison_notices_what_is_mixed_up(tmp_path, sae_type):
    noticed = 0
    for name, change in BREAK.items():
        tensors = make(tmp_path, sae_type)
        try:
            change(broken := {key: x.clone() for key, x in tensors.items()})
        except KeyError:  # this type has no such tensor
            continue
        if broken.keys() != tensors.keys():
            continue
        save(tmp_path / "best.pt", {"model_state_dict": broken, "config": describe(sae_type)})
        assert difference(load_reference(tmp_path), sae_type, tensors) > 1e-3, name
        noticed += 1
    assert noticed >= 2


@torch.no_grad()
def test_choosing_over_the_batch_is_not_choosing_for_each(tmp_path):
    tensors = make(tmp_path)
    sae = load_reference(tmp_path)
    X = torch.randn(16, D_K, D_V)
    assert (sae.encode(X) - reference_sae.codes("bilinear", tensors, X, K, over_batch=True)).abs().max() > 1e-3


def bare(folder, sae_type, tensors):
    (folder / "best.pt").unlink()
    return save(folder / f"{sae_type}_L17_H2_nf24_k4_s42" / "best.pt", tensors)


@pytest.mark.parametrize("sae_type", reference_sae.TYPES)
@torch.no_grad()
def test_weights_alone_say_the_type_and_sizes(tmp_path, sae_type):
    tensors = make(tmp_path, sae_type)
    path = bare(tmp_path, sae_type, tensors)
    if sae_type == "flat":
        with pytest.raises(
            ValueError, match=r"nothing says how 30 numbers make a matrix; put d_k and d_v into config.js"
        ):
            load_reference(path)
        path.with_name("config.json").write_text(json.dumps(dict(d_k=D_K, d_v=D_V)))
    sae = load_reference(path)
    assert (sae.cfg.layer, sae.cfg.head, sae.cfg.k) == (17, 2, K)
    assert sae.cfg.training["reference"]["sae_type"] == sae_type
    assert difference(sae, sae_type, tensors) < 1e-6


@torch.no_grad()
def test_what_nothing_says_is_assumed_and_said(tmp_path):
    tensors = reference_sae.random_tensors("flat", 40, 4, 4, 1)
    sae = load_reference(save(tmp_path / "flat.pt", tensors))
    assert (sae.cfg.k, sae.cfg.d_key, sae.cfg.d_value, sae.cfg.layer) == (32, 4, 4, None)
    assert sae.cfg.training["reference"]["assumed"] == ["4x4 matrices", "k=32"]


@pytest.mark.parametrize("sae_type", reference_sae.TYPES[1:])
@torch.no_grad()
def test_old_factors_without_a_rank(tmp_path, sae_type):
    tensors = make(tmp_path, sae_type)
    old = {name: x[:, 0] if name[0] in "VW" else x for name, x in tensors.items()}
    for config in (describe(sae_type), {}):
        sae = load_reference(save(tmp_path / "x_k4" / "best.pt", {"model_state_dict": old, "config": config}))
        assert difference(sae, sae_type, tensors) < 1e-6


@torch.no_grad()
def test_what_else_its_code_takes(tmp_path):
    tensors = make(tmp_path, "bilinear_tied", config=describe("bilinear"))  # bilinear without an encoder is tied
    assert load_reference(tmp_path).cfg.encoder == "tied"
    assert difference(load_reference(tmp_path), "bilinear_tied", tensors) < 1e-6
    make(tmp_path, config=describe(k=99), optimizer_state_dict={"state": {0: {"exp_avg": torch.ones(2)}}})
    assert load_reference(tmp_path).cfg.k == N  # more than there are: all
    make(tmp_path, val_mse=torch.tensor(0.5), best_val_mse=float("inf"))
    record = load_reference(tmp_path).cfg.training["reference"]
    assert (record["val_mse"], record["best_val_mse"]) == (0.5, None) and "optimizer_state_dict" not in record
    (tmp_path / "config.json").write_text(json.dumps(describe(k=7) | {"note": "x"}))
    sae = load_reference(tmp_path)
    assert sae.cfg.k == K and sae.cfg.training["reference"]["note"] == "x", "what lies inside counts"


# Bad checkpoints


def drop(name):
    return lambda payload: payload["model_state_dict"].pop(name)


def add(name, tensor):
    return lambda payload: payload["model_state_dict"].update({name: tensor})


def configure(**changes):
    return lambda payload: payload["config"].update(changes)


BAD = {
    "missing tensor": (drop("W_enc"), "as an SAE of type bilinear, W_enc is missing"),
    "unknown tensor": (add("extra", torch.ones(1)), "extra is unknown"),
    "several": (lambda p: (drop("bias")(p), add("b", torch.ones(1))(p)), "bias is missing; b is unknown"),
    "other type": (configure(sae_type="flat"), "type flat, encoder.weight is missing.*V_enc is unknown"),
    "unknown type": (configure(sae_type="flatsae"), "unknown sae_type 'flatsae'; known are flat, rank1, bilinear"),
    "n_features": (configure(n_features=25), r"25 atoms of 6x5, V_enc is \[24, 1, 6\], not \[25, 1, 6\]"),
    "swapped sizes": (configure(d_k=5, d_v=6), r"V_enc is \[24, 1, 6\], not \[24, 1, 5\]; W_enc is"),
    "rank": (configure(rank=2), r"V_dec is \[24, 1, 6\], not \[24, 2, 6\]"),
    "d_in": (configure(d_in=31), "says d_in=31, but matrices are 6x5"),
    "number": (configure(k="many"), "k must be a whole number; got 'many'"),
    "k": (configure(k=0), "k must be a whole number of at least 1; got 0"),
    "flag": (configure(use_batchtopk="no"), "use_batchtopk must be true or false; got 'no'"),
    "no numbers": (lambda p: p["model_state_dict"]["b_enc"].fill_(torch.nan), "24 of 24 numbers in b_enc are NaN"),
    "whole numbers": (add("b_enc", torch.ones(N, dtype=torch.long)), "b_enc is torch.int64, not floating point"),
    "a single number": (add("V_enc", torch.tensor(1.0)), r"V_enc is \[\], not \[24, 1, 6\]"),
    "config a list": (lambda p: p.update(config=[1]), "config must be a dict; got list"),
    "no weights": (lambda p: p.update(model_state_dict={}), "holds no weights: .* but model_state_dict, config, epoch"),
}


@pytest.mark.parametrize("damage, message", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(tmp_path, damage, message):
    tensors = reference_sae.random_tensors("bilinear", N, D_K, D_V, 1)
    payload = {"model_state_dict": tensors, "config": describe(), "epoch": 1}
    damage(payload)
    path = save(tmp_path / "best.pt", payload)
    with pytest.raises(ValueError, match=f"best.pt.*{message}") as caught:
        load_reference(path)
    assert str(path) in str(caught.value)


class Code:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, sae=Code())
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert Path("it-ran").exists(), "the trap works"
    os.rmdir("it-ran")
    with pytest.raises(ValueError, match=r"best.pt wants to run code when it is loaded .*mkdir.*, which is refused"):
        load_reference(tmp_path / "best.pt")
    with pytest.raises(ValueError, match="nothing was run; have it saved again by somebody who trusts it"):
        WriteSAE.from_pretrained(tmp_path)
    save(tmp_path / "best.pt", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"wants to run code when it is loaded \(torch.nn.modules.linear.Linear\)"):
        load_reference(tmp_path)
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_damaged_file_is_an_error(tmp_path, keep):
    make(tmp_path)
    data = (tmp_path / "best.pt").read_bytes()
    for damaged in (data[:keep], bytes(range(256)) * 4):
        (tmp_path / "best.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best.pt is damaged, or no checkpoint"):
            load_reference(tmp_path)


def test_other_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a checkpoint nor a folder with best.pt or final.pt"):
        load_reference(tmp_path)
    with pytest.raises(ValueError, match="holds a list, not a dict of tensors"):
        load_reference(save(tmp_path / "best.pt", [torch.ones(1)]))
    make(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds a JSON list"):
        load_reference(tmp_path)


def test_folder_and_configuration_that_disagree(tmp_path):
    make(tmp_path / "writesae_L9_H5")
    with pytest.raises(ValueError, match="its configuration says head 4, its folder 5; say which: head="):
        load_reference(tmp_path / "writesae_L9_H5")
    assert load_reference(tmp_path / "writesae_L9_H5", head=4).cfg.head == 4
    cfg = load_reference(tmp_path / "writesae_L9_H5", head=5, layer=1, model_id="a/b").cfg
    assert (cfg.layer, cfg.head, cfg.model_id) == (1, 5, "a/b")


# Manifest


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


TAG = "writesae/qwen/L9_H4"


@pytest.mark.parametrize(
    "manifest",
    [
        lambda sha: {TAG: sha},
        lambda sha: {"L9_H4": sha.upper()},
        lambda sha: {f"{TAG}/best.pt": {"sha256": sha, "val_mse": 0.1}},
        lambda sha: {"qwen/L9_H4": {"SHA-256": sha}, "L9_H4": {"SHA256": "0" * 64}},  # the longer name counts
    ],
)
def test_manifest_is_verified(tmp_path, manifest):
    make(tmp_path / TAG)
    right = digest(tmp_path / TAG / "best.pt")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(right)))
    assert load_reference(tmp_path / TAG, root=tmp_path).cfg.training["reference"]["verified"]
    assert WriteSAE.from_pretrained(tmp_path, TAG).cfg.training["reference"]["verified"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest("1" * 64)))
    for load in (lambda: WriteSAE.from_pretrained(tmp_path, TAG), lambda: convert(tmp_path, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"best.pt has SHA-256 {right}, but .*manifest.json says {'1' * 64} for"):
            load()
    assert not (tmp_path / "out").exists()


def test_manifest_without_the_file(tmp_path):
    make(tmp_path / TAG)
    (tmp_path / "manifest.json").write_text(json.dumps({"flatsae_L9_H4": "0" * 64, "4": "0" * 64}))
    record = load_reference(tmp_path / TAG, root=tmp_path).cfg.training["reference"]
    assert not record["verified"] and record["sha256"] == digest(tmp_path / TAG / "best.pt")
    assert record["file"] == f"{TAG}/best.pt"


@pytest.mark.parametrize(
    "manifest, message",
    [
        ("{", "manifest.json is not JSON"),
        ("[]", "manifest.json holds a JSON list"),
        ('{"version": 1}', "manifest.json says 1 for 'version'; manifest.json maps tags or paths to a SHA-256"),
        ('{"a": {"md5": "x", "size": 3}}', "says 'an object with md5, size' for 'a'"),
        ('{"a": "abc"}', "says 'abc' for 'a'"),
        ('{"": "%s"}' % ("0" * 64), "for ''"),
    ],
)
def test_bad_manifests(tmp_path, manifest, message):
    make(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        load_reference(tmp_path)


# Layouts


@torch.no_grad()
def test_a_tree_becomes_the_same_tree(tmp_path):
    source, out = tmp_path / "ckpts", tmp_path / "out"
    tensors = {}
    for place, sae_type in (("writesae/qwen0p8b/L9_H4", "bilinear"), ("flatsae_L9_H4_s1", "flat")):
        tensors[place] = make(source / place, sae_type), sae_type
        (source / place / "config.json").write_text(json.dumps(describe(sae_type)))
    make(source / "flatsae_L9_H4_s1", "flat", name="final.pt")
    tensors["matrixsae_L9_H4"] = make(source / "matrixsae_L9_H4", "rank1", name="final.pt"), "rank1"
    tensors["loose/tied"] = make(source / "loose", "bilinear_tied", name="tied.pt"), "bilinear_tied"
    folders = convert(source, out, model_id="Qwen/Qwen3.5-0.8B")
    assert sorted(folders) == sorted(out / place for place in tensors)
    for place, (theirs, sae_type) in tensors.items():
        sae = WriteSAE.from_pretrained(out, place)
        assert sae.cfg.model_id == "Qwen/Qwen3.5-0.8B" and sae.cfg.layer == 9
        assert difference(sae, sae_type, theirs) < 1e-6
    assert convert(source / "loose" / "tied.pt", out / "one") == [out / "one"]
    assert convert(source / "matrixsae_L9_H4", out / "two", head=4) == [out / "two"]
    with pytest.raises(ValueError, match=r"layer and head are for one checkpoint; .* has 4: name one of them"):
        convert(source, out, layer=3)


def test_nothing_is_left_out_silently(tmp_path):
    source, out = tmp_path / "ckpts", tmp_path / "out"
    make(source / "good_L9_H4")
    make(source / "bad_L9_H4", sae=Code())
    (source / "empty_L9_H4").mkdir()
    (source / "empty_L9_H4" / "config.json").write_text(json.dumps(describe()))
    (source / "config.json").write_text('{"model_type": "qwen"}')  # not of an SAE
    with pytest.raises(ValueError, match="2 of 3 checkpoints could not be converted:") as caught:
        convert(source, out)
    assert "bad_L9_H4/best.pt wants to run code" in str(caught.value)
    assert "empty_L9_H4 has the config.json of an SAE, and no .pt file" in str(caught.value)
    assert [p.parent.name for p in out.rglob("cfg.json")] == ["good_L9_H4"]
    make(source / "good_L9_H4" / "best")
    make(source / "good_L9_H4", name="x.pt")
    make(source / "good_L9_H4" / "x")
    with pytest.raises(ValueError, match=r"would go to .*x, as another checkpoint does"):
        convert(source, out)
    for nothing in (out, tmp_path / "no.pt", "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no \.pt file|neither a file nor a folder here, nor a hub id"):
            convert(nothing, tmp_path / "else")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: what is asked for comes, what is uploaded lies there."""
    import huggingface_hub

    served, asked = tmp_path / "hub", []

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        if not (served / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"404 for {name}")
        cache = tmp_path / f"cache{len(asked)}"
        cache.mkdir()
        files = [p.relative_to(served / name).as_posix() for p in (served / name).rglob("*") if p.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(served / name / file, cache / file)
        return str(cache)

    class HfApi:
        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            asked.append(("create", repo_id, private))
            (served / repo_id).mkdir(parents=True, exist_ok=True)

        def create_branch(self, repo_id, *, branch, exist_ok):
            assert exist_ok
            asked.append(("branch", repo_id, branch))

        def file_exists(self, repo_id, filename, *, revision):
            return (served / repo_id / filename).exists()

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            asked.append(("upload", commit_message, revision))
            shutil.copytree(folder_path, served / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return served, asked


@torch.no_grad()
def test_checkpoints_from_the_hub(tmp_path, hub):
    served, asked = hub
    theirs = make(served / "owner/ckpts" / TAG)
    make(served / "owner/ckpts" / TAG, name="final.pt")
    make(served / "owner/ckpts/flatsae_L9_H4", "flat")
    manifest = {TAG: digest(served / "owner/ckpts" / TAG / "best.pt")}
    (served / "owner/ckpts/manifest.json").write_text(json.dumps(manifest))
    sae = WriteSAE.from_pretrained("owner/ckpts", TAG, revision="v1")
    assert difference(sae, "bilinear", theirs) < 1e-6 and sae.cfg.training["reference"]["verified"]
    assert asked[0] == ("owner/ckpts", "v1", [f"{TAG}/cfg.json", f"{TAG}/sae_weights.safetensors"])
    assert asked[1] == ("owner/ckpts", "v1", [f"{TAG}/best.pt", f"{TAG}/config.json", "manifest.json"])
    assert convert("owner/ckpts", tmp_path / "all") == [tmp_path / "all/flatsae_L9_H4", tmp_path / "all" / TAG]
    assert not list((tmp_path / "cache3").rglob("final.pt")), "twice the size for nothing"
    (folder,) = convert("owner/ckpts/writesae/", tmp_path / "some", revision="v2")
    assert folder == tmp_path / "some/qwen/L9_H4" and asked[-1][1] == "v2"
    assert WriteSAE.from_pretrained(folder).cfg.training["reference"]["file"] == f"{TAG}/best.pt"
    with pytest.raises(FileNotFoundError, match=r"owner/ckpts has no best.pt in nowhere"):
        convert("owner/ckpts/nowhere", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no/such is no folder here, and the hub did not give it: 404"):
        convert("no/such", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"cfg.json is missing"):
        WriteSAE.from_pretrained("owner/ckpts")


# To the hub


def ours(**changes):
    values = dict(d_key=6, d_value=5, n_atoms=12, k=3, layer=9, head=4, model_id="Qwen/Qwen3.5-0.8B")
    return WriteSAE(SAEConfig(**(values | changes)))


def run_snippet(text):
    (code,) = re.findall("```python\n(.*?)```", text, re.S)
    names = {}
    exec(code, names)
    return names["sae"]


def test_what_is_pushed_comes_back(hub):
    served, asked = hub
    sae = ours(training={"steps": 5, "held_out": {"nmse": 0.123456, "note": "a|b <i>*x*\n# y"}})
    url = sae.push_to_hub("me/saes", private=True, license="mit", commit_message="first")
    assert url == "https://hub/me/saes/commit/1"
    assert asked == [("create", "me/saes", True), ("upload", "first", None)]
    assert sorted(p.name for p in (served / "me/saes").iterdir()) == [
        "README.md",
        "cfg.json",
        "sae_weights.safetensors",
    ]
    card = (served / "me/saes/README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: writesae" in front and "base_model: Qwen/Qwen3.5-0.8B" in front and "license: mit" in front
    assert "layer 9, head 4" in card and "| held\\_out: nmse | 0.1235 |" in card
    assert "| held\\_out: note | a\\|b &lt;i&gt;\\*x\\* # y |" in card
    back = run_snippet(card)
    assert back.cfg == sae.cfg and all(
        torch.equal(x, y) for x, y in zip(back.parameters(), sae.parameters(), strict=True)
    )


def test_a_subfolder_leaves_the_card_at_the_root_alone(hub):
    served, asked = hub
    first, second = ours(), ours(head=5, model_id="tiny-gdn", encoder="bilinear")
    first.push_to_hub("me/saes", subfolder="L9/H4", revision="v1")
    assert ("branch", "me/saes", "v1") in asked and asked[-1] == ("upload", "Upload SAE", "v1")
    shown = (served / "me/saes/README.md").read_text()
    assert "from_pretrained('me/saes', 'L9/H4', revision='v1')" in shown and "license" not in shown
    assert run_snippet(shown).cfg == first.cfg
    second.push_to_hub("me/saes", subfolder="L9/H5")
    assert (served / "me/saes/README.md").read_text() == shown
    own = (served / "me/saes/L9/H5/README.md").read_text()
    assert "base_model" not in own and "# WriteSAE of tiny-gdn, layer 9, head 5" in own, "no hub id: the hub refuses it"
    assert run_snippet(own).cfg == second.cfg and run_snippet(shown).cfg == first.cfg


def test_nothing_is_pushed_that_is_not_finite_or_leads_out(hub):
    _, asked = hub
    sae = ours()
    for bad in ("../x", "/x"):
        with pytest.raises(ValueError, match=f"subfolder must be a path inside the repository; got '{bad}'"):
            sae.push_to_hub("me/saes", subfolder=bad)
    with torch.no_grad():
        sae.b_enc[0] = torch.nan
    with pytest.raises(ValueError, match="not saved: 1 of 12 numbers in b_enc are NaN"):
        sae.push_to_hub("me/saes")
    assert asked == []


# Command line


def test_convert_on_the_command_line(tmp_path):
    runner = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"})
    make(tmp_path / "in/bilinear_L9_H4")
    make(tmp_path / "in/bilinear_L9_H4", name="final.pt")
    save(tmp_path / "in/L1_H2/best.pt", reference_sae.random_tensors("rank1", 40, D_K, D_V, 2))
    make(tmp_path / "in/bad", sae=Code())
    kept = ["--json", str(tmp_path / "all.json")]
    result = runner.invoke(app, ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--model", "a/b", *kept])
    found = {one["checkpoint"]: one for one in read_json(tmp_path / "all.json")["checkpoints"]}
    assert "wants to run code" in found["bad/best.pt"]["error"] and found["L1_H2/best.pt"]["cfg"]["model_id"] == "a/b"
    assert found["bilinear_L9_H4/best.pt"]["passed_over"] == ["final.pt"]
    assert result.exit_code == 1 and "Traceback" not in result.output
    for part in (
        "rank1", "1.2", "9.4", "6x5", "0.25", "not listed", "bilinear_L9_H4/best.pt: left final.pt beside it alone",
        "L1_H2/best.pt: assumed k=32, which nothing says", "bad/best.pt wants to run code",
    ):  # fmt: skip
        assert part in result.output, part
    assert WriteSAE.from_pretrained(tmp_path / "out/L1_H2").cfg.model_id == "a/b"
    one = str(tmp_path / "in/L1_H2/best.pt")
    result = runner.invoke(app, ["convert", one, str(tmp_path / "one"), "--layer", "3", "--head", "0"])
    assert result.exit_code == 0 and "3.0" in result.output
    result = runner.invoke(app, ["convert", "no-such", str(tmp_path / "two")])
    assert result.exit_code == 1 and "no-such is neither a file nor a folder here" in result.output
