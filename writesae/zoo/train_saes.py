"""Train the SAEs shipped with a model: the recipe behind `tiny-gdn/saes`.

    python -m writesae.zoo.train_saes tiny-gdn runs/saes --site 0.2 --site 1.1            # the default corpus
    python -m writesae.zoo.train_saes my-model runs/saes --site 1.1 --text my_texts/      # your own
    python -m writesae.zoo.train_saes tiny-gdn runs/names --site 2.1 --names              # for the demo

The training text is what the model itself was trained on; documents held out there are held out here too. So one
sequence in `1 / facts` tells facts among prose and asks for them (`Recall.passage`). With `--names` these tell a few
names of one person instead, so often that each gets an atom of its own; large writes, such as those of names, then
count for more. For other texts and settings, use `writesae train`.
"""

import random
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
from writesae.zoo.recall import Recall

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A shipped model, a hub id or a folder.")],
    out: Annotated[Path, typer.Argument(help="Each SAE is saved to OUT/L<layer>H<head>.")],
    site: Annotated[list[str], typer.Option(help="LAYER.HEAD; repeat for several.")],
    text: Annotated[Path | None, typer.Option(help="A folder of .txt files, or one file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the default corpus is kept.")] = None,
    atoms: Annotated[int, typer.Option(help="Atoms per SAE.")] = 2048,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    facts: Annotated[float, typer.Option(help="Share of sequences that tell facts and ask for them.")] = 0.25,
    names: Annotated[bool, typer.Option(help="Tell a few names of one person, and no other facts.")] = False,
    max_tokens: Annotated[
        int, typer.Option(help="Use at most this many tokens, spread over the documents.")
    ] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Train SAEs of native writes with one active atom per write. The same command continues a stopped run."""
    hooked = HookedRecurrentModel.from_pretrained(model, dtype="float32")
    documents = [document.text for document in corpus.split(read(text or corpus.fetch(cache)))[0]]
    n = max_tokens // context
    n_facts, rng, recall = round(facts * n), random.Random(seed), Recall(hooked.tokenizer, documents)
    prose = Windows.cut(hooked, documents, context).enough(of="the text").spread((n - n_facts) * context).tokens
    tell = recall.few_names if names else lambda rng, length: recall.passage(rng, length, gap=200).ids[:length]
    told = torch.tensor([tell(rng, context) for _ in range(n_facts)])
    tokens = torch.cat([prose, told]) if n_facts else prose
    store = record(
        hooked,
        tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))],
        parse_sites(hooked, site),
    )
    for sae in train_store(store, n_atoms=atoms, steps=steps, seed=seed, out=out, unit_norm=not names).values():
        folder = sae.save_pretrained(out / sae.place.folder, dtype=torch.float16)
        print(f"{folder}: {sae.cfg.training['held_out']}")


if __name__ == "__main__":
    app()
