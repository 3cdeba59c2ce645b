"""A memory as a thing: going on from it is the unbroken text, and its parts are those of the model."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import docs_pages
import writesae as ws
from architectures import N_VOCAB, Architecture, architecture_named, each_architecture, each_rule

SETTINGS: dict[str, Any] = dict(max_new_tokens=5, do_sample=False)
N_POS, N_READ = 11, 7
IDS = torch.randint(N_VOCAB, (2, N_POS), generator=torch.Generator().manual_seed(3))
READ, MORE = IDS[:, :N_READ], IDS[:, N_READ:]
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)


def wrapped(architecture: Architecture) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(architecture.build())


def tensors(memory: ws.Memory) -> dict[str, Tensor]:
    return {f"state.{layer}": x for layer, x in memory.states.items()} | dict(memory.others) | {"ids": memory.ids}


def assert_same(one: ws.Memory, other: ws.Memory) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    for name, x in tensors(one).items():
        assert x.dtype == tensors(other)[name].dtype and torch.equal(x, tensors(other)[name]), name


# Going on ------------------------------------------------------------------------------------------------------------


@each_architecture
@torch.no_grad()
def test_it_goes_on_as_the_unbroken_text(architecture: Architecture, tmp_path: Path) -> None:
    model = wrapped(architecture)
    whole, memory = model(IDS), model.memory(READ)
    before = copy.deepcopy(memory)
    for _ in range(2):  # a memory serves many times
        torch.testing.assert_close(model(MORE, memory=memory), whole[:, N_READ:], **CLOSE)
    logits, cache = model.run_with_cache(MORE, memory=memory)
    torch.testing.assert_close(logits, whole[:, N_READ:], **CLOSE)
    layer = model.sites[-1].layer
    expected = model.run_with_cache(IDS)[1].state(layer, [N_POS - 1])
    torch.testing.assert_close(cache.state(layer, [N_POS - 1]), expected, **CLOSE)
    found = model.generate(MORE, memory=memory, **SETTINGS)
    assert torch.equal(found, model.generate(IDS, **SETTINGS)[:, N_READ:])
    assert_same(memory, before)

    step_by_step = model.memory(IDS[:, 4:N_READ], memory=model.memory(IDS[:, :4]))
    torch.testing.assert_close(model(MORE, memory=step_by_step), whole[:, N_READ:], **CLOSE)
    torch.testing.assert_close(model(MORE.flip(0), memory=memory[[1, 0]]), whole[:, N_READ:].flip(0), **CLOSE)
    batch = torch.cat([MORE[:1], MORE[:1], MORE[1:]])  # one memory serves a batch
    torch.testing.assert_close(model(batch, memory=memory[0])[:2], whole[:1, N_READ:].expand(2, -1, -1), **CLOSE)

    memory.save(tmp_path / "memory.safetensors")
    loaded = ws.Memory.load(tmp_path / "memory.safetensors")
    assert_same(loaded, memory)
    assert torch.equal(model(MORE, memory=loaded), model(MORE, memory=memory))


@each_architecture
@torch.no_grad()
def test_what_is_left_out_is_missed(architecture: Architecture) -> None:
    """The twins: a state turned over or forgotten, a convolution, a second memory, keys or values."""
    model = wrapped(architecture)
    expected, memory = model(IDS)[:, N_READ:], model.memory(READ)

    def error(broken: ws.Memory) -> float:
        return float((model(MORE, memory=broken) - expected).abs().max())

    site = model.sites[0]
    S = memory.state(site.layer)
    turned = S.flatten(2).unflatten(2, (site.d_value, site.d_key)).mT if site.d_value > 1 else S.flip(2)
    assert error(memory.with_state(site.layer, turned)) > 1e-3
    assert error(memory.zeroed()) > 1e-3
    for part in ("conv_states", "recurrent_states", "keys", "values"):
        those = {name: torch.zeros_like(x) for name, x in memory.others.items() if part in name and x.numel()}
        if those:
            assert error(replace(memory, others={**memory.others, **those})) > 1e-3, part
        else:  # plain GLA has no convolution; not all have attention; some keep no values beside compressed keys
            assert architecture.name in ("gla", "hgrn2", "linear_attn", "minimax", "xlstm") or part != "conv_states"
    assert error(memory) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "olmo_hybrid", "rwkv7"])
@torch.no_grad()
def test_positions_go_on_counting(name: str) -> None:
    """Edits count over the whole text, and one a token off is another."""
    model = wrapped(architecture_named(name))
    layer = model.sites[0].layer

    def edited(at: int, memory: ws.Memory | None) -> Tensor:
        with model.intervene(ws.Delete(layer), positions=[at]):
            return model(MORE, memory=memory) if memory is not None else model(IDS)[:, N_READ:]

    memory = model.memory(READ)
    torch.testing.assert_close(edited(N_READ + 1, memory), edited(N_READ + 1, None), **CLOSE)
    assert (edited(N_READ + 2, memory) - edited(N_READ + 1, None)).abs().max() > 1e-3
    late = replace(memory, ids=torch.nn.functional.pad(memory.ids, (1, 0)))  # the twin: a token more than were read
    if name == "rwkv7":
        assert (edited(N_READ + 1, late) - edited(N_READ + 1, None)).abs().max() > 1e-3
    else:  # attention counts its own
        with pytest.raises((ValueError, RuntimeError)):
            edited(N_READ + 1, late)
    if name == "qwen3_5":
        shifted = model(MORE, memory=memory, position_ids=torch.arange(N_READ, N_POS)[None] + 1)
        assert (shifted - model(IDS)[:, N_READ:]).abs().max() > 1e-3
    with model.intervene(ws.Delete(layer), positions=[2]):  # what is attached while it reads stays in it
        deleted = model.memory(READ)
    torch.testing.assert_close(model(MORE, memory=deleted), edited(2, None), **CLOSE)
    assert (model(MORE, memory=memory) - edited(2, None)).abs().max() > 1e-3


@each_architecture
@torch.no_grad()
def test_an_empty_memory(architecture: Architecture) -> None:
    """It changes nothing, until a state is set in it: that then decays and is read as any."""
    model = wrapped(architecture)
    empty, whole = model.memory(), model(IDS)
    torch.testing.assert_close(model(IDS, memory=empty), whole, **CLOSE)
    assert torch.equal(model.generate(IDS, memory=empty, **SETTINGS), model.generate(IDS, **SETTINGS))
    layer = model.sites[0].layer
    S = torch.randn_like(empty.state(layer)[0])
    logits, cache = model.run_with_cache(IDS, memory=empty.with_state(layer, S))
    assert (logits - whole).abs().max() > 1e-3
    found = cache.state(layer, [0])[:, 0]
    own = model.run_with_cache(IDS)[1]
    rec, plain = own.dynamics(layer).recurrence, own.state(layer, [0])[:, 0]
    decay = rec.log_decay[:, 0].exp()
    kept = (decay[..., None] if decay.ndim == 3 else decay[..., None, None]) * S
    if (erase := rec.erase()) is not None:
        kept = kept + torch.einsum("bhrk,bhrl,hlv->bhkv", *(x[:, 0] for x in erase), S)
    torch.testing.assert_close(found - plain, kept, **CLOSE)


@each_architecture
def test_gradients_go_through_what_follows(architecture: Architecture) -> None:
    """Weights and edits get those of the unbroken text's tokens, also where a single token follows."""
    model = wrapped(architecture)
    layer = model.sites[0].layer
    for n_read in (N_READ, N_POS - 1):
        whole = ws.gradient(model, IDS, ws.Logit(5), [layer])[layer].output[:, n_read:]
        memory = model.memory(IDS[:, :n_read])
        before = copy.deepcopy(memory)
        found = ws.gradient(model, IDS[:, n_read:], ws.Logit(5), [layer], memory=memory)[layer].output
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
        assert_same(memory, before)
        other = model.memory(IDS[:, :n_read].flip(1))
        found = ws.gradient(model, IDS[:, n_read:], ws.Logit(5), [layer], memory=other)[layer].output
        assert (found - whole).abs().max() > 1e-2 * whole.abs().max()


