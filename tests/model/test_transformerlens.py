"""Beside TransformerLens: its names, its ways, and its `TransformerBridge` on the same weights."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from writesae import Delete, HookedRecurrentModel, Logit, Write, direct_attribution
from writesae.models.load import load_model
from writesae.zoo import shipped_model

if int(version("transformer-lens").split(".")[0]) < 4:  # its Gated DeltaNet does not run with transformers 5.15
    pytest.skip('needs TransformerLens 4, which SAELens 6 does not run with: see "bench" in pyproject.toml and .ci/run',
                allow_module_level=True)  # fmt: skip

TEXT = "The state of the Union is strong."
MODELS = ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"]
each_model = pytest.mark.parametrize("name", MODELS)


def bridge_of(name: str, hf_model: Any = None) -> Any:
    """TransformerLens' bridge on the weights of a shipped model, or around a model that is there."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = str(shipped_model(name))
    model = load_model(folder, dtype=torch.float32) if hf_model is None else hf_model
    return TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer(name), device="cpu")


def tokenizer(name: str) -> Any:
    return HookedRecurrentModel.from_pretrained(name).tokenizer


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[HookedRecurrentModel, Any, Tensor]:
    """Our wrapper and theirs, of separate copies, and token ids."""
    model = HookedRecurrentModel.from_pretrained(request.param)
    return model, bridge_of(request.param), model.to_tokens(TEXT)[0]


# Names ---------------------------------------------------------------------------------------------------------------

EXPECTED = {  # names that both have, in layer 1, beside those of the residual stream
    "tiny-gdn": [
        *(f"linear_attn.hook_{q}" for q in ("q", "k", "v", "beta", "log_decay", "recurrence_out", "gate_input")),
        *(f"linear_attn.hook_ssm_{q}" for q in ("B", "C", "decay", "write", "out")),
        *("linear_attn.hook_out", "hook_mlp_out", "mlp.hook_out"),
    ],
    "tiny-mamba2": ["mixer.hook_out", "mixer.hook_ssm_out", "hook_mixer_out"],
    "tiny-rwkv7": ["attn.hook_out", "ffn.hook_out"],
}
STREAM = ["hook_in", "hook_out", "hook_resid_pre", "hook_resid_post"]


@torch.no_grad()
def test_both_agree_on_every_quantity_that_both_name(pair: Any) -> None:
    model, bridge, ids = pair
    logits, theirs = bridge.run_with_cache(ids, use_cache=False)
    ours_logits, ours = model.run_with_cache(ids)
    torch.testing.assert_close(ours_logits, logits, rtol=0, atol=2e-5)
    both = [name for name in theirs if name in ours]
    assert set(both) >= {f"blocks.1.{rest}" for rest in EXPECTED[model.model_id] + STREAM}
    assert {name.split(".")[1] for name in both} == {str(layer) for layer in range(model.n_layers)}
    for name in both:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@torch.no_grad()
def test_a_key_before_its_norm_is_not_the_key() -> None:
    """So the names must keep them apart; this is what the test above would not pass with."""
    model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    _, cache = model.run_with_cache(TEXT)
    theirs, ours = cache["blocks.1.linear_attn.hook_k"], cache["blocks.1.mixer.hook_k"]
    assert (theirs - ours).abs().max() > 0.1
    torch.testing.assert_close(theirs / (theirs.square().sum(-1, keepdim=True) + 1e-6).sqrt(), ours)


