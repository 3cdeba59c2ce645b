"""A logit as a sum of parts: sums on every architecture, heads and writes by hand, and twins that do not add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import brute_force as bf
import writesae as ws
from architectures import Architecture, architecture_named, each_architecture
from edit_cases import annotations_unchecked
from writesae.methods import direct_paths

OF = ws.Logit(5, minus=11)
TEXT = "The captain of the ship said that the name of the sea was"
# Rules with something beside the memory: a skip, a bonus.
OUTSIDE = ("mamba1", "mamba2", "mamba3", "mamba3_mimo", "rwkv6", "rwkv7")


def ids_of(a: Architecture) -> Tensor:
    return torch.randint(97, (20,), generator=torch.Generator().manual_seed(4))


@each_architecture
@annotations_unchecked()
def test_parts_sum_to_the_logit(architecture: Architecture) -> None:
    a, ids = architecture, ids_of(architecture)
    model = ws.HookedRecurrentModel(a.build())
    with torch.no_grad():
        expected = float(OF(model(ids)))
    found = {by: ws.direct_attribution(model, ids, OF, by=by).records() for by in ("layer", "head", "token")}
    for records in found.values():
        assert records.contribution.sum() == pytest.approx(expected, abs=1e-4)
    heads, writes = found["head"], found["token"]
    assert (heads["head"] >= 0).sum() == a.n_heads * len(a.layers)
    for layer in a.layers:
        of_layer = heads[(heads.layer == layer) & (heads["head"] >= 0)]
        assert of_layer.contribution.abs().max() > 1e-3  # the twin: a head left out would be missed
        for head, x in zip(of_layer["head"], of_layer.contribution, strict=True):
            of_head = writes[(writes.layer == layer) & (writes["head"] == head)]
            assert len(of_head) == len(ids)
            assert of_head.contribution.sum() == pytest.approx(x, abs=1e-4)
        rest = heads[(heads.layer == layer) & (heads.part == "rest")].contribution.item()
        outside = a.rule.name in OUTSIDE and a.rule is not bf.MLSTM
        assert (abs(rest) > 1e-4) if outside else rest == pytest.approx(0, abs=1e-4)
    grid = ws.pattern(model, ids, a.layers[-1], 1, of=OF)
    of_head = writes[(writes.layer == a.layers[-1]) & (writes["head"] == 1)].sort_values("position")
    torch.testing.assert_close(grid.grid[-1], torch.tensor(of_head.contribution.to_numpy()).float())
    assert not model.busy and not any(p.grad is not None for p in model.hf_model.parameters())


@pytest.fixture(scope="module")
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def final_gradient(model: ws.HookedRecurrentModel, stream: Tensor) -> Tensor:
    """Of a logit difference with respect to the stream, with the final norm at its scale: by hand."""
    norm, W_U = model.hf_model.model.norm, model.hf_model.lm_head.weight
    scale = (stream.square().mean() + norm.variance_epsilon if hasattr(norm, "variance_epsilon") else
             stream.square().mean() + norm.eps).rsqrt()  # fmt: skip
    return (W_U[OF.token] - W_U[OF.minus]) * (1 + norm.weight) * scale


@torch.no_grad()
def test_heads_by_hand(model: ws.HookedRecurrentModel) -> None:
    """Gated DeltaNet normalises each head by itself, so what a head adds to the stream is known in full."""
    _, cache = model.run_with_cache(TEXT)
    u = final_gradient(model, cache["resid_post", model.n_layers - 1][0, -1])
    heads = ws.direct_attribution(model, TEXT, OF, by="head").records()
    for layer in (0, 2):
        o, z = cache["o", layer][0, -1], cache["z", layer][0, -1]
        added = torch.einsum("hv,hvd->hd", model.norm(layer)(o, z), model.W_O(layer))
        found = heads[(heads.layer == layer) & (heads["head"] >= 0)].sort_values("head").contribution
        torch.testing.assert_close(torch.tensor(found.to_numpy()).float(), added @ u, rtol=1e-3, atol=1e-5)
    layers = ws.direct_attribution(model, TEXT, OF).records()
    for layer, part, point in ((0, "mlp", "mlp_out"), (3, "self_attn", "mixer_out")):
        x = layers[(layers.layer == layer) & (layers.part == part)].contribution.item()
        assert x == pytest.approx(float(cache[point, layer][0, -1] @ u), rel=1e-3, abs=1e-5)
    other = final_gradient(model, cache["resid_post", model.n_layers - 1][0, -2])  # the twin: another token's scale
    assert abs(float(cache["mixer_out", 3][0, -1] @ other) - float(cache["mixer_out", 3][0, -1] @ u)) > 1e-3


@torch.no_grad()
def test_what_passes_the_memory_by() -> None:
    """A layer's rest is Mamba-2's skip ``D x`` and RWKV-7's bonus, and nothing else."""
    mamba, rwkv = (ws.HookedRecurrentModel.from_pretrained(name) for name in ("tiny-mamba2", "tiny-rwkv7"))
    for model in (mamba, rwkv):
        ids, layer = torch.arange(3, 15), 1
        rest = ws.direct_attribution(model, ids, OF, by="head").records()
        rest = rest[(rest.layer == layer) & (rest.part == "rest")].contribution.item()
        with direct_paths.direct_paths(model):
            gradient = ws.gradient(model, ids, OF)[layer]
        _, cache = model.run_with_cache(ids)
        mixer = model._installed.mixers[layer]
        if model is mamba:
            skip = mixer.D[:, None] * cache["v", layer]
            expected = (skip * gradient.at_fixed_scale.output).sum()
        else:
            q, k, v, z = (cache[name, layer] for name in ("q", "k", "v", "z"))
            bonus = (q * k * mixer.r_k).sum(-1, keepdim=True) * v
            expected = (bonus + mixer.g_norm.bias.view(v.shape[-2:])) * z
            added = torch.einsum("hv,hvd->d", expected[0, -1], model.W_O(layer))
            expected = added @ _of_stream(model, ids)
        assert rest == pytest.approx(float(expected), rel=1e-3, abs=1e-5) and abs(rest) > 1e-4


