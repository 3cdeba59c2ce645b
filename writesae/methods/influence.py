"""Influence in a graph of edges: what is kept, and how much of it is explained (circuit-tracer's definitions).

Edges into a node are divided by the sum of their sizes, so that each node's inputs are shares of it. A node's influence
is the sum, over all paths to the target, of the products of shares along them (Ameisen et al. 2025, circuit-tracer's
``graph.py``). ``A [target, source]`` is ordered so that sources come first.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def shares(A: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Each row's sizes as shares of their sum."""
    return A.abs() / A.abs().sum(1, keepdim=True).clamp_min(1e-10)


def influence(A: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Of each node on the last one, which has none on itself."""
    return influence_of_rows(A, torch.arange(len(A)))


def influence_of_rows(rows: Float[Tensor, "k n"], targets: Int[Tensor, " k"]) -> Float[Tensor, " n"]:
    """`influence` where few nodes have edges into them: ``targets``, in order; the last is the last of all nodes."""
    N, found = shares(rows), torch.zeros(rows.shape[1], dtype=rows.dtype)
    reached = torch.zeros_like(found)
    reached[-1] = 1.0
    for row in reversed(range(len(rows))):
        found += (reached[targets[row]] + found[targets[row]]) * N[row]
    return found


def scores(A: Float[Tensor, "n n"], tokens: Bool[Tensor, " n"], errors: Bool[Tensor, " n"]) -> tuple[float, float]:
    """Replacement and completeness scores.

    Replacement: of the influence that begins somewhere, the share that begins at tokens rather than at errors.
    Completeness: the share of all nodes' inputs, weighted by their influence, that does not come from errors.
    """
    of_each = influence(A)
    begun = float(of_each[tokens].sum() + of_each[errors].sum())
    replacement = float(of_each[tokens].sum()) / begun if begun else 0.0
    weight = of_each.clone()
    weight[-1] += 1.0
    known = 1 - shares(A)[:, errors].sum(1)
    return replacement, float((known * weight).sum() / weight.sum())


def threshold(values: Float[Tensor, "..."], share: float) -> float:
    """The least value among the largest that make up a share of the sum."""
    ordered = values.flatten().sort(descending=True).values
    total = ordered.cumsum(0) / ordered.sum().clamp_min(1e-30)
    at = int(torch.searchsorted(total, torch.tensor(share, dtype=total.dtype)))
    return float(ordered[min(at, len(ordered) - 1)])


def prune(
    A: Float[Tensor, "n n"], always: Bool[Tensor, " n"], explained: Bool[Tensor, " n"], nodes: float, edges: float
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, "n n"]]:
    """Which nodes and edges to keep: those with the largest influence, up to these shares of it.

    Args:
        A: the edges.
        always: nodes that stay: tokens and the target.
        explained: nodes that have edges into them; one that loses them all goes.
        nodes, edges: shares, 0 to 1.
    """
    of_each = influence(A)
    kept = (of_each >= threshold(of_each, nodes)) & (of_each > 0) | always
    left = torch.where(kept[:, None] & kept[None], A, torch.zeros_like(A))
    weight = influence(left)
    weight[-1] += 1.0
    of_edges = shares(left) * weight[:, None]
    stays = (of_edges >= threshold(of_edges, edges)) & (of_edges > 0)
    while True:
        fits = (stays.any(0) | always) & (stays.any(1) | always | ~explained) & kept
        if bool((fits == kept).all()):
            return kept, stays & kept[:, None] & kept[None]
        kept = fits
        stays = stays & kept[:, None] & kept[None]
