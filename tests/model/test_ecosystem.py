"""Models as other libraries leave them: with PEFT's adapters, compiled, in bfloat16, spread over devices."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn

import writesae as ws
from writesae.hooks import graphs
from writesae.models.load import load_model
from writesae.models.wrappers import bare, weights
from writesae.zoo import shipped_model, shipped_models, shipped_saes

TEXT = "The state of the Union is strong, and so are the people."
NAMES = ["blocks.2.mixer.hook_k", "blocks.2.mixer.hook_z", "blocks.1.mixer.hook_state", "blocks.3.hook_resid_post"]
CLOSE = dict(rtol=0, atol=1e-4)


def load(name: str = "tiny-gdn") -> Any:
    """The transformers model, in float32, nothing attached."""
    return load_model(str(shipped_model(name)), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def sae() -> ws.WriteSAE:
    return ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")


def halved(value: Tensor, hook: Any) -> Tensor:
    return value / 2


@torch.no_grad()
def everything(model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """What a model gives with nothing attached, cached, hooked, edited, steered and generating; nothing is left."""
    model.tokenizer = tokenizer or model.tokenizer
    found: dict[str, Any] = {"logits": model(TEXT)}
    _, cache = model.run_with_cache(TEXT, NAMES, state_positions=[3, 8])
    found |= {name: cache[name] for name in NAMES}
    for name in ("blocks.1.mixer.hook_v", "blocks.2.mixer.hook_z", "blocks.3.hook_mixer_out"):
        found[f"{name} halved"] = model.run_with_hooks(TEXT, [(name, halved)])
    halve = [("blocks.2.mixer.hook_state", halved)]
    found["state halved"] = model.run_with_hooks(TEXT, halve, state_positions=[4])
    with model.intervene([ws.Delete(1, 0), ws.Delete(2, [1, 2])], positions=[2, 5]):
        found["deleted"] = model(TEXT)
    with model.intervene(ws.Delete(1)):
        found["continued"] = model.generate(TEXT, max_new_tokens=5, do_sample=False)
    steering = ws.Add(2, 1, write=ws.WriteSAE.from_pretrained("tiny-gdn/L2H1").atom(5), scale=4, relative=True)
    with model.intervene(steering):
        found["steered"] = model.generate("The captain", max_new_tokens=8, do_sample=False)
    found["logits again"] = model(TEXT)
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], **close: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value, name
        else:
            torch.testing.assert_close(found[name], value, **close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def expected(plain: ws.HookedRecurrentModel) -> dict[str, Any]:
    found = everything(plain)
    changed = [value for name, value in found.items() if "halved" in name or name == "deleted"]
    assert len(changed) == 5 and all((value - found["logits"]).abs().max() > 0.1 for value in changed)
    assert found["continued"] != plain.generate(TEXT, max_new_tokens=5, do_sample=False)
    assert found["steered"] != plain.generate("The captain", max_new_tokens=8, do_sample=False)
    return found


# PEFT -----------------------------------------------------------------------------------------------------------------

MIXER = ["in_proj_qkv", "in_proj_b", "out_proj"]


def adapted(hf_model: Any, kind: str, targets: list[str] = MIXER) -> Any:
    """A model with an adapter that does something, as after training."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if kind == "ia3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False)
    else:
        config = peft.LoraConfig(r=4, target_modules=targets, use_dora=kind == "dora", init_lora_weights=False)
    return peft.get_peft_model(hf_model, config)


