"""The residual stream: its hook points on every architecture, against torch's own hooks, and edits by SAEs of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_hooks import padded_batch, random_ids
from torch import Tensor

from architectures import ARCHITECTURES, Architecture, each_architecture
from writesae import HookedRecurrentModel, Reconstruct, Steer, Substitute, WriteSAE
from writesae.hooks import name_of

TEXT = "The state of the Union is strong."
# Layers that do more than add what their mixer and MLP give: scale it, mix lanes, or add a second mixer's.
NOT_PLAIN = {"minimax", "granitemoehybrid", "falcon_h1", "falcon_h1_no_norm", "zamba2", "qwen4_exp", "glm5_next"}
BEGINS_WITH_A_NORM = {("rwkv6", 0), ("rwkv7", 0)}


def layers_of(a: Architecture, model: Any) -> Any:
    return next(x for m in model.modules() if len(x := getattr(m, a.stack, ())) >= 4)


@each_architecture
@torch.no_grad()
def test_what_goes_in_and_out_of_layers(architecture: Architecture) -> None:
    """Against torch's hooks on the model that nobody wrapped."""
    raw, model, ids = architecture.build(), HookedRecurrentModel(architecture.build()), random_ids(2, 9)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731
    for i, layer in enumerate(layers_of(architecture, raw)):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: before.update({i: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        layer.register_forward_hook(lambda _, args, out, i=i: after.update({i: first(out)}))
    raw(input_ids=ids, use_cache=False)
    _, cache = model.run_with_cache(ids)
    for i in range(model.n_layers):
        assert torch.equal(cache["resid_pre", i], before[i]) and torch.equal(cache["resid_post", i], after[i])
        if architecture.name not in NOT_PLAIN and (architecture.name, i) not in BEGINS_WITH_A_NORM:
            added = [cache[quantity, i] for quantity in ("mixer_out", "mlp_out") if name_of(quantity, i) in cache]
            torch.testing.assert_close(sum(added, before[i]), after[i], rtol=1e-5, atol=1e-5)
            assert min(x.norm() for x in added) > 0.01 * after[i].norm()


@each_architecture
@torch.no_grad()
def test_changes_reach_the_model(architecture: Architecture) -> None:
    """The same change by torch's own hook, in the model that nobody wrapped; and one token away it is another one."""
    model, ids = HookedRecurrentModel(architecture.build()), random_ids(2, 9)
    for quantity, at in (("resid_pre", 2), ("resid_post", 1)):  # the same place
        for position in (4, 5):
            raw = architecture.build()

            def roll(x: Tensor, position: int = position) -> Tensor:
                x = x.clone()
                x[:, position] = 1.5 * x[:, position].roll(1, -1)
                return x

            def on_entry(_layer: Any, args: Any, kwargs: Any, roll: Any = roll) -> Any:
                if args:
                    return (roll(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": roll(kwargs["hidden_states"])}

            layers_of(architecture, raw)[2].register_forward_pre_hook(on_entry, with_kwargs=True)
            expected = raw(input_ids=ids, use_cache=False).logits
            if position == 4:
                changed = model.run_with_hooks(ids, [(name_of(quantity, at), lambda x, _, roll=roll: roll(x))])
                torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
            else:
                assert (changed - expected).abs().max() > 1e-3


# SAEs of the residual stream -----------------------------------------------------------------------------------------


class DictionarySAE(torch.nn.Module):
    """What a residual SAE is asked for, and no more."""

    def __init__(self, d_model: int, n_atoms: int = 300, hook_name: str | None = "blocks.1.hook_resid_post"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W_dec = torch.nn.Parameter(torch.randn(n_atoms, d_model, generator=generator) / d_model**0.5)
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook_name))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_dec.T - 0.1)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec


@pytest.fixture(scope="module")
def gdn() -> HookedRecurrentModel:
    return HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def sae(gdn: HookedRecurrentModel) -> DictionarySAE:
    return DictionarySAE(gdn.W_E.shape[1])


def at(position: int | None, change: Any) -> Any:
    """``change`` as a hook function, at one position."""

    def fn(x: Tensor, _hook: Any) -> Tensor:
        new = change(x)
        return new if position is None else torch.where(torch.arange(x.shape[1])[:, None] == position, new, x)

    return fn


@torch.no_grad()
@pytest.mark.parametrize("position", [None, 3])
def test_reconstruct_and_steer_are_what_hooks_would_do(gdn: Any, sae: Any, position: int | None) -> None:
    point, plain = "blocks.1.hook_resid_post", gdn(TEXT)
    unit = sae.W_dec[7] / sae.W_dec[7].norm()
    for what, change in [
        (Reconstruct(sae), lambda x: sae.decode(sae.encode(x))),
        (Reconstruct(sae, error_term=True), lambda x: x),
        (Steer(sae, atom=7, scale=0.5), lambda x: x + 0.5 * x.norm(dim=-1, keepdim=True) * unit),
        (Steer(sae, atom=7, scale=3, relative=False), lambda x: x + 3 * sae.W_dec[7]),
    ]:
        expected = gdn.run_with_hooks(TEXT, [(point, at(position, change))])
        with gdn.intervene(what, positions=position):
            torch.testing.assert_close(gdn(TEXT), expected, rtol=0, atol=2e-5)
        moved = (expected - plain).abs().max()
        assert moved < 1e-5 if getattr(what, "error_term", False) else moved > 0.05
    with gdn.intervene(sae, atom=7, scale=0.5, positions=position):
        short = gdn(TEXT)
    with gdn.intervene(Steer(sae, atom=7, scale=0.5), positions=position):
        assert torch.equal(gdn(TEXT), short)
    assert torch.equal(gdn(TEXT), plain)


@torch.no_grad()
def test_one_block_for_the_stream_and_the_memory(gdn: Any, sae: Any) -> None:
    write_sae = WriteSAE.from_pretrained("tiny-gdn/L2H1")
    with gdn.intervene([Reconstruct(sae), Substitute(write_sae)], positions=[3, 5]):
        together, cache = gdn.run_with_cache(TEXT)
    with gdn.intervene(Substitute(write_sae), positions=[3, 5]), gdn.intervene(Reconstruct(sae), positions=[3, 5]):
        assert torch.equal(gdn(TEXT), together)
    fn = lambda x, _: torch.where(  # noqa: E731
        torch.isin(torch.arange(x.shape[1]), torch.tensor([3, 5]))[:, None], sae.decode(sae.encode(x)), x
    )
    with gdn.intervene(Substitute(write_sae), positions=[3, 5]):
        by_hand = gdn.run_with_hooks(TEXT, [("blocks.1.hook_resid_post", fn)])
    torch.testing.assert_close(together, by_hand, rtol=0, atol=2e-5)
    alone = gdn.run_with_hooks(TEXT, [("blocks.1.hook_resid_post", fn)])
    assert (alone - together).abs().max() > 1e-3  # both act
    torch.testing.assert_close(cache["resid_pre", 2], cache["resid_post", 1])  # the cache has what went on


@torch.no_grad()
def test_order_is_the_order_given(gdn: Any, sae: Any) -> None:
    steer, rebuild = Steer(sae, atom=7, scale=1), Reconstruct(sae)
    with gdn.intervene([steer, rebuild]):
        one = gdn(TEXT)
    with gdn.intervene(steer), gdn.intervene(rebuild):
        assert torch.equal(gdn(TEXT), one)
    with gdn.intervene([rebuild, steer]):
        assert (gdn(TEXT) - one).abs().max() > 0.01


@torch.no_grad()
def test_positions_of_padded_batches_and_of_generations(gdn: Any, sae: Any) -> None:
    ids, mask = padded_batch(20, 6)
    with gdn.intervene(Steer(sae, atom=7, scale=1), positions=[4]):
        padded = gdn(ids, attention_mask=mask)[0, 6:]
        alone = gdn(ids[:1, 6:])[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=5e-5)
    assert (alone - gdn(ids[:1, 6:])[0]).abs().max() > 0.1
    settings: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
    start = gdn.to_tokens(TEXT)[0]
    n = start.shape[1]
    with gdn.intervene(Steer(sae, atom=7, scale=4), positions=[n + 1]):
        made = gdn.generate(start, **settings)
        again = gdn(made[:, :-1])[:, n - 1 :].argmax(-1)
    assert torch.equal(made[:, n:], again)


def test_gradients_reach_the_atoms(gdn: Any) -> None:
    sae = DictionarySAE(gdn.W_E.shape[1])
    with gdn.intervene(Reconstruct(sae, error_term=True)):
        gdn(TEXT)[0, -1].max().backward()
    assert sae.W_dec.grad is not None and sae.W_dec.grad.abs().max() > 0


@torch.no_grad()
def test_bfloat16(gdn: Any, sae: Any) -> None:
    low = HookedRecurrentModel.from_pretrained("tiny-gdn", dtype=torch.bfloat16)
    with low.intervene(Steer(sae, atom=7, scale=1)), gdn.intervene(Steer(sae, atom=7, scale=1)):
        steered, expected = low(TEXT).float(), gdn(TEXT)
    one, other = (steered - low(TEXT).float()).flatten(), (expected - gdn(TEXT)).flatten()
    assert torch.cosine_similarity(one, other, 0) > 0.98


def test_mistakes(gdn: Any, sae: Any) -> None:
    d_model, write_sae = gdn.W_E.shape[1], WriteSAE.from_pretrained("tiny-gdn/L2H1")
    transcoder = DictionarySAE(d_model)
    transcoder.cfg.d_out = d_model
    for make, error, text in [
        (
            lambda: Reconstruct(write_sae),
            TypeError,
            r"Reconstruct takes an SAE of the residual .*; got WriteSAE",
        ),
        (lambda: Reconstruct(transcoder), ValueError, "DictionarySAE is a transcoder"),
        (lambda: Steer(sae, atom=300), IndexError, "atom=300: this SAE has atoms 0 to 299"),
    ]:
        with pytest.raises(error, match=text):
            make()
    for what, settings, error, text in [
        (Reconstruct(DictionarySAE(d_model, hook_name=None)), {}, ValueError, r"not say where it was trained"),
        (Reconstruct(sae, at="blocks.9.hook_resid_post"), {}, KeyError, r"no hook point named 'blocks\.9\.hook_resid"),
        (Reconstruct(sae, at="blocks.1.mixer.hook_v"), {}, ValueError, r"blocks\.1\.mixer\.hook_v is not a part of it"),
        (Reconstruct(sae), {"read": "next"}, ValueError, "read='next' is about the memory"),
        (sae, {}, TypeError, r"needs atom= and scale= .* use intervene\(Reconstruct\(sae\)\)"),
        (Reconstruct(DictionarySAE(10)), {}, ValueError, r"an SAE of 10 dimensions does not fit blocks"),
        (Reconstruct(sae), {"positions": [40]}, IndexError, "position 40 is out of range"),
    ]:  # fmt: skip
        with pytest.raises(error, match=text), gdn.intervene(what, **settings):
            gdn(TEXT)


def test_every_architecture_is_plain_or_named() -> None:
    assert {a.name for a in ARCHITECTURES} >= NOT_PLAIN