@torch.no_grad()
@pytest.mark.parametrize(("name", "mixer"), [("tiny-gdn", "linear_attn"), ("tiny-mamba2", "mixer")])
def test_states_and_writes(name: str, mixer: str) -> None:
    """TransformerLens keeps Mamba-2's as [d_value, d_key]; ours are [d_key, d_value] in every architecture."""
    model, bridge = HookedRecurrentModel.from_pretrained(name), bridge_of(name)
    ids = model.to_tokens(TEXT)[0]
    every, turned = list(range(ids.shape[1])), name == "tiny-mamba2"
    for block in bridge.blocks:
        if hasattr(block, mixer):
            getattr(block, mixer).eager_scan = True
    _, theirs = bridge.run_with_cache(ids, use_cache=False)
    state = f"blocks.1.{mixer}.hook_ssm_state"
    _, cache = model.run_with_cache(ids, [state], state_positions=every)
    ours = cache[state].mT if turned else cache[state]
    torch.testing.assert_close(ours, theirs[state], rtol=1e-4, atol=1e-4)
    assert (cache[state] - theirs[state]).abs().max() > 0.1 or not turned  # not by chance symmetric
    write = f"blocks.1.{mixer}.hook_ssm_write"
    _, cache = model.run_with_cache(ids, [write])
    if turned:
        assert isinstance(cache[write], Write)
        torch.testing.assert_close(cache[write].dense().mT, theirs[write], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(cache[write], theirs[write], rtol=1e-4, atol=1e-5)  # their word for beta there


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [f"blocks.1.{rest}" for rest in ("linear_attn.hook_k", "linear_attn.hook_ssm_C", "linear_attn.hook_v",
             "linear_attn.hook_ssm_decay", "linear_attn.hook_ssm_write", "hook_resid_pre", "hook_mlp_out", "hook_out")],
)  # fmt: skip
def test_a_hook_does_the_same_in_both(name: str) -> None:
    model, bridge = HookedRecurrentModel.from_pretrained("tiny-gdn"), bridge_of("tiny-gdn")
    ids = model.to_tokens(TEXT)[0]

    def turned(value: Tensor, hook: Any) -> Tensor:
        new = value.clone()
        new[:, 3:6] = 0.7 * value[:, 3:6].roll(1, -1)
        return new

    theirs = bridge.run_with_hooks(ids, fwd_hooks=[(name, turned)], use_cache=False)
    ours = model.run_with_hooks(ids, fwd_hooks=[(name, turned)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - model(ids)).abs().max() > 0.01


def test_names_that_only_they_have() -> None:
    model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    for name in ("blocks.1.linear_attn.hook_k_pre_conv", "blocks.3.linear_attn.hook_k", "blocks.1.hook_resid_mid"):
        with pytest.raises(KeyError, match=rf"no hook point named '{name}'; nearest: blocks\."):
            model.run_with_cache(TEXT, name)


# Ways ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_run_with_cache(pair: Any) -> None:
    model, bridge, ids = pair
    asked = dict(names_filter=lambda name: name.endswith("hook_resid_post"), remove_batch_dim=True, stop_at_layer=2)
    stream, theirs = bridge.run_with_cache(ids, use_cache=False, **asked)
    ours_stream, ours = model.run_with_cache(ids, device="cpu", **asked)
    torch.testing.assert_close(ours_stream, stream, rtol=0, atol=2e-5)
    both = {"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    assert set(ours) == both <= set(theirs)  # their filter is asked about each alias of a point, too
    for name in both:
        assert ours[name].ndim == 2 and not ours.has_batch_dim
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(ours["resid_post", 1], ours_stream[0])
    assert torch.equal(model(ids, stop_at_layer=-1), model(ids, stop_at_layer=model.n_layers - 1))
    last = model(ids, stop_at_layer=model.n_layers)
    torch.testing.assert_close(last, model.run_with_cache(ids)[1]["resid_post", model.n_layers - 1])
    with pytest.raises(IndexError, match=rf"stop_at_layer={model.n_layers + 1}: this model has layers 0 to"):
        model(ids, stop_at_layer=model.n_layers + 1)
    with pytest.raises(ValueError, match=r"stop_at_layer=1: blocks\.1\.hook_resid_pre is never reached"):
        model.run_with_cache(ids, "blocks.1.hook_resid_pre", stop_at_layer=1)
    with pytest.raises(TypeError, match="names and names_filter mean the same"):
        model.run_with_cache(ids, "blocks.1.hook_resid_pre", names_filter="blocks.1.hook_resid_pre")


@torch.no_grad()
@each_model
def test_a_cache_without_its_batch_dimension(name: str) -> None:
    model = HookedRecurrentModel.from_pretrained(name)
    with model.intervene(Delete(1), positions=[2]):
        _, with_batch = model.run_with_cache(TEXT)
        _, without = model.run_with_cache(TEXT, remove_batch_dim=True, device="cpu")
    assert torch.equal(without["k", 1], with_batch["k", 1][0]) and torch.equal(
        without.positions, with_batch.positions[0]
    )
    for of in ("write", "delta"):
        one, other = getattr(without, of)(1), getattr(with_batch, of)(1)
        assert one.shape == other.shape[1:] and torch.equal(one.value, other.value[0])
    assert torch.equal(without.state(1, [0, -1]), with_batch.state(1, [0, -1])[0])
    with pytest.raises(ValueError, match="remove_batch_dim with 2 sequences"):
        model.run_with_cache([TEXT, TEXT], "blocks.0.hook_resid_pre", remove_batch_dim=True)


def test_tokens(pair: Any) -> None:
    model, bridge, ids = pair
    assert model.to_str_tokens(TEXT) == bridge.to_str_tokens(TEXT, prepend_bos=False)
    assert model.to_str_tokens([TEXT, "The war"]) == [model.to_str_tokens(t) for t in (TEXT, "The war")]
    assert model.to_single_token(" state") == bridge.to_single_token(" state")
    assert model.to_string(ids) == bridge.to_string(ids) == [TEXT] and model.to_string(ids[0]) == TEXT
    assert model.to_string(model.to_single_token(" state")) == " state"
    for tokens in (" state", model.to_single_token(" state"), ids[0]):
        theirs = bridge.tokens_to_residual_directions(tokens)
        torch.testing.assert_close(model.tokens_to_residual_directions(tokens), theirs)
    assert model.W_E.shape == (model.W_U.shape[1], model.W_U.shape[0])


@torch.no_grad()
def test_losses(pair: Any) -> None:
    model, bridge, ids = pair
    theirs = bridge(ids, return_type="loss", use_cache=False)
    torch.testing.assert_close(model(ids, return_type="loss"), theirs, rtol=0, atol=1e-5)
    logits, loss = model(ids, return_type="both", loss_per_token=True)
    torch.testing.assert_close(
        loss, bridge(ids, return_type="loss", loss_per_token=True, use_cache=False), rtol=0, atol=1e-4
    )
    assert torch.equal(logits, model(ids)) and model(ids, return_type=None) is None
    both = model([TEXT, "The war"], return_type="loss")  # the mean over real tokens, padding left out
    alone = [model(text, return_type="both", loss_per_token=True)[1].flatten() for text in (TEXT, "The war")]
    torch.testing.assert_close(both, torch.cat(alone).mean(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="return_type='probs': allowed are"):
        model(ids, return_type="probs")
    with pytest.raises(ValueError, match="a loss needs logits of all tokens"):
        model(ids, return_type="loss", logits_to_keep=1)


@torch.no_grad()
def test_hooks_that_stay_until_reset() -> None:
    model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    before, doubled = model(TEXT), lambda value, hook: 2 * value
    model.add_hook("blocks.1.linear_attn.hook_v", doubled)
    expected = model(TEXT)
    model.reset_hooks()
    assert torch.equal(model(TEXT), before) and not torch.allclose(expected, before)
    with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_v", doubled)]):
        model.reset_hooks()  # what a block attached goes when the block ends
        assert torch.equal(model(TEXT), expected)
    with pytest.raises(
        ValueError, match=r"hook_state fires only at positions asked for: attach to it with model\.hooks"
    ):
        model.add_hook("blocks.1.mixer.hook_state", doubled)
    assert model.hook_dict["blocks.1.mixer.hook_v"].name == "blocks.1.mixer.hook_v"
    assert list(model.hook_dict) == model.hook_names


@each_model
def test_backward_hooks(name: str) -> None:
    """Against autograd through a hook that puts a leaf there, and they may change the gradient."""
    model, seen = HookedRecurrentModel.from_pretrained(name), {}
    weight = model.hf_model.get_input_embeddings().weight
    points = ["blocks.1.hook_resid_post", "blocks.1.mixer.hook_k", "blocks.1.mixer.hook_v", "blocks.0.mixer.hook_o"]
    keep = lambda gradient, hook: seen.update({hook.name: gradient})  # noqa: E731
    model.run_with_hooks(TEXT, bwd_hooks=[(p, keep) for p in points])[0, -1].max().backward()
    for point in points:
        leaf = {}
        put = lambda value, hook, leaf=leaf: leaf.setdefault("x", value.detach().requires_grad_())  # noqa: E731
        model.run_with_hooks(TEXT, [(point, put)])[0, -1].max().backward()
        torch.testing.assert_close(seen[point], leaf["x"].grad, rtol=1e-3, atol=1e-5)
        assert leaf["x"].grad.abs().max() > 0
    weight.grad = None
    model.run_with_hooks(TEXT, bwd_hooks=[("blocks.0.hook_resid_pre", lambda g, _: 0 * g)])[0, -1].max().backward()
    assert not weight.grad.any() or model.config.tie_word_embeddings
    with torch.no_grad(), pytest.raises(ValueError, match=r"no gradient will reach blocks\.0\.mixer\.hook_v"):
        model.run_with_hooks(TEXT, bwd_hooks=[("blocks.0.mixer.hook_v", keep)])
    with pytest.raises(TypeError, match=r"hook_write carries a Write, .*ws\.gradient computes it"):
        model.run_with_hooks(TEXT, bwd_hooks=[("blocks.0.mixer.hook_write", keep)])


# Both on one model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@each_model
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_interventions_act_in_the_bridges_runs(name: str, first: str) -> None:
    alone = HookedRecurrentModel.from_pretrained(name)
    ids = alone.to_tokens(TEXT)[0]
    if first == "ours":
        model = HookedRecurrentModel(load_model(str(shipped_model(name)), dtype=torch.float32), tokenizer(name))
        bridge = bridge_of(name, model.hf_model)
    else:
        bridge = bridge_of(name)
        model = HookedRecurrentModel(bridge)
        assert model.hf_model is bridge.original_model and model.tokenizer is bridge.tokenizer
    assert model.hook_names == alone.hook_names
    before = alone(ids)
    with alone.intervene(Delete(1), positions=[2, 3]):
        expected, continued = alone(ids), alone.generate(ids, max_new_tokens=4)
    assert (expected - before).abs().max() > 0.01
    with model.intervene(Delete(1), positions=[2, 3]):
        for logits in (bridge(ids), bridge(ids, use_cache=False), model(ids)):
            torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
        assert torch.equal(model.generate(ids, max_new_tokens=4), continued)
        _, cache = bridge.run_with_cache(ids, use_cache=False)
    torch.testing.assert_close(bridge(ids), before, rtol=0, atol=5e-5)
    with alone.intervene(Delete(1), positions=[2, 3]):
        torch.testing.assert_close(
            cache["blocks.2.hook_in"], alone.run_with_cache(ids)[1]["resid_pre", 2], rtol=0, atol=5e-5
        )


@torch.no_grad()
@each_model
def test_our_points_in_a_bridge(name: str) -> None:
    alone, model = HookedRecurrentModel.from_pretrained(name), HookedRecurrentModel(bridge_of(name))
    ids = alone.to_tokens(TEXT)[0]
    _, expected = alone.run_with_cache(ids)
    _, cache = model.run_with_cache(ids)
    assert list(cache) == list(expected)
    for point, value in expected.items():
        pairs = (
            zip((value.key, value.value), (cache[point].key, cache[point].value), strict=True)
            if isinstance(value, Write)
            else [(value, cache[point])]
        )
        for one, other in pairs:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=5e-5, msg=lambda text, p=point: f"{p}: {text}")


@torch.no_grad()
def test_a_point_that_another_tool_goes_around_is_an_error() -> None:
    """The bridge calls the parts of a Gated DeltaNet mixer, and not the mixer that was there before it."""
    model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    bridge = bridge_of("tiny-gdn", model.hf_model)
    ids, name = model.to_tokens(TEXT)[0], "blocks.1.hook_mixer_out"
    with pytest.raises(
        RuntimeError, match=rf"{name} was never reached, .* Wrap the model with writesae after that tool"
    ):
        model.run_with_cache(ids, name)
    with pytest.raises(RuntimeError, match=rf"{name} was never reached"), model.hooks([(name, lambda x, hook: 2 * x)]):
        bridge(ids, use_cache=False)
    with model.hooks([(name, lambda x, hook: 2 * x)]):
        pass  # nothing ran


# Who reads whom, and what it adds to a logit --------------------------------------------------------------------------


@torch.no_grad()
def test_effective_attention_leaves_the_erase_out() -> None:
    """Theirs is the pattern of a memory that erases nothing, of keys before their norm; so it does not make what is
    read, as the pattern does."""
    model, bridge = HookedRecurrentModel.from_pretrained("tiny-gdn"), bridge_of("tiny-gdn")
    ids = model.to_tokens(TEXT)[0]
    _, theirs = bridge.run_with_cache(ids, use_cache=False)
    _, cache = model.run_with_cache(ids)
    effective = bridge.blocks[1].linear_attn.compute_effective_attention(theirs, 1)
    beta, written, read = cache["beta", 1].mT[:, :, None], cache.write(1).value, cache["o", 1]
    made = lambda pattern: torch.einsum("bhqk,bkhv->bqhv", pattern, written)  # noqa: E731
    torch.testing.assert_close(made(cache.pattern(1)), read, rtol=1e-4, atol=1e-5)
    assert (made(effective / beta) - read).abs().max() > 0.1 * read.abs().max()
    assert (effective / beta - cache.pattern(1)).abs().max() > 0.1 * cache.pattern(1).abs().max()


@torch.no_grad()
def test_effective_attention_of_mamba2_is_the_pattern() -> None:
    """Nothing is erased there, and both leave dt to what is written."""
    model, bridge = HookedRecurrentModel.from_pretrained("tiny-mamba2"), bridge_of("tiny-mamba2")
    ids = model.to_tokens(TEXT)[0]
    for block in bridge.blocks:
        block.mixer.eager_scan = True
    _, theirs = bridge.run_with_cache(ids, use_cache=False)
    _, cache = model.run_with_cache(ids)
    mixer = bridge.blocks[1].mixer
    torch.testing.assert_close(cache.pattern(1), mixer.compute_effective_attention(theirs, 1), rtol=1e-4, atol=1e-5)
    with_dt = mixer.compute_effective_attention(theirs, 1, include_dt_scaling=True)
    assert (cache.pattern(1) - with_dt).abs().max() > 0.1


def test_direct_attribution_of_their_parts(pair: Any) -> None:
    """Their layers' outputs, the scale of their final norm and their unembedding make our contributions."""
    model, bridge, ids = pair
    ours = direct_attribution(model, ids, Logit(5, minus=11)).records()
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(ids, use_cache=False)
        norm, W_U, scale = bridge.ln_final.original_component, bridge.W_U, theirs["ln_final.hook_scale"][0, -1]
        weight = (1 + norm.weight) if "Qwen" in type(norm).__name__ else norm.weight
        u = (W_U[:, 5] - W_U[:, 11]) * weight / scale
        u = u - u.mean() if isinstance(norm, torch.nn.LayerNorm) else u  # it centres
        for part, layer, contribution in zip(ours.part, ours.layer, ours.contribution, strict=True):
            if layer >= 0:
                name = "attn" if part == "self_attn" else part
                expected = float(theirs[f"blocks.{layer}.{name}.hook_out"][0, -1] @ u)
                assert contribution == pytest.approx(expected, abs=2e-5)
                assert abs(contribution) > 1e-4
