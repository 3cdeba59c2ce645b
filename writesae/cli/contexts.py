"""``writesae contexts``"""

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
    json_file,
    plainly,
    quiet,
    read_texts,
    sae_and_model,
)

ORDER = 5


def contexts(
    sae: SAEName,
    model: ModelOfSAE = None,
    text: HeldOutText = None,
    atom: Annotated[
        list[int] | None, typer.Option(help="Repeat for several; without it, the five that fire most.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Places shown per atom.", min=1)] = 10,
    context: Annotated[int, typer.Option(help="Tokens read at once, from an empty memory.", min=1)] = 512,
    batch: Annotated[int, typer.Option(help="Sequences run at once.", min=1)] = 8,
    json: Annotated[Path | None, json_file("everything found")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
) -> None:
    """Show where in a text atoms fire most strongly."""
    quiet()
    with plainly():
        from rich.console import Console

        from writesae.jobs.disk import write_json
        from writesae.saes import top_contexts

        found, hooked = sae_and_model(sae, model, prepend_bos, special_tokens, device, dtype, kernels)
        top = top_contexts(hooked, found, read_texts(text), n=n, atoms=atom, context=context, batch_size=batch)
        if json is not None:
            write_json(json, top.to_dict())
    console = Console()
    for i in atom or top.most_frequent(5):
        console.print(top.table(i) if top[i] else top.about(i), highlight=False)