def test_a_memory_made_under_inference_mode() -> None:
    model = wrapped(architecture_named("rwkv7"))
    with torch.inference_mode():
        memory = model.memory(READ)
        assert torch.equal(model(MORE, memory=memory), model(MORE, memory=model.memory(READ)))
    found = ws.gradient(model, MORE, ws.Logit(5), memory=memory)
    assert torch.equal(found[0].output, ws.gradient(model, MORE, ws.Logit(5), memory=model.memory(READ))[0].output)


# A trained model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
@torch.no_grad()
def test_texts(name: str) -> None:
    model = ws.HookedRecurrentModel.from_pretrained(name)
    memory = model.memory("The state of the Union")
    text = model.generate("The state of the Union is strong", **SETTINGS)
    assert model.generate(" is strong", memory=memory, **SETTINGS) == text.removeprefix("The state of the Union")
    assert model.generate([" is strong"] * 2, memory=memory, **SETTINGS)[1] == text[22:]
    # Padding on the left stays in it.
    two = model.memory(["The state of the Union", "The people of the United States"])
    assert two.mask is not None and two.position.tolist() == two.mask.sum(-1).tolist()
    alone = model(" of America", memory=memory)
    torch.testing.assert_close(model([" of America"] * 2, memory=two)[:1], alone, **CLOSE)
    loss = model(" is strong", memory=memory, return_type="loss")
    whole = model("The state of the Union is strong", return_type="loss", loss_per_token=True)
    torch.testing.assert_close(loss, whole[:, -1].mean(), **CLOSE)


