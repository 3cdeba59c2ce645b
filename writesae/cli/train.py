"""``writesae train``"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from writesae.cli._shared import (
    AUTO,
    NATIVE,
    Device,
    DType,
    Kernels,
    PrependBos,
    SpecialTokens,
    json_file,
    plainly,
    quiet,
    reading,
)

ORDER = 4


def train(
    source: Annotated[str, typer.Argument(help="A store made by extract; or a model, with --text and --site.")],
    out: Annotated[
        Path, typer.Argument(help="Each SAE is saved to OUT/L<layer>H<head>. A folder of a stopped run is continued.")
    ],
    site: Annotated[
        list[str] | None, typer.Option(help="LAYER.HEAD; repeat for several, trained side by side.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="For a model: a .txt file, or a folder of .txt files.")] = None,
    target: Annotated[str, typer.Option(help="What the SAE reads: write, delta or state.")] = "write",
    variant: Annotated[str | None, typer.Option(help="WriteSAE, TiedSAE, BilinearFlatSAE, MatrixSAE, FlatSAE.")] = None,
    sparsity: Annotated[str, typer.Option(help="topk, batch_topk, jumprelu or gated.")] = "topk",
    atoms: Annotated[int, typer.Option(help="Atoms per SAE.", min=1)] = 2048,
    k: Annotated[
        int | None, typer.Option(help="Active atoms per sample; without it, 1 for a write, 32 for a state.", min=1)
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of an atom.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 1500,
    batch: Annotated[
        int | None, typer.Option(help="Samples per step; without it, 2048 writes or 512 states.", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the sequences that is not trained on, only measured on.")
    ] = 0.1,
    evaluate_every: Annotated[int, typer.Option(help="Steps between measurements on held-out data.", min=1)] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 250,
    context: Annotated[int, typer.Option(help="For a model: tokens per sequence.", min=1)] = 512,
    max_tokens: Annotated[
        int, typer.Option(help="For a model: use at most this many tokens, spread over the texts.", min=1)
    ] = 500_000,
    json: Annotated[Path | None, json_file("the numbers of each head's training")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    tracker: Annotated[
        str | None, typer.Option(help="Also log to wandb, trackio, tensorboard, ... (to be installed separately).")
    ] = None,
) -> None:
    """Train SAEs, one per head. The same command continues a stopped run.

    With several processes (accelerate launch -m writesae.cli train ...) each takes a share of every batch.
    """
    from rich.console import Console
    from rich.table import Table

    from writesae.jobs.disk import write_json
    from writesae.jobs.processes import Processes
    from writesae.saes import train_store
    from writesae.saes.training.collect import planned
    from writesae.stores.extraction import parse_sites, record
    from writesae.stores.store import ActivationStore
    from writesae.stores.texts import from_files

    quiet()
    with plainly(goes_on=True):
        first = Processes.launched().first
        given: dict[str, Any] = dict(steps=steps, seed=seed, batch_size=batch, lr=lr)
        given = {name: value for name, value in given.items() if value is not None}
        given |= dict(target=target, variant=variant, sparsity=sparsity, n_atoms=atoms, k=k)
        given["choices"] = {"rank": rank} if rank > 1 else None
        planned(**given)
        if ActivationStore.is_at(source):
            for_a_model = {"--text": text, "--dtype": dtype, "--kernels": None if kernels == NATIVE else kernels}
            for_a_model |= {"--prepend-bos": prepend_bos, "--special-tokens": special_tokens}
            if wrong := " and ".join(option for option, value in for_a_model.items() if value is not None):
                raise ValueError(f"{source} is a store of tokens, so it goes without {wrong}, which a model would take")
            store = ActivationStore.open(source)
            sites = [store.place(name) for name in site] if site else None
        else:
            from writesae.model import HookedRecurrentModel

            if text is None or not site:
                raise ValueError(f"{source} is no store, so it is taken for a model: that needs --text and --site")
            model = HookedRecurrentModel.from_pretrained(
                source, device=device, dtype=dtype, kernels=kernels, **reading(prepend_bos, special_tokens)
            )
            sites = parse_sites(model, site)
            store = record(model, from_files(model, text, context, max_tokens), sites, progress=first)
        with _tracked(tracker, {"source": source, "target": target, "variant": variant, "seed": seed}) as log:
            saes = train_store(
                store, sites, out=out, held_out=held_out, device=device, also_log=log, evaluate_every=evaluate_every,
                checkpoint_every=save_every, progress=first, **given,
            )  # fmt: skip
    if not first:
        return
    if json is not None:
        write_json(json, {str(sae.place): sae.cfg.training for sae in saes.values()})
    table = Table(title=f"SAEs of {store.info.model_id}, on held-out sequences")
    for column in ("head", "normalised MSE", "cosine of the top atom", "active atoms", "atoms ever active"):
        table.add_column(column, justify="right")
    for sae in saes.values():
        found = sae.cfg.training.get("held_out", sae.cfg.training["train"])
        numbers = f"{found['nmse']:.3f}", f"{found['cosine']:.3f}", f"{found['l0']:.1f}", f"{found['alive']:.1%}"
        table.add_row(str(sae.place), *numbers)
    console = Console()
    console.print(table)
    for sae in saes.values():
        console.print(f"{out / sae.place.folder}", soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _tracked(tracker: str | None, about: dict[str, object]) -> Iterator[Callable[[str, dict], object] | None]:
    """A function that logs a head's numbers to the tracker."""
    if tracker is None:
        yield None
        return
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    installed = [str(name.value) for name in get_available_trackers()]
    if tracker not in installed:  # accelerate would leave it out silently
        raise ImportError(
            f"--tracker {tracker} is not installed (installed: {', '.join(installed) or 'none'}): pip install it, or "
            f"leave the option out"
        )
    accelerator = Accelerator(log_with=tracker, project_dir="runs", cpu=True)
    accelerator.init_trackers("writesae", {name: value for name, value in about.items() if value is not None})

    def log(head: str, record: dict) -> None:
        accelerator.log({f"{head}/{name}": value for name, value in record.items() if name != "step"}, record["step"])

    try:
        yield log
    finally:
        accelerator.end_training()
