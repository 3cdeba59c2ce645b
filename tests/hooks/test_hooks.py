"""Hook points: what fires when, what values it sees, what comes of a change, and that nothing stays behind."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import brute_force as bf
from architectures import (
    ARCHITECTURES,
    D_KEY,
    D_VALUE,
    N_HEADS,
    N_VOCAB,
    Architecture,
    architecture_named,
    each_architecture,
    each_rule,
)
from writesae import Add, Delete, HookedRecurrentModel, Replace, SAEConfig, Site, Substitute, Write, WriteSAE
from writesae.hooks import install, name_of
from writesae.hooks.attachment import attached_to
from writesae.hooks.clock import Clock
from writesae.hooks.installing import Attachment

QWEN = ARCHITECTURES[0]
QUANTITIES = QWEN.quantities(0)


@pytest.fixture
def model() -> HookedRecurrentModel:
    return HookedRecurrentModel(QWEN.build())


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, N_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def random_write(*lead: int, d_value: int = D_VALUE) -> Write:
    return Write(torch.randn(*lead, D_KEY) / 4, torch.randn(*lead, d_value) / 4)


def name(quantity: str, layer: int = 0) -> str:
    return f"blocks.{layer}.mixer.hook_{quantity}"


def scaled(factor: float) -> Callable[[Any, Any], Any]:
    return lambda value, hook: value * factor


def padded_batch(n_pos: int, n_pad: int) -> tuple[Tensor, Tensor]:
    """Two sequences, the first ``n_pad`` tokens shorter and padded on the left, and the mask."""
    ids, mask = random_ids(2, n_pos), torch.ones(2, n_pos, dtype=torch.long)
    ids[0, :n_pad], mask[0, :n_pad] = 0, 0
    return ids, mask


def same_as_before(model: HookedRecurrentModel, ids: Tensor, before: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(ids), before) and not model.busy


# Names, order, shapes ------------------------------------------------------------------------------------------------


@each_architecture
def test_sites_and_names(architecture: Architecture) -> None:
    a, model = architecture, HookedRecurrentModel(architecture.build())
    assert model.sites == [Site(layer, a.n_heads, D_KEY, a.d_value, a.rule.name) for layer in a.layers]
    assert model.hook_names == [name_of(quantity, i) for i in range(model.n_layers) for quantity in a.points(i)]
    assert model.site(3) == model.sites[-1]


@each_architecture
def test_order_of_firing(architecture: Architecture) -> None:
    model = HookedRecurrentModel(architecture.build())
    fired: list[str] = []
    for ids, n_times in [(random_ids(1, 6), 1), (random_ids(2, 70), 1)]:
        fired.clear()
        model.run_with_hooks(ids, [(lambda _: True, lambda value, hook: fired.append(hook.name))], state_positions=5)
        assert fired == model.hook_names * n_times
    fired.clear()
    with model.hooks([(lambda _: True, lambda value, hook: fired.append(hook.name))], state_positions=[1, 6]):
        model.generate(ids[:1, :5], max_new_tokens=4)  # prompt, then 3 steps; the states of one in each
    without = [n for n in model.hook_names if not n.endswith("state")]
    assert fired == model.hook_names + without + model.hook_names + without


class Watch(bf.BruteForce):
    """Keeps what the quantities of one layer are, by brute force."""

    def __init__(self, a: Architecture, model: Any, n_rows: int, layer: int):
        super().__init__(a, model, [[]] * n_rows)
        self.watched, self.values = layer, {}

    def run(self, call: bf.Call) -> Any:
        answer = call.answer

        def watched(o: Tensor, S: Tensor) -> Any:
            self.keep(**call.x, **call.raw, o=o)
            return answer(o, S)

        call.answer = watched
        return super().run(call)

    def changed(self, stage: str, value: Tensor) -> Tensor:
        self.keep(**{stage: value})
        return super().changed(stage, value)

    def keep(self, **values: Tensor) -> None:
        if self.layer == self.watched:
            for name, value in values.items():
                before = self.values.get(name) if self.head else None  # of the heads of the calls before
                self.values[name] = value if before is None else torch.cat([before, value], 2)


@each_architecture
@torch.no_grad()
def test_values_are_what_enters_the_recurrence(architecture: Architecture) -> None:
    """Against the arguments of the native function, in the model that nobody wrapped, and its outputs replayed."""
    a, ids = architecture, random_ids(2, 9)
    raw = a.build()
    with Watch(a, raw, n_rows=2, layer=3) as watch:
        raw(input_ids=ids, use_cache=False)
    _, cache = HookedRecurrentModel(a.build()).run_with_cache(ids)
    tensors = [quantity for quantity in a.quantities(3) if quantity not in ("write", "state")]
    for quantity in tensors:
        value = cache[quantity, 3]
        assert value.shape == (2, 9, a.n_heads, *a.shape(quantity)) and value.dtype == torch.float32
        expected = watch.values[quantity].float().reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5, msg=lambda text, q=quantity: f"{q}: {text}")
    write = cache["write", 3]
    assert write.shape == (2, 9, a.n_heads) and (write.d_key, write.d_value) == (D_KEY, a.d_value)
    nothing = torch.zeros(2, a.n_heads, D_KEY, a.d_value).double()
    for t in range(9):
        key, value, *_ = a.rule.step({name: watch.values[name][:, t] for name in a.rule.inputs}, nothing)
        torch.testing.assert_close(write[:, t].dense(), bf.outer(key, value).float(), rtol=1e-4, atol=2e-5)


def turn(value: Any, hook: Any) -> Any:
    """Not only scaled, which a norm behind the memory would undo."""
    if isinstance(value, Write):
        return replace(value, value=1.5 * value.value.roll(1, -1))
    return 1.5 * value.roll(1, -1)


@each_architecture
def test_every_point_moves_the_logits(architecture: Architecture) -> None:
    """A point that carried something else than what the model computes with would leave them alone."""
    model, ids = HookedRecurrentModel(architecture.build()), random_ids(1, 12)
    before = model(ids)
    for point in model.hook_names:
        turned = scaled(3.0) if point.endswith("state") else turn
        after = model.run_with_hooks(ids, [(point, turned)], state_positions=[4] if "state" in point else None)
        moved = (after - before).abs().amax(-1)[0]
        assert moved.max() > 1e-3, point
        # Not 0: which form our own models' chunks take depends on all decays in them, those of later layers included.
        assert moved[:4].max() < 1e-5 or "state" not in point
    assert same_as_before(model, ids, before)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_changes_in_place(model: HookedRecurrentModel, quantity: str) -> None:
    ids, factor = random_ids(2, 70), -0.5 if quantity.endswith("raw") else 0.5  # a norm undoes what is positive

    def in_place(value: Tensor | Write, hook: Any) -> None:
        (value.value if isinstance(value, Write) else value)[:, :, 1].mul_(factor)

    def returned(value: Any, hook: Any) -> Any:
        value = copy.copy(value) if isinstance(value, Write) else value.clone()
        new = Write(value.key, value.value.clone()) if isinstance(value, Write) else value
        in_place(new, hook)
        return new

    positions = [3, 66] if quantity == "state" else None  # [rows, 1, head, ...]: there, too, dimension 2 is the head
    with torch.no_grad():
        before = model(ids)
        one, other = (
            model.run_with_hooks(ids, [(name(quantity, 1), fn)], state_positions=positions)
            for fn in (in_place, returned)
        )
        assert torch.equal(one, other) and not torch.allclose(one, before, atol=1e-3)
        with torch.inference_mode():  # whose tensors count no versions
            assert torch.equal(
                model.run_with_hooks(ids, [(name(quantity, 1), in_place)], state_positions=positions), one
            )
    assert same_as_before(model, ids, before)


def test_hooks_run_in_the_order_given_and_may_nest(model: HookedRecurrentModel) -> None:
    ids, seen = random_ids(1, 5), []

    def add(number: int) -> Callable[[Tensor, Any], Tensor]:
        def fn(value: Tensor, hook: Any) -> Tensor:
            seen.append(number)
            return value + number

        return fn

    with model.hooks([(name("v"), add(1)), (name("v"), add(2))]), model.hooks([(name("v"), add(3))]):
        _, cache = model.run_with_cache(ids, name("v"))
    assert seen == [1, 2, 3]
    _, plain = model.run_with_cache(ids, name("v"))
    torch.testing.assert_close(cache["v", 0], plain["v", 0] + 6)


def test_padding_is_left_alone_by_hooks() -> None:
    """What a hook writes at padding tokens would otherwise be in the memory before the first real token."""
    model = HookedRecurrentModel(QWEN.build())
    ids, mask = padded_batch(20, 6)
    extra = random_write()

    def constant(value: Any, hook: Any) -> Any:
        return value + extra.expand(*value.shape) if isinstance(value, Write) else value + 0.5

    def constant_in_place(value: Tensor, hook: Any) -> None:
        value += 0.5

    for points, fn in [("kv", constant), ("kv", constant_in_place), (["write"], constant)]:  # k or v alone writes 0
        with torch.no_grad(), model.hooks([(name(point, 1), fn) for point in points]):
            padded, alone = model(ids, attention_mask=mask)[0, 6:], model(ids[:1, 6:])[0]
        torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)


# The cache -----------------------------------------------------------------------------------------------------------


def test_names(model: HookedRecurrentModel) -> None:
    ids = random_ids(1, 5)
    every = [n for n in model.hook_names if not n.endswith("state")]
    assert list(model.run_with_cache(ids)[1]) == every
    assert list(model.run_with_cache(ids, name("k"))[1]) == [name("k")]
    assert list(model.run_with_cache(ids, [name("z", 3), name("k")])[1]) == [name("k"), name("z", 3)]
    _, cache = model.run_with_cache(ids, lambda n: n.endswith("hook_o"))
    assert list(cache) == [name("o", layer) for layer in QWEN.layers] and len(cache) == 3
    assert cache["o", 3] is cache[name("o", 3)]
    assert "blocks.3.mixer.hook_o" in cache and "blocks.3.mixer.hook_k" not in cache
    with pytest.raises(KeyError, match=r"blocks\.0\.mixer\.hook_k was not cached; ask for it in names="):
        cache["k", 0]
    with pytest.raises(KeyError, match=r"no hook point named 'blocks\.0\.mixer\.hook_key'; nearest: .*hook_k"):
        cache["key", 0]
    assert "3 values of layers [0, 1, 3]" in repr(cache)


@each_architecture
@torch.no_grad()
def test_states_are_those_of_the_models_own_cache(architecture: Architecture) -> None:
    a, raw = architecture, architecture.build()
    model = HookedRecurrentModel(a.build())
    ids, n_pad = random_ids(2, 75), 6
    ids[0, :n_pad] = 0
    mask = torch.ones_like(ids)
    mask[0, :n_pad] = 0
    _, cache = model.run_with_cache(ids, attention_mask=mask)
    asked = [0, 63, 64, 68]  # of the padded sequence, these lie 6 columns later
    found = {layer: cache.state(layer, asked) for layer in a.layers}
    for row, shift in ((0, n_pad), (1, 0)):
        hf_cache, start = a.new_cache(raw), 0
        for i, p in enumerate(asked):
            piece = ids[row : row + 1, start + shift : p + shift + 1]
            if a.rule.forgets:  # in pieces of several tokens it would: the text from its beginning
                hf_cache, piece = a.new_cache(raw), ids[row : row + 1, shift : p + shift + 1]
            raw(input_ids=piece, **hf_cache, **a.place(start, piece.shape[1]))
            start = p + 1
            for layer in a.layers:
                expected = a.slot(*hf_cache.values(), layer)[0]
                torch.testing.assert_close(found[layer][row, i], expected, rtol=1e-5, atol=2e-5)
    # From the end, in another order, some heads.
    last = cache.state(1, [-1, -75 + n_pad], heads=[2, 0])
    torch.testing.assert_close(last[0], cache.state(1, [68, 0])[0][:, [2, 0]])
    alone = model.run_with_cache(ids[1:])[1]
    torch.testing.assert_close(last[1], alone.state(1, [74, 6])[0][:, [2, 0]], rtol=1e-5, atol=1e-5)
    assert cache.positions[0].tolist() == [-1] * n_pad + list(range(69))


def edits(a: Architecture = QWEN) -> list[Any]:
    torch.manual_seed(3)
    sae = WriteSAE(SAEConfig(D_KEY, a.d_value, n_atoms=16, k=2, target="state", layer=1, head=2))
    return [
        Delete(1, [0, 3]),
        Add(1, 2, write=random_write(d_value=a.d_value), relative=True, scale=3.0),
        Replace(1, 1, write=random_write(d_value=a.d_value)),
        Substitute(sae),
    ]


@each_rule
@pytest.mark.parametrize("read", ["same", "next"])
def test_states_with_edits_and_in_pieces(architecture: Architecture, read: str) -> None:
    """Rebuilt states are those that the model goes on with, whatever was done to them."""
    a, model, ids = architecture, HookedRecurrentModel(architecture.build()), random_ids(2, 70)
    turned = functools.partial(Write.__add__, random_write(d_value=a.d_value).expand(2, 66, N_HEADS))
    hooks = [(name("k", 1), scaled(0.9)), (name("write", 1), lambda value, hook: turned(value) * 0.5)]
    hooks += [(name("state", 1), scaled(0.5))]
    with (
        torch.no_grad(),
        model.intervene(edits(a), positions=[2, 30, 64, 68], read=read),
        model.hooks(hooks[:1]),
    ):
        hf_cache = DynamicCache(config=model.config)
        with model.hooks(hooks[1:], state_positions=[20]):
            _, first = model.run_with_cache(ids[:, :66], past_key_values=hf_cache)
        end = a.slot(hf_cache, 1).clone()
        torch.testing.assert_close(first.state(1, [-1])[:, 0], end, rtol=0, atol=1e-5)
        assert first.positions[0].tolist() == list(range(66))
        _, second = model.run_with_cache(ids[:, 66:], past_key_values=hf_cache)
        torch.testing.assert_close(second.state(1, [69])[:, 0], a.slot(hf_cache, 1), rtol=0, atol=1e-5)
    with pytest.raises(IndexError, match="position 65 of sequence 0: this pass has its positions 66 to 69"):
        second.state(1, [65])
    with pytest.raises(
        IndexError, match="layer 9 is not recurrent; recurrent layers are " + re.escape(str([*a.layers]))
    ):
        second.state(9, [66])


@each_rule
def test_delta(architecture: Architecture) -> None:
    """What a state gains beyond its decay; under edits, without what these add at the token itself."""
    a, model, ids = architecture, HookedRecurrentModel(architecture.build()), random_ids(2, 70)

    def gained(cache: Any) -> Tensor:
        states = cache.state(1, range(70))
        decay = cache["log_decay", 1][:, 1:].exp() if "log_decay" in a.rule.inputs else torch.ones(())
        return states[:, 1:] - decay[(..., *[None] * (1 if a.rule.decay_per_key else 2))] * states[:, :-1]

    _, cache = model.run_with_cache(ids)
    torch.testing.assert_close(cache.delta(1)[:, 1:].dense(), gained(cache), rtol=0, atol=1e-5)
    with model.intervene(edits(a)[0], positions=[5, 40]):
        _, cache = model.run_with_cache(ids)
    difference = (cache.delta(1)[:, 1:].dense() - gained(cache)).abs().amax((0, -1, -2))
    assert (difference[[4, 39]] > 1e-3)[:, [0, 3]].all()
    difference[[4, 39]] = 0
    assert difference.max() < 1e-5


def test_write_is_as_hooks_left_it(model: HookedRecurrentModel) -> None:
    ids = random_ids(1, 6)
    _, plain = model.run_with_cache(ids)
    with model.hooks([(name("write"), scaled(0.5))]), model.intervene(Delete(0)):
        _, cached = model.run_with_cache(ids, name("write"))
        _, rebuilt = model.run_with_cache(ids, [name(q) for q in ("k", "v", "beta", "log_decay")])
    for cache in (cached, rebuilt):
        torch.testing.assert_close(cache.write(0).dense(), 0.5 * plain.write(0).dense())
    with pytest.raises(KeyError, match="hook_k was not cached"):
        cached.delta(0)


def test_hook_state(model: HookedRecurrentModel) -> None:
    """Fires at the asked positions, with the states that the cache rebuilds, each sequence at its own tokens."""
    ids, mask = padded_batch(70, 4)
    _, cache = model.run_with_cache(ids, attention_mask=mask)
    fired = []
    with model.hooks(
        [(name("state"), lambda value, hook: fired.append((value, hook.positions)))], state_positions=[2, 64]
    ):
        model(ids, attention_mask=mask)
    rows = [1, 0, 1, 0]  # the padded sequence reaches a position 4 columns later
    assert [at.tolist() for _, at in fired] == [[2], [2], [64], [64]]
    for row, (value, at) in zip(rows, fired, strict=True):
        assert value.shape == (1, 1, N_HEADS, D_KEY, D_VALUE)
        torch.testing.assert_close(value[0, 0], cache.state(0, at.tolist())[row, 0], rtol=0, atol=1e-6)
    _, kept = model.run_with_cache(ids, [name("state")], state_positions=[-1, 2], attention_mask=mask)
    assert list(kept) == [name("state")]
    torch.testing.assert_close(kept["state", 0], cache.state(0, [-1, 2]))


def test_hook_state_of_nested_blocks(model: HookedRecurrentModel) -> None:
    ids, outer, inner = random_ids(1, 8), [], []
    with (
        model.hooks([(name("state"), lambda value, hook: outer.append(hook.positions.item()))], state_positions=[1, 5]),
        model.hooks([(name("state"), lambda value, hook: inner.append(hook.positions.item()))], state_positions=[5, 6]),
    ):
        model(ids)
    assert outer == [1, 5] and inner == [5, 6]
    with (
        torch.no_grad(),
        model.hooks([(name("state"), scaled(0.5))], state_positions=[1, 5]),
        model.hooks([(name("state"), scaled(0.4))], state_positions=[5, 6]),
    ):
        both = model(ids)
    factor = {1: 0.5, 5: 0.5 * 0.4, 6: 0.4}
    once = [(name("state"), lambda value, hook: value * factor[hook.positions.item()])]
    with torch.no_grad():
        torch.testing.assert_close(model.run_with_hooks(ids, once, state_positions=[1, 5, 6]), both, rtol=0, atol=1e-5)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["same", "next"])
@pytest.mark.parametrize("kind", [Add, Replace])
def test_gradient_of_a_write(model: HookedRecurrentModel, kind: type[Add], read: str) -> None:
    """Of a scalar of the logits, against central differences along a random direction."""
    ids, base = random_ids(1, 70), random_write()
    direction, weights = random_write(), torch.randn(30, N_VOCAB)

    def scalar(key: Tensor, value: Tensor, relative: bool) -> Tensor:
        write = kind(1, 2, write=Write(key, value), relative=relative)
        with model.intervene(write, positions=[3, 40], read=read):
            return (model(ids)[0, 40:] * weights).sum()

    for relative in (False, True):
        key, value = base.key.clone().requires_grad_(), base.value.clone().requires_grad_()
        scalar(key, value, relative).backward()
        slope = (key.grad * direction.key).sum() + (value.grad * direction.value).sum()
        step = 0.01
        with torch.no_grad():
            up, down = (
                scalar(base.key + s * direction.key, base.value + s * direction.value, relative) for s in (step, -step)
            )
        assert abs(slope) > 0.1
        torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=0.02, atol=0.02)


def test_gradients_of_the_model_are_untouched(model: HookedRecurrentModel) -> None:
    """By listening; and they go through every changed quantity to the weights before it."""
    ids, weight = random_ids(1, 9), model.hf_model.get_input_embeddings().weight

    def gradient(hooks: list[Any], positions: Any = None) -> Tensor:
        weight.grad = None
        model.run_with_hooks(ids, hooks, state_positions=positions)[0, -1].max().backward()
        return weight.grad.clone()

    plain = gradient([])
    assert torch.equal(gradient([(lambda _: True, lambda value, hook: None)], [3]), plain)
    for quantity in QUANTITIES:
        positions = [3] if quantity == "state" else None
        changed = gradient([(name(quantity, 3), scaled(1.0))], positions)
        torch.testing.assert_close(changed, plain, rtol=0, atol=1e-3 * plain.abs().max().item())
        cut = lambda value, hook: Write(value.key, value.value.detach()) if isinstance(value, Write) else value.detach()  # noqa: E731
        assert not torch.allclose(gradient([(name(quantity, 3), cut)], positions), plain), quantity


def test_gradient_to_an_sae(model: HookedRecurrentModel) -> None:
    sae = edits()[-1].sae
    with model.intervene(Substitute(sae), positions=[5, 6]):
        model(random_ids(1, 9))[0, -1].max().backward()
    assert sae.W_dec.grad is not None and sae.W_dec.grad.abs().max() > 0


def test_gradient_checkpointing(model: HookedRecurrentModel) -> None:
    """It runs the layers again in the backward pass: with the same edits, at the same positions."""
    (ids, mask), weight = padded_batch(20, 4), model.hf_model.get_input_embeddings().weight
    model.hf_model.train()

    def gradient() -> Tensor:
        weight.grad = None
        with model.intervene(edits(), positions=[3]), model.hooks([(name("v"), scaled(0.5))]):
            model(ids, attention_mask=mask)[:, -1].logsumexp(-1).sum().backward()
        return weight.grad.clone()

    plain = gradient()
    for layer in model.hf_model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    ran = []
    with model.hooks([(name("k"), lambda value, hook: ran.append(hook.name))]):
        torch.testing.assert_close(gradient(), plain)
    assert len(ran) == 2


def test_backward_hooks(model: HookedRecurrentModel) -> None:
    """torch's own hooks on a point see the gradient of its quantity, and change nothing."""
    ids, seen = random_ids(1, 9), []
    before = model(ids).detach()
    point = model.hook_dict[name("v", 1)]
    handle = point.register_full_backward_hook(lambda _m, _given, of_output: seen.append(of_output[0]))
    logits = model(ids)
    assert torch.allclose(logits, before, atol=1e-5)
    logits[0, -1].max().backward()
    handle.remove()
    leaf: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        leaf.append(value.detach().requires_grad_())
        return leaf[0]

    model.run_with_hooks(ids, [(name("v", 1), keep)])[0, -1].max().backward()
    torch.testing.assert_close(seen[0], leaf[0].grad)


