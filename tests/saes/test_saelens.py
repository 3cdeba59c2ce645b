"""Our SAEs in SAELens: one folder for both libraries, the same codes and reconstructions, the same gradients."""

import dataclasses
import importlib.util
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import ARCHITECTURES, N_VOCAB
from writesae.jobs.disk import read_json
from writesae.saes import VARIANTS, SAEConfig, WriteSAE
from writesae.saes.files import CONFIG, WEIGHTS, saelens_fields
from writesae.zoo import heldout_documents, shipped_models, shipped_saes

if importlib.util.find_spec("sae_lens") is None:  # one that is there and can't be imported is an error
    pytest.skip("needs the extra [saelens]", allow_module_level=True)

import sae_lens

from writesae.saelens import SAELensConfig, SAELensWriteSAE, from_disk, from_hub, to_saelens

D_KEY, D_VALUE, N_ATOMS = 6, 5, 32
# Every variant with every sparsity; target and bias vary along, and with the target whether there is a mean.
KINDS = [
    dict(variant=variant, sparsity=sparsity, target=("write", "delta", "state")[n % 3], decoder_bias=n % 4 > 1)
    for n, (variant, sparsity) in enumerate(
        itertools.product(
            [name for name in VARIANTS if name != "BilinearSAE"],  # another name of WriteSAE
            ["topk", "batch_topk", "jumprelu", "gated"],
        )
    )
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['variant']}-{kind['sparsity']}")
SHIPPED = [folder for model in shipped_models() for folder in shipped_saes(model)]


def make(variant: str = "WriteSAE", **changes: Any) -> WriteSAE:
    """An SAE of rectangular matrices in which nothing is trivial: biases, mean and thresholds are random."""
    torch.manual_seed(0)
    sizes = dict(d_key=D_KEY, d_value=D_VALUE, n_atoms=N_ATOMS, k=3, layer=2, head=1, model_id="some/model")
    sae = WriteSAE(SAEConfig.variant(variant, **sizes | changes))
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name.startswith(("b_", "r_")):
                p.normal_(std=0.1)
            elif name == "log_threshold":
                p.uniform_(-1, 0)
        if sae.mean is not None:
            sae.mean.normal_()
        if sae.cfg.sparsity == "batch_topk":
            sae.threshold.fill_(0.7)
    return sae


def vectors(*shape: int) -> tuple[Tensor, Tensor]:
    """Random matrices, as we and as SAELens take them."""
    x = torch.randn(*shape, D_KEY, D_VALUE)
    return x, x.flatten(-2)


def load(folder: Path, **kwargs: Any) -> Any:
    return sae_lens.SAE.load_from_disk(folder, **kwargs)


def gradients(sae: WriteSAE, number: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    number.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


# One folder, two libraries --------------------------------------------------------------------------------------------


@each_kind
def test_a_saved_folder_is_one_of_saelens(kind: dict[str, Any], tmp_path: Path) -> None:
    ours = make(**kind)
    theirs = load(ours.save_pretrained(tmp_path / "ours"))
    assert isinstance(theirs, sae_lens.SAE) and type(theirs) is SAELensWriteSAE
    assert (theirs.cfg.architecture(), theirs.cfg.d_in, theirs.cfg.d_sae) == ("writesae", D_KEY * D_VALUE, N_ATOMS)
    assert theirs.cfg.own() == ours.cfg

    X, x = vectors(4, 7)
    codes = ours.encode(X)
    assert (codes > 0).any() and (codes == 0).any()
    torch.testing.assert_close(theirs.encode(x), codes)
    torch.testing.assert_close(theirs.decode(codes), ours.decode(codes).flatten(-2))
    torch.testing.assert_close(theirs(x), ours.decode(codes).flatten(-2))
    with torch.no_grad():
        assert torch.equal(theirs.encode(x), ours.encode(X))
    torch.testing.assert_close(x @ theirs.W_enc + theirs.b_enc, ours.pre(X))
    torch.testing.assert_close(codes @ theirs.W_dec + theirs.b_dec, theirs.decode(codes))
    torch.testing.assert_close(theirs.get_W_dec_norm(), torch.ones(N_ATOMS))

    weights, config = theirs.save_model(tmp_path / "theirs")
    assert weights.read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    assert json.loads(config.read_text()) == json.loads((tmp_path / "ours" / CONFIG).read_text())
    back = WriteSAE.from_pretrained(tmp_path / "theirs")
    assert back.cfg == ours.cfg and torch.equal(back.encode(X), codes)


def test_flattening_by_columns_is_another_matrix() -> None:
    """The twin: had the two libraries different orders in mind, nothing would agree."""
    X, _ = vectors(20)
    ours = make()
    assert not torch.allclose(to_saelens(ours).encode(X.mT.flatten(-2)), ours.encode(X), atol=0.1)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: f"{folder.parents[1].name}-{folder.name}")
