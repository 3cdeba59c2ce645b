"""``writesae pages``"""

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
    SpecialTokens,
    Unchecked,
    json_file,
    plainly,
    quiet,
    read_texts,
    saes_and_model,
    site_folder,
)

ORDER = 6


def pages(
    saes: Annotated[
        list[str], typer.Argument(help="Shipped SAEs (tiny-gdn/L2H1), folders or hub ids; several are one per head.")
    ],
    model: ModelOfSAE = None,
    text: HeldOutText = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the site; the same folder again continues.")] = None,
    atoms: Annotated[int, typer.Option(help="Measure this many atoms of each SAE, the most frequent.", min=0)] = 32,
    atom: Annotated[
        list[int] | None, typer.Option(help="Measure this atom of each SAE too; repeat for several.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to continue with each atom added; repeat for several.")
    ] = None,
    neuronpedia: Annotated[bool, typer.Option("--neuronpedia", help="Also write Neuronpedia's format.")] = False,
    labels: Annotated[
        list[Path] | None, typer.Option(help="Labels to show, a file of `writesae explain`; repeat for several SAEs.")
    ] = None,
    json: Annotated[Path | None, json_file("what the index shows of every atom")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    unchecked: Unchecked = False,
) -> None:
    """Write a site with a page for every atom, and an index to search and sort them. It opens from disk.

    Several SAEs of one model share the index. One pass over the text serves all atoms. What needs further runs of the
    model (measured effects on tokens, the replacement test, a steered text) is done for the most frequent atoms; the
    same command with others adds them.
    """
    import shlex

    from rich.console import Console

    quiet()
    with plainly():
        from writesae.pages import write_pages

        found, hooked = saes_and_model(saes, model, prepend_bos, special_tokens, device, dtype, kernels)
        folder = out or site_folder(saes)
        # To be run in the site's folder, so that pages say the same wherever that is.
        said = {
            "--model": model and anywhere(model), "--text": text and anywhere(str(text)), "--out": ".",
            "--dtype": dtype, "--kernels": None if kernels == NATIVE else kernels,
        }  # fmt: skip
        again = ["writesae", "pages", *map(anywhere, saes)]
        again += [word for option, value in said.items() if value for word in (option, value)]
        read = {"prepend-bos": prepend_bos, "special-tokens": special_tokens}
        again += [f"--{'' if yes else 'no-'}{name}" for name, yes in read.items() if yes is not None]
        again += ["--unchecked"] if unchecked else []
        again += [word for path in labels or () for word in ("--labels", anywhere(str(path)))]
        index = write_pages(
            hooked, found, read_texts(text), folder, atoms=atoms, also=atom or (), prompts=prompt,
            name=[sae.removesuffix("/") for sae in saes], source=str(text or "Shipped held-out documents"),
            neuronpedia=neuronpedia, labels=labels, command=shlex.join(again), records=json,
            check_model=not unchecked, console=Console(stderr=True),
        )  # fmt: skip
    console = Console()
    console.print(f"Open {index} in a browser.", markup=False, highlight=False)
    if neuronpedia:
        of = folder if len(found) == 1 else folder / "L*H*"
        console.print(f"For Neuronpedia: {of / 'neuronpedia'}", markup=False, highlight=False)


def anywhere(name: str) -> str:
    """What names the same file or folder from every folder; names of other things stay."""
    return str(Path(name).resolve()) if Path(name).exists() else name
