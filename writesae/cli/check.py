"""``writesae check``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import AUTO, NATIVE, Device, DType, Kernels, ModelName, json_file, plainly, quiet

ORDER = 2.5


def check(
    model: ModelName,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    text: Annotated[str | None, typer.Option(help="A text to run it on; without it, random token ids.")] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Look into every recurrent layer, not the first, middle and last.")
    ] = False,
    costs: Annotated[bool, typer.Option(help="Measure time and memory too.")] = True,
    json: Annotated[Path | None, json_file("the rows")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Check on your model, device, dtype and kernels that hooks and edits do what they claim.

    A minute or two. Exits with 0 if every check is ok, with 1 otherwise.
    """
    from rich.console import Console

    from writesae.checking import check as run
    from writesae.model import HookedRecurrentModel

    quiet()
    console = Console(stderr=True)
    with plainly():
        with console.status(f"loading {model}"):
            tokenizer = None if text is not None else False
            hooked = HookedRecurrentModel.from_pretrained(
                model, dtype=dtype, device=device, kernels=kernels, tokenizer=tokenizer
            )
        result = run(hooked, text, layers="all" if all_layers else None, costs=costs, seed=seed, show=console)
        if json is not None:
            result.save(json)
    Console().print(result.table())
    raise typer.Exit(0 if result.ok else 1)
