"""``writesae pages``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import (
    AUTO,
    Device,
    DType,
    HeldOutText,
    ModelOfSAE,
    PrependBos,
    SAEName,
    SpecialTokens,
    Unchecked,
    json_file,
    plainly,
    quiet,
    read_texts,
    sae_and_model,
)

ORDER = 6


def pages(
    sae: SAEName,
    model: ModelOfSAE = None,
    text: HeldOutText = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the site; the same folder again continues.")] = None,
    atoms: Annotated[int, typer.Option(help="Measure this many atoms, the most frequent.", min=0)] = 32,
    atom: Annotated[list[int] | None, typer.Option(help="Measure this atom too; repeat for several.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to continue with each atom added; repeat for several.")
    ] = None,
    neuronpedia: Annotated[bool, typer.Option("--neuronpedia", help="Also write Neuronpedia's format.")] = False,
    labels: Annotated[Path | None, typer.Option(help="Labels to show, a file of `writesae explain`.")] = None,
    json: Annotated[Path | None, json_file("what the index shows of every atom")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    unchecked: Unchecked = False,
) -> None:
    """Write a site with a page for every atom, and an index to search and sort them. It opens from disk.

    One pass over the text serves all atoms. What needs further runs of the model (measured effects on tokens, the
    replacement test, a steered text) is done for the most frequent atoms; the same command with others adds them.
    """
    import shlex

    from rich.console import Console

    quiet()
    with plainly():
        from writesae.pages import write_pages

        found, hooked = sae_and_model(sae, model, prepend_bos, special_tokens, device, dtype)
        name = sae.removesuffix("/")
        folder = out or Path("runs") / f"pages-{Path(name).parent.name}-{Path(name).name}".replace("--", "-")
        # To be run in the site's folder, so that pages say the same wherever that is.
        again = ["writesae", "pages", anywhere(sae), *(["--model", anywhere(model)] if model else [])]
        again += [*(["--text", anywhere(str(text))] if text else []), "--out", "."]
        again += ["--labels", anywhere(str(labels))] if labels else []
        index = write_pages(
            hooked, found, read_texts(text), folder, atoms=atoms, also=atom or (), prompts=prompt,
            name=name, source=str(text or "Shipped held-out documents"), neuronpedia=neuronpedia, labels=labels,
            command=shlex.join(again), records=json, check_model=not unchecked, console=Console(stderr=True),
        )  # fmt: skip
    console = Console()
    console.print(f"Open {index} in a browser.", markup=False, highlight=False)
    if neuronpedia:
        console.print(f"For Neuronpedia: {folder / 'neuronpedia'}", markup=False, highlight=False)


def anywhere(name: str) -> str:
    """What names the same file or folder from every folder; names of other things stay."""
    return str(Path(name).resolve()) if Path(name).exists() else name
