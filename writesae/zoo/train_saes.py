"""Train the SAEs shipped with a model: the recipe behind `tiny-gdn/saes`.

    python -m writesae.zoo.train_saes tiny-gdn runs/saes --site 0.2 --site 1.1            # the default corpus
    python -m writesae.zoo.train_saes my-model runs/saes --site 1.1 --text my_texts/      # your own

Training text is what the model itself was trained on; the documents held out there are held out here too.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from writesae.model import HookedRecurrentModel
from writesae.saes.collect import sequences, train_site
from writesae.zoo import corpus

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A shipped model, a hub id or a folder.")],
    out: Annotated[Path, typer.Argument(help="Each SAE goes to OUT/L<layer>H<head>.")],
    site: Annotated[list[str], typer.Option(help="LAYER.HEAD; repeat for several.")],
    text: Annotated[Path | None, typer.Option(help="A folder of .txt files, or one file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the default corpus is kept.")] = None,
    atoms: Annotated[int, typer.Option(help="Atoms of each SAE.")] = 1024,
    k: Annotated[int, typer.Option(help="Atoms active in a write.")] = 1,
    target: Annotated[str, typer.Option(help="write, delta or state.")] = "write",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3000,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    max_tokens: Annotated[
        int, typer.Option(help="Train on about so many tokens, spread over the documents.")
    ] = 1_000_000,
    seed: int = 0,
) -> None:
    """Train one SAE a site, one after another; each run continues where it stopped."""
    hooked = HookedRecurrentModel.from_pretrained(model)
    documents, _ = corpus.split(corpus.read(text or corpus.fetch(cache)))
    tokens = sequences(hooked, [document.text for document in documents], context)
    tokens = tokens[:: max(1, len(tokens) * context // max_tokens)]
    for name in site:
        layer, head = (int(part) for part in name.split("."))
        folder = out / f"L{layer}H{head}"
        sae = train_site(
            hooked, tokens, layer, head, n_atoms=atoms, k=k, target=target,  # type: ignore[arg-type]
            steps=steps, seed=seed, checkpoint=folder / "checkpoint.safetensors",
        )  # fmt: skip
        sae.save_pretrained(folder, dtype=torch.float16)
        print(f"{folder}: {sae.cfg.training['held_out']}")


if __name__ == "__main__":
    app()
