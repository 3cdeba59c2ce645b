"""``writesae demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import AUTO, NATIVE, Device, DType, Kernels, json_file, plainly, quiet

ORDER = 1


def demo(
    model: Annotated[str, typer.Option(help="A shipped model: tiny-gdn, tiny-mamba2 or tiny-rwkv7.")] = "tiny-gdn",
    firings: Annotated[int, typer.Option(help="Firings tested by the replacement test, per SAE.", min=1)] = 300,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    picture: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("writesae-demo.png"),
    json: Annotated[Path | None, json_file("all that is shown")] = None,
) -> None:
    """See which write holds a name, and what a model says when it is deleted, exchanged, planted or made an atom."""
    from writesae.demo import run
    from writesae.jobs.disk import write_json

    quiet()
    with plainly():
        found = run(model, firings, picture, device=device, dtype=dtype, kernels=kernels)
        if json is not None:
            write_json(json, found)
