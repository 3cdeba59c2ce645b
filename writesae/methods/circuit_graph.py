"""A circuit: nodes, edges, scores and pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.hooks.sites import Head
from writesae.jobs.late import given
from writesae.jobs.progress import Progress
from writesae.methods import influence
from writesae.methods.circuit_check import CircuitCheck, check
from writesae.methods.circuit_file import node_id, node_json, save_listed
from writesae.methods.cuts import EMBEDDING, ERROR, TARGET, Node
from writesae.methods.tracing import Question, Trace
from writesae.results.across import name_tokens, wide
from writesae.results.result import Figure, Number, Result, figure

NAMED = 30  # nodes of a plot, at most, that stand there by name


@dataclass(frozen=True, eq=False)
class Circuit(Result):
    """What made a model say a token, as a graph. One entry per node; the last is the target.

    Attributes:
        tokens: of the text, as strings.
        target: the number asked about, in words.
        nodes: sources before targets.
        edges: ``[target, source]``: what the source adds to the target's pre-activation by direct paths.
        rest: what nodes that are not in the graph add to each node's pre-activation.
        constant: what biases add.
        pre: pre-activation of each node; of embeddings and errors, what they add to the number by all paths.
        effect: what each node adds to the number by all paths of the frozen model.
        probability: of the token asked about.
        n_layers: layers of the model.
        id: number of each node in the trace; -1 is the target.
        source: what was asked, and the pass, for `check`.
    """

    KEYS, VALUE = ("kind", "layer", "head"), "effect"

    tokens: tuple[str, ...]
    target: str
    nodes: tuple[Node, ...]
    edges: Float[Tensor, "node node"]
    rest: Float[Tensor, " node"]
    constant: Float[Tensor, " node"]
    pre: Float[Tensor, " node"]
    effect: Float[Tensor, " node"]
    probability: float
    n_layers: int
    id: tuple[int, ...]
    source: tuple[Question, Trace, tuple[list[Tensor], list[Tensor]]]

    @property
    def title(self) -> str:
        return f"Circuit of {self.target}, {len(self.nodes):,} nodes and {int((self.edges != 0).sum()):,} edges"

    @property
    def about(self) -> str:
        return (
            "Edges are what a node adds to the pre-activation of another, by paths through no other node, with the "
            "scales of norms, gates, decays, erases, keys, queries and attention patterns as they were on this text. "
            "Within a memory that is exact. Into each node, edges, constants and the rest that is not shown sum to its "
            "pre-activation. What changes when norms and gates move is not in it; deletions in the model as it is "
            "measure that."
        )

    @property
    def influence(self) -> Float[Tensor, " node"]:
        """Of each node on the target (circuit-tracer's definition)."""
        return influence.influence(self.edges)

    @property
    def shown(self) -> float:
        """The share of the sizes of all edges into nodes, weighted by influence, that is in the graph."""
        weight = self.influence
        weight[-1] += 1
        weight[~self._explained] = 0
        sizes = self.edges.abs().sum(1)
        return float((weight * sizes / (sizes + self.rest.abs()).clamp_min(1e-30)).sum() / weight.sum())

    def _are(self, *kinds: str) -> Tensor:
        return torch.tensor([node.kind in kinds for node in self.nodes])

    @property
    def _explained(self) -> Tensor:
        return torch.tensor([node.has_past for node in self.nodes])

    @property
    def scores(self) -> tuple[float, float]:
        """Replacement and completeness scores, as circuit-tracer has them (`writesae.methods.influence`). Both are 1
        where no SAE is given: then there are no errors."""
        return influence.scores(self.edges, self._are(EMBEDDING), self._are(ERROR))

    @property
    def leak(self) -> float:
        """By how much edges, rest and constants miss the pre-activations, as a share of their sizes; the worst node."""
        made = self.edges.sum(1) + self.rest + self.constant
        size = self.edges.abs().sum(1) + self.rest.abs() + self.constant.abs()
        return float(((made - self.pre).abs() / size.clamp_min(1e-12))[self._explained].max())

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> Circuit:
        """The nodes and edges with the largest influence, up to these shares of it (circuit-tracer's defaults). Tokens
        and the target stay. What is left out is in ``rest``.

        Raises:
            ValueError: a share outside 0 to 1.
        """
        for name, x in (("nodes", nodes), ("edges", edges)):
            if not 0 <= x <= 1:
                raise ValueError(f"{name}={x}: give a share of the influence, 0 to 1")
        always = self._are(EMBEDDING, TARGET)
        kept, stays = influence.prune(self.edges, always, self._explained, nodes, edges)
        left = torch.where(stays, self.edges, torch.zeros_like(self.edges))
        at = kept.nonzero()[:, 0]
        rest = self.rest + self.edges.sum(1) - left.sum(1)
        index = at.tolist()
        return replace(
            self, nodes=tuple(self.nodes[i] for i in index), edges=left[at][:, at], rest=rest[at],
            constant=self.constant[at], pre=self.pre[at], effect=self.effect[at], id=tuple(self.id[i] for i in index),
        )  # fmt: skip

    def name(self, i: int) -> str:
        """What the ``i``-th node is called."""
        node = self.nodes[i]
        if node.kind == TARGET:
            return self.target
        where = f"{self.tokens[node.position]!r} at {node.position}"
        if node.kind == EMBEDDING:
            return f"token {where}"
        number = f" {node.feature}" if node.feature >= 0 else ""
        if node.head >= 0:
            return f"{Head(node.layer, node.head).folder} {node.kind}{number}, {where}"
        return f"{node.place or f'layer {node.layer}'} {node.kind}{number}, {where}"

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The ``n`` nodes of the largest influence: name, and what each adds to the number by all paths."""
        order = self.influence.argsort(descending=True)[:n].tolist()
        return [(self.name(i), float(self.effect[i])) for i in order]

    def columns(self) -> dict[str, Any]:
        """One row per node."""
        fields = ("kind", "layer", "head", "position", "feature")
        made: dict[str, Any] = {name: [getattr(node, name) for node in self.nodes] for name in fields}
        numbers = {"influence": self.influence, "effect": self.effect, "pre": self.pre, "rest": self.rest}
        return made | {name: x.numpy() for name, x in numbers.items()}

    def numbers(self) -> Sequence[Number]:
        replacement, completeness = self.scores
        return [
            Number("the number", float(self.pre[-1])),
            Number("probability of the token", self.probability, "%"),
            Number("replacement score", replacement),
            Number("completeness score", completeness),
            Number("share of inputs that is shown", self.shown, "%"),
            *(Number(name, x, id=f"node/{name}") for name, x in self.top(12)),
        ]

    def plot(self) -> Figure:
        """Nodes that have an edge, by token and layer, sized by influence; edges by weight, blue ones adding.

        A token without such a node has no column. While there are few (`NAMED`), nodes are named, and edges say what
        they add; the title says what is left out.
        """
        linked = ((self.edges != 0).any(0) | (self.edges != 0).any(1)).nonzero()[:, 0].tolist() or [len(self.nodes) - 1]
        columns = sorted({self.nodes[i].position for i in linked})
        named = len(linked) <= NAMED
        width = wide(len(columns), 2.0 if named else 0.35, most=12.0)
        made, (axis,) = figure(1, width, 0.7 * self.n_layers + 2.0)
        at = {}
        for i in linked:
            x, y = self.place(i, linked)
            at[i] = x - self.nodes[i].position + columns.index(self.nodes[i].position), y
        largest = float(self.edges.abs().max()) or 1.0
        for target, source in self.edges.nonzero().tolist():
            w, ends = float(self.edges[target, source]), (at[source], at[target])
            share, colour = abs(w) / largest, "C0" if w > 0 else "C3"
            size = {"lw": 0.5 + 4 * share} if named else {"lw": 0.8, "alpha": min(1.0, share + 0.05)}
            axis.plot(*zip(*ends, strict=True), color=colour, **size)
            if named and share > 0.05:
                middle = [0.6 * a + 0.4 * b for a, b in zip(*ends, strict=True)]
                axis.annotate(f"{w:.2g}", middle, (5, 3), textcoords="offset points", color=colour, fontsize=7)
        influence = self.influence
        axis.scatter(*zip(*at.values(), strict=True), s=[8 + 120 * float(influence[i]) for i in at], c="0.2", zorder=3)
        for i, where in at.items() if named else ():
            short = self.nodes[i].kind if self.nodes[i].kind == TARGET else self.name(i).partition(", ")[0]
            axis.annotate(
                short.partition(" at ")[0], where, (-6, 3), textcoords="offset points", ha="right", fontsize=7,
                parse_math=False, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
        name_tokens(axis, [self.tokens[t] for t in columns], width)
        axis.set_xlim(-0.8 if named else -0.5, len(columns) - 0.2)
        axis.set_yticks(range(-1, self.n_layers + 1), ["tokens", *map(str, range(self.n_layers)), "target"])
        title = f"{len(linked)} nodes with an edge, of {len(self.nodes)}; {len(columns)} of {len(self.tokens)} tokens"
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("layer")
        return made

    def place(self, i: int, shown: Sequence[int] | None = None) -> tuple[float, float]:
        """Where a node stands in a picture of those shown: across by token, up by layer; several there side by side."""
        node, cell = self.nodes[i], lambda n: (self.nodes[n].layer, self.nodes[n].position)
        same = [n for n in (range(len(self.nodes)) if shown is None else shown) if cell(n) == cell(i)]
        return node.position + 0.8 * (same.index(i) / len(same)), float(node.layer)

    def check(
        self, top: int = 20, *, edges: int | None = None, seed: int = 0, progress: Progress | None = None
    ) -> CircuitCheck:
        """Take nodes out and see, in the frozen model and in the real one.

        Args:
            top: how many nodes, those with the largest effects; as many random ones of the whole pass stand beside.
            edges: how many edges, the heaviest into the nodes of largest influence; None: as many as ``top``.
            seed: of the random nodes.
            progress: called with the number of deletions done.

        Raises:
            ValueError: fewer than one node.
        """
        if top < 1:
            raise ValueError(f"top={top}: give a number of nodes, 1 or more")
        asked, trace, totals = self.source
        order = [i for i in self.effect.abs().argsort(descending=True).tolist() if self.id[i] >= 0][:top]
        nodes = [(self.id[i], False, self.name(i)) for i in order]
        others = torch.randperm(len(trace.nodes), generator=torch.Generator().manual_seed(seed)).tolist()
        own = {self.id[i] for i in order}
        nodes += [(i, True, f"random {trace.nodes[i].kind}") for i in others if i not in own][:top]
        weight = self.influence
        weight[-1] += 1
        sizes = influence.shares(self.edges) * weight[:, None]
        heaviest = sizes.flatten().argsort(descending=True)[: top if edges is None else edges].tolist()
        pairs = [divmod(i, len(self.nodes)) for i in heaviest if sizes.flatten()[i] > 0]
        found = [(self.id[s], self.id[t], f"{self.name(s)} -> {self.name(t)}") for t, s in pairs]
        return check(asked, trace, nodes, found, totals, progress)

    def to_json(self, slug: str = "circuit") -> dict[str, Any]:
        """The graph as circuit-tracer writes it (``metadata``, ``qParams``, ``nodes``, ``links``), for its viewer and
        Neuronpedia's."""
        of_each, probability = self.influence, self.probability
        order = of_each.argsort(descending=True)
        total = torch.zeros_like(of_each)
        total[order] = of_each[order].cumsum(0) / of_each.sum().clamp_min(1e-30)
        ids = [node_id(node, self.n_layers) for node in self.nodes]
        nodes = [
            node_json(node, self.name(i), self.n_layers, probability, self._activation(i), float(total[i]))
            for i, node in enumerate(self.nodes)
        ]
        pairs = self.edges.nonzero().tolist()
        return {
            "metadata": {
                "slug": slug, "scan": "writesae", "transcoder_list": [], "prompt_tokens": list(self.tokens),
                "prompt": "".join(self.tokens), "node_threshold": None, "schema_version": 1,
            },
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": nodes,
            "links": [{"source": ids[s], "target": ids[t], "weight": float(self.edges[t, s])} for t, s in pairs],
        }  # fmt: skip

    def _activation(self, i: int) -> float:
        own = self.nodes[i].activation
        return float(self.pre[i]) if own is None else own

    def show(self) -> Any:
        """The graph as a page, which notebooks show and ``.save(path)`` writes as one file that needs no network."""
        return given("show_circuit")(self)

    def save(self, path: str | Path) -> Path:
        """`to_json` as a file, whole or not at all; its name without the ending is the graph's. Beside it the graph is
        added to ``graph-metadata.json``, the list in which circuit-tracer's viewer looks for graphs.

        >>> found.save("graphs/henry.json")          # then: circuit_tracer.frontend.local_server.serve("graphs")

        Raises:
            ValueError: ``path`` is that list, or the list that is there is none.
        """
        return save_listed(self.to_json(Path(path).stem), Path(path))