@torch.no_grad()
def test_shipped_saes_on_what_heads_write(folder: Path) -> None:
    theirs = load(folder)
    ours = WriteSAE.from_pretrained(folder)
    c = ours.cfg
    model = ws.HookedRecurrentModel.from_pretrained(c.model_id)
    text = heldout_documents()[1][:400]
    _, cache = model.run_with_cache(text)
    acts = theirs.encode(cache.write(c.layer)[:, :, c.head].dense().flatten(-2))
    codes = model.encode(ours, text).dense()
    assert torch.equal(acts.argmax(-1), codes.argmax(-1)) and (codes > 0).any(-1).float().mean() > 0.9
    torch.testing.assert_close(acts, codes)
    metadata = theirs.cfg.metadata
    assert metadata.hook_name == f"blocks.{c.layer}.mixer.hook_write" and metadata.hook_name in model.hook_names
    assert (metadata.model_name, metadata.hook_head_index) == (c.model_id, c.head)
    assert metadata.sae_lens_training_version is None  # it was not


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_folders_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Both libraries bring atoms back to norm 1 that rounding moved from it."""
    folder = make(target="state").save_pretrained(tmp_path, dtype=dtype)
    ours, theirs = WriteSAE.from_pretrained(folder), load(folder)
    X, x = vectors(30)
    assert theirs.dtype == torch.float32 and torch.equal(theirs.encode(x), ours.encode(X))
    assert not torch.equal(ours.encode(X), make(target="state").encode(X))


def test_precision_and_notes_of_saelens_are_kept(tmp_path: Path) -> None:
    sae = to_saelens(make()).to(torch.bfloat16)
    sae.cfg.metadata.neuronpedia_id = "some-model/2-write"
    sae.save_model(tmp_path)
    back = load(tmp_path)
    assert back.dtype == back.write_sae.V_dec.dtype == torch.bfloat16 and back.cfg.dtype == "bfloat16"
    assert back.cfg.metadata.neuronpedia_id == "some-model/2-write"
    X, x = vectors(9)
    assert torch.equal(back.encode(x), sae.encode(x)) and back.encode(x).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32
    ours = WriteSAE.from_pretrained(tmp_path)
    assert ours.V_dec.dtype == torch.float32 and ours.cfg == sae.cfg.own()
    torch.testing.assert_close(ours.encode(X), load(tmp_path, dtype="float32").encode(x))


def test_the_same_sae_in_memory() -> None:
    ours = make(sparsity="gated", target="state", decoder_bias=True).double()
    theirs = to_saelens(ours)
    assert theirs.write_sae is ours and theirs.dtype == torch.float64 and theirs.device == torch.device("cpu")
    assert str(theirs.cfg.device) == "cpu" and theirs.cfg.dtype == "float64"
    again = sae_lens.SAE.from_dict(theirs.cfg.to_dict())
    assert type(again) is SAELensWriteSAE and again.cfg.own() == ours.cfg and again.dtype == torch.float64


@each_kind
def test_gradients_flow(kind: dict[str, Any]) -> None:
    ours = make(**kind)
    theirs = to_saelens(ours)
    X, x = vectors(12)
    given = x.clone().requires_grad_()
    found = gradients(ours, (theirs(given) - x).square().sum())
    expected = gradients(ours, (ours.decode(ours.encode(X)) - X).square().sum())
    assert found.keys() == expected.keys() and len(found) >= 2 and given.grad is not None
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    of_weights = gradients(ours, theirs.W_dec.square().sum())
    assert of_weights and all("dec" in name for name in of_weights)


def test_saelens_hooks_and_error_term() -> None:
    sae = to_saelens(make(decoder_bias=True))
    _, x = vectors(3)
    _, cache = sae.run_with_cache(x)
    assert {name: list(value.shape) for name, value in cache.items()} == {
        "hook_sae_input": [3, 30],
        "hook_sae_acts_pre": [3, N_ATOMS],
        "hook_sae_acts_post": [3, N_ATOMS],
        "hook_sae_recons": [3, 30],
        "hook_sae_output": [3, 30],
    }
    torch.testing.assert_close(cache["hook_sae_acts_pre"], x @ sae.W_enc + sae.b_enc)
    without = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: acts * 0)])
    torch.testing.assert_close(without, sae.b_dec.expand(3, -1))
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    torch.testing.assert_close(sae(x), x)


# What does not fit ----------------------------------------------------------------------------------------------------


def test_older_folders(tmp_path: Path) -> None:
    """Written before this layout: read by us as ever, and by SAELens through a converter."""
    ours = make(target="state")
    ours.save_pretrained(tmp_path)
    described = read_json(tmp_path / CONFIG)
    old = {name: value for name, value in described.items() if name not in saelens_fields(ours.cfg)}
    assert len(old) == len(described) - 9
    (tmp_path / CONFIG).write_text(json.dumps(old))
    X, x = vectors(5)
    assert torch.equal(WriteSAE.from_pretrained(tmp_path).encode(X), ours.encode(X))
    with pytest.raises(KeyError, match="dtype"):
        load(tmp_path)
    theirs = load(tmp_path, converter=from_disk)
    torch.testing.assert_close(theirs.encode(x), ours.encode(X))
    assert theirs.cfg.metadata.hook_name == "blocks.2.mixer.hook_state"


def test_names_and_checksums_through_the_converter(tmp_path: Path) -> None:
    theirs = load("tiny-gdn/L2H1", converter=from_disk, dtype="float64")  # type: ignore[arg-type]
    assert theirs.cfg.own() == WriteSAE.from_pretrained("tiny-gdn/L2H1").cfg and theirs.dtype == torch.float64
    folder = make().save_pretrained(tmp_path)
    other = make(decoder_bias=False).save_pretrained(tmp_path / "other")
    shutil.copy(other / CONFIG, tmp_path / "config")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=r"is not the file that cfg\.json was written with"):
        load(folder, converter=from_disk)


def in_hub_cache(path: Path, repo: str, files: Path) -> Path:
    """A cache of the hub as it is after a download."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    kept = path / f"models--{repo.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(sha)
    (kept / "snapshots").mkdir()
    shutil.copytree(files, kept / "snapshots" / sha)
    return path


@pytest.mark.parametrize("converter", [None, from_hub], ids=["as it is", "converter"])
def test_from_the_hub(converter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make()
    ours.save_pretrained(tmp_path / "repo" / "L2H1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(in_hub_cache(tmp_path, "me/saes", tmp_path / "repo"))
    )
    theirs = sae_lens.SAE.from_pretrained("me/saes", "L2H1", converter=converter)
    X, x = vectors(5)
    assert type(theirs) is SAELensWriteSAE and theirs.cfg.own() == ours.cfg
    torch.testing.assert_close(theirs.encode(x), ours.encode(X))
    with pytest.raises(FileNotFoundError):
        sae_lens.SAE.from_pretrained("me/saes", "L3H1", converter=converter)
    if converter:
        with pytest.raises(ValueError, match=r"force_download=True: remove"):
            sae_lens.SAE.from_pretrained("me/saes", "L2H1", converter=converter, force_download=True)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another d_in": (dict(d_in=31), r"d_in must be 30, as its other fields say; got 31"),
    "another d_sae": (dict(d_sae=8), r"d_sae must be 32, .* got 8"),
    "bias taken off the input": (dict(apply_b_dec_to_input=True), r"apply_b_dec_to_input must be False"),
    "activations normalised": (dict(normalize_activations="layer_norm"), r"normalize_activations must be 'none'"),
    "heads side by side": (dict(reshape_activations="hook_z"), r"reshape_activations must be 'none'"),
    "a rank too large": (dict(rank=7), r"rank=7: 6x5 matrices have rank 1 to 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_configurations_at_odds_with_themselves(case: str, tmp_path: Path) -> None:
    changes, text = BAD[case]
    make().save_pretrained(tmp_path)
    described = read_json(tmp_path / CONFIG) | changes
    (tmp_path / CONFIG).write_text(json.dumps(described))
    for read in (load, WriteSAE.from_pretrained):
        with pytest.raises(ValueError, match=text):
            read(tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    import safetensors.torch

    folder = make().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)

    def error_of(changed: dict[str, Tensor]) -> str:
        safetensors.torch.save_file(changed, folder / WEIGHTS)
        with pytest.raises(ValueError) as error:
            load(folder)
        return str(error.value)

    without = {name: tensor for name, tensor in tensors.items() if name != "b_enc"}
    assert "b_enc is missing" in error_of(without)
    assert "V_dec is [31, 6], not [32, 6]" in error_of(tensors | {"V_dec": tensors["V_dec"][1:].clone()})
    assert "W_skip is unknown" in error_of(tensors | {"W_skip": torch.ones(2)})
    assert "1 of 32 numbers in b_enc are NaN" in error_of(
        tensors | {"b_enc": tensors["b_enc"].index_fill(0, torch.tensor(3), float("nan"))}
    )
    assert "atoms must have norm 1; one is off by 1" in error_of(tensors | {"V_dec": tensors["V_dec"] * 2})


def test_what_saelens_would_do_to_dense_weights() -> None:
    sae = to_saelens(make())
    assert torch.allclose(sae.fold_and_get_W_dec_norm(), torch.ones(N_ATOMS))
    sae.fold_W_dec_norm()  # they are 1: nothing to do
    with pytest.raises(NotImplementedError, match=r"no factor 3\.0 is folded in"):
        sae.fold_activation_norm_scaling_factor(3.0)
    with pytest.raises(NotImplementedError, match="no whitening"):
        sae.fold_activation_whitening(torch.zeros(30), torch.eye(30), torch.eye(30))
    free = to_saelens(make(unit_atoms=False))
    with pytest.raises(NotImplementedError, match=r"not folded into its encoder"):
        free.fold_W_dec_norm()
    with pytest.raises(ValueError, match=r"6x5 matrices as vectors \[\.\.\., 30\]; got \[2, 6, 5\]: flatten"):
        sae.encode(torch.zeros(2, 6, 5))
    with pytest.raises(TypeError, match="d_key"):
        SAELensConfig(d_in=30, d_sae=32)
    assert dataclasses.is_dataclass(sae.cfg)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("ablate", [[], [3]])
def test_an_sae_put_in_is_what_saelens_puts_in(error_term: bool, ablate: list[int]) -> None:
    """`run_with_saes` and ``use_error_term``: their forward, in a hook on the write, against `Recode`; logits and
    gradients. The other error term gives others."""
    a = ARCHITECTURES[0]
    model = ws.HookedRecurrentModel(a.build())
    ids = torch.randint(N_VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    ours = WriteSAE(SAEConfig(16, a.d_value, n_atoms=24, k=5, layer=1, head=2, decoder_bias=True))
    theirs = to_saelens(ours)
    if error_term:
        with pytest.warns(DeprecationWarning, match="use_error_term"):
            theirs.use_error_term = True

    def ablated(acts: Tensor, hook: Any) -> Tensor:
        return acts * ~torch.isin(torch.arange(24), torch.tensor(ablate))

    def put_in(write: Any, hook: Any) -> Any:
        X = write.dense()
        flat = theirs.run_with_hooks(X[:, :, 2].flatten(-2), fwd_hooks=[("hook_sae_acts_post", ablated)])
        X = torch.cat([X[:, :, :2], flat.view_as(X[:, :, 2])[:, :, None], X[:, :, 3:]], 2)
        return ws.Write(torch.eye(16).expand(*X.shape[:3], 16, 16), X, 16)

    def logits_and_gradients(block: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with block:
            logits = model(ids)
        return logits.detach(), gradients(ours, logits.square().mean())

    expected, slopes = logits_and_gradients(model.hooks([(("write", 1), put_in)]))
    found, own = logits_and_gradients(model.intervene(ws.Recode(ours, ablate=ablate, error_term=error_term)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert own.keys() == slopes.keys() and len(own) > 2
    for name in own:
        torch.testing.assert_close(own[name], slopes[name], atol=1e-6, rtol=1e-3)
    other = model.intervene(ws.Recode(ours, ablate=ablate, error_term=not error_term))
    assert (logits_and_gradients(other)[0] - expected).abs().max() > 1e-2
