"""``writesae hooks``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import Device, DType, ModelName, json_file, plainly, quiet

ORDER = 2


def hooks(
    model: ModelName,
    device: Device = "cpu",
    dtype: DType = None,
    json: Annotated[Path | None, json_file("layers and hook points")] = None,
    names: Annotated[bool, typer.Option("--names", help="Only the names, one per line.")] = False,
) -> None:
    """List a model's recurrent layers and its hook points."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from writesae.jobs.disk import write_json
    from writesae.model import HookedRecurrentModel

    quiet()
    with plainly():
        hooked = HookedRecurrentModel.from_pretrained(model, device=device, dtype=dtype)
        if json is not None:
            sizes = ("layer", "n_heads", "d_key", "d_value")
            layers = [{name: getattr(site, name) for name in sizes} | {"rule": str(site.rule)} for site in hooked.sites]
            points = [dict(zip(("name", "shape", "what"), row, strict=True)) for row in hooked.describe_hooks()]
            write_json(json, {"model": model, "layers": layers, "hook_points": points, "names": hooked.hook_names})
    if names:
        print("\n".join(hooked.hook_names))
        return
    console = Console()
    table = Table(title=f"{model}: {type(hooked.hf_model).__name__}")
    for column in ("layer", "heads", "d_key", "d_value", "rule"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for site in hooked.sites:
        table.add_row(*map(str, (site.layer, site.n_heads, site.d_key, site.d_value, site.rule)))
    console.print(table)
    table = Table(title="Hook points of each layer, in the order in which they fire")
    for column in ("name", "shape", "what"):
        table.add_column(column, no_wrap=column == "name")
    for row in hooked.describe_hooks():
        table.add_row(*map(Text, row))  # plain text: shapes have brackets, which rich would take for markup
    console.print(table)
