"""Gradients of writes: against autograd through the readable loop, and against edits of real models."""

import dataclasses

import pytest
import torch

import writesae as ws
from architectures import each_architecture
from writesae.gradients import LayerGradient, Logit, gradient
from writesae.recurrence import Recurrence, Write
from writesae.recurrence.kernels import adjoint, adjoint_write, carried, chunked
from writesae.zoo import heldout_documents

BATCH, POS, HEADS, D_KEY, D_VALUE = 2, 37, 2, 6, 5
# one decay per key channel, terms of an erase, reads before it writes; and reads per token, if several
KINDS: dict[str, tuple] = {
    "one decay": (False, 0, False),
    "one decay, erases": (False, 1, False),
    "one decay, erases two terms": (False, 2, False),
    "one decay, erases two terms, reads before": (False, 2, True),
    "a key channel": (True, 0, False),
    "a key channel, erases": (True, 1, False),
    "a key channel, reads before": (True, 0, True),
    "one decay, three reads": (False, 0, False, 3),
    "a key channel, erases, two reads": (True, 1, False, 2),
    "one decay, two reads before": (False, 0, True, 2),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def make(kind):
    per_key, erases, before, *reads = KINDS[kind]
    draw = lambda *size: torch.randn(BATCH, POS, HEADS, *size, dtype=torch.float64)  # noqa: E731
    k, other = (torch.nn.functional.normalize(draw(D_KEY), dim=-1) for _ in range(2))
    decay = -draw(*((D_KEY,) if per_key else ())).abs() / 4
    a, b = (-0.8 * k, k + 0.5 * other) if erases else (None, None)
    if erases > 1:
        a, b = torch.stack([a, 0.3 * other], -2), torch.stack([b, k.roll(1, 1)], -2)
    weights = draw(*reads, D_VALUE) if reads else None
    rec = Recurrence(draw(*reads, D_KEY), decay, a, b, reads_before=before, read_weights=weights)
    return rec, Write(k, draw(D_VALUE)), draw(D_VALUE)


def read_of(rec, t, S):
    """What token ``t`` reads of a state, as it is written."""
    if rec.read_weights is None:
        return torch.einsum("bhkv,bhk->bhv", S, rec.q[:, t])
    return torch.einsum("bhrv,bhkv,bhrk->bhv", rec.read_weights[:, t], S, rec.q[:, t])


def by_autograd(rec, write, g, read="same"):
    """``d (sum g . o) / d E_t`` for a matrix ``E_t`` added to every state, by the recurrence as it is written."""
    E = torch.zeros(POS, BATCH, HEADS, D_KEY, D_VALUE, dtype=torch.float64, requires_grad=True)
    S, total = torch.zeros_like(E[0]), 0.0
    for t in range(POS):
        decay = rec.log_decay[:, t].exp()
        kept = S * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        if (erase := rec.erase()) is not None:
            kept = kept + torch.einsum("bhrk,bhrl,bhlv->bhkv", *(x[:, t] for x in erase), S)
        native = kept + torch.einsum("bhk,bhv->bhkv", write.key[:, t], write.value[:, t])
        before, S = S, native + E[t]
        seen = before if rec.reads_before else S if read == "same" else native
        total = total + (read_of(rec, t, seen) * g[:, t]).sum()
    (M,) = torch.autograd.grad(total, E)
    return M.transpose(0, 1), total.detach()  # [batch, pos, head, d_key, d_value]


@each_kind
@pytest.mark.parametrize("read", ["same", "next"])
def test_gradients_of_writes_are_those_of_autograd(kind, read):
    rec, write, g = make(kind)
    found = LayerGradient(rec, write, g)
    M, total = by_autograd(rec, write, g, read)
    torch.testing.assert_close(found.at(range(POS), read=read), M)
    torch.testing.assert_close(found.at([30, 3], [1], read=read), M[:, [30, 3]][:, :, [1]])
    edit = Write(torch.randn(BATCH, POS, HEADS, 2, D_KEY).double(), torch.randn(1, 1, 1, 2, D_VALUE).double().expand(
        BATCH, POS, HEADS, 2, D_VALUE), rank=2)  # fmt: skip
    torch.testing.assert_close(found.price(edit, read=read), (edit.dense() * M).sum((-1, -2)))
    atoms = Write(torch.randn(7, D_KEY).double(), torch.randn(7, D_VALUE).double())
    torch.testing.assert_close(
        found.prices(1, atoms, read=read), torch.einsum("btkv,nkv->btn", M[:, :, 1], atoms.dense())
    )
    torch.testing.assert_close(found.prices(1, atoms.dense(), read=read), found.prices(1, atoms, read=read))
    if read == "same":
        torch.testing.assert_close(found.price(write).sum(), total)
        torch.testing.assert_close(found.price(write).sum(1), found.of_output())


@each_kind
@pytest.mark.parametrize(
    "broken", ["decay not shifted", "a and b not exchanged", "write of the other token", "weights of the other read"]
)
def test_a_broken_adjoint_is_noticed(kind, broken):
    rec, write, g = make(kind)
    if broken == "a and b not exchanged" and rec.a is None:
        pytest.skip("nothing is erased")
    right_one = rec
    M, _ = by_autograd(rec, write, g)
    back = adjoint(rec)
    if broken == "decay not shifted":
        back = dataclasses.replace(back, log_decay=rec.log_decay.flip(1))
    elif broken == "a and b not exchanged":
        back = dataclasses.replace(back, a=back.b, b=back.a)
    elif broken == "weights of the other read":
        if rec.read_weights is None:
            pytest.skip("one read")
        rec = dataclasses.replace(rec, read_weights=rec.read_weights.flip(3))
    other = dataclasses.replace(rec, reads_before=not rec.reads_before)
    seen, _ = chunked(back, adjoint_write(other if broken == "write of the other token" else rec, g))
    rec = right_one
    right = torch.stack([read_of(rec, t, M[:, t]) for t in range(POS)], 1)
    assert (seen.flip(1) - right).abs().max() > 1e-2
    seen, _ = chunked(adjoint(rec), adjoint_write(rec, g))
    torch.testing.assert_close(seen.flip(1), right)


@each_kind
def test_a_key_carried_on_is_the_response_to_its_edit(kind):
    rec, _, _ = make(kind)
    keys, value = torch.randn(BATCH, 3, D_KEY).double(), torch.randn(D_VALUE).double()
    positions = torch.tensor([[0, 5, 36], [5, 5, 20]])
    one = rec[:, :, [1]]
    found = carried(one, keys, positions)
    for n in range(3):
        key = torch.zeros(BATCH, POS, 1, D_KEY).double()
        key[torch.arange(BATCH), positions[:, n], 0] = keys[:, n]
        o, _ = chunked(one, Write(key, value.expand(BATCH, POS, 1, D_VALUE)))
        factor = found[:, :, n] if found.ndim == 4 else found[:, :, n, None]
        torch.testing.assert_close(factor * value, o[:, :, 0])
        assert not found[0, : positions[0, n], n].any()


def test_best_is_the_edit_of_norm_1_with_the_largest_price():
    rec, write, g = make("one decay, erases")
    found = LayerGradient(rec, write, g)
    best = found.best([4], [0])
    M = found.at([4], [0])
    torch.testing.assert_close(best.norm(), torch.ones(BATCH, 1, 1).double())
    torch.testing.assert_close((best.dense() * M).sum((-1, -2)), torch.linalg.matrix_norm(M, 2))


# --- through models ---------------------------------------------------------------------------------------------------


@each_architecture
def test_prices_are_what_small_edits_do(architecture):
    """Central differences, at every layer; and with the norm taken exactly, the same to first order."""
    model = ws.HookedRecurrentModel(architecture.build())
    torch.manual_seed(0)  # the first to build a model has drawn its weights
    ids = torch.randint(90, (2, 24))
    of = Logit(torch.tensor([5, 9]), at=torch.tensor([20, 23]), minus=11)
    with torch.no_grad():
        logits = model(ids)
    found = gradient(model, ids, of)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-5)
    t, head, step = 14, 2, 2e-3
    for site in model.sites:
        key, value = torch.randn(site.d_key), torch.randn(site.d_value)
        if site.d_value == 1:  # one number may be small by chance
            value = torch.full((1,), 12**0.5)
        here, atom = found[site.layer], Write(key, value)
        for read in ("same", "next"):
            changed = []
            for scale in (step, -step):
                edit = ws.Add(site.layer, head, write=atom, scale=scale)
                with torch.no_grad(), model.intervene(edit, positions=[t], read=read):
                    changed.append(of(model(ids)))
            measured = (changed[0] - changed[1]) / (2 * step)
            price = here.price(atom[None, None, None], read=read)[:, t, head]
            torch.testing.assert_close(price, measured, rtol=1e-2, atol=3e-3)
            # One column is little, and what gated_delta_net forgets within six tokens leaves little at one layer.
            few = 1e-3 if architecture.name == "gated_delta_net" else 3e-3 if site.d_value == 1 else 6e-3
            assert price.abs().max() > few
            at, several = torch.full((2, 1), t), (atom * step)[None, None].expand(2, 1)
            effects = [here.effect(head, at, edit, read=read)[:, 0] for edit in (several, -several)]
            torch.testing.assert_close((effects[0] - effects[1]) / (2 * step), price, rtol=1e-2, atol=3e-3)