TREASURY = (
    "The Treasury collected a revenue of ten million dollars. The Treasury paid five million dollars of the public "
    "debt, and the revenue of the Treasury"
)
WAR = (
    "The war with Mexico began. Our army crossed the river and defeated the army of Mexico, and the general of our "
    "army took the city of Mexico. The army"
)
AFTER = " has since been increased, and I recommend to Congress that"


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
@torch.no_grad()
def test_heads_of_another_memory(name: str) -> None:
    """With another text's states the model goes on nearly as after that; with all that is remembered, exactly so. The
    model with an attention layer has most of it there instead."""
    model = ws.HookedRecurrentModel.from_pretrained(name)
    ours, other = model.memory(TREASURY), model.memory(WAR)
    wanted = model(AFTER, memory=other)[0, 4:].log_softmax(-1)

    def distance(memory: ws.Memory) -> float:
        """KL from what follows the war, per token, past the reach of convolutions."""
        found = model(AFTER, memory=memory)[0, 4:].log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    def rest_of_other(memory: ws.Memory) -> ws.Memory:
        return replace(memory, others=other.others, settings=other.settings, ids=other.ids)

    def heads(layers: list[int]) -> list[tuple[int, int]]:
        return [(layer, head) for layer in layers for head in range(model.site(layer).n_heads)]

    swapped = ours.with_heads(other, heads([site.layer for site in model.sites]))
    best = sorted((site.layer for site in model.sites), key=lambda x: distance(ours.with_heads(other, heads([x]))))
    some = len(best) // 3
    right, wrong = (distance(ours.with_heads(other, heads(layers))) for layers in (best[:some], best[-some:]))
    if name == "tiny-gdn":
        assert distance(swapped) > 0.5 * distance(ours) and distance(rest_of_other(ours)) < 0.2 * distance(ours)
    else:
        assert distance(swapped) < 0.15 * distance(ours) and distance(rest_of_other(ours)) > 0.6 * distance(ours)
        assert right < 0.55 * distance(ours)  # a third of the layers does half of it
        halfway = distance(ours.blend(other, 0.5))
        assert distance(swapped) < halfway < distance(ours)
    assert wrong > 0.95 * distance(ours)
    assert torch.equal(model(AFTER, memory=rest_of_other(swapped)), model(AFTER, memory=other))


def test_parts_of_two_memories() -> None:
    model = wrapped(architecture_named("qwen3_5"))
    ours, other = model.memory(READ), model.memory(MORE)
    assert_same(ours.with_heads(other, None), ours.blend(other, 1.0))
    assert_same(ours.blend(other, 0.0), ours)
    assert_same(ours.with_heads(other, []), ours)
    torch.testing.assert_close(ours.blend(other, 0.5).state(1), (ours.state(1) + other.state(1)) / 2)
    one = ours.with_heads(other[1], [(1, 2)])  # a memory of one text serves all
    assert torch.equal(one.state(1)[:, 2], other.state(1)[[1, 1], 2])
    assert torch.equal(one.state(1)[:, :2], ours.state(1)[:, :2]) and torch.equal(one.state(0), ours.state(0))
    zeroed = ours.zeroed([(1, 2), (3, 0)])
    assert not zeroed.state(1)[:, 2].any() and not zeroed.state(3)[:, 0].any()
    assert torch.equal(zeroed.state(1)[:, [0, 1, 3]], ours.state(1)[:, [0, 1, 3]])


# States --------------------------------------------------------------------------------------------------------------


@each_rule
@torch.no_grad()
def test_states_are_canonical(architecture: Architecture) -> None:
    model = wrapped(architecture)
    memory = model.memory(READ)
    _, cache = model.run_with_cache(READ)
    for site in model.sites:
        state = memory.state(site.layer)
        torch.testing.assert_close(state, cache.state(site.layer, [N_READ - 1])[:, 0], **CLOSE)
        assert state.shape == (2, site.n_heads, site.d_key, site.d_value)
        one = memory.with_state(site.layer, torch.ones(1, site.d_key, site.d_value), heads=[1]).state(site.layer)
        assert bool((one[:, 1] == 1).all()) and torch.equal(one[:, [0, 2, 3]], state[:, [0, 2, 3]])


