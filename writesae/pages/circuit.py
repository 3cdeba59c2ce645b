"""A circuit as one page that needs no others: nodes by token and layer, edges of the node pointed at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from writesae.pages.render import alone, asset, number, percent, render, visible
from writesae.pages.show import Page

if TYPE_CHECKING:
    from writesae.methods import Circuit

STEP, ROW, LEFT = 44, 76, 72  # pixels per token and layer, and beside them


def show_circuit(circuit: Circuit) -> Page:
    """The page of a circuit; `Circuit.show` calls this."""
    of_each = circuit.influence
    largest = float(of_each.max()) or 1.0
    nodes = []
    for i, node in enumerate(circuit.nodes):
        x, y = circuit.place(i)
        inputs = circuit.edges[i].abs().argsort(descending=True)[:8].tolist()
        outputs = circuit.edges[:, i].abs().argsort(descending=True)[:8].tolist()
        nodes.append({
            "id": i, "name": circuit.name(i), "kind": node.kind, "x": round(LEFT + STEP * (x + 0.3), 1),
            "y": ROW * (circuit.n_layers - y) + 30, "r": round(3 + 9 * (float(of_each[i]) / largest) ** 0.5, 1),
            "effect": number(float(circuit.effect[i])), "influence": percent(float(of_each[i])),
            "pre": number(float(circuit.pre[i])), "rest": number(float(circuit.rest[i] + circuit.constant[i])),
            "inputs": [_edge(circuit, j, float(circuit.edges[i, j])) for j in inputs if circuit.edges[i, j]],
            "outputs": [_edge(circuit, j, float(circuit.edges[j, i])) for j in outputs if circuit.edges[j, i]],
        })  # fmt: skip
    size = circuit.edges.abs().max().clamp_min(1e-30)
    links = [
        {"source": s, "target": t, "up": bool(circuit.edges[t, s] > 0), "width": round(float(4 * w), 2)}
        for t, s in circuit.edges.nonzero().tolist()
        if (w := circuit.edges[t, s].abs() / size) > 0.002
    ]
    replacement, completeness = circuit.scores
    order = of_each.argsort(descending=True).tolist()
    values: dict[str, Any] = {
        "circuit": circuit, "nodes": nodes, "links": links, "order": [i for i in order if i != len(nodes) - 1][:20],
        "tokens": [visible(token) for token in circuit.tokens], "replacement": replacement,
        "completeness": completeness, "step": STEP, "row": ROW, "left": LEFT,
        "width": LEFT + STEP * (len(circuit.tokens) + 1), "height": ROW * (circuit.n_layers + 2) + 20,
        "has_errors": any(node.kind == "error" for node in circuit.nodes),
    }  # fmt: skip
    page = alone(render("circuit", **values), "", lambda name: asset(name.removeprefix("assets/")))
    return Page(circuit.title, page)


def _edge(circuit: Circuit, other: int, weight: float) -> dict[str, Any]:
    return {"id": other, "name": circuit.name(other), "weight": number(weight), "up": weight > 0}
