"""``writesae convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import json_file, plainly

ORDER = 8


def convert(
    source: Annotated[str, typer.Argument(help="A .pt file, a folder or a tree of them; or owner/name\\[/folder].")],
    out: Annotated[Path, typer.Argument(help="Where the SAE is saved; for a tree, the same tree again.")],
    model: Annotated[str | None, typer.Option(help="The model they belong to: hub id, folder or name.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer, where the checkpoint does not say.", min=0)] = None,
    head: Annotated[int | None, typer.Option(help="Head, where the checkpoint does not say.", min=0)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    json: Annotated[Path | None, json_file("what became of each checkpoint")] = None,
) -> None:
    """Convert checkpoints of the paper's own code (JackYoung27/writesae-ckpts) to SAEs of this package."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from writesae.jobs.disk import plain, write_json
    from writesae.saes.paper.convert import conversions

    names = ("checkpoint", "type", "site", "matrices", "atoms", "k", "val. MSE", "SHA-256", "to")
    table, remarks, failed, records = Table(*names), [], [], []
    with plainly():
        for done in conversions(source, out, model_id=model, layer=layer, head=head, revision=revision):
            records.append({"checkpoint": str(done.checkpoint), "passed_over": done.passed_over})
            if isinstance(done.result, Exception):
                failed.append(str(done.result))
                records[-1]["error"] = failed[-1]
                continue
            cfg, record = done.result.cfg, done.result.cfg.training["reference"]
            mse = record.get("val_mse", record.get("best_val_mse"))
            cells = (
                done.checkpoint, record["sae_type"], "?" if cfg.layer is None or cfg.head is None else str(cfg.place),
                f"{cfg.d_key}x{cfg.d_value}", f"{cfg.n_atoms:,}", cfg.k if cfg.chooses else "",
                "" if mse is None else f"{mse:.3g}", "verified" if record["verified"] else "not listed", done.folder,
            )  # fmt: skip
            table.add_row(*(Text(str(cell)) for cell in cells))
            records[-1] |= {"folder": str(done.folder), "cfg": plain(cfg.to_dict())}
            if record["assumed"]:
                remarks.append(f"{done.checkpoint}: assumed {', '.join(record['assumed'])}, which nothing says")
            if done.passed_over:
                remarks.append(f"{done.checkpoint}: left {', '.join(done.passed_over)} beside it alone")
        console = Console()
        if table.row_count:
            console.print(table)
        for remark in remarks:
            console.print(remark, markup=False, highlight=False)
        if json is not None:
            write_json(json, {"source": source, "checkpoints": records})
        if failed:
            raise ValueError("\nwritesae: ".join(failed))
