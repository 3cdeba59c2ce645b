"""Circuits: edges against the frozen model, sums against pre-activations, deletions, and twins that must be seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import writesae as ws
from architectures import Architecture, architecture_named, each_architecture
from edit_cases import annotations_unchecked
from writesae.methods import cuts, frozen, influence, tracing

OF = ws.Logit(5, minus=11)
SHIPPED = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")
TEXT = "The captain of the ship said that the name of the sea was"


def ids_of(n: int = 7) -> Tensor:
    return torch.randint(97, (n,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def tiny() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(architecture_named("qwen3_5").build())


@pytest.fixture(scope="module")
def whole(tiny: ws.HookedRecurrentModel) -> ws.Circuit:
    """Without any SAE."""
    return ws.circuit(tiny, ids_of(), OF, max_nodes=200)


class StreamSAE(nn.Module):
    """A ReLU SAE of the residual stream, as SAELens has it."""

    def __init__(self, d_model: int, at: str, n: int = 24):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.W_dec = nn.Parameter(torch.randn(n, d_model, generator=g) / d_model**0.5)
        self.b_enc, self.b_dec = (nn.Parameter(torch.randn(k, generator=g) / 4) for k in (n, d_model))
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=at))

    def encode(self, x: Tensor) -> Tensor:
        return ((x - self.b_dec) @ self.W_dec.T + self.b_enc).relu()

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


def write_sae(model: ws.HookedRecurrentModel, layer: int, head: int, **values: Any) -> ws.WriteSAE:
    site = model.site(layer)
    torch.manual_seed(7)
    sae = ws.WriteSAE(ws.SAEConfig(site.d_key, site.d_value, 32, 4, layer=layer, head=head, **values))
    with torch.no_grad():
        sae.b_enc += 0.01
        if sae.cfg.sparsity == "jumprelu":
            sae.log_threshold.fill_(-4.0)
    return sae


def worst_edge(found: ws.Circuit, n: int = 12) -> float:
    """The largest relative error of an edge against a difference in the frozen model, all other nodes held."""
    checked = found.check(1, edges=n)
    rows = torch.tensor([what == "edge" for what in checked.what])
    error = (checked.predicted - checked.frozen).abs() / checked.predicted.abs()
    return float(error[rows].max())


@each_architecture
@annotations_unchecked()
def test_edges_sum_and_are_those_of_the_frozen_model(architecture: Architecture) -> None:
    model = ws.HookedRecurrentModel(architecture.build())
    with torch.no_grad():
        expected = float(OF(model(ids_of()[None])))
    if architecture.name == "xlstm":
        with pytest.raises(ValueError, match="a softcap"):
            ws.circuit(model, ids_of(), OF)
        return
    full = architecture.is_first_of_its_rule
    found = ws.circuit(model, ids_of(), OF, max_nodes=24 if full else 12)
    assert float(found.pre[-1]) == pytest.approx(expected, abs=1e-4)
    assert found.leak < (2e-5 if architecture.name == "hgrn2" else 1e-5)
    assert {"embedding", "write", "target"} <= {node.kind for node in found.nodes}
    checked = found.check(4, edges=6) if full else found.check(2, edges=3)
    torch.testing.assert_close(checked.frozen, checked.predicted, rtol=1e-4, atol=2e-6)
    assert float((checked.real - checked.predicted).abs().max()) > 1e-3  # the twin: it is not the model as it is
    assert not model.busy and not any(p.grad is not None for p in model.hf_model.parameters())
    with torch.no_grad():
        assert float(OF(model(ids_of()[None]))) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models(name: str) -> None:
    model = ws.HookedRecurrentModel.from_pretrained(name)
    found = ws.circuit(model, TEXT, " the", max_nodes=40)
    assert found.leak < 1e-4 and 0.3 < found.shown <= 1
    checked = found.check(8, edges=6)
    assert checked.r("node", "frozen") > 0.9999 and checked.r("edge", "frozen") > 0.9999
    sizes = [float(checked.frozen[(checked.random == random)].abs().mean()) for random in (False, True)]
    assert sizes[0] > 2 * sizes[1]  # random nodes do less


def test_edges_into_the_target_are_the_direct_attribution(tiny: ws.HookedRecurrentModel, whole: ws.Circuit) -> None:
    found = whole
    direct = ws.direct_attribution(tiny, ids_of(), OF, by="token").records()
    heads = direct[direct["head"] >= 0]
    for i, node in enumerate(found.nodes):
        if node.kind == cuts.WRITE:
            row = heads[(heads.layer == node.layer) & (heads["head"] == node.head) & (heads.position == node.position)]
            assert float(found.edges[-1, i]) == pytest.approx(float(row.contribution.iloc[0]), abs=2e-5)
    mlps = direct[direct.part == "mlp"]
    for layer in range(4):
        edges = sum(float(found.edges[-1, i]) for i, n in enumerate(found.nodes) if (n.kind, n.layer) == ("mlp", layer))
        assert edges == pytest.approx(float(mlps[mlps.layer == layer].contribution.iloc[0]), abs=1e-4)


def test_atoms_of_a_write_of_several_terms() -> None:
    """In Gated DeltaProduct a token writes a matrix of rank two."""
    model = ws.HookedRecurrentModel(architecture_named("gated_delta_product").build())
    found = ws.circuit(model, ids_of(), OF, saes=[write_sae(model, 1, 0)], max_nodes=30)
    checked = found.check(4, edges=6)
    assert any(node.kind == cuts.ATOM for node in found.nodes) and found.leak < 1e-5
    torch.testing.assert_close(checked.frozen, checked.predicted, rtol=1e-4, atol=2e-6)


def test_a_planted_memory_is_found() -> None:
    """Nothing but head 2 of layer 1 reaches the stream: the graph is tokens, its writes, and the target."""
    a = architecture_named("delta_net_no_gate")
    built = a.build()
    with torch.no_grad():
        for layer, block in enumerate(built.model.layers):
            for p in block.mlp.parameters():
                p.zero_()
            kept = slice(2 * a.d_value, 3 * a.d_value) if layer == 1 else slice(0, 0)
            weight = block.attn.o_proj.weight if hasattr(block, "attn") else a.mixers(built)[layer].o_proj.weight
            new = torch.zeros_like(weight)
            new[:, kept] = weight[:, kept]
            weight.copy_(new)
    model = ws.HookedRecurrentModel(built)
    found = ws.circuit(model, ids_of(), OF, max_nodes=100)
    writes = {(n.layer, n.head) for i, n in enumerate(found.nodes) if n.kind == cuts.WRITE and found.influence[i] > 0}
    assert writes == {(1, 2)}
    pattern = ws.pattern(model, ids_of(), 1, 2, of=OF).grid[-1].double()
    edges = torch.tensor([float(found.edges[-1, i]) for i, n in enumerate(found.nodes) if n.kind == cuts.WRITE])
    torch.testing.assert_close(edges.double(), pattern, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "values", [{}, {"encoder": "bilinear"}, {"encoder": "dense", "decoder": "dense"}, {"sparsity": "jumprelu"},
               {"rank": 2, "decoder_bias": True, "center": True}]
)  # fmt: skip
def test_atoms_and_errors(tiny: ws.HookedRecurrentModel, whole: ws.Circuit, values: dict[str, Any]) -> None:
    sae = write_sae(tiny, 1, 2, **values)
    found = ws.circuit(tiny, ids_of(), OF, saes=[sae], max_nodes=200)
    rounding = 3e-4 if values.get("encoder") == "dense" else 1e-4  # matrices of full rank: sums of more terms
    assert found.leak < rounding and worst_edge(found) < 1e-4
    atoms = [i for i, n in enumerate(found.nodes) if n.kind == cuts.ATOM]
    assert atoms and all((found.nodes[i].layer, found.nodes[i].head) == (1, 2) for i in atoms)
    _, cache = tiny.run_with_cache(ids_of()[None], names=["blocks.1.mixer.hook_write", *_inputs(tiny, 1)])
    pre = sae.pre(cache.write(1)[0, :, 2])
    own = torch.stack([pre[found.nodes[i].position, found.nodes[i].feature] for i in atoms]).detach().double()
    taken = found.edges[atoms].abs().sum(1) > 0
    torch.testing.assert_close(found.pre[atoms][taken], own[taken], rtol=1e-4, atol=1e-5)
    for t in range(len(ids_of())):
        of_token = lambda c, t=t: sum(  # noqa: E731
            float(c.edges[-1, i]) for i, n in enumerate(c.nodes) if (n.layer, n.head, n.position) == (1, 2, t)
        )
        assert of_token(found) == pytest.approx(of_token(whole), abs=1e-5)  # atoms and error are the write
    assert 0 < found.scores[0] < 1 and 0 < found.scores[1] < 1


def _inputs(model: ws.HookedRecurrentModel, layer: int) -> list[str]:
    return [f"blocks.{layer}.mixer.hook_{q}" for q in model.family(layer).rule.inputs]


def test_residual_features(tiny: ws.HookedRecurrentModel) -> None:
    sae = StreamSAE(64, "blocks.2.hook_resid_pre")
    found = ws.circuit(tiny, ids_of(), OF, stream_saes=[sae], saes=[write_sae(tiny, 0, 1)], max_nodes=60)
    kinds = [n.kind for n in found.nodes]
    assert {"feature", "error"} < set(kinds)
    assert found.leak < 1e-4 and worst_edge(found) < 1e-4
    early = [i for i, n in enumerate(found.nodes) if n.layer < 2 and n.kind != "feature" and not n.place]
    late = [i for i, n in enumerate(found.nodes) if (n.layer >= 2 and not n.place)]
    assert not found.edges[late][:, early].any()  # all of it goes through the features
    named = ws.circuit(tiny, ids_of(), OF, stream_saes={"blocks.2.hook_resid_pre": sae}, max_nodes=8)
    assert named.scores[0] < 1


def test_features_of_mlps_and_attention(tiny: ws.HookedRecurrentModel, whole: ws.Circuit) -> None:
    """In place of the whole: edges into features go through the module, and all that leaves it is in them."""
    points = ["blocks.1.hook_mlp_out", "blocks.3.hook_mixer_out"]
    saes = [StreamSAE(64, at) for at in points]
    for sae in saes:
        sae.b_dec.data.zero_()  # what is constant would be in no node
    found = ws.circuit(tiny, ids_of(), OF, stream_saes=saes, max_nodes=150)
    assert found.leak < 1e-4 and worst_edge(found) < 1e-4
    for layer, name, at in ((1, "mlp", points[0]), (3, "self_attn", points[1])):
        nodes = [n for n in found.nodes if n.layer == layer]
        assert name not in {n.kind for n in nodes} and {"feature", "error"} <= {n.kind for n in nodes if n.place == at}
    mlp = sum(float(whole.edges[-1, i]) for i, n in enumerate(whole.nodes) if (n.kind, n.layer) == ("mlp", 1))
    parts = sum(float(found.edges[-1, i]) for i, n in enumerate(found.nodes) if n.place == points[0])
    assert parts == pytest.approx(mlp, abs=1e-4)


@pytest.mark.parametrize("broken", [False, True])
def test_transcoders(tiny: ws.HookedRecurrentModel, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Features are read off what the MLP is given, past its inside."""
    at = "blocks.1.hook_mlp_out"
    sae = StreamSAE(64, "blocks.1.ln2.hook_normalized")
    sae.cfg.metadata.hook_name_out = at
    if broken:  # reads what the MLP gives, as an SAE does
        monkeypatch.setattr(tracing, "transcodes", lambda sae: None)
    found = ws.circuit(tiny, ids_of(), OF, stream_saes=[sae], max_nodes=150)
    assert found.leak < 1e-4 and worst_edge(found) < 1e-4
    given: list[Tensor] = []
    with tiny.hf_model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: given.append(args[0])):
        tiny(ids_of()[None])
    codes = sae.encode(given[0][0]).detach()
    features = [n for n in found.nodes if n.kind == "feature"]
    assert features
    same = [abs(float(codes[n.position, n.feature]) - n.activation) < 1e-4 for n in features]  # type: ignore[operator]
    assert all(same) is not broken
    taken = [i for i, n in enumerate(found.nodes) if n.kind == "feature" and found.edges[i].abs().sum() > 0]
    assert taken and not any(
        found.nodes[j].kind == "mlp" and found.nodes[j].layer == 1 for j in range(len(found.nodes))
    )


