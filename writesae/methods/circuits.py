"""Circuits: a graph of what made a model say a token, through its memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from writesae.gradients import Logit
from writesae.gradients.questions import in_ids
from writesae.hooks.residual_edits import Reconstruct
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.methods.circuit_graph import Circuit
from writesae.methods.cuts import EMBEDDING, ERROR, TARGET, Node
from writesae.methods.influence import influence_of_rows
from writesae.methods.questions import one_text, strings_of
from writesae.methods.tracing import Question, Trace, run, transcodes
from writesae.model import HookedRecurrentModel, Text
from writesae.models.wrappers import bare, in_half_precision

LEAK = 1e-4  # of the sizes of the edges into a node: what they may miss its pre-activation by
POINTS = ("resid_pre", "mixer_out", "mlp_out", "resid_post")  # where SAEs of vectors may be
STEP = 16  # nodes whose edges are taken before influences are reckoned anew


@named_kinds
def circuit(
    model: HookedRecurrentModel,
    text: Text,
    target: str | int | Logit,
    *,
    saes: Sequence[Any] = (),
    stream_saes: Sequence[Any] | Mapping[str, Any] = (),
    max_nodes: int = 128,
    progress: Progress | None = None,
) -> Circuit:
    """What made the model say ``target`` after a text, as a graph through its recurrent memories.

    >>> found = ws.circuit(model, "The state of the", " art", saes=[sae])
    >>> found.prune().top(5); found.check(top=10).table(); found.save("art.json")

    Nodes are the embeddings of tokens; what each head writes at each token (where an SAE of its writes is given, its
    active atoms, and its error); the features and the error of residual SAEs; what each attention layer and MLP gives,
    per token, as a whole or as features; and the number asked about. An edge is what its source adds to the
    pre-activation of its end by direct paths, through no other node. Everything that multiplies the stream is held as
    it was on this text: scales of norms, gates, decays, erases, keys, queries, attention patterns, factors of
    activation functions. The model is then linear in what nodes give, and edges and biases into each node sum to its
    pre-activation. This is checked for every node whose edges are taken.

    The pre-activation of an atom is its encoder's; of a feature, its activation, to first order. A whole node has no
    encoder, so it is read by what the target makes of it: with ``D`` the gradient of the number with respect to its
    value ``x``, by all paths of the frozen model, its pre-activation is ``D . x``, its whole effect. So influence flows
    through whole nodes as through a network of pipes: what comes in (biases included) is what goes out.

    Each node's edges take one backward pass; those of the largest influence come first (circuit-tracer; Ameisen et al.
    2025). Cost grows with ``max_nodes``, not with the square of the text's length.

    Args:
        model: the model. Hooks and edits that are attached act in the pass.
        text: one text, or token ids ``[pos]``, two tokens or more.
        target: a token, as text or id, after the last token of the text; or a `Logit`, which may be a difference of
            two, and at another token.
        saes: SAEs of writes (target ``"write"``), at most one per head. Other heads are taken as wholes.
        stream_saes: SAEs of the residual stream (SAELens' or alike), or ``{hook name: SAE}``. An SAE of an MLP's or an
            attention layer's output (``hook_mlp_out``, ``hook_mixer_out``) makes nodes of its features and its error in
            place of the whole. So does a transcoder, which reads what the MLP is given (SAELens' ``hook_name_out`` says
            that it is one).
        max_nodes: for how many nodes, at most, edges are taken. The graph has these, all tokens and all errors; what
            other nodes add is in ``rest``.
        progress: called with the number of nodes whose edges are taken.

    Raises:
        ValueError: several texts, or one of a single token; a target that is no single token, or is outside the
            vocabulary; an SAE of another layer, head or model, or that reads something else than writes; two SAEs of a
            head; a model in half precision, or one that does something to its stream that can't be held as it was.
        IndexError: a `Logit` outside the vocabulary or the text.
        KeyError: a residual SAE of a hook point that is not there.
    """
    if max_nodes < 1:
        raise ValueError(f"max_nodes={max_nodes}: give a number of nodes, 1 or more")
    if in_half_precision(model.hf_model):
        dtype = str(bare(model.hf_model).dtype).removeprefix("torch.")
        raise ValueError(f'a model in {dtype} rounds the sums that a circuit is made of: load it with dtype="float32"')
    ids = one_text(model, text)
    n_pos = ids.shape[1]
    if n_pos < 2:
        raise ValueError("the text is one token, so nothing was remembered: give a text of two tokens or more")
    of = _asked(model, target, n_pos)
    asked = Question(model, ids, of, _by_head(model, saes), _by_point(model, stream_saes))
    trace = run(asked)
    totals = trace.totals(False), trace.totals(True)
    return _grow(asked, trace, totals, max_nodes, progress)


def _grow(
    asked: Question,
    trace: Trace,
    totals: tuple[list[Tensor], list[Tensor]],
    max_nodes: int,
    progress: Progress | None,
) -> Circuit:
    """Edges into the target, then into nodes of the largest influence."""
    D, nodes, end = totals[1], trace.nodes, len(trace.nodes)
    effect = torch.cat([cut.effects(G)[0].double().cpu() for cut, G in zip(trace.cuts, D, strict=True)])
    rows: dict[int, tuple[Tensor, float, float]] = {}  # edges, constant, pre-activation
    value = float(trace.value.detach())

    def take(node: int) -> None:
        if node == end:
            row, constant = trace.row(len(trace.cuts))
            found = row, float(constant), value
        else:
            cut, n = trace.where(node)
            seed, own = trace.cuts[cut].reads(n, D[cut])
            row, constant = trace.row(cut, seed)
            pre = float((seed * trace.cuts[cut].given.detach()).double().sum()) + float(own)
            found = row, float(constant) + float(own), pre
        _check_sum(node if node == end else nodes[node], *found)
        rows[node] = found

    take(end)
    while len(rows) <= max_nodes:
        known = sorted(rows)
        A = torch.stack([torch.cat([rows[node][0], rows[node][0].new_zeros(1)]) for node in known])
        of_each = influence_of_rows(A, torch.tensor(known))
        order = of_each.argsort(descending=True).tolist()
        left = [i for i in order if i not in rows and i < end and of_each[i] > 0 and nodes[i].has_past]
        if not left:
            break
        for node in left[: min(STEP, max_nodes + 1 - len(rows))]:
            take(node)
            if progress is not None:
                progress(len(rows) - 1)
    kept = sorted({*rows, *(i for i, node in enumerate(nodes) if node.kind in (EMBEDDING, ERROR))})
    own = torch.tensor(kept[:-1])
    edges, rest, constant = (torch.zeros(len(kept), *s, dtype=torch.float64) for s in ((len(kept),), (), ()))
    pre = torch.cat([effect[own], torch.tensor([value], dtype=torch.float64)])
    for i, node in enumerate(kept):
        if node in rows:
            row, constant[i], pre[i] = rows[node]
            edges[i, :-1] = row[own]
            rest[i] = row.sum() - edges[i].sum()
    at = int(asked.of.at) % asked.ids.shape[1]
    last = Node(TARGET, asked.model.n_layers, at, feature=int(asked.of.token))
    return Circuit(
        strings_of(asked.model, asked.ids), _words(asked), tuple([nodes[i] for i in kept[:-1]] + [last]), edges, rest,
        constant, pre, torch.cat([effect[own], pre[-1:]]), trace.probability, asked.model.n_layers,
        tuple([*kept[:-1], -1]), (asked, trace, totals),
    )  # fmt: skip


def _check_sum(node: Any, row: Tensor, constant: float, pre: float) -> None:
    """Raise ValueError unless edges and constants sum to the pre-activation."""
    made = float(row.sum()) + constant
    if abs(made - pre) > LEAK * (float(row.abs().sum()) + abs(constant)) + 1e-9:
        what = f"{node.kind} of layer {node.layer} at token {node.position}" if isinstance(node, Node) else "the number"
        raise ValueError(
            f"edges into {what} sum to {made:.5g}, and it is {pre:.5g}: the model does something to its stream that "
            f"can't be held as it was (a softcap, or an edit that is attached), so no circuit of it can be made. "
            f"ws.patching and ws.knockout_sweep ask for no such thing"
        )


def _asked(model: HookedRecurrentModel, target: str | int | Logit, n_pos: int) -> Logit:
    if not isinstance(target, Logit):
        return Logit(model.to_single_token(target))
    asked = in_ids(target, model)
    token, minus, at = asked.token, asked.minus, asked.at
    if not (isinstance(token, int) and isinstance(at, int) and (minus is None or isinstance(minus, int))):
        raise ValueError("target: give a Logit of one token, at one place, minus one token or none")
    for one in (token, minus):
        if one is not None and not 0 <= one < model.n_vocab:
            raise IndexError(f"token id {one} is out of range: allowed are 0 to {model.n_vocab - 1}")
    if not -n_pos <= at < n_pos:
        raise IndexError(f"position {at} is out of range: allowed are {-n_pos} to {n_pos - 1}")
    return asked


def _by_head(model: HookedRecurrentModel, saes: Sequence[Any]) -> dict[Head, Any]:
    found: dict[Head, Any] = {}
    for sae in saes:
        sae.check_fits(model)
        head = sae.place
        if sae.cfg.target != "write":
            raise ValueError(
                f"the SAE of {head.folder} reads each {sae.cfg.target}, and nodes are writes: give one with "
                f"target='write', or leave it out, so that the head's writes are taken as wholes"
            )
        if head in found:
            raise ValueError(f"two SAEs of {head.folder}: give one per head")
        found[head] = sae
    return found


def _by_point(model: HookedRecurrentModel, saes: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """By the own name of the hook point."""
    pairs = saes.items() if isinstance(saes, Mapping) else [(transcodes(sae), sae) for sae in saes]
    found: dict[str, Any] = {}
    for at, sae in pairs:
        edit = Reconstruct(sae) if at is None else Reconstruct(sae, at)
        if edit.hook_name not in model.hook_dict:
            raise KeyError(
                f"a residual SAE of {edit.hook_name!r}: this model has no such hook point; model.hook_names has them. "
                f"Give stream_saes={{name: sae}} to say where it goes"
            )
        point = model.hook_dict[edit.hook_name]
        if "mixer" in point.name.split(".") or point.quantity not in POINTS:
            raise ValueError(f"{point.name} is not on the residual stream: allowed are hook_{', hook_'.join(POINTS)}")
        if point.name in found:
            raise ValueError(f"two residual SAEs of {point.name}: give one per place")
        if transcodes(sae) and (point.quantity != "mlp_out" or "resid" in sae.cfg.metadata.hook_name):
            raise ValueError(
                f"a transcoder from {sae.cfg.metadata.hook_name} to {point.name}: give one that reads what an MLP is "
                f"given, behind its norm, and stands for hook_mlp_out"
            )
        d_in, d_model = edit.sae.W_dec.shape[-1], model.W_E.shape[-1]
        if d_in != d_model:
            raise ValueError(f"an SAE of {d_in} dimensions does not fit {point.name}, which has {d_model}")
        found[point.name] = edit.sae
    return found


def _words(asked: Question) -> str:
    of = asked.of
    token, minus = (
        str(x) if asked.model.tokenizer is None or x is None else repr(asked.model.to_string(int(x)))
        for x in (of.token, of.minus)
    )
    return f"logit of {token}" + ("" if of.minus is None else f" minus {minus}")
