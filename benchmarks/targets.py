"""What an SAE is trained on, and what its atoms are worth in place of a write: the replacement test on every model.

    python benchmarks/targets.py                                  # the shipped models, one head each
    python benchmarks/targets.py --site tiny-rwkv7:3.4 --target state --firings 100

For each head, an SAE on the native writes, on the deltas (what the state really gains; rank 2 for RWKV-7) and on the
states (the paper's choice), all else equal, trained here on a part of the corpus; then firings on held-out text. With
``k=1`` an atom has to stand for what it was trained on alone; the paper has 32 active in a state. ``matched`` gives the
top atom the native write's norm, so that only its direction counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.saes import train_site
from writesae.stores import Windows
from writesae.stores.texts import read
from writesae.zoo import corpus, heldout_documents

SITES = ["tiny-gdn:2.1", "tiny-mamba2:4.1", "tiny-mamba2:6.11", "tiny-rwkv7:3.1", "tiny-rwkv7:3.4"]
CONTEXT = 512


def main(
    site: Annotated[list[str] | None, typer.Option(help="MODEL:LAYER.HEAD; repeat for several.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="write, delta, state; repeat for several.")] = None,
    atoms: Annotated[int, typer.Option(help="Atoms of each SAE.")] = 1024,
    k: Annotated[int, typer.Option(help="Atoms active in a sample; the replacement test takes the strongest.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    tokens: Annotated[int, typer.Option(help="Tokens of text; of states, one in eight is taken.")] = 150_000,
    firings: Annotated[int, typer.Option(help="Firings of the replacement test.")] = 300,
    cache: Annotated[Path | None, typer.Option(help="Where the corpus is kept.")] = None,
) -> None:
    """Replacement rates by training target."""
    transformers.logging.set_verbosity_error()
    documents, _ = corpus.split(read(corpus.fetch(cache)))
    table = Table(title=f"Replacement test, {firings} firings, {atoms} atoms, k={k}, {steps} steps")
    columns = ("head", "trained on", "nmse", "cosine to write", "atom beats deletion, at", "in total")
    for column in (*columns, "matched, at", "in total"):
        table.add_column(column)
    models: dict[str, Any] = {}
    for place in site or SITES:
        name, where = place.split(":")
        layer, head = (int(x) for x in where.split("."))
        model = models.setdefault(name, ws.HookedRecurrentModel.from_pretrained(name))
        ids = Windows.cut(model, [d.text for d in documents], CONTEXT).tokens
        ids = ids[:: max(1, len(ids) * CONTEXT // tokens)]
        for what in target or ("write", "delta", "state"):
            options: Any = dict(target=what, n_atoms=atoms, k=k, steps=steps, progress=False)
            sae = train_site(model, ids, layer, head, **options)
            result = ws.replacement_test(model, sae, heldout_documents(), n_firings=firings)
            rates = [result.wins(c, "delete", w) for c in ("atom", "matched") for w in ("at", "through")]  # type: ignore[arg-type]
            cosine = float(torch.as_tensor(result.cosine).median())
            row = (place, what, f"{sae.cfg.training['held_out']['nmse']:.2f}", f"{cosine:.2f}", *map(str, rates))
            table.add_row(*row)
            print(*row, sep=" | ", flush=True)
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
