"""The paper's own selection for the replacement test: a few register atoms of several heads, all their firings pooled.

    python benchmarks/registers.py --model tiny-gdn --sae tiny-gdn/L0H0 --sae runs/L1H1 --sae tiny-gdn/L2H1

The paper's 92.4% (section 3.2, figure 14) pools 4,851 firings of 18 register features, of layers 1, 9 and 17. It does
not say how the 18 were chosen among the registers. Here they are, of each SAE, the registers (`atom_classes`) that fire
most often, and beside them four times as many that are drawn at random.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.results.result import share
from writesae.zoo import heldout_documents


def main(
    model: Annotated[str, typer.Option(help="A shipped model, a hub id or a folder.")] = "tiny-gdn",
    sae: Annotated[list[str] | None, typer.Option(help="A folder or name; repeat. Without: the model's own.")] = None,
    per_head: Annotated[int, typer.Option(help="Registers of each head.")] = 6,
    firings: Annotated[int, typer.Option(help="Firings of each register at most.")] = 100,
) -> None:
    """The table."""
    hooked = ws.HookedRecurrentModel.from_pretrained(model, dtype="float32")
    texts = heldout_documents()
    table = Table("head", "registers", "firings", "at the firing", "with the next 16", title=f"Registers of {model}")
    pooled: dict[str, list[ws.ReplacementResult]] = {}
    for one in map(ws.WriteSAE.from_pretrained, sae or [f"{model}/{f.name}" for f in ws.zoo.shipped_saes(model)]):
        classes = ws.atom_classes(hooked, one, texts)
        registers = torch.tensor([name == "register" for name in classes.classes]).nonzero().flatten()
        often = registers[classes.firings[registers].argsort(descending=True)[:per_head]]
        drawn = registers[torch.randperm(len(registers), generator=torch.Generator().manual_seed(0))[: 4 * per_head]]
        for name, atoms in (("fire most", often), ("at random", drawn)):
            found = ws.population_test(hooked, one, texts, atoms=atoms.tolist(), max_firings=firings).firings
            pooled.setdefault(name, []).append(found)
            add(table, f"{one.place}, {name}", [found])
    for name, found in pooled.items():
        add(table, f"all, {name}", found)
    Console(width=120).print(table)


def add(table: Table, name: str, found: list[ws.ReplacementResult]) -> None:
    """A row of several results, their firings pooled."""
    n, atoms = sum(r.n for r in found), sum(len(r.atom.unique()) for r in found)
    won = [torch.cat([r.score("atom", when) < r.score("delete", when) for r in found]) for when in ("at", "through")]
    table.add_row(name, str(atoms), f"{n:,}", *(str(share(hits)) for hits in won))


if __name__ == "__main__":
    typer.run(main)
