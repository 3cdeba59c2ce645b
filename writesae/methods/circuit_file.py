"""A circuit as files in circuit-tracer's form (0.5), which its viewer and Neuronpedia's open.

A folder has one file for each graph, and ``graph-metadata.json``, the list of them, with which the viewer begins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from writesae.jobs.disk import write_whole
from writesae.methods.cuts import ATOM, EMBEDDING, ERROR, FEATURE, TARGET, Node

LIST = "graph-metadata.json"


def node_id(node: Node, n_layers: int) -> str:
    """Layer, feature and token, as circuit-tracer's ids; heads, kinds and atoms are one number, paired (Cantor)."""
    if node.kind == EMBEDDING:
        return f"E_{node.feature}_{node.position}"
    if node.kind == TARGET:
        return f"{n_layers + 1}_{node.feature}_{node.position}"
    if node.kind in (ATOM, FEATURE):
        a, b = node.head + 2 if node.kind == ATOM else 1, node.feature + 1
    else:
        a, b = node.head + 2, 0
    number = (a + b) * (a + b + 1) // 2 + b
    if node.head < 0:  # a module or a place of the stream: told apart by its name
        number = number * 10**6 + int.from_bytes((node.place + node.kind).encode(), "big") % 999_983
    if node.kind == ERROR:
        number = -1 - number
    return f"{node.layer}_{number}_{node.position}"


def node_json(
    node: Node, words: str, n_layers: int, probability: float, activation: float, cumulative: float
) -> dict[str, Any]:
    """An entry of ``nodes``.

    Args:
        node: the node.
        words: what it is called.
        n_layers: layers of the model.
        probability: of the token asked about.
        activation: of an atom or a feature; of another node its pre-activation.
        cumulative: the share of all influence that it and nodes of more influence have.
    """
    kinds = {EMBEDDING: "embedding", TARGET: "logit", ERROR: "mlp reconstruction error"}
    name, target = node_id(node, n_layers), node.kind == TARGET
    layer, number, _ = name.split("_")
    return {
        "node_id": name, "feature": int(number) if node.kind != EMBEDDING else node.position, "layer": layer,
        "ctx_idx": node.position, "feature_type": kinds.get(node.kind, "cross layer transcoder"),
        "token_prob": probability if target else 0.0, "is_target_logit": target, "run_idx": 0, "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if target else layer}_{number}-{node.position}",
        "clerp": f'Output "{words}" (p={probability:.3f})' if target else words,
        "influence": None if target else cumulative, "activation": activation,
    }  # fmt: skip


def save_listed(graph: dict[str, Any], path: Path) -> Path:
    """Write a graph, whole or not at all, and add it to its folder's list, which ``path`` must not be."""
    listed = path.with_name(LIST)
    if path == listed:
        raise ValueError(f"{path} is the list of graphs: give the graph another name, such as henry.json")
    others = [one for one in _graphs(listed) if one["slug"] != graph["metadata"]["slug"]]
    write_whole(path, json.dumps(graph, allow_nan=False).encode())
    write_whole(listed, json.dumps({"graphs": [*others, graph["metadata"]]}, allow_nan=False, indent=2).encode())
    return path


def _graphs(listed: Path) -> list[dict[str, Any]]:
    """What a list has; ValueError if it is none."""
    if not listed.exists():
        return []
    try:
        found = json.loads(listed.read_bytes())["graphs"]
        assert all(isinstance(one["slug"], str) for one in found)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{listed} is no list of graphs: remove it, or save the graph in another folder") from error
    return found
