"""Evaluation of SAEs, against a plain loop over windows with dense reconstructions put in by hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import writesae as ws
from writesae import HookedRecurrentModel, SAEConfig, Write, WriteSAE
from writesae.cli import app

CONTEXT = 24


@pytest.fixture(scope="module")
def model() -> HookedRecurrentModel:
    return HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def ids(model: HookedRecurrentModel) -> Tensor:
    text = "The Congress of the United States has passed a law for the relief of the people. " * 5
    tokens, _ = model.to_tokens(text)
    return tokens[0, : 3 * CONTEXT].reshape(3, CONTEXT)


def made(layer: int, head: int, target: str = "write", **given: Any) -> WriteSAE:
    torch.manual_seed(layer)
    sae = WriteSAE(SAEConfig(32, 32, n_atoms=64, **{"k": 4, "layer": layer, "head": head, "target": target, **given}))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.01)
    return sae


def by_hand(model: HookedRecurrentModel, saes: list[WriteSAE], row: Tensor, how: str) -> Tensor:
    """Log-probabilities after each token of a window, with dense matrices in the place of the writes."""
    hooks = []
    for sae in saes:
        layer, head = sae.place

        def put(write: Write, _hook: Any, sae: WriteSAE = sae, head: int = head) -> Write:
            X = write.dense()
            X[:, :, head] = 0 if how == "ablated" else sae(X[:, :, head])
            return Write(torch.eye(32).expand(*X.shape[:3], 32, 32), X, 32)

        hooks.append((f"blocks.{layer}.mixer.hook_write", put))
    return model.run_with_hooks(row[None], hooks if how != "native" else [])[0, :-1].log_softmax(-1)


@torch.no_grad()
def test_losses_are_those_of_a_plain_loop(model: HookedRecurrentModel, ids: Tensor) -> None:
    saes = [made(2, 1, decoder_bias=True), made(0, 3, sparsity="jumprelu")]
    with torch.no_grad():
        saes[0].b_dec.normal_(std=0.02)
        saes[1].log_threshold.fill_(-4.0)
    found = ws.evaluate(model, saes, ids, context=CONTEXT, batch_size=2)
    assert found.sets == ("2.1", "0.3", "all heads") and len(found.native) == 3
    for w, row in enumerate(ids):
        native = by_hand(model, [], row, "native")
        ce = -native.gather(1, row[1:, None]).mean()
        assert abs(float(found.native[w] - ce)) < 1e-5
        for i, some in enumerate(([saes[0]], [saes[1]], saes)):
            for how, ce_found, kl_found in (
                ("sae", found.ce_sae, found.kl_sae),
                ("ablated", found.ce_ablated, found.kl_ablated),
            ):
                edited = by_hand(model, some, row, how)
                ce = -edited.gather(1, row[1:, None]).mean()
                kl = (native.exp() * (native - edited)).sum(1).mean()
                assert abs(float(ce_found[i, w] - ce)) < 1e-4
                assert abs(float(kl_found[i, w] - kl)) < 1e-5 + 1e-3 * abs(float(kl))
                # The twins: another head's, and the divergence the other way round.
                other = by_hand(model, [saes[1 - i]] if i < 2 else saes[:1], row, how)
                assert abs(float(kl_found[i, w] - (native.exp() * (native - other)).sum(1).mean())) > 1e-5
                assert abs(float(kl_found[i, w] - (edited.exp() * (edited - native)).sum(1).mean())) > 1e-7
    lost = found.ce_ablated.mean(1) - found.native.mean()
    torch.testing.assert_close(found.loss_recovered, 1 - (found.ce_sae.mean(1) - found.native.mean()) / lost)


@pytest.mark.parametrize("target", ["write", "delta", "state"])
@torch.no_grad()
def test_quality_is_that_of_dense_matrices(model: HookedRecurrentModel, ids: Tensor, target: str) -> None:
    sae = made(2, 1, target, center=True)
    assert sae.mean is not None
    sae.mean.normal_(std=0.01)
    (q,) = ws.evaluate(model, sae, ids, context=CONTEXT).quality
    _, cache = model.run_with_cache(ids)
    if target == "state":
        X = cache.state(2, [7, 15, 23], [1]).reshape(-1, 32, 32)
    else:
        X = (cache.write(2) if target == "write" else cache.delta(2))[:, :, 1].dense().reshape(-1, 32, 32)
    made_of = sae(X)
    error, whole = (X - made_of).square().sum(), (X - X.mean(0)).square().sum()
    codes = sae.encode(X)
    expected = {
        "n": len(X),
        "explained_variance": 1 - error / whole,
        "nmse": error / X.square().sum(),
        "mse": (X - made_of).square().sum((-1, -2)).mean(),
        "cosine": torch.cosine_similarity(X.flatten(1), made_of.flatten(1)).mean(),
        "l0": (codes > 0).float().sum(1).mean(),
        "l1": codes.sum(1).mean(),
        "length_in": X.flatten(1).norm(dim=1).mean(),
        "length_out": made_of.flatten(1).norm(dim=1).mean(),
        "bias": made_of.square().sum() / (X * made_of).sum(),
    }
    for name, value in expected.items():
        assert getattr(q, name) == pytest.approx(float(value), rel=2e-3, abs=1e-7), name
    torch.testing.assert_close(q.density, (codes > 0).float().mean(0).to(q.density), atol=1e-6, rtol=0)
    assert q.explained_variance != pytest.approx(1 - float(error / X.square().sum()), rel=1e-4), "about the mean"


def test_file_and_command(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = ["evaluate", "tiny-gdn", "tiny-gdn/L2H1", "tiny-gdn/L0H0", "--tokens", "512", "--context", "64"]
    done = CliRunner().invoke(app, [*command, "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "loss recovered" in done.output and "all heads" in done.output
    results = json.loads(path.read_text())["results"]
    assert [r["sae"] for r in results] == ["2.1", "0.0", "all heads"]
    metrics = results[0]["eval_result_metrics"]
    assert metrics["sparsity"]["l0"] == 1.0 and len(metrics["writesae"]["feature_density"]) == 2048
    behaviour = metrics["model_behavior_preservation"]
    assert behaviour["kl_div_score"] == pytest.approx(
        1 - behaviour["kl_div_with_sae"] / behaviour["kl_div_with_ablation"], rel=1e-5
    )
    assert 0.5 < behaviour["kl_div_score"] < 1
    twice = CliRunner().invoke(app, ["evaluate", "tiny-gdn", "tiny-gdn/L2H1", "tiny-gdn/L2H1"])
    assert twice.exit_code == 1 and "two SAEs of one head" in twice.stderr


def test_what_cannot_be_evaluated(model: HookedRecurrentModel, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="no SAE to evaluate"):
        ws.evaluate(model, [], ids)
    with pytest.raises(ValueError, match="context=1: a window needs two tokens"):
        ws.evaluate(model, made(2, 1), ids, context=1)
    with pytest.raises(ValueError, match="this SAE is for head 4"):
        ws.evaluate(model, made(2, 4), ids, context=CONTEXT)
    with pytest.raises(ValueError, match="the text"):
        ws.evaluate(model, made(2, 1), "The", context=CONTEXT)
    shown = ws.evaluate(model, made(2, 1), ids, context=CONTEXT)
    assert shown.plot().axes and len(shown.records()) == 3
