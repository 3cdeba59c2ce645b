"""SAELens' SAEs of the residual stream, beside SAEs of writes, in our models and in SAELens' own bridge."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from writesae.models.load import load_model
from writesae.zoo import heldout_documents, shipped_model

if importlib.util.find_spec("sae_lens") is None:  # one that is there and can't be imported is an error
    pytest.skip("needs the extra [saelens]", allow_module_level=True)

import sae_lens
from sae_lens.loading import pretrained_sae_loaders

from writesae.saelens import to_saelens

TEXT = "The Congress of the United States has the power to declare war."
POINT = "blocks.1.hook_resid_post"
KINDS = ["topk", "standard", "jumprelu"]
N_ATOMS, K = 1024, 8


@pytest.fixture(scope="module")
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def write_sae() -> ws.WriteSAE:
    return ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")


@pytest.fixture(scope="module")
def trained(model: ws.HookedRecurrentModel) -> dict[str, Tensor]:
    """Weights of a TopK SAE of the stream behind layer 1, trained briefly on real text."""
    ids = model.to_tokens(" ".join(heldout_documents()[1:3]))[0][:, :2048].reshape(8, -1)
    with torch.no_grad():
        x = model.run_with_cache(ids, POINT)[1][POINT].flatten(0, 1)
    torch.manual_seed(0)
    b_dec = x.mean(0)
    W_dec = torch.nn.functional.normalize(x[torch.randperm(len(x))[:N_ATOMS]] - b_dec, dim=-1).requires_grad_()
    W_enc = (W_dec.detach().T / 3).clone().requires_grad_()  # atoms that are alike share the work
    optimizer = torch.optim.Adam([W_dec, W_enc], lr=5e-3)
    for _ in range(40):
        pre = (x - b_dec) @ W_enc
        values, indices = pre.topk(K)
        made = torch.zeros_like(pre).scatter(-1, indices, values.relu()) @ W_dec + b_dec
        error = (made - x).square().sum() / (x - b_dec).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.5  # it reconstructs most of the variance
    return {"W_enc": W_enc.detach(), "W_dec": W_dec.detach(), "b_dec": b_dec, "b_enc": -(b_dec @ W_enc.detach())}


@pytest.fixture(scope="module", params=KINDS)
def sae(request: pytest.FixtureRequest, trained: dict[str, Tensor], tmp_path_factory: Any) -> Any:
    """The same as SAELens loads it: the TopK one from a file of Qwen Scope's layout, others from SAELens' own."""
    folder, d_in = tmp_path_factory.mktemp(request.param), len(trained["b_dec"])
    if request.param == "topk":
        file = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in trained.items()}
        torch.save(file, folder / "layer1.sae.pt")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(pretrained_sae_loaders.QWEN_SCOPE_MODEL_INFO, "tiny-gdn", ("tiny-gdn", d_in))
            patch.setattr(pretrained_sae_loaders, "hf_hub_download", lambda filename, **_: folder / filename)
            found = sae_lens.SAE.from_pretrained(
                f"Qwen/SAE-Res-tiny-gdn-W{N_ATOMS // 1024}K-L0_{K}", "layer1.sae.pt",
                converter=pretrained_sae_loaders.qwen_scope_sae_huggingface_loader,
            )  # fmt: skip
        assert found.cfg.metadata.hook_name == POINT and found.cfg.k == K
        return found
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=POINT, model_name="tiny-gdn")
    kind = {"standard": "StandardSAE", "jumprelu": "JumpReLUSAE"}[request.param]
    config = getattr(sae_lens, kind + "Config")
    made = getattr(sae_lens, kind)(config(d_in=d_in, d_sae=N_ATOMS, apply_b_dec_to_input=False, metadata=metadata))
    extra = {"threshold": torch.full((N_ATOMS,), 0.5)} if request.param == "jumprelu" else {}
    made.load_state_dict(trained | extra)
    made.save_model(folder)
    return sae_lens.SAE.load_from_disk(folder)


@torch.no_grad()
def by_hand(name_or_ids: Any, change: Any, layer: int = 1) -> Tensor:
    """Logits of the model that nobody wrapped, with the layer's output changed by a hook of torch's."""
    hf_model = load_model(str(shipped_model("tiny-gdn")), dtype=torch.float32).eval()
    hf_model.model.layers[layer].register_forward_hook(lambda _module, _args, out: change(out))
    return hf_model(name_or_ids, use_cache=False).logits


@torch.no_grad()
def test_an_sae_of_saelens_on_our_hook_points(model: Any, sae: Any) -> None:
    ids, plain = model.to_tokens(TEXT)[0], model(TEXT)
    unit = sae.W_dec[7] / sae.W_dec[7].norm()
    for what, change in [
        (ws.Reconstruct(sae), sae),
        (ws.Reconstruct(sae, at="blocks.1.hook_out"), sae),  # TransformerLens' name of the place
        (ws.Steer(sae, atom=7, scale=0.5), lambda x: x + 0.5 * x.norm(dim=-1, keepdim=True) * unit),
        (ws.Steer(sae, atom=7, scale=-4, relative=False), lambda x: x - 4 * sae.W_dec[7]),
    ]:
        with model.intervene(what):
            found = model(TEXT)
        torch.testing.assert_close(found, by_hand(ids, change), rtol=0, atol=1e-4)
        assert (found - plain).abs().max() > 0.1
        assert (found - by_hand(ids, change, layer=2)).abs().max() > 0.1  # the twin: another place
    with model.intervene(ws.Reconstruct(sae, error_term=True)):
        torch.testing.assert_close(model(TEXT), plain, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_residual_sae_and_a_write_sae_in_one_block(model: Any, sae: Any, write_sae: ws.WriteSAE) -> None:
    def at_4(x: Tensor, _hook: Any) -> Tensor:
        return torch.where((torch.arange(x.shape[1]) == 4)[:, None], sae(x), x)

    with model.intervene([ws.Reconstruct(sae), ws.Substitute(write_sae)], positions=[4]):
        together = model(TEXT)
    with model.intervene(ws.Substitute(write_sae), positions=[4]):
        one = model(TEXT)
        torch.testing.assert_close(model.run_with_hooks(TEXT, [(POINT, at_4)]), together, rtol=0, atol=1e-4)
    other = model.run_with_hooks(TEXT, [(POINT, at_4)])
    assert min((together - one).abs().max(), (together - other).abs().max()) > 1e-3  # both act
    with model.intervene([ws.Reconstruct(sae), ws.Substitute(write_sae)]):
        assert model.generate(TEXT, max_new_tokens=4).startswith(TEXT)


@torch.no_grad()
def test_saelens_own_bridge(model: Any, sae: Any, write_sae: ws.WriteSAE) -> None:
    """The residual SAE attached by SAELens, writes edited by us, in one run; against both done by us."""
    hf_model = load_model(str(shipped_model("tiny-gdn")), dtype=torch.float32).eval()
    bridge = sae_lens.SAETransformerBridge.boot_transformers(
        str(shipped_model("tiny-gdn")), hf_model=hf_model, tokenizer=model.tokenizer, device="cpu"
    )
    ids = model.to_tokens(TEXT)[0]  # with a cache, as is the default; without, TransformerLens 3 runs code of its own
    torch.testing.assert_close(bridge(ids), model(ids), rtol=0, atol=1e-4)
    in_bridge = ws.HookedRecurrentModel(bridge)
    assert in_bridge.fingerprint(2) == model.fingerprint(2) and in_bridge.tokenizer is not None
    with bridge.saes(sae), in_bridge.intervene(ws.Substitute(write_sae)):
        found = bridge(ids)
    with model.intervene([ws.Reconstruct(sae), ws.Substitute(write_sae)]):
        torch.testing.assert_close(found, model(ids), rtol=0, atol=1e-4)
    with model.intervene(ws.Reconstruct(sae)):
        assert (found - model(ids)).abs().max() > 1e-2
    torch.testing.assert_close(bridge(ids), model(ids), rtol=0, atol=1e-4)


def test_a_write_sae_is_none_of_the_stream(model: Any, write_sae: ws.WriteSAE) -> None:
    theirs = to_saelens(write_sae)
    for what, text in [
        (ws.Reconstruct(theirs), r"acts on the residual stream .*blocks\.2\.mixer\.hook_write is not a part of it"),
        (ws.Reconstruct(theirs, at=POINT), r"1024 dimensions does not fit blocks\.1\.hook_resid_post, which has 192"),
    ]:
        with pytest.raises(ValueError, match=text), model.intervene(what):
            model(TEXT)
