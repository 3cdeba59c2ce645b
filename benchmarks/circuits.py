"""Circuits of the shipped models: what a graph of 64 tokens costs, and deletions of its nodes against what it says.

    python benchmarks/circuits.py

The text is held-out prose, the number asked about the logit of the likeliest next token minus that of the second.
Deletions are of the 24 nodes with the largest influence, in the frozen model, where the graph has to be exact, and in
the model as it is, where norms, gates and keys move; as many random nodes stand beside them.
"""

from __future__ import annotations

import time
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.zoo import heldout_documents, shipped_models


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Shipped models; all without.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the text.")] = 64,
    texts: Annotated[int, typer.Option(help="Texts whose correlations are averaged.")] = 3,
) -> None:
    torch.set_num_threads(1)
    costs = Table("model", *(f"s, {n} nodes" for n in NODES), "influence shown", title="cost")
    checks = Table(
        "model",
        "r frozen",
        "r real",
        "of writes",
        "edges: r real",
        "size, top nodes",
        "size, random",
        title="deletions",
    )
    for name in models or shipped_models():
        model = ws.HookedRecurrentModel.from_pretrained(name)
        rows = [model.to_tokens(document)[0][0, :tokens] for document in heldout_documents()[:texts]]
        seconds, shown = [], []
        for n in NODES:
            began = time.thread_time()
            shown.append(ws.circuit(model, rows[0], asked(model, rows[0]), max_nodes=n).shown)
            seconds.append(time.thread_time() - began)
        costs.add_row(name, *(f"{s:.2g}" for s in seconds), ", ".join(f"{x:.0%}" for x in shown))
        found = [ws.circuit(model, ids, asked(model, ids)).check(24, edges=24) for ids in rows]
        r = [mean(c.r(*what) for c in found) for what in (("node", "frozen"), ("node", "real"), ("edge", "real"))]
        r.insert(2, mean(r_of_writes(c) for c in found))
        size = [
            mean(float(c.real[(c.random == random) & of_nodes(c)].abs().mean()) for c in found)
            for random in (False, True)
        ]
        checks.add_row(name, *(f"{x:.4f}" for x in r), *(f"{x:.3g}" for x in size))
    Console(width=120).print(costs, checks)


NODES = (16, 64, 256)


def asked(model: ws.HookedRecurrentModel, ids: torch.Tensor) -> ws.Logit:
    with torch.no_grad():
        first, second = model(ids[None], logits_to_keep=1)[0, -1].topk(2).indices.tolist()
    return ws.Logit(first, minus=second)


def r_of_writes(check: ws.CircuitCheck) -> float:
    """Of predicted and real changes, of those nodes that are writes."""
    rows = torch.tensor([" write" in name for name in check.name]) & of_nodes(check) & ~check.random
    return float(torch.corrcoef(torch.stack([check.predicted[rows], check.real[rows]]))[0, 1])


def of_nodes(check: ws.CircuitCheck) -> torch.Tensor:
    return torch.tensor([what == "node" for what in check.what])


if __name__ == "__main__":
    typer.run(main)
