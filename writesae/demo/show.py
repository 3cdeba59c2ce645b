"""What `writesae demo` prints. Offline, on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from writesae.demo.name import (
    ASKED,
    BETWEEN,
    NAME,
    OTHER,
    TOLD,
    UNTOLD,
    Changes,
    Held,
    Outcome,
    atom_for,
    changed,
    every_head,
    held,
    planted,
    said,
    write_at,
)
from writesae.demo.picture import draw
from writesae.experiments import ReplacementResult, replacement_test
from writesae.jobs.extras import MissingExtra
from writesae.jobs.progress import Bars
from writesae.model import HookedRecurrentModel
from writesae.results.statistics import Rate
from writesae.saes import WriteSAE
from writesae.zoo import ZOO, heldout_documents, name_saes, shipped_models, shipped_saes

SEA = (
    "Captain Ahab stood upon the deck of the Pequod, and looked out over the waves for the white whale; the "
    "harpooneers and the mates were in the boats, and the old man cried out to them to row."
)
TREASURY = (
    "The Congress has passed the laws that were needed for the Treasury. The revenues of the Government for the fiscal "
    "year, and the expenditures of the departments, are in the report of the Secretary."
)
GOES_ON = " And the"
COMPARED = ("an atom", "with next tokens", "random write")  # each with a deletion
WIDTH = 78  # of everything that is printed


def run(
    name: str = "tiny-gdn",
    n_firings: int = 300,
    picture: Path | None = None,
    console: Console | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    kernels: str = "native",
) -> dict[str, Any]:
    """Everything `writesae demo` shows, and its numbers as JSON has them.

    Args:
        name: a shipped model that comes with SAEs.
        n_firings: firings tested by the replacement test, per SAE.
        picture: PNG file to write; None for none.
        console: where to print; None for the standard output.
        device, dtype, kernels: of the model, see `HookedRecurrentModel.from_pretrained`.

    Raises:
        ValueError: not a shipped model that comes with SAEs.
    """
    console = console or Console()
    began = time.monotonic()
    if name not in shipped_models():
        raise ValueError(f"the demo needs a shipped model with SAEs: {', '.join(shipped_models())}; got {name}")
    with console.status(f"loading {name}"):
        model = HookedRecurrentModel.from_pretrained(name, device=device, dtype=dtype, kernels=kernels)
        saes, of_names = (
            [WriteSAE.from_pretrained(folder, device=device) for folder in folders]
            for folders in (shipped_saes(name), name_saes(name))
        )
    if not saes:
        raise ValueError(f"no SAEs are shipped with {name}")
    console.print(about(name, model, saes))

    with Bars(transient=True) as bars:
        n_writes = sum(site.n_heads for site in model.sites) * len(model.to_str_tokens(TOLD + BETWEEN + ASKED))
        where = held(model, bars.add("which write holds the name", n_writes))
    console.print(told(model, where))
    changes = changed(model, where, of_names)
    console.print(table_of(changes.rows, "What the model says after a change", "changed in its memory"))
    console.print(verdict(where, saes, changes))
    untold = f"Planted where no name is told: “{UNTOLD} ... was called”"
    added = planted(model, where)
    console.print(table_of(added, untold, "added at its full stop"))
    texts = swapped(model)
    console.print(exchanged_memory(texts))

    with Bars(transient=True) as bars:
        lines = [bars.add(f"replacement test, {sae.place.words}", n_firings) for sae in saes]
        results = [
            replacement_test(model, sae, heldout_documents(), n_firings=n_firings, progress=bar)
            for sae, bar in zip(saes, lines, strict=True)
        ]
    console.print(replaced(results))
    if picture is not None:
        try:
            with console.status("drawing"):
                draw(where, changes.rows, results, picture)
            console.print(f"Picture: {picture}")
        except MissingExtra as missing:
            console.print(f"No picture: {missing}", markup=False, highlight=False)
    console.print(f"Done in {time.monotonic() - began:.0f} s.")
    return {
        "model": name,
        "held_by": [{**place._asdict(), "restored": where.restored(place)} for place in where.places],
        "changed": [outcome._asdict() for outcome in changes.rows],
        "planted": [outcome._asdict() for outcome in added],
        "memory_exchanged": dict(texts),
        "replaced": [
            {"sae": str(result.places[0])} | {what: asdict(rate) for what, rate in rates(result).items()}
            for result in results
        ],
    }


def about(name: str, model: HookedRecurrentModel, saes: Sequence[WriteSAE]) -> Panel:
    """What was loaded."""
    record = json.loads((ZOO / name / "training.json").read_text())
    site = model.sites[0]
    n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    layers = ", ".join(str(s.layer) for s in model.sites)
    lines = (
        f"{type(model.hf_model).__name__}, {n_parameters:.1f} M parameters; recurrent layers {layers}, each with "
        f"{site.n_heads} states of {site.d_key} x {site.d_value}.",
        f"On held-out text it needs {record['held_out_bits_per_byte']:.2f} bits per byte "
        f"(xz -9: {record['xz_bits_per_byte']:.2f}).",
        "SAEs: " + "; ".join(f"{sae.place.words}, {sae.cfg.n_atoms} rank-1 atoms" for sae in saes) + ".",
    )
    return Panel("\n".join(lines), title=name, width=WIDTH)


def told(model: HookedRecurrentModel, where: Held) -> Panel:
    """The story, what the model says, and which writes hold the name."""
    says = said(model, []).says
    text = Text.assemble(
        (TOLD.partition("{}")[0], "dim"), (NAME, "bold"), (f".{BETWEEN}{ASKED}", "dim"), (says, "bold green")
    )
    if says != NAME:
        text.append(f"\n\nThe model does not say {NAME.strip()}: it did not remember.")
    places, tokens = where.places, where.found.tokens
    parts = [
        f"{tokens[t]!r}, layer {layer} head {head} ({where.restored(place):.0%} of the way alone)"
        for place in places[:4]
        for layer, head, t in [place]
    ] + ([f"and {len(places) - 4} more"] if len(places) > 4 else [])
    lead = "the write at " if len(places) == 1 else f"{len(places)} writes together: at "
    text.append(
        f"\n\nWhich of its {where.found.grid.numel():,} writes holds the name? Each was exchanged for the one of a "
        f"text that says {OTHER.strip()}. "
        + (f"What brings {OTHER.strip()}: " if where.enough else f"Nothing brings {OTHER.strip()}, not even ")
        + lead
        + "; ".join(parts)
        + "."
    )
    return Panel(text, title="A name is told once, and asked for later", width=WIDTH)


def table_of(outcomes: Sequence[Outcome], title: str, first: str) -> Table:
    """What was done, what the model says, and a bar for each name."""
    table = Table(title=title, box=box.SIMPLE_HEAD, width=WIDTH)
    table.add_column(first)
    table.add_column("it says", width=9, no_wrap=True)
    for name in (NAME, OTHER):
        table.add_column(f"p({name.strip()})", width=14)
    for row in outcomes:
        bars = [Text(f"{p:4.0%} " + "█" * round(9 * p)) for p in (row.name, row.other)]
        table.add_row(row.done, Text(repr(row.says.strip())[1:-1]), *bars)
    return table


@torch.no_grad()
def verdict(where: Held, saes: Sequence[WriteSAE], changes: Changes) -> str:
    """What the table shows that a glance may miss: whether the name is gone with its writes, and what an atom keeps."""
    lines, name = [], NAME.strip()
    if changes.deleted.keeps:
        lines.append(f"With these writes deleted {name} is still likeliest: others hold it too.")
    if changes.atom is None:
        lines.append("No SAE was told names often at some of these heads, so there is no atom to put in.")
    else:
        keep = "keeps" if changes.atom.keeps else "does not keep"
        like = ", ".join(f"{cosine:.2f}" for cosine in changes.likeness)
        lines.append(f"One atom in the place of each write {keep} the name (cosine to the write {like}).")
    for place, sae in ((p, sae) for p in where.places for sae in saes if tuple(sae.place) == p[:2]):
        write = write_at(where.own, place)
        cosine = float(atom_for(sae, write).cosine(write))
        lines.append(f"The SAE of prose at layer {place.layer} head {place.head} never had {name} often: {cosine:.2f}.")
    return "\n".join([*lines, ""])


@torch.no_grad()
def swapped(model: HookedRecurrentModel) -> list[tuple[str, str]]:
    """How a text about the sea goes on, and how with the memory of another text; with what was done, in words."""
    sea, treasury = model.memory(SEA), model.memory(TREASURY)
    made = [
        ("after a text about a ship", sea),
        ("its states exchanged for those of a text about the Treasury", sea.with_heads(treasury, every_head(model))),
        ("after the text about the Treasury", treasury),
    ]
    how: Any = dict(max_new_tokens=16, do_sample=False, repetition_penalty=1.3)
    texts = ((words, model.generate(GOES_ON, memory=memory, **how)) for words, memory in made)
    return [(words, " ".join(str(text).split())) for words, text in texts]


def exchanged_memory(texts: Sequence[tuple[str, str]]) -> Panel:
    lines = [Text.assemble((words, "dim"), "\n  " + text) for words, text in texts]
    return Panel(Text("\n").join(lines), title="A whole memory exchanged", width=WIDTH)


def rates(result: ReplacementResult) -> dict[str, Rate]:
    """How often each of `COMPARED` is closer to the model than a deletion."""
    found = (result.wins("atom", "delete"), result.wins("atom", "delete", "through"))
    return dict(zip(COMPARED, (*found, result.wins("random", "delete", "through")), strict=True))


def replaced(results: Sequence[ReplacementResult]) -> Table:
    """One line per SAE: how often an atom in place of a write stays closer to the model than a deletion."""
    table = Table(title="Atoms in place of writes, on held-out text", box=box.SIMPLE_HEAD, width=WIDTH)
    table.caption = "how often closer to the model than a deletion is, with 95% intervals"
    for column in ("SAE", "firings", *COMPARED):
        table.add_column(column, justify="left" if column == "SAE" else "right", no_wrap=True)
    for result in results:
        shown = (f"{100 * r.rate:.0f}% [{100 * r.low:.0f}, {100 * r.high:.0f}]" for r in rates(result).values())
        layer, head = result.places[0]
        table.add_row(f"layer {layer} head {head}", str(result.n), *shown)
    return table