# Copies, wrappers, exceptions ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_deepcopy(model: HookedRecurrentModel) -> None:
    """A copy has taps and positions of its own, also with the original gone to another sequence."""
    ids, mask = padded_batch(20, 4)
    other = HookedRecurrentModel(copy.deepcopy(model.hf_model))
    before = model(ids, attention_mask=mask)
    assert torch.equal(other(ids, attention_mask=mask), before)
    with model.intervene(Delete(0, 1), positions=[5]):
        edited = model(ids, attention_mask=mask)
        assert torch.equal(other(ids, attention_mask=mask), before)
    assert not torch.equal(edited, before)
    del model
    with other.intervene(Delete(0, 1), positions=[5]):
        assert torch.equal(other(ids, attention_mask=mask), edited)
    for whole in (copy.deepcopy(other),):
        with whole.intervene(Delete(0, 1), positions=[5]):
            assert torch.equal(whole(ids, attention_mask=mask), edited)
            assert torch.equal(other(ids, attention_mask=mask), before)


@torch.no_grad()
def test_saving(model: HookedRecurrentModel, tmp_path: Path) -> None:
    """The model saves as before, and a pickled one goes on."""
    ids = random_ids(1, 9)
    assert list(model.hf_model.state_dict()) == list(QWEN.build().state_dict())
    model.hf_model.save_pretrained(tmp_path)
    other = HookedRecurrentModel.from_pretrained(tmp_path, tokenizer=object())
    assert torch.equal(other(ids), model(ids))
    again = HookedRecurrentModel(pickle.loads(pickle.dumps(model.hf_model)))
    with model.intervene(Delete(0, 1), positions=[3]), again.intervene(Delete(0, 1), positions=[3]):
        assert torch.equal(again(ids), model(ids)) and not torch.equal(other(ids), model(ids))


