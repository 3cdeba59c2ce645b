"""``writesae reproduce``"""

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
    PrependBos,
    SpecialTokens,
    json_file,
    plainly,
    quiet,
    read_texts,
    reading,
)

ORDER = 7


def reproduce(
    model: Annotated[str, typer.Option(help="A shipped model (tiny-gdn), a hub id or a folder.")],
    sae: Annotated[
        list[str] | None,
        typer.Option(help="An SAE of one of its heads; repeat for several. Without it, those shipped with the model."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; the same folder again continues.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="An experiment; repeat for several. Without it, all.")] = None,
    text: HeldOutText = None,
    flat: Annotated[list[str] | None, typer.Option(help="Flat SAEs of states, one per head: a control.")] = None,
    other_seed: Annotated[
        list[str] | None, typer.Option(help="SAEs of the same heads trained with other seeds.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small samples: a first look, in minutes instead of a quarter of an hour.")
    ] = False,
    json: Annotated[Path | None, json_file("the numbers of every experiment")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Take SAEs that do not say which weights they were trained on.")
    ] = False,
) -> None:
    """Run the paper's experiments on a model and its SAEs, and write a report beside the paper's numbers.

    The same command continues a stopped run with the first experiment that is missing. --only takes the name of an
    experiment's function, such as replacement_test or erase; a name that does not exist lists them all.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from writesae.experiments.report.reproduction import Sizes
    from writesae.experiments.report.reproduction import reproduce as run
    from writesae.jobs.disk import write_json
    from writesae.model import HookedRecurrentModel
    from writesae.models.wrappers import in_half_precision
    from writesae.saes import WriteSAE
    from writesae.zoo import shipped_saes

    quiet()
    with plainly(goes_on=True):
        names = sae or [str(folder) for folder in shipped_saes(model)]
        if not names:
            raise ValueError(f"no SAEs are shipped with {model}: give --sae, a folder or a hub id, once for each head")
        texts = read_texts(text)
        load = lambda names: [WriteSAE.from_pretrained(name, device=device) for name in names or ()]  # noqa: E731
        saes = load(names)
        how = reading(prepend_bos, special_tokens, saes)
        hooked = HookedRecurrentModel.from_pretrained(model, device=device, dtype=dtype, kernels=kernels, **how)
        folder = out or Path("runs") / f"reproduce-{Path(model).name}"
        outcomes = run(
            hooked, saes, texts, folder, only=only, sizes=Sizes.quick() if quick else None, flat=load(flat),
            other_seeds=load(other_seed), seed=seed, check_model=not unchecked, console=Console(stderr=True),
        )  # fmt: skip
        if json is not None:
            each = [{"folder": str(outcome.folder), **outcome.to_dict()} for outcome in outcomes]
            write_json(json, {"model": model, "report": str(folder / "report.html"), "outcomes": each})
    table = Table(title=f"{model}: first number of each experiment")
    for column in ("experiment", "", "", "s"):
        table.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    for outcome in outcomes:
        first = outcome.numbers[0] if outcome.numbers else None
        what = (first.name, str(first)) if first is not None else ("failed", outcome.error or "")
        table.add_row(*map(Text, (outcome.key, *what, f"{outcome.seconds or 0:.0f}")))
    console = Console()
    console.print(table)
    if in_half_precision(hooked.hf_model):
        console.print(
            "In half precision a model loses effects of less than about a hundredth of a logit: --dtype float32",
            highlight=False,
        )
    console.print(f"Report: {folder / 'report.html'} and report.md beside it", highlight=False, soft_wrap=True)
    if any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(1)