@pytest.fixture(scope="module", params=["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def shipped(request):
    model = ws.HookedRecurrentModel.from_pretrained(request.param)
    return model, model.to_tokens(heldout_documents()[3])[0][:, 40:100]


@pytest.mark.parametrize("broken", [False, True], ids=["right", "erase left out"])
def test_contributions_sum_to_the_outputs(shipped, broken):
    """Of every head of every layer; where something is erased, it belongs to it."""
    model, ids = shipped
    with torch.no_grad():
        found = gradient(model, ids, Logit(model(ids)[:, -1].argmax(-1)))
        _, cache = model.run_with_cache(ids, names=lambda name: name.endswith("hook_o"))
    worst = 0.0
    for layer, here in found.layers.items():
        here = here.at_fixed_scale
        if broken and here.recurrence.a is None:
            pytest.skip("nothing is erased")
        if broken:
            here = dataclasses.replace(here, recurrence=Recurrence(here.recurrence.q, here.recurrence.log_decay))
        outputs = (cache["o", layer] * here.output).sum((1, 3))
        worst = max(worst, float((here.price(here.write).sum(1) - outputs).abs().max() / outputs.abs().max()))
    assert (worst < 1e-4) is not broken


@each_architecture
def test_with_the_scale_fixed_the_norm_is_linear(architecture):
    """What the heads read, times the gradient, is what the norm's output contributes; as the gradient is, it is not."""
    model = ws.HookedRecurrentModel(architecture.build())
    ids = torch.randint(90, (2, 24))
    found = gradient(model, ids, Logit(5, minus=11))
    for site in model.sites:
        here = found[site.layer]
        if here.norm is None:
            assert here.at_fixed_scale is here
            continue
        o, y = here.norm.inputs[0], here.norm.output
        with torch.no_grad():
            bias = here.norm.module(torch.zeros_like(o), *here.norm.inputs[1:])
        whole = ((y - bias) * here.norm.gradient).sum()
        fixed = here.at_fixed_scale.output.reshape(o.shape)
        torch.testing.assert_close((fixed * o).sum(), whole, rtol=1e-3, atol=1e-4)
        assert ((here.output.reshape(o.shape) * o).sum() - whole).abs() > 1e-2 * whole.abs()


def test_a_scale_that_cannot_be_held_fixed_is_an_error(shipped):
    model, ids = shipped

    class Fused(torch.nn.Module):
        def forward(self, o, *z):
            return o / o.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    here = gradient(model, ids, Logit(100))[0]
    norm = dataclasses.replace(here.norm, module=Fused())
    with pytest.raises(ValueError, match="the scale of Fused can't be held fixed"):
        norm.at_fixed_scale()


def test_effect_takes_the_norm_exactly(shipped):
    """What the norm returns with the edit in place, times its gradient: however large the edit."""
    model, ids = shipped
    layer = model.sites[-1].layer
    with torch.no_grad():
        of = Logit(model(ids)[:, -1].argmax(-1))
    site, here = model.site(layer), gradient(model, ids, of)[layer]
    seen = []
    with model.norm(layer).register_forward_hook(lambda _module, _args, out: seen.append(out)):
        head, t = site.n_heads - 1, 59
        atom = Write(torch.randn(site.d_key), torch.randn(site.d_value))
        with torch.no_grad(), model.intervene(ws.Add(layer, head, write=atom, scale=3, relative=True), positions=[t]):
            model(ids)
    size = 3 * here.write.norm()[0, t, head] / atom.norm()
    by_hand = ((seen[0] - here.norm.output) * here.norm.gradient).sum()
    effect = here.effect(head, torch.tensor([[t]]), (atom * size)[None, None])
    torch.testing.assert_close(effect[0, 0], by_hand, rtol=1e-3, atol=1e-4)
    linear = here.price(atom[None, None, None])[0, t, head] * size
    assert (linear - by_hand).abs() > 10 * (effect[0, 0] - by_hand).abs(), "the norm is not linear"


def test_of_several_texts_of_unequal_length(shipped):
    """Padding changes no price."""
    model, _ = shipped
    texts = ["The Congress of the United States", "The captain of the ship said that the whale"]
    both = gradient(model, texts, Logit(100))
    for row, text in enumerate(texts):
        alone = gradient(model, text, Logit(100))
        n = alone.logits.shape[1]
        for layer, here in alone.layers.items():
            price = both[layer].price(both[layer].write)[row, -n:]
            torch.testing.assert_close(price, here.price(here.write)[0], rtol=1e-3, atol=1e-5)


def test_in_half_precision(shipped):
    """Hooks and norms run in the model's dtype, the recurrence backwards in float32: the same to what bfloat16 has."""
    model, ids = shipped
    half = ws.HookedRecurrentModel.from_pretrained(model.model_id, dtype=torch.bfloat16)
    token = model(ids)[:, -1].argmax(-1)
    for found, own in zip(
        gradient(half, ids, Logit(token)).layers.values(),
        gradient(model, ids, Logit(token)).layers.values(),
        strict=True,
    ):
        for a, b in ((found, own), (found.at_fixed_scale, own.at_fixed_scale)):
            prices = torch.stack([x.price(x.write).flatten() for x in (a, b)])
            assert prices.dtype == torch.float32 and torch.corrcoef(prices)[0, 1] > 0.98


def test_parameters_keep_wanting_gradients_and_get_none(shipped):
    model, ids = shipped
    wanted = [p.requires_grad for p in model.hf_model.parameters()]
    gradient(model, ids, Logit(1))
    with pytest.raises(RuntimeError):
        gradient(model, ids, lambda logits: 1 / 0 if logits is None else torch.ones(2).reshape(3))
    assert [p.requires_grad for p in model.hf_model.parameters()] == wanted
    assert all(p.grad is None for p in model.hf_model.parameters())
    assert not any(point.listening for point in model.hook_dict.values())
    assert not model.norm(0)._forward_hooks or model.norm(0)._forward_hooks.keys() == _hooks_of_others(model)


def _hooks_of_others(model):
    fresh = ws.HookedRecurrentModel.from_pretrained(model.model_id)
    assert len(fresh.norm(0)._forward_hooks) == len(model.norm(0)._forward_hooks)
    return model.norm(0)._forward_hooks.keys()


def test_bad_questions(shipped):
    model, ids = shipped
    with pytest.raises(IndexError, match=f"token id 9999999 is out of range: allowed are 0 to {model.n_vocab - 1}"):
        gradient(model, ids, Logit(9999999))
    with pytest.raises(IndexError, match=r"position 60 is out of range: allowed are -60 to 59"):
        gradient(model, ids, Logit(1, at=60))
    with pytest.raises(ValueError, match=rf"one number per sequence, \[1\]; got \[60, {model.n_vocab}\]"):
        gradient(model, ids, lambda logits: logits[0])
    with pytest.raises(ValueError, match="does not depend on what these layers read"):
        gradient(model, ids, lambda logits: torch.zeros(1))
    with pytest.raises(IndexError, match="layer 99 is not recurrent"):
        gradient(model, ids, Logit(1), layers=[99])
    found = gradient(model, ids, Logit(1), layers=[0])
    with pytest.raises(IndexError, match=r"no gradient was taken at layer 1; there are those of \[0\]"):
        found[1]
    with pytest.raises(IndexError, match="gradient at position 60: allowed are 0 to 59"):
        found[0].at([60])
    with pytest.raises(IndexError, match="edits at positions 3 to 60: allowed are 0 to 59"):
        found[0].effect(0, torch.tensor([[3, 60]]), found[0].write[:, :2, 0])