@torch.no_grad()
def test_two_wrappers_of_one_model(model: HookedRecurrentModel) -> None:
    ids = random_ids(1, 20)
    other = HookedRecurrentModel(model.hf_model)
    n_hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()]
    before = model(ids)
    with model.intervene(Delete(0, 1), positions=[5]):
        edited = other(ids)
        with other.intervene(Delete(1, 1), positions=[6]):
            both = model(ids)
    assert not torch.equal(edited, before) and not torch.equal(both, edited)
    assert same_as_before(other, ids, before)
    HookedRecurrentModel(model.hf_model)
    assert n_hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()]


def test_an_unwrapped_model_beside_a_wrapped_one(model: HookedRecurrentModel) -> None:
    raw, ids = QWEN.build(), random_ids(1, 9)
    with torch.no_grad():
        before = raw(input_ids=ids).logits
        with model.intervene(Delete(0)), model.hooks([(name("v"), lambda v, hook: raw(input_ids=ids) and v * 2)]):
            model(ids)  # which runs the other one within its own layer
            assert torch.equal(raw(input_ids=ids).logits, before)


@torch.no_grad()
def test_another_model_within_a_hook(model: HookedRecurrentModel) -> None:
    """The outer layer's own points still fire after it."""
    other, ids, fired = HookedRecurrentModel(QWEN.build()), random_ids(1, 9), []
    plain = model.run_with_hooks(ids, [(name("v"), scaled(2))])

    def fn(value: Tensor, hook: Any) -> Tensor:
        other(ids)
        return value * 2

    hooks = [(name("v"), fn), (name("z"), lambda value, hook: fired.append(hook.name))]
    assert torch.equal(model.run_with_hooks(ids, hooks), plain)
    assert fired == [name("z")]


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_an_exception_leaves_nothing(model: HookedRecurrentModel, quantity: str, error: type[BaseException]) -> None:
    ids = random_ids(1, 9)
    before = model(ids)

    def fail(value: Any, hook: Any) -> None:
        raise error

    with (
        pytest.raises(error),
        model.intervene(edits(), positions=[2]),
        model.hooks([(name(quantity, 1), fail)], state_positions=[3]),
    ):
        model(ids)
    assert same_as_before(model, ids, before)
    with pytest.raises(error), model.intervene(Delete(0)), model.hooks([(name("k"), scaled(2))]):
        raise error
    assert same_as_before(model, ids, before)