@pytest.mark.parametrize("first", ["adapter", "wrapper"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapted_model_is_its_merged_one(kind: str, first: str, plain: Any, expected: dict[str, Any]) -> None:
    """Hooks, edits, generating, weights and fingerprint: all are those of a model with the adapter in its weights."""
    if first == "adapter":
        peft_model = adapted(load(), kind)
        model = ws.HookedRecurrentModel(peft_model, plain.tokenizer)
        assert model.hf_model is peft_model
    else:
        model = ws.HookedRecurrentModel(load(), plain.tokenizer)
        peft_model = adapted(model.hf_model, kind)
    found = everything(model)
    assert (found["logits"] - expected["logits"]).abs().max() > 0.1  # the adapter acts
    fingerprint, W_O, W_U = model.fingerprint(2), model.W_O(2), model.W_U
    assert not torch.allclose(W_O, plain.W_O(2), atol=1e-2) and torch.equal(W_U, plain.W_U)
    assert not torch.equal(model.hf_model.get_submodule(path_of(model)).weight.T.flatten(), W_O.flatten())

    with peft_model.disable_adapter():
        assert model.fingerprint(2) == plain.fingerprint(2) != fingerprint
        assert torch.equal(model.W_O(2), plain.W_O(2))
        assert_same(everything(model), expected)

    merged = ws.HookedRecurrentModel(peft_model.merge_and_unload(), plain.tokenizer)
    assert_same(found, everything(merged), **CLOSE)
    assert merged.fingerprint(2) == fingerprint
    torch.testing.assert_close(merged.W_O(2), W_O)


def path_of(model: Any) -> str:
    """The output projection of layer 2, where its plain ``weight`` lacks the adapter: the twin of what `W_O` gives."""
    return next(path for path, _ in model.hf_model.named_modules() if path.endswith("layers.2.linear_attn.out_proj"))


def test_saes_and_adapters(plain: Any, sae: ws.WriteSAE) -> None:
    peft_model = adapted(load(), "lora")
    model = ws.HookedRecurrentModel(peft_model, plain.tokenizer)
    text = r"of layer 2|weights of that layer here are others \([\w-]+\), active adapters included. check_model=False"
    with pytest.raises(ValueError, match=text), model.intervene(sae, atom=5, scale=3):
        pass
    with model.intervene(sae, atom=5, scale=3, check_model=False):
        assert (model(TEXT) - peft_model(**plain.tokenizer(TEXT, return_tensors="pt")).logits).abs().max() == 0
    with peft_model.disable_adapter(), model.intervene(sae, atom=5, scale=3):
        model(TEXT)
    elsewhere = ws.HookedRecurrentModel(adapted(load(), "lora", ["gate_proj", "q_proj"]), plain.tokenizer)
    with elsewhere.intervene(sae, atom=5, scale=3):  # the layer itself is what it was
        elsewhere(TEXT)


def test_adapters_train_under_an_edit(plain: Any) -> None:
    model = ws.HookedRecurrentModel(adapted(load(), "lora"), plain.tokenizer)
    with model.intervene(ws.Delete(1, 0)):
        loss = model(TEXT, return_type="loss")
    loss.backward()
    grads = {name: p.grad for name, p in model.hf_model.named_parameters() if p.requires_grad}
    assert len(grads) == 18 and all("lora_" in name for name in grads)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_pieces_of_an_adapted_mamba() -> None:
    """PEFT's forward takes anything; the cache must come under the name that the model inside has for it."""
    from transformers import DynamicCache

    plain = ws.HookedRecurrentModel.from_pretrained("tiny-mamba2")
    model = ws.HookedRecurrentModel(adapted(load("tiny-mamba2"), "lora", ["in_proj"]), plain.tokenizer)
    ids = plain.to_tokens(TEXT)[0]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        pieces = [model(ids[:, part], past_key_values=cache) for part in (slice(0, 4), slice(4, None))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), **CLOSE)
    assert model.logits_of_last(1) == {"logits_to_keep": 1}


def test_copies_that_peft_makes_of_modules(plain: Any, expected: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")

    def saving(hf_model: Any, *names: str) -> Any:
        return peft.get_peft_model(hf_model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=list(names)))

    peft_model = saving(load(), "norm", "out_proj")
    model = ws.HookedRecurrentModel(peft_model, plain.tokenizer)
    assert_same(everything(model), expected)
    assert model.fingerprint(2) == plain.fingerprint(2)
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if "modules_to_save" in name:
                p.mul_(0.5)
    assert model.fingerprint(2) != plain.fingerprint(2)
    torch.testing.assert_close(model.W_O(2), plain.W_O(2) / 2)
    with peft_model.disable_adapter():
        assert model.fingerprint(2) == plain.fingerprint(2)

    with pytest.raises(ValueError, match=r"layer 0 has two mixers, .*original_module and .*modules_to_save"):
        ws.HookedRecurrentModel(saving(load(), "linear_attn"))
    wrapped = ws.HookedRecurrentModel(load(), plain.tokenizer)
    saving(wrapped.hf_model, "linear_attn")  # copies run from here on, in which nothing is attached
    with pytest.raises(RuntimeError, match="was never reached"), wrapped.intervene(ws.Delete(2, 0)):
        wrapped(TEXT)
    wrapped = ws.HookedRecurrentModel(load(), plain.tokenizer)
    saving(wrapped.hf_model, "norm")
    with pytest.raises(RuntimeError, match=r"blocks\.2\.mixer\.hook_z was never reached"):
        wrapped.run_with_hooks(TEXT, [("blocks.2.mixer.hook_z", halved)])


def test_virtual_tokens_are_refused() -> None:
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(load(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PromptTuningConfig puts virtual tokens before the text"):
        ws.HookedRecurrentModel(prompted)


def test_a_plain_model_is_bare_and_its_weights_are_its_own(plain: Any) -> None:
    assert bare(plain.hf_model) is plain.hf_model
    found = dict(weights(plain.hf_model))
    own = dict(plain.hf_model.named_parameters(remove_duplicate=False))
    assert found.keys() == own.keys() and all(found[name] is own[name] for name in own)


# torch.compile -------------------------------------------------------------------------------------------------------


class Backend:
    """A compiler that changes nothing and counts the graphs that run."""

    def __init__(self) -> None:
        self.n_runs = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            self.n_runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compiler that has compiled nothing yet."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest has it write down all it does
    torch.compiler.reset()
    gc.collect()  # models of other tests whose passes were interrupted
    with import_module("torch._dynamo.config").patch(recompile_limit=64):  # checks of annotations are all one code
        yield Backend()
    torch.compiler.reset()


uses_compiler = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def two_layers() -> Any:
    """The first two layers of a model, since compiling takes long."""
    hf_model = load()
    hf_model.model.layers = hf_model.model.layers[:2]
    hf_model.config.num_hidden_layers = 2
    return hf_model


def compiled(how: str, backend: Any) -> Any:
    hf_model = two_layers()
    if how == "first, and run":
        hf_model = torch.compile(hf_model, backend=backend)
        hf_model(torch.tensor([[5, 6, 7]]), use_cache=False)
        return ws.HookedRecurrentModel(hf_model)
    model = ws.HookedRecurrentModel(hf_model)
    for layer in hf_model.model.layers:
        layer.compile(backend=backend)
    return model


@torch.no_grad()
def in_short(model: Any, ids: Tensor) -> dict[str, Any]:
    """As `everything`, but less."""
    found: dict[str, Any] = {"logits": model(ids)}
    _, cache = model.run_with_cache(ids, names := ["blocks.1.mixer.hook_k", "blocks.0.hook_resid_post"])
    found |= {name: cache[name] for name in names}
    for name in ("blocks.1.mixer.hook_v", "blocks.0.mixer.hook_z", "blocks.0.hook_mlp_out"):
        found[f"{name} halved"] = model.run_with_hooks(ids, [(name, halved)])
    with model.intervene(ws.Delete(1, [1, 2]), positions=[2, 5]):
        found["deleted"] = model(ids)
    return found | {"logits again": model(ids)}


@uses_compiler
@pytest.mark.parametrize("how", ["by layers", "first, and run"])
def test_compiled_models(how: str, plain: Any, compiler: Backend) -> None:
    """Graphs made with nothing attached run when nothing is; all that is attached acts."""
    ids = plain.to_tokens(TEXT)[0]
    expected = in_short(ws.HookedRecurrentModel(two_layers()), ids)
    changed = [value for name, value in expected.items() if "halved" in name or name == "deleted"]
    assert len(changed) == 4 and all((value - expected["logits"]).abs().max() > 0.1 for value in changed)
    model = compiled(how, compiler)
    with torch.no_grad():
        model(ids)
    assert compiler.n_runs > 0, "nothing was compiled"
    assert_same(in_short(model, ids), expected)
    before = compiler.n_runs
    with torch.no_grad():
        assert torch.equal(model(ids), expected["logits"]) and compiler.n_runs > before


@uses_compiler
def test_generating_with_compiled_layers(plain: Any, compiler: Backend) -> None:
    model, texts = ws.HookedRecurrentModel(load(), plain.tokenizer), []
    model.hf_model.model.layers[2].compile(backend=compiler)
    for one in (model, plain):
        for edits in ([], [ws.Delete(2)]):
            with one.intervene(edits):
                texts.append(one.generate(TEXT, max_new_tokens=5, do_sample=False))
    assert texts[:2] == texts[2:] and texts[0] != texts[1] and compiler.n_runs > 0


@uses_compiler
def test_graphs_that_never_look_would_be_a_silent_no_op(
    plain: Any, compiler: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: without the look at what is attached, hooks do nothing. With it, torch's own hooks act as well."""
    ids, model, called = plain.to_tokens(TEXT)[0], compiled("by layers", compiler), []
    point = model.hook_dict["blocks.1.mixer.hook_v"]

    @torch.no_grad()
    def with_hook() -> None:
        with point.register_forward_hook(lambda _module, _args, value: called.append(list(value.shape))):
            model(ids)

    with torch.no_grad():
        model(ids)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "begin", lambda text_model, attached: None)  # the look itself: there is no value in it
        with_hook()
        assert not called
        with pytest.raises(RuntimeError, match="was never reached"), torch.no_grad():
            model.run_with_hooks(ids, [(point.name, halved)])
    with_hook()
    assert called == [[1, ids.shape[1], 4, 32]]


@uses_compiler
def test_an_interrupted_pass_does_not_slow_the_next_ones(plain: Any, compiler: Backend) -> None:
    """Ctrl-C runs no hooks of torch, so nobody says that the pass is over; the next one of that model does."""
    ids, model = plain.to_tokens(TEXT)[0], compiled("by layers", compiler)

    def interrupt(value: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                model.run_with_hooks(ids, [("blocks.1.mixer.hook_v", interrupt)])
        model(ids)
    assert graphs.RUNNING.attached == 0 and model._installed.text_model not in graphs.RUNNING.passes


def with_a_compiled_layer(backend: str, plain: Any) -> list[ws.HookedRecurrentModel]:
    models = [ws.HookedRecurrentModel(two_layers(), plain.tokenizer) for _ in range(2)]
    models[0].hf_model.model.layers[1].compile(backend=backend)
    return models


@uses_compiler
@pytest.mark.usefixtures("compiler")
def test_gradients_through_graphs(plain: Any) -> None:
    results = []
    for model in with_a_compiled_layer("aot_eager", plain):
        with model.intervene(ws.Delete(1, 1), positions=[3]):
            edited = model(TEXT)
        edited.square().mean().backward()
        results.append([edited, model.hf_model.model.layers[1].linear_attn.in_proj_qkv.weight.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@uses_compiler
@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@torch.no_grad()
def test_inductor(plain: Any) -> None:
    model, eager = with_a_compiled_layer("inductor", plain)
    torch.testing.assert_close(model(TEXT), eager(TEXT), **CLOSE)
    with model.intervene(ws.Delete(1, 1), positions=[3]), eager.intervene(ws.Delete(1, 1), positions=[3]):
        torch.testing.assert_close(model(TEXT), edited := eager(TEXT), **CLOSE)
    assert (edited - eager(TEXT)).abs().max() > 0.01


@uses_compiler
@pytest.mark.usefixtures("compiler")
def test_one_graph_for_all_is_refused_with_the_reason(plain: Any) -> None:
    model = ws.HookedRecurrentModel(two_layers(), plain.tokenizer)
    model.hf_model.compile(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        model(TEXT)


# bfloat16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_models())
@torch.no_grad()
def test_bfloat16_on_real_text(name: str) -> None:
    """Every hook point fires, edits act by as much as in float32, SAEs read the same; states are float32."""
    sae = ws.WriteSAE.from_pretrained(shipped_saes(name)[-1])
    layer = sae.cfg.layer
    model = ws.HookedRecurrentModel.from_pretrained(name)
    half = ws.HookedRecurrentModel.from_pretrained(name, dtype=torch.bfloat16)
    (logits, cache), (low, low_cache) = model.run_with_cache(TEXT), half.run_with_cache(TEXT)
    assert half.hf_model.dtype == torch.bfloat16 and set(low_cache.keys()) == set(cache.keys())
    rounding = (low - logits).abs().max()
    state, low_state = cache.state(layer, [-1]), low_cache.state(layer, [-1])
    assert low_state.dtype == torch.float32
    assert (state - low_state).norm() < 0.03 * state.norm()

    edit = ws.Delete(layer)
    with model.intervene(edit, positions=range(2, 10)):
        effect = model(TEXT) - logits
    with half.intervene(edit, positions=range(2, 10)):
        low_effect = (half(TEXT) - low).float()
        assert half.generate(TEXT, max_new_tokens=4).startswith(TEXT)
    assert effect.abs().max() > 5 * rounding > 0
    assert torch.cosine_similarity(effect.flatten(), low_effect.flatten(), dim=0) > 0.98

    assert half.fingerprint(layer) == model.fingerprint(layer)
    codes, low_codes = model.encode(sae, TEXT), half.encode(sae, TEXT)
    assert (codes.indices == low_codes.indices).float().mean() > 0.8
    with half.intervene(sae, atom=5, scale=3):
        assert (half(TEXT) - low).abs().max() > 0


# Weights elsewhere ----------------------------------------------------------------------------------------------------


def on_disk(hf_model: nn.Module, folder: Path) -> None:
    disk_offload(hf_model, str(folder), execution_device=torch.device("cpu"))


def off_the_device(hf_model: nn.Module, _folder: Path) -> None:
    cpu_offload(hf_model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", [on_disk, off_the_device])
@pytest.mark.parametrize("first", ["offloaded", "wrapped"])
def test_weights_that_accelerate_keeps_elsewhere(
    place: Any, first: str, plain: Any, sae: ws.WriteSAE, expected: dict[str, Any], tmp_path: Path
) -> None:
    hf_model = load()
    if first == "wrapped":
        ws.HookedRecurrentModel(hf_model)
    place(hf_model, tmp_path)
    model = ws.HookedRecurrentModel(hf_model, plain.tokenizer)
    assert all(p.is_meta for p in hf_model.parameters()) and model.device == torch.device("cpu")
    check_weights_and_all(model, plain, sae, expected)


def test_a_device_map(plain: Any, sae: ws.WriteSAE, expected: dict[str, Any], tmp_path: Path) -> None:
    one = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device_map={"": "cpu"})
    check_weights_and_all(one, plain, sae, expected)
    parts = [name for name, _ in load().model.named_children() if name != "layers"]
    devices = {f"model.{name}": "cpu" for name in parts} | {"lm_head": "cpu"}
    devices |= {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(plain.n_layers)}
    split = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device_map=devices, offload_folder=str(tmp_path))
    there = {int(name.split(".")[2]) for name, p in split.hf_model.named_parameters() if p.is_meta}
    assert there == {1, 2}
    check_weights_and_all(split, plain, sae, expected)


def check_weights_and_all(model: Any, plain: Any, sae: ws.WriteSAE, expected: dict[str, Any]) -> None:
    assert_same(everything(model), expected)
    assert model.fingerprint(2) == plain.fingerprint(2)
    for name in ("W_U", "W_E"):
        assert torch.equal(getattr(model, name), getattr(plain, name))
    assert torch.equal(model.W_O(2), plain.W_O(2))
    assert torch.equal(model.encode(sae, TEXT).values, plain.encode(sae, TEXT).values)
    logit = ws.Logit(plain.to_single_token(" people"))
    prices, wanted = (ws.gradient(m, TEXT, logit)[2].prices(0, sae.decoder) for m in (model, plain))
    torch.testing.assert_close(prices, wanted)
    assert torch.equal(model(TEXT, stop_at_layer=3), plain(TEXT, stop_at_layer=3))


def test_copies_of_a_model_with_everything(plain: Any, expected: dict[str, Any]) -> None:
    """A copy has hooks of its own, adapters and all."""
    model = ws.HookedRecurrentModel(adapted(load(), "lora"), plain.tokenizer)
    other = copy.deepcopy(model)
    with model.intervene(ws.Delete(2, 0)), torch.no_grad():
        assert not torch.equal(model(TEXT), other(TEXT))