def _of_stream(model: ws.HookedRecurrentModel, ids: Tensor) -> Tensor:
    """RWKV-7's final norm centres: its transpose at the scale of the last token."""
    norm, W_U = model.hf_model.base_model.norm, model.hf_model.lm_head.weight
    x = model.run_with_cache(ids)[1]["resid_post", model.n_layers - 1][0, -1]
    u = (W_U[OF.token] - W_U[OF.minus]) * norm.weight * (x.var(unbiased=False) + norm.eps).rsqrt()
    return u - u.mean()


@torch.no_grad()
def test_along_a_direction(model: ws.HookedRecurrentModel) -> None:
    """What heads add along a direction, all of them and all reads: what the mixer adds."""
    _, cache = model.run_with_cache(TEXT)
    u = torch.randn(cache["mixer_out", 2].shape[-1])
    total = sum(ws.pattern(model, TEXT, 2, head, of=u).grid.sum(1) for head in range(4))
    torch.testing.assert_close(total, cache["mixer_out", 2][0] @ u, rtol=1e-3, atol=1e-4)
    fewer = sum(ws.pattern(model, TEXT, 2, head, of=u).grid.sum(1) for head in range(3))
    assert (fewer - total).abs().max() > 1e-2  # the twin: a head left out


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "rwkv7"])
@annotations_unchecked()
def test_lengths(name: str) -> None:
    """The square of a length is the sum of squares along directions at right angles that hold all that a head adds."""
    model, ids = ws.HookedRecurrentModel(architecture_named(name).build()), torch.arange(6)
    along = lambda u: ws.pattern(model, ids, 1, 2, of=u).grid  # noqa: E731
    lengths, (n, _) = ws.pattern(model, ids, 1, 2, of="stream").grid, model.W_O(1)[2].shape
    every = torch.linalg.qr(model.W_O(1)[2].mT.detach(), mode="complete")[0].mT
    squares = torch.stack([along(u).square() for u in every[:n]])
    torch.testing.assert_close(lengths.square(), squares.sum(0), rtol=1e-3, atol=1e-6)
    assert (squares[:-1].sum(0) - lengths.square()).abs().max() > 1e-3 * squares.max()  # the twin: one left out
    assert along(every[n]).abs().max() < 1e-4 and lengths.abs().max() > 1e-2
    assert (lengths.sign() == ws.pattern(model, ids, 1, 2).grid.sign()).all()


def test_pattern(model: ws.HookedRecurrentModel) -> None:
    found = ws.pattern(model, TEXT, 2, 1)
    _, cache = model.run_with_cache(TEXT)
    torch.testing.assert_close(found.grid, cache.pattern(2, 1)[0])
    t, j, x = found.top(1)[0]
    assert x == float(found.grid[t, j]) and abs(x) == float(found.grid.abs().max())
    assert all(row[0] == len(found.tokens) - 1 for row in found.top(4, at=-1))
    records = found.records()
    assert (
        len(records) == len(found.tokens) * (len(found.tokens) + 1) // 2 and (records["key"] <= records["query"]).all()
    )
    assert found.numbers()[0].value == x and len(found.plot().axes) == 2 and "layer 2 head 1" in found.title


