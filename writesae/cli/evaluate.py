"""``writesae evaluate``"""

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
    ModelName,
    PrependBos,
    SpecialTokens,
    json_file,
    plainly,
    quiet,
    read_texts,
    reading,
)

ORDER = 4.5


def evaluate(
    model: ModelName,
    saes: Annotated[list[str], typer.Argument(help="Shipped SAEs (tiny-gdn/L2H1), folders or hub ids, one per head.")],
    text: HeldOutText = None,
    context: Annotated[int, typer.Option(help="Tokens read at once, from an empty memory.", min=2)] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens read in all, spread over the text.", min=2)] = 20_000,
    batch: Annotated[int, typer.Option(help="Sequences run at once.", min=1)] = 4,
    json: Annotated[Path | None, json_file("the numbers, under SAEBench's names")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Take SAEs that were trained on other weights.")
    ] = False,
) -> None:
    """Evaluate SAEs on held-out text: reconstruction, sparsity, and the loss that they recover.

    Each SAE by itself and, if there are several, all at once.
    """
    quiet()
    with plainly():
        from rich.console import Console

        from writesae.jobs.progress import Bars
        from writesae.methods import evaluate as run
        from writesae.model import HookedRecurrentModel
        from writesae.saes import WriteSAE

        found = [WriteSAE.from_pretrained(name, device=device) for name in saes]
        how = reading(prepend_bos, special_tokens, found)
        hooked = HookedRecurrentModel.from_pretrained(model, device=device, dtype=dtype, kernels=kernels, **how)
        with Bars(transient=True) as bars:
            bar = bars.add("windows", max(1, tokens // context))
            result = run(
                hooked, found, read_texts(text), context=context, max_tokens=tokens, batch_size=batch,
                check_model=not unchecked, progress=bar,
            )  # fmt: skip
        if json is not None:
            result.save(json)
    Console().print(result.table())