# Files and copies ----------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    model = wrapped(architecture_named("qwen3_5"))
    path = tmp_path / "memory.safetensors"
    memory = model.memory(READ)
    memory.save(path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"is not a whole memory file .*save the memory again"):
        ws.Memory.load(path)
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its tensors were altered"):
        ws.Memory.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a memory file"):
        ws.Memory.load(path)
    with pytest.raises(FileNotFoundError):
        ws.Memory.load(tmp_path / "none")
    memory.to(dtype="bfloat16").save(path)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("0.state").dtype == torch.bfloat16
    found = model(MORE, memory=ws.Memory.load(path))
    torch.testing.assert_close(found, model(MORE, memory=memory), rtol=0, atol=0.1)
    again = pickle.loads(pickle.dumps(memory))
    assert torch.equal(model(MORE, memory=again), model(MORE, memory=memory))
    assert "7 tokens of each of 2 texts" in repr(memory) and "keys and values of layers 2" in repr(memory)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = wrapped(architecture_named("qwen3_5"))
    memory = model.memory(READ)
    same = wrapped(architecture_named("qwen3_5"))  # the same weights in another object
    torch.testing.assert_close(same(MORE, memory=memory), model(MORE, memory=memory), **CLOSE)
    other = architecture_named("qwen3_5").build()
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "layers.3.linear_attn" in name and p.ndim > 1).mul_(1.5)
    changed = ws.HookedRecurrentModel(other)
    with pytest.raises(ValueError, match="of the same size but with other weights: use the model that made it"):
        changed(MORE, memory=memory)
    with pytest.raises(ValueError, match="of the same size but with other weights: take both from one model"):
        memory.with_heads(changed.memory(READ), None)
    for name in ("rwkv7", "kimi_linear"):
        with pytest.raises(ValueError, match=r"this is a memory of Qwen3_5ForCausalLM.*; the model is .*use the model"):
            wrapped(architecture_named(name))(MORE, memory=memory)
    lost = model.memory(READ)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="the model that made this memory is gone"):
        lost.save(tmp_path / "memory")


# What cannot be ------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    model = wrapped(architecture_named("qwen3_5"))
    memory = model.memory(READ)
    with pytest.raises(ValueError, match="a memory of 2 texts, and 1 to go on from it"):
        model(MORE[:1], memory=memory)
    with pytest.raises(TypeError, match="memory= and past_key_values= both say what came before"):
        model(MORE, memory=memory, past_key_values=memory)
    with pytest.raises(TypeError, match="attention_mask"):
        model(MORE, memory=memory, attention_mask=torch.ones_like(MORE))
    with pytest.raises(ValueError, match="with 3 beams"):
        model.generate(MORE, memory=memory, num_beams=3)
    with pytest.raises(IndexError, match="layer 2 is not recurrent"):
        memory.state(2)
    with pytest.raises(IndexError, match="head 4 at layer 0: allowed are 0 to 3"):
        memory.zeroed([(0, 4)])
    with pytest.raises(IndexError, match="text 2 of a memory of 2"):
        memory[2]
    with pytest.raises(ValueError, match=r"give \[2, 4, 16, 12\]"):
        memory.with_state(0, torch.zeros(4, 12, 16))
    with pytest.raises(ValueError, match="wants a gradient"):
        memory.with_state(0, torch.zeros(4, 16, 12, requires_grad=True))
    with pytest.raises(ValueError, match="a memory of 2 texts and the other of 3"):
        memory.blend(model.memory(IDS[[0, 1, 1]]), 0.5)
    with model.intervene(ws.Delete(0)), pytest.raises(ValueError, match="before anything is attached"):
        model.memory()
    text = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    with pytest.raises(ValueError, match="a memory needs padding on the left"):
        model.memory({"input_ids": READ, "attention_mask": torch.ones_like(READ).index_fill(1, torch.tensor([6]), 0)})
    with pytest.raises(ValueError, match="texts of unequal length can't go on from a memory"):
        text(["a", "a longer text"], memory=text.memory("The"))
    model.hf_model.activation_checkpointing_enable()
    model.hf_model.train()
    with pytest.raises(ValueError, match="keeps no cache"):
        model(MORE, memory=memory)


# The page ------------------------------------------------------------------------------------------------------------


def test_the_snippets_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run one after the other, and what a comment says comes of a line is what comes of it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    checked = 0
    for language, code in docs_pages.blocks((docs_pages.DOCS / "memories.md").read_text("utf-8")):
        assert language == "python"
        exec(code, names)
        for line in code.splitlines():
            code_of, _, said = line.partition("  # gives ")
            if said:
                assert repr(eval(code_of, names)) == said, line
                checked += 1
    assert checked >= 4 and names["tuned"].numbers()[1].value < names["tuned"].numbers()[0].value