@torch.no_grad()
def test_blocks_that_end_in_another_order(model: HookedRecurrentModel) -> None:
    ids = random_ids(1, 9)
    before = model(ids)
    first, second = model.intervene(Delete(0, 1)), model.intervene(Delete(0, 1))
    first.__enter__()
    one = model(ids)
    second.__enter__()
    two = model(ids)
    first.__exit__(None, None, None)
    assert torch.equal(model(ids), one) and not torch.allclose(one, two)
    second.__exit__(None, None, None)
    assert same_as_before(model, ids, before)


# bfloat16 ------------------------------------------------------------------------------------------------------------


@each_architecture
@torch.no_grad()
def test_bfloat16(architecture: Architecture) -> None:
    model = HookedRecurrentModel(architecture.build())
    low = HookedRecurrentModel(architecture.build().to(torch.bfloat16))
    ids = random_ids(2, 70)
    _, cache = low.run_with_cache(ids)
    assert {cache[q, 1].dtype for q in architecture.rule.inputs} == {torch.float32}
    # transformers' scan of Mamba-2 gives its float32 to the norm.
    as_the_model = torch.float32 if architecture.rule is bf.MAMBA2 else torch.bfloat16
    assert cache["o", 1].dtype == as_the_model
    if "z" in architecture.quantities(1):
        assert cache["z", 1].dtype == torch.bfloat16
    plain, low_plain = model(ids), low(ids)  # some models turn their logits into float32
    for what in edits(architecture)[:3]:
        with model.intervene(what, positions=slice(5, 70, 4)), low.intervene(what, positions=slice(5, 70, 4)):
            effect, low_effect = model(ids) - plain, low(ids).float() - low_plain.float()
        assert low_effect.isfinite().all()
        assert torch.cosine_similarity(effect.flatten(), low_effect.flatten(), 0) > 0.8
        assert 0.7 < low_effect.norm() / effect.norm() < 1.4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_whose_writes_are_all_deleted_is_silent(dtype: torch.dtype) -> None:
    """Not what is left of subtracting two nearly equal numbers, which the gated norm would blow up."""
    model = HookedRecurrentModel(QWEN.build().to(dtype))
    ids = random_ids(1, 70)
    nothing = Write(torch.zeros(D_KEY), torch.zeros(D_VALUE))
    for what in (Delete(1, 2), Replace(1, 2, write=nothing)):
        with model.intervene(what):
            assert model.run_with_cache(ids, name("o", 1))[1]["o", 1][:, :, 2].abs().max() == 0
    with model.hooks([(name("write", 1), scaled(0.0))]):
        assert model.run_with_cache(ids, name("o", 1))[1]["o", 1].abs().max() == 0


