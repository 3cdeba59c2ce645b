"""Variants of SAEs on the shipped models, like the paper's tables 5 to 7: error, atoms alive, L0, cosine to the writes.

    python benchmarks/variants.py                                           # about a quarter of an hour on two cores
    python benchmarks/variants.py --site tiny-gdn:2.1 --target write --k 4 --variant TiedSAE --variant WriteSAE

Each variant is trained on the same sequences of real text, and measured on others. ``write`` is the cosine of the
strongest atom, at the token where it is active, to what the model writes at that token: its median over tokens, and
over the atoms that are ever the strongest (the paper's register cosine is a median over atoms). ``nmse`` is about the
mean, where a variant subtracts it, and ``mse`` is that of a number of the matrix, which compares across variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from writesae import ActivationStore, HookedRecurrentModel, WriteSAE
from writesae.saes import train_store
from writesae.saes.training.data import FromStore
from writesae.stores.extraction import record
from writesae.stores.texts import read
from writesae.stores.windows import Windows
from writesae.zoo import corpus

SITES = ["tiny-gdn:2.1", "tiny-mamba2:4.1", "tiny-rwkv7:3.4"]
VARIANTS: list[tuple[str, str]] = [
    ("WriteSAE", "topk"),
    ("WriteSAE", "batch_topk"),
    ("WriteSAE", "jumprelu"),
    ("WriteSAE", "gated"),
    ("TiedSAE", "topk"),
    ("Rank2SAE", "topk"),
    ("BilinearFlatSAE", "topk"),
    ("MatrixSAE", "topk"),
    ("FlatSAE", "topk"),
]


def main(
    site: Annotated[list[str] | None, typer.Option(help="MODEL:LAYER.HEAD; repeat for several.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only these, with TopK; repeat for several.")] = None,
    target: Annotated[str, typer.Option(help="write, delta or state.")] = "state",
    atoms: Annotated[int, typer.Option(help="Atoms of each SAE.")] = 1024,
    k: Annotated[int, typer.Option(help="Active atoms.")] = 32,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-3,
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 150_000,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    cache: Annotated[Path | None, typer.Option(help="Where the corpus is kept.")] = None,
) -> None:
    """The table."""
    transformers.logging.set_verbosity_error()
    documents, _ = corpus.split(read(corpus.fetch(cache)))
    columns = ("head", "variant", "sparsity", "nmse", "mse", "alive", "L0", "write, tokens", "write, atoms", "states/s")
    table = Table(*columns, title=f"Target {target}, {atoms} atoms, k={k}, {steps} steps of 512")
    for place in site or SITES:
        name, where = place.split(":")
        layer, head = (int(x) for x in where.split("."))
        model = HookedRecurrentModel.from_pretrained(name)
        ids = Windows.cut(model, [d.text for d in documents], context).spread(tokens).tokens
        store = record(model, ids, [(layer, head)], progress=False)
        for kind, sparsity in [(name, "topk") for name in variant or ()] or VARIANTS:
            options: Any = dict(n_atoms=atoms, k=k, steps=steps, lr=lr, batch_size=512, progress=False)
            marks: list[dict[str, Any]] = []
            options |= dict(log=marks.append, log_every=steps)
            sae = train_store(store, target=target, variant=kind, sparsity=sparsity, **options)[layer, head]  # type: ignore[arg-type]
            found = sae.cfg.training["held_out"]
            by_token, by_atom = cosine_to_writes(store, sae)
            row = (
                place, kind, sparsity, f"{found['nmse']:.3f}", f"{found['mse']:.2e}", f"{found['alive']:.0%}",
                f"{found['l0']:.1f}", f"{by_token:.2f}", f"{by_atom:.2f}", f"{512 * steps / marks[0]['seconds']:.0f}",
            )  # fmt: skip
            table.add_row(*row)
            print(*row, sep=" | ", flush=True)
    Console(width=140).print(table)


@torch.no_grad()
def cosine_to_writes(store: ActivationStore, sae: WriteSAE, n_sequences: int = 16) -> tuple[float, float]:
    """Of the strongest atom to the native write: median over tokens, and over atoms of their means."""
    layer, head, target = sae.cfg.layer, sae.cfg.head, sae.cfg.target
    assert layer is not None and head is not None
    data = FromStore(store, layer, head, target, stride=1)
    aside = [i for i in range(len(store)) if i not in set(data.sequences.tolist())][:n_sequences]
    cosines, atoms = [], []
    for i in aside:
        x = data.load(torch.tensor([i]))
        values, indices = (part.reshape(-1) for part in sae.topk(x, 1))
        write = store.write(layer, head, [i])[0]
        cosines.append(sae.atom(indices[values > 0]).cosine(write[values > 0]))
        atoms.append(indices[values > 0])
    cosine, atom = torch.cat(cosines), torch.cat(atoms)
    count = torch.zeros(sae.cfg.n_atoms).index_add_(0, atom, torch.ones(len(atom)))
    total = torch.zeros(sae.cfg.n_atoms).index_add_(0, atom, cosine)
    return float(cosine.median()), float((total / count)[count > 0].median())


if __name__ == "__main__":
    typer.run(main)