# Twins ---------------------------------------------------------------------------------------------------------------


def test_norms_that_are_not_frozen_are_seen(tiny: ws.HookedRecurrentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "FACTORS", frozen.FACTORS - {torch.rsqrt, Tensor.rsqrt})
    with pytest.raises(ValueError, match="can't be held as it was"):
        ws.circuit(tiny, ids_of(), OF)


@pytest.mark.parametrize("what", ["erase", "error"])
def test_what_is_left_out_is_seen(tiny: ws.HookedRecurrentModel, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    whole = cuts.Writes.effects

    def less(self: cuts.Writes, G: Tensor) -> tuple[Tensor, Tensor]:
        if what == "erase":
            self = dataclasses.replace(self, recurrence=dataclasses.replace(self.recurrence, a=None, b=None))
        found, constant = whole(self, G)
        errors = torch.tensor([node.kind == cuts.ERROR for node in self.nodes])
        return torch.where(errors, torch.zeros_like(found), found) if what == "error" else found, constant

    monkeypatch.setattr(cuts.Writes, "effects", less)
    with pytest.raises(ValueError, match="edges into"):
        ws.circuit(tiny, ids_of(), OF, saes=[write_sae(tiny, 1, 2)])


def test_gates_that_move_are_seen_by_deletions(tiny: ws.HookedRecurrentModel) -> None:
    """The frozen pass holds what it says: with factors made anew it is another."""
    found = ws.circuit(tiny, ids_of(), OF, max_nodes=24)
    asked, trace, _ = found.source
    node = int(found.effect[:-1].abs().argmax())
    removed = [trace.where(found.id[node])]
    held = tracing.run(asked, tracing.Again(trace.kept, trace.cuts, removed, False)).value.detach()
    assert float(held - trace.value.detach()) == pytest.approx(-float(found.effect[node]), rel=1e-3)
    moved = tracing.run(asked, tracing.Again(None, trace.cuts, removed, False)).value.detach()
    assert abs(float(moved - held)) > 1e-3


# Scores, pruning, files -----------------------------------------------------------------------------------------------


def test_influence_and_scores_by_all_paths() -> None:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(9, 9, generator=g, dtype=torch.float64).tril(-1)
    A[:4] = 0  # two tokens, two errors
    N = A.abs() / A.abs().sum(1, keepdim=True).clamp_min(1e-10)
    B = torch.linalg.inv(torch.eye(9, dtype=torch.float64) - N) - torch.eye(9)
    torch.testing.assert_close(influence.influence(A), B[-1])
    tokens, errors = torch.arange(9) < 2, (torch.arange(9) >= 2) & (torch.arange(9) < 4)
    replacement, completeness = influence.scores(A, tokens, errors)
    assert replacement == pytest.approx(float(B[-1, :2].sum() / B[-1, :4].sum()))
    output = B[-1] + torch.eye(9)[-1]
    assert completeness == pytest.approx(float(((1 - N[:, 2:4].sum(1)) * output).sum() / output.sum()))


def test_pruning_keeps_sums_and_leaves_no_loose_ends(tiny: ws.HookedRecurrentModel) -> None:
    found = ws.circuit(tiny, ids_of(), OF, max_nodes=80)
    small = found.prune(0.7, 0.9)
    assert len(small.nodes) < len(found.nodes) and (small.edges != 0).sum() < (found.edges != 0).sum()
    assert small.leak < 1e-5  # what was left out is in the rest
    for i, node in enumerate(small.nodes[:-1]):
        if node.kind != "embedding":
            assert small.edges[:, i].any() and small.edges[i].any()
    assert small.shown < found.shown
    with pytest.raises(ValueError, match="give a share of the influence"):
        found.prune(2.0)


FIELDS = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
    "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str,
}  # fmt: skip