# GPU packages --------------------------------------------------------------------------------------------------------

FAKE_PACKAGES = {
    "fla/__init__.py": "",
    "fla/ops/__init__.py": "",
    "fla/ops/gated_delta_rule/__init__.py": """
import torch

def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, **kwargs):
    if q.device.type == "cpu":
        raise RuntimeError("0 active drivers ([]). There should only be one.")
    return torch.empty_like(v), None

fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
""",
    "causal_conv1d/__init__.py": """
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    if x.device.type == "cpu":
        raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
    return x

def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
""",
}
WITH_FAKE_PACKAGES = """
import sys
import pytest, torch
from architectures import ARCHITECTURES
from writesae import Delete, HookedRecurrentModel

saved = torch.load(sys.argv[1], weights_only=True)
for architecture in ARCHITECTURES:
    if architecture.name not in saved:
        continue
    ids, logits, made = saved[architecture.name]
    hf_model = architecture.build()
    with pytest.raises(RuntimeError, match="x.is_cuda"):
        hf_model(input_ids=ids)
    architecture.modeling.causal_conv1d_fn = architecture.modeling.causal_conv1d_fn.__wrapped__
    with pytest.raises(RuntimeError, match="0 active drivers"):
        hf_model(input_ids=ids)
    model = HookedRecurrentModel(hf_model)
    with torch.no_grad():
        assert torch.equal(model(ids), logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), made)
        with model.intervene(Delete(0, 1), positions=[5]):
            assert not torch.equal(model(ids), logits)
        # On another device the package's function runs, and gets what it calls by other names than transformers.
        mixer = hf_model.model.layers[0].linear_attn.to("meta")
        with model.hooks([(lambda name: not name.endswith(("state", "write")), lambda value, hook: value * 0.5)]):
            assert mixer(torch.zeros(1, 9, 64, device="meta")).is_meta
"""


