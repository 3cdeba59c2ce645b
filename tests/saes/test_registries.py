"""Sparsities and formats of checkpoints are registered, and asked about nowhere else."""

import ast
import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

import writesae
from writesae import SAEConfig, Write, WriteSAE
from writesae.saes import (
    FORMATS,
    SPARSITIES,
    Format,
    Thresholds,
    evaluate,
    register_format,
    register_sparsity,
    train_sae,
)
from writesae.saes.dictionary import Dense, Factored

PACKAGE = Path(writesae.__file__).parent
OWN = {"topk", "batch_topk", "jumprelu", "gated"}
SIZES = dict(d_key=6, d_value=5, n_atoms=12, k=3)


def asked(source: str) -> list[int]:
    """Lines that compare something with the name of a sparsity."""
    return [
        part.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare | ast.match_case)
        for part in ast.walk(node.pattern if isinstance(node, ast.match_case) else node)
        if isinstance(part, ast.Constant) and part.value in OWN
    ]


def test_no_module_asks_which_sparsity_it_is() -> None:
    assert set(SPARSITIES) >= OWN
    found = {p.name: lines for p in PACKAGE.rglob("*.py") if (lines := asked(p.read_text("utf-8")))}
    assert not found


def test_asking_is_noticed() -> None:
    assert asked('if sae.cfg.sparsity == "topk":\n    pass') == [1]
    assert asked('x = 1\ny = sparsity in ("jumprelu", "gated")') == [2, 2]


@pytest.fixture
def everything_as_it_was():
    sparsities, formats = dict(SPARSITIES), list(FORMATS)
    yield
    SPARSITIES.clear()
    SPARSITIES.update(sparsities)
    FORMATS[:] = formats


class Loud(Thresholds):
    """Activations that are pre-activations above 0."""

    def of_pre(self, sae, pre, bandwidth):
        return pre.relu()

    def set_threshold(self, sae, threshold):
        sae.b_enc.fill_(-float(threshold))


def test_a_sparsity_of_ones_own(everything_as_it_was: None) -> None:
    with pytest.raises(ValueError, match="no sparsity 'loud': allowed are topk, batch_topk, jumprelu, gated"):
        SAEConfig(**SIZES, sparsity="loud")
    register_sparsity("loud")(Loud)
    cfg = SAEConfig(**SIZES, sparsity="loud")
    assert not cfg.chooses
    torch.manual_seed(0)
    data = Write(torch.randn(300, 6), torch.randn(300, 5))
    sae = train_sae(cfg, data, steps=5, progress=False)
    assert evaluate(sae, data)["n"] == 300 and torch.equal(sae.encode(data), sae.pre(data).relu())
    values, indices = sae.topk(data)
    assert torch.equal(values, sae.encode(data).gather(-1, indices))
    with pytest.raises(ValueError, match="calibrate is for batch_topk; this SAE has sparsity 'loud'"):
        sae.calibrate(data)


def test_a_name_is_given_once(everything_as_it_was: None) -> None:
    with pytest.raises(ValueError, match=r"a sparsity 'topk' already, writesae\.saes\.sparsities\.choosing\.TopK"):
        register_sparsity("topk")(Loud)
    register_sparsity("loud")(Loud)
    register_sparsity("loud")(Loud)  # a notebook's cell that runs again


def test_formats_are_asked_in_order(everything_as_it_was: None, tmp_path: Path) -> None:
    class Text(Format):
        holds, wanted = "atoms.txt", ("atoms.txt",)
        tensors = WriteSAE(SAEConfig(**SIZES)).state_dict()

        def load(self, folder, root):
            assert (folder.name, root) == ("L2H0", tmp_path)
            return SAEConfig(**SIZES), self.tensors

    (tmp_path / "L2H0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\(or best\.pt of the paper's code\); point to"):
        WriteSAE.from_pretrained(tmp_path, "L2H0")
    register_format(Text)
    with pytest.raises(FileNotFoundError, match=r"\(or best\.pt of the paper's code, or atoms\.txt\); point to"):
        WriteSAE.from_pretrained(tmp_path, "L2H0")
    (tmp_path / "L2H0" / "atoms.txt").write_text("")
    sae = WriteSAE.from_pretrained(tmp_path, "L2H0")
    assert torch.equal(sae.V_dec, Text.tensors["V_dec"])

    Text.tensors = {name: t for name, t in Text.tensors.items() if name != "b_enc"}
    with pytest.raises(ValueError, match=r"L2H0 does not fit the configuration that Text read: b_enc is missing"):
        WriteSAE.from_pretrained(tmp_path, "L2H0")
    WriteSAE(dataclasses.replace(sae.cfg, n_atoms=7)).save_pretrained(tmp_path / "L2H0")
    assert WriteSAE.from_pretrained(tmp_path, "L2H0").cfg.n_atoms == 7  # ours comes first


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    WriteSAE(SAEConfig(**SIZES)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    WriteSAE.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_fingerprint_stands_for_the_weights_and_the_place() -> None:
    sae = WriteSAE.from_pretrained("tiny-gdn/L2H1")
    digest = hashlib.sha256(b"2.1.write.topk")
    for name in sorted(sae.state_dict()):
        digest.update(name.encode() + sae.state_dict()[name].numpy().tobytes())
    assert sae.fingerprint() == digest.hexdigest()[:16]
    before = sae.fingerprint()
    sae.cfg = dataclasses.replace(sae.cfg, head=0)
    assert sae.fingerprint() != before
    sae.cfg = dataclasses.replace(sae.cfg, head=1)
    with torch.no_grad():
        sae.b_enc[0] += 1e-3
    assert sae.fingerprint() != before


@pytest.mark.parametrize("rank", [1, 2])
def test_a_dictionary_is_the_saes_own(rank: int) -> None:
    sae = WriteSAE(SAEConfig(**SIZES, rank=rank, encoder="dense"))
    assert isinstance(sae.dictionary, Factored) and sae.dictionary.V is sae.V_dec
    assert isinstance(sae.own_encoder, Dense) and sae.own_encoder.A is sae.A_enc
    assert WriteSAE(SAEConfig(**SIZES)).own_encoder is None
    sae.dictionary.atoms.dense().square().sum().backward()  # only changes norms: nothing of it is tangent
    assert max(p.grad.abs().max() for p in (sae.V_dec, sae.W_dec)) > 0.1
    sae.dictionary.keep_tangent()
    moved = (sae.V_dec.grad * sae.V_dec).sum(-1)
    torch.testing.assert_close(moved, torch.zeros_like(moved))
