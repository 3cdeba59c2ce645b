"""``writesae serve``: the pages from a local server that runs the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import (
    AUTO,
    NATIVE,
    Device,
    DType,
    HeldOutText,
    Kernels,
    ModelOfSAE,
    PrependBos,
    SAEName,
    SpecialTokens,
    Unchecked,
    plainly,
    quiet,
    read_texts,
    sae_and_model,
    site_folder,
)

ORDER = 6.5


def serve(
    sae: SAEName,
    model: ModelOfSAE = None,
    text: HeldOutText = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the site, written first if it is not there.")] = None,
    atoms: Annotated[int, typer.Option(help="Measure this many atoms, the most frequent.", min=0)] = 0,
    port: Annotated[int, typer.Option(help="Port on this machine.", min=0, max=65535)] = 8000,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    unchecked: Unchecked = False,
) -> None:
    """Serve the pages to this machine, and run the model: type a text to see what fires, and steer with an atom.

    The site is that of `writesae pages` of one SAE: a site of several is not served. The same folder again continues.
    Only this machine is answered. Needs the extra [serve]. Ctrl-C ends it. There is no --json, since it has no result:
    `writesae pages --json` writes what the index shows.
    """
    from rich.console import Console

    quiet()
    with plainly():
        from writesae.jobs.extras import extra

        uvicorn = extra("uvicorn")
        from writesae.pages import write_pages
        from writesae.pages.serve import HOST, application

        found, hooked = sae_and_model(sae, model, prepend_bos, special_tokens, device, dtype, kernels)
        name, folder = sae.removesuffix("/"), out or site_folder([sae])
        write_pages(
            hooked, found, read_texts(text), folder, atoms=atoms, name=name,
            source=str(text or "Shipped held-out documents"), check_model=not unchecked, console=Console(stderr=True),
        )  # fmt: skip
        app = application(hooked, found, folder, name=name, check_model=not unchecked)
        Console().print(f"Open http://{HOST}:{port}/try.html in a browser. Ctrl-C ends it.", markup=False)
        uvicorn.run(app, host=HOST, port=port, log_level="warning")