@torch.no_grad()
def test_gpu_packages_on_a_cpu(tmp_path: Path) -> None:
    """transformers binds what is installed at import, and then crashes on a CPU; a wrapped model does not."""
    for file, text in FAKE_PACKAGES.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    expected, ids = {}, random_ids(1, 70)
    for architecture in (QWEN, architecture_named("olmo_hybrid")):
        with bf.untouched(architecture):
            hf_model = architecture.build()
            made = hf_model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            expected[architecture.name] = [ids, hf_model(input_ids=ids, use_cache=False).logits, made]
    torch.save(expected, tmp_path / "expected.pt")
    here = Path(__file__).parent
    ours = [str(here.parent / "helpers"), str(here.parents[1])]
    path = [str(tmp_path), *ours, *filter(None, [os.environ.get("PYTHONPATH")])]
    script = "import torch; torch.set_num_threads(1)" + WITH_FAKE_PACKAGES
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "expected.pt")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


# Text ----------------------------------------------------------------------------------------------------------------


class Letters:
    """A token a letter."""

    pad_token_id = eos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 32 for c in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(int(i) + 32) for i in ids)


@torch.no_grad()
def test_text() -> None:
    """Several texts at once are each what it is alone, edits and generation included."""
    model = HookedRecurrentModel(QWEN.build(), Letters())
    texts = ["What", "a longer text"]
    assert model.to_str_tokens(texts[0]) == list("What")
    with model.intervene(Delete(0, 1), positions=[2]), model.hooks([(name("v", 1), scaled(0.5))]):
        together = model(texts)
        for row, text in enumerate(texts):
            torch.testing.assert_close(together[row, -len(text) :], model(text)[0], rtol=0, atol=2e-5)
        made = [model.generate(text, max_new_tokens=4, do_sample=False) for text in texts]
        assert model.generate(texts, max_new_tokens=4, do_sample=False) == made
        assert [len(m) for m in made] == [len(t) + 4 for t in texts]
        assert all(m.startswith(t) for m, t in zip(made, texts, strict=True))
        assert model.generate([3, 5, 7], max_new_tokens=2).shape == (1, 5)
    assert model.run_with_cache(texts)[1].positions[0].tolist() == [-1] * 9 + [0, 1, 2, 3]


