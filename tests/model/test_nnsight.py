"""Beside nnsight: its traces see our hook points, our edits act in its runs, and either may wrap the model first."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from writesae import Delete, HookedRecurrentModel, Substitute, Write, WriteSAE
from writesae.zoo import shipped_model, shipped_models, shipped_saes

TEXT = "The state of the Union is strong."
each_model = pytest.mark.parametrize("name", shipped_models())
# An open loop over the steps of a generation ends with this warning of nnsight's.
open_loops_end = pytest.mark.filterwarnings("ignore:.*was never reached. the loop asked for a step:UserWarning")


@pytest.fixture(scope="module")
def nnsight() -> Any:
    """Not imported at the top: it adds methods to `object`, on which an import of beartype after it fails."""
    return pytest.importorskip("nnsight")


@pytest.fixture
def traced(nnsight: Any, name: str) -> tuple[HookedRecurrentModel, Any, Tensor]:
    """A model wrapped by both, and token ids."""
    model = HookedRecurrentModel.from_pretrained(name)
    return model, nnsight.NNsight(model.hf_model), model.to_tokens(TEXT)[0]


def envoy(model: HookedRecurrentModel, nn_model: Any, point: str) -> Any:
    """What nnsight has for one of our hook points: at the same place in the model."""
    module = model.hook_dict[point]
    return nn_model.get(next(path for path, m in model.hf_model.named_modules() if m is module))


@torch.no_grad()
@each_model
def test_a_trace_reads_every_point(traced: Any) -> None:
    model, nn_model, ids = traced
    logits, cache = model.run_with_cache(ids)
    names = [n for n in model.hook_names if not n.endswith("hook_state")]  # states fire only where asked
    envoys = [envoy(model, nn_model, n) for n in names]
    with nn_model.trace(ids, use_cache=False):
        found = list().save()
        for each in envoys:
            found.append(each.output)
        traced_logits = nn_model.lm_head.output.save()
    assert torch.equal(traced_logits, logits)
    for n, value in zip(names, found, strict=True):
        pairs = [(value, cache[n])]
        if isinstance(value, Write):
            pairs = [(value.key, cache[n].key), (value.value, cache[n].value)]
        assert all(torch.equal(one, other) for one, other in pairs), n
    assert not any(point.listening for point in model.hook_dict.values())  # outside of a trace nobody looks
    assert torch.equal(model(ids), logits)


@torch.no_grad()
@each_model
def test_assigning(traced: Any) -> None:
    model, nn_model, ids = traced
    before = model(ids)
    for point in ("blocks.1.mixer.hook_v", "blocks.1.hook_resid_post", "blocks.1.hook_mixer_out"):
        hook = envoy(model, nn_model, point)
        expected = model.run_with_hooks(ids, [(point, lambda value, _: value * 0.5)])
        with nn_model.trace(ids, use_cache=False):
            hook.output = hook.output * 0.5
            logits = nn_model.lm_head.output.save()
        assert torch.equal(logits, expected) and not torch.allclose(logits, before), point
        with nn_model.trace(ids, use_cache=False):
            hook.output[:] *= 0.5
            logits = nn_model.lm_head.output.save()
        assert torch.equal(logits, expected), point
    assert torch.equal(model(ids), before)


@torch.no_grad()
@each_model
def test_assigning_a_write(traced: Any) -> None:
    model, nn_model, ids = traced
    hook = envoy(model, nn_model, "blocks.1.mixer.hook_write")
    with model.intervene(Delete(1)):
        expected = model(ids)
    with nn_model.trace(ids, use_cache=False):
        hook.output = hook.output * 0.0
        logits = nn_model.lm_head.output.save()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (expected - model(ids)).abs().max() > 0.01


@torch.no_grad()
@open_loops_end
@each_model
def test_generating(traced: Any) -> None:
    """Read and assign at every step, in `generate` of the model that it wraps."""
    model, nn_model, ids = traced
    settings = dict(max_new_tokens=5, do_sample=False)
    plain = model.generate(ids, **settings)
    point = f"blocks.{model.sites[-1].layer}.mixer.hook_v"
    hook = envoy(model, nn_model, point)
    seen = []
    with model.hooks([(point, lambda value, _: seen.append(-30 * value) or -30 * value)]):
        expected = model.generate(ids, **settings)
    with nn_model.trace(ids, fn=model.hf_model.generate, **settings) as tracer:
        found = list().save()
        for _step in tracer.iter[:]:
            hook.output = -30 * hook.output
            found.append(hook.output)
    assert [value.shape[1] for value in found] == [ids.shape[1], 1, 1, 1, 1]
    assert all(torch.equal(one, other) for one, other in zip(found, seen, strict=True))
    with nn_model.trace(ids, fn=model.hf_model.generate, **settings) as tracer:
        for _step in tracer.iter[:5]:
            hook.output = -30 * hook.output
        made = tracer.result.save()
    assert torch.equal(made, expected) and not torch.equal(expected, plain)


@each_model
def test_gradients(traced: Any) -> None:
    """Against those of our own backward hooks, which are held against autograd elsewhere."""
    model, nn_model, ids = traced
    kept: dict[str, Tensor] = {}
    keep = lambda gradient, point: kept.update({point.name: gradient})  # noqa: E731
    for point in (
        "blocks.1.hook_resid_post",
        "blocks.1.mixer.hook_v",
        "blocks.1.mixer.hook_k",
        "blocks.0.mixer.hook_o",
    ):
        model.run_with_hooks(ids, bwd_hooks=[(point, keep)])[0, -1].max().backward()
        hook = envoy(model, nn_model, point)
        with nn_model.trace(ids, use_cache=False):
            value = hook.output
            with nn_model.lm_head.output[0, -1].max().backward():
                gradient = value.grad.save()
        torch.testing.assert_close(gradient, kept[point], rtol=1e-3, atol=1e-5)
        assert gradient.abs().max() > 0 and not torch.allclose(gradient, 1.01 * kept[point], rtol=1e-3, atol=1e-6)


@torch.no_grad()
@each_model
def test_our_edits_in_its_runs(traced: Any, name: str) -> None:
    model, nn_model, ids = traced
    before, sae = model(ids), WriteSAE.from_pretrained(shipped_saes(name)[-1])
    layer = sae.cfg.layer
    read = envoy(model, nn_model, f"blocks.{layer}.mixer.hook_o")
    for what in ([Delete(layer, sae.cfg.head)], [Substitute(sae)]):
        with model.intervene(what, positions=[2, 5]):
            expected, cache = model.run_with_cache(ids)
            with nn_model.trace(ids, use_cache=False):
                o = read.output.save()
                logits = nn_model.lm_head.output.save()
        assert torch.equal(logits, expected) and torch.equal(o, cache["o", layer])
        assert not torch.equal(logits, before)
    with model.intervene(sae, atom=3, scale=5), nn_model.trace(ids, fn=model.hf_model.generate, max_new_tokens=4) as t:
        made = t.result.save()
    with model.intervene(sae, atom=3, scale=5):
        assert torch.equal(made, model.generate(ids, max_new_tokens=4))
    with nn_model.trace(ids, use_cache=False):
        logits = nn_model.lm_head.output.save()
    assert torch.equal(logits, before)


@torch.no_grad()
@each_model
@pytest.mark.parametrize("kind", ["NNsight", "TransformersModel", "LanguageModel"])
def test_a_model_that_nnsight_wraps_already(nnsight: Any, name: str, kind: str) -> None:
    plain = HookedRecurrentModel.from_pretrained(name)
    ids, folder = plain.to_tokens(TEXT)[0], str(shipped_model(name))
    if kind == "NNsight":
        nn_model, tokenizer = nnsight.NNsight(HookedRecurrentModel.from_pretrained(name).hf_model), plain.tokenizer
    else:
        deprecated = pytest.warns(nnsight.NNsightDeprecationWarning, match="LanguageModel is deprecated")
        with deprecated if kind == "LanguageModel" else contextlib.nullcontext():
            nn_model = getattr(nnsight, kind)(
                folder, task="text-generation", tokenizer=plain.tokenizer, dtype=torch.float32
            )
        with pytest.raises(ValueError, match=r"nnsight has not loaded this model yet: call its \.dispatch\(\)"):
            HookedRecurrentModel(nn_model)
        nn_model.dispatch()
        tokenizer = None  # its own
    model = HookedRecurrentModel(nn_model, tokenizer)
    assert torch.equal(model(TEXT), plain(TEXT)) and model.hook_names == plain.hook_names
    expected = plain.run_with_hooks(ids, [("blocks.1.mixer.hook_k", lambda value, _: value * 0.5)])
    hook = envoy(model, nn_model, "blocks.1.mixer.hook_k")
    with nn_model.trace(ids, use_cache=False):
        hook.output = hook.output * 0.5
        logits = nn_model.lm_head.output.save()
    assert torch.equal(logits, expected) and not torch.allclose(logits, plain(ids))
    with model.intervene(Delete(1), positions=[3]), plain.intervene(Delete(1), positions=[3]):
        with nn_model.trace(ids, use_cache=False):
            logits = nn_model.lm_head.output.save()
        assert torch.equal(logits, plain(ids))


@torch.no_grad()
@each_model
def test_writes_of_several_invokes(traced: Any, nnsight: Any) -> None:
    """Each invoke sees and changes the writes of its own prompts, as it does tensors."""
    model, _, ids = traced
    nn_model = nnsight.TransformersModel(model.hf_model, tokenizer=model.tokenizer)  # which knows how to join prompts
    other, point = ids.flip(1), "blocks.1.mixer.hook_write"
    hook = envoy(model, nn_model, point)
    own = [model.run_with_cache(x)[1].write(1) for x in (ids, other)]
    plain, changed = model(torch.cat([ids, other])), {}
    for how, change in {
        "scaled": lambda write: -2 * write,
        "a Write of its own": lambda write: Write(write.key, -2 * write.value, rank=write.rank),
    }.items():
        with nn_model.trace() as tracer:
            with tracer.invoke(ids):
                first = hook.output.save()
            with tracer.invoke(other):
                second = hook.output.save()
                hook.output = change(hook.output)
            with tracer.invoke():
                logits = nn_model.lm_head.output.save()
        for found, expected in zip((first, second), own, strict=True):
            assert isinstance(found, Write) and found.shape == expected.shape
            torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first.value, own[1].value, rtol=1e-2)  # the twin: the prompts differ
        changed[how] = logits
        expected = model.run_with_hooks(other, [(point, lambda write, _: -2 * write)])
        torch.testing.assert_close(logits[:1], plain[:1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1:], expected, rtol=1e-4, atol=1e-4)
        assert (logits[1:] - plain[1:]).abs().max() > 0.01


@torch.no_grad()
@each_model
def test_a_write_changed_in_place_in_one_invoke(traced: Any, nnsight: Any) -> None:
    model, _, ids = traced
    nn_model = nnsight.TransformersModel(model.hf_model, tokenizer=model.tokenizer)  # which knows how to join prompts
    other, point = ids.flip(1), "blocks.1.mixer.hook_write"
    hook = envoy(model, nn_model, point)
    with nn_model.trace() as tracer:
        with tracer.invoke(ids):
            hook.output.value[:] *= -2
        with tracer.invoke(other):
            pass
        with tracer.invoke():
            logits = nn_model.lm_head.output.save()
    expected = model.run_with_hooks(ids, [(point, lambda write, _: -2 * write)])
    torch.testing.assert_close(logits[:1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1:], model(other), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:1], model(ids), rtol=1e-2)


@torch.no_grad()
@each_model
def test_a_scan_knows_the_shapes(traced: Any, nnsight: Any) -> None:
    """nnsight runs the model on tensors without contents; whole writes have shapes there, too."""
    model, _, ids = traced
    nn_model = nnsight.TransformersModel(model.hf_model, tokenizer=model.tokenizer, task="text-generation")
    values, writes = (envoy(model, nn_model, f"blocks.1.mixer.hook_{quantity}") for quantity in ("v", "write"))
    with nn_model.scan(TEXT):
        found = [values.output.shape, writes.output.shape]
        nnsight.save(found)
    _, cache = model.run_with_cache(ids)
    assert found == [cache["v", 1].shape, cache["write", 1].shape]