def test_the_file_is_as_circuit_tracer_has_it(tiny: ws.HookedRecurrentModel, tmp_path: Path) -> None:
    saes = [write_sae(tiny, 1, 2), write_sae(tiny, 0, 0)]
    stream = StreamSAE(64, "blocks.2.hook_resid_pre")
    found = ws.circuit(tiny, ids_of(), OF, saes=saes, stream_saes=[stream], max_nodes=40)
    read = json.loads(found.save(tmp_path / "graphs" / "mine.json").read_text())
    assert read["metadata"]["slug"] == "mine" and len(read["metadata"]["prompt_tokens"]) == 7
    listed = tmp_path / "graphs" / "graph-metadata.json"
    for name in ("other.json", "mine.json"):  # one saved again is there once
        found.save(tmp_path / "graphs" / name)
    assert json.loads(listed.read_text())["graphs"] == [found.to_json(name)["metadata"] for name in ("other", "mine")]
    for text in ("[]", '{"graphs": [1]}', "no"):
        listed.write_text(text)
        with pytest.raises(ValueError, match=r"graph-metadata\.json is no list of graphs: remove it"):
            found.save(tmp_path / "graphs" / "new.json")
    assert not (tmp_path / "graphs" / "new.json").exists()
    with pytest.raises(ValueError, match="is the list of graphs: give the graph another name"):
        found.save(listed)
    assert set(read["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    ids = [node["node_id"] for node in read["nodes"]]
    assert len(set(ids)) == len(ids) == len(found.nodes)
    for node in read["nodes"]:
        assert all(isinstance(node[name], kind) for name, kind in FIELDS.items())
        assert node["node_id"].split("_")[0] == node["layer"] and node["node_id"].endswith(f"_{node['ctx_idx']}")
    assert [n["feature_type"] for n in read["nodes"]].count("logit") == 1
    assert len(read["links"]) == int((found.edges != 0).sum())
    assert all({link["source"], link["target"]} <= set(ids) for link in read["links"])
    weights = {(link["source"], link["target"]): link["weight"] for link in read["links"]}
    assert sum(w for (_, t), w in weights.items() if t == ids[-1]) == pytest.approx(float(found.edges[-1].sum()))


def test_the_result_reads(tiny: ws.HookedRecurrentModel) -> None:
    found = ws.circuit(tiny, ids_of(), OF, max_nodes=20, progress=lambda n: None)
    assert len(found.records()) == len(found.nodes) and found.top(3)[0][0]
    assert found.scores == (1.0, 1.0)
    assert "nodes" in found.title and found.table().row_count > 5
    small = found.prune(nodes=0.5, edges=0.5)
    (axis,) = small.plot().axes
    linked = {small.nodes[i].position for pair in small.edges.nonzero().tolist() for i in pair}
    assert len(axis.get_xticklabels()) == len(linked) < len(found.tokens) and "target" in [
        t.get_text() for t in axis.texts
    ]
    assert axis.get_title().endswith(f"of {len(small.nodes)}; {len(linked)} of {len(found.tokens)} tokens")
    found.plot()
    checked = found.check(3)
    assert checked.random.sum() == 3 and checked.table().row_count
    checked.plot()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_input(tiny: ws.HookedRecurrentModel) -> None:
    ask = lambda *args, **kwargs: ws.circuit(tiny, *args, **kwargs)  # noqa: E731
    with pytest.raises(ValueError, match="one token, so nothing was remembered"):
        ask(ids_of(1), OF)
    with pytest.raises(ValueError, match="vocabulary of 97"):
        ask(ids_of(), 97)
    with pytest.raises(IndexError, match="token id 200 is out of range: allowed are 0 to 96"):
        ask(ids_of(), ws.Logit(200))
    with pytest.raises(IndexError, match="position 9"):
        ask(ids_of(), ws.Logit(2, at=9))
    with pytest.raises(ValueError, match="holds 2 texts"):
        ask(torch.stack([ids_of(), ids_of()]), OF)
    with pytest.raises(ValueError, match="max_nodes=0"):
        ask(ids_of(), OF, max_nodes=0)
    sae = write_sae(tiny, 1, 2)
    with pytest.raises(ValueError, match="two SAEs of"):
        ask(ids_of(), OF, saes=[sae, sae])
    with pytest.raises(ValueError, match="reads each state"):
        ask(ids_of(), OF, saes=[write_sae(tiny, 1, 2, target="state")])
    elsewhere = write_sae(tiny, 1, 2)
    elsewhere.cfg = dataclasses.replace(elsewhere.cfg, layer=2)
    with pytest.raises((ValueError, IndexError), match="2"):
        ask(ids_of(), OF, saes=[elsewhere])
    with pytest.raises(KeyError, match="no such hook point"):
        ask(ids_of(), OF, stream_saes=[StreamSAE(64, "blocks.9.hook_resid_pre")])
    with pytest.raises(ValueError, match="not on the residual stream"):
        ask(ids_of(), OF, stream_saes=[StreamSAE(64, "blocks.1.mixer.hook_o")])
    of_stream = StreamSAE(64, "blocks.1.hook_resid_pre")
    of_stream.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(
        ValueError, match=r"a transcoder from blocks\.1\.hook_resid_pre to blocks\.1\.hook_mlp_out: give"
    ):
        ask(ids_of(), OF, stream_saes=[of_stream])
    with pytest.raises(ValueError, match="32 dimensions"):
        ask(ids_of(), OF, stream_saes=[StreamSAE(32, "blocks.1.hook_resid_pre")])
    with pytest.raises(ValueError, match="top=0"):
        ask(ids_of(), OF, max_nodes=2).check(0)


def test_another_token_can_be_asked_about(tiny: ws.HookedRecurrentModel) -> None:
    found = ws.circuit(tiny, ids_of(), ws.Logit(5, at=3), max_nodes=20)
    with torch.no_grad():
        assert float(found.pre[-1]) == pytest.approx(float(tiny(ids_of()[None])[0, 3, 5]), abs=1e-4)
    assert all(float(found.effect[i]) == 0 for i, n in enumerate(found.nodes[:-1]) if n.position > 3)