# Where the model is --------------------------------------------------------------------------------------------------


@each_architecture
def test_taps_of_the_text_model_alone(architecture: Architecture) -> None:
    """The path of its layers has nothing before it."""
    text_model = next(
        m for m in architecture.build().modules()
        if hasattr(m, architecture.stack) and (hasattr(m, "embed_tokens") or hasattr(m, "embeddings"))
    )  # fmt: skip
    taps = install(text_model).taps
    assert tuple(tap.site.layer for tap in taps) == architecture.layers
    assert "attention_mask" in taps[0].clock.parameters or architecture.ignores_padding
    assert attached_to(text_model, Attachment).clock is taps[0].clock


def test_clock_of_a_cache_that_does_not_count() -> None:
    """Models without attention layers: transformers' cache can't tell how long it is."""

    class Cache:
        def get_seq_length(self) -> int:
            raise ValueError("only linear attention")

    class TextModel(torch.nn.Module):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None):
            return None

    clock, cache = Clock.of(TextModel()), Cache()
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        clock.positions()
    for start, n in [(0, 5), (5, 1), (6, 3)]:
        clock.begin((), {"input_ids": torch.zeros(2, n), "past_key_values": cache})
        assert clock.positions().tolist() == [list(range(start, start + n))] * 2
        clock.end()


@torch.no_grad()
def test_inputs_as_embeddings(model: HookedRecurrentModel) -> None:
    ids = random_ids(1, 20)
    embeddings = model.hf_model.get_input_embeddings()(ids)
    with model.intervene(Delete(0, 1), positions=[5]):
        expected = model(ids)
        assert torch.equal(model.hf_model(inputs_embeds=embeddings, use_cache=False).logits, expected)
        base = model.hf_model.model(ids, use_cache=False).last_hidden_state  # by place
        assert torch.equal(model.hf_model.lm_head(base), expected)
