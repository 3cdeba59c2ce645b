"""Train the SAEs shipped with a model: the recipe behind `tiny-gdn/saes`.

    python -m writesae.zoo.train_saes tiny-gdn runs/saes --site 0.2 --site 1.1            # the default corpus
    python -m writesae.zoo.train_saes my-model runs/saes --site 1.1 --text my_texts/      # your own

Training text is what the model itself was trained on; the documents held out there are held out here too. With other
texts and settings, `writesae train` is the command.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from writesae.model import HookedRecurrentModel
from writesae.saes import train_store
from writesae.stores.extraction import parse_sites, record
from writesae.stores.texts import read
from writesae.stores.windows import Windows
from writesae.zoo import corpus

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A shipped model, a hub id or a folder.")],
    out: Annotated[Path, typer.Argument(help="Each SAE goes to OUT/L<layer>H<head>.")],
    site: Annotated[list[str], typer.Option(help="LAYER.HEAD; repeat for several.")],
    text: Annotated[Path | None, typer.Option(help="A folder of .txt files, or one file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the default corpus is kept.")] = None,
    atoms: Annotated[int, typer.Option(help="Atoms of each SAE.")] = 2048,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="About so many, spread over the documents.")] = 1_000_000,
    seed: int = 0,
) -> None:
    """SAEs of native writes, one atom active in each; the same command again goes on where it stopped."""
    hooked = HookedRecurrentModel.from_pretrained(model)
    documents, _ = corpus.split(read(text or corpus.fetch(cache)))
    windows = Windows.cut(hooked, [document.text for document in documents], context).enough(of="the text")
    store = record(hooked, windows.spread(max_tokens).tokens, parse_sites(hooked, site))
    for sae in train_store(store, n_atoms=atoms, steps=steps, seed=seed, out=out).values():
        folder = sae.save_pretrained(out / sae.place.folder, dtype=torch.float16)
        print(f"{folder}: {sae.cfg.training['held_out']}")


if __name__ == "__main__":
    app()