@pytest.mark.parametrize("by", ["layer", "head", "token"])
def test_numbers_records_and_picture(model: ws.HookedRecurrentModel, by: str) -> None:
    found = ws.direct_attribution(model, TEXT, OF, by=by)
    name, x = found.top(1)[0]
    assert abs(x) == pytest.approx(float(found.contribution.abs().max()))
    assert found.numbers()[0].value == found.value and found.numbers()[1].name == name
    assert len(found.records()) == len(found.part) and found.plot().axes
    assert by in found.title and "sum to the number" in found.about


def test_a_norm_that_is_not_held_is_noticed(model: ws.HookedRecurrentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without the fixed scale, the parts' first-order effects sum to something else, and that is an error."""
    monkeypatch.setattr(direct_paths.DirectScale, "__torch_function__",
                        lambda self, func, types, args=(), kwargs=None: func(*args, **kwargs or {}))  # fmt: skip
    with pytest.raises(ValueError, match=r"the parts sum to .*, and the number is"):
        ws.direct_attribution(model, TEXT, OF)


@annotations_unchecked()
def test_bad_input(model: ws.HookedRecurrentModel) -> None:
    for given, error, match in (
        (dict(by="heads"), ValueError, r"by='heads': allowed are 'layer', 'head' and 'token'"),
        (dict(of=lambda logits: logits.sum()), TypeError, r"give a ws.Logit"),
        (dict(text=["a", "b"]), ValueError, r"text holds 2 texts: give one"),
        (dict(of=ws.Logit(10**6)), IndexError, r"token id 1000000 is out of range"),
        (dict(of=ws.Logit(5, at=40)), IndexError, r"position 40 is out of range"),
    ):
        given = {"text": TEXT, "of": OF, **given}
        with pytest.raises(error, match=match):
            ws.direct_attribution(model, given.pop("text"), given.pop("of"), **given)
    for given, error, match in (
        (dict(layer=3), IndexError, r"layer 3 is not recurrent"),
        (dict(head=7), IndexError, r"head 7 at layer 2"),
        (dict(of="streams"), ValueError, r"of='streams': give a Logit, a vector, 'stream', or None"),
        (dict(of=torch.zeros(3)), ValueError, r"of= a vector \[3\]: the residual stream has"),
    ):
        with pytest.raises(error, match=match):
            ws.pattern(model, TEXT, **{"layer": 2, "head": 1, **given})

    def capped(_module: torch.nn.Module, _args: object, logits: Tensor) -> Tensor:
        return 3 * (logits / 3).tanh()

    with model.hf_model.lm_head.register_forward_hook(capped):
        with pytest.raises(ValueError, match="a softcap"):
            ws.direct_attribution(model, TEXT, OF)
        with pytest.raises(ValueError, match="logits are not linear in what the last layer gives"):
            ws.pattern(model, TEXT, 2, 1, of=OF)


def parts_of(model: ws.HookedRecurrentModel, by: str) -> tuple[float, float, float]:
    """The number, the sum of the parts, and what layer 2 adds beside its heads."""
    records = (found := ws.direct_attribution(model, TEXT, OF, by=by)).records()
    return found.value, records.contribution.sum(), records[records.part == "rest"].contribution.iloc[-1]


def test_what_edits_do_to_parts(model: ws.HookedRecurrentModel) -> None:
    """What an edit wrote is in the rest; what a knockout hides is missing from its head, and so from the rest of
    writes."""
    write = ws.Write(torch.ones(32), torch.ones(32))
    for edit, positions in ((ws.Add(2, 0, write=write, scale=0.1), [13, 14]), (ws.Knockout(2, sources=13), None)):
        with model.intervene(edit, positions=positions):
            by_head, by_token = (parts_of(model, by) for by in ("head", "token"))
        for value, total, _ in (by_head, by_token):
            assert total == pytest.approx(value, abs=1e-4)
        assert abs(by_token[2]) > 1e-2
        assert abs(by_head[2]) > 1e-2 if positions else by_head[2] == pytest.approx(0, abs=1e-5)


def test_in_other_ways(model: ws.HookedRecurrentModel) -> None:
    expected = parts_of(model, "head")
    with torch.inference_mode():
        assert parts_of(model, "head") == pytest.approx(expected, abs=1e-4)
        assert ws.pattern(model, TEXT, 2, 1, of=OF).grid.isfinite().all()
    model.kernels = "writesae"
    assert parts_of(model, "head") == pytest.approx(expected, abs=1e-4)
    model.kernels = "native"
    half = ws.HookedRecurrentModel.from_pretrained("tiny-gdn", dtype="bfloat16")
    assert parts_of(half, "head") == pytest.approx(expected, abs=0.1)
    compiled = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    compiled.hf_model.compile(backend="eager")
    assert parts_of(compiled, "head") == pytest.approx(expected, abs=1e-4)
