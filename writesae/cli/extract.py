"""``writesae extract``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli._shared import (
    AUTO,
    NATIVE,
    Device,
    DType,
    Kernels,
    ModelName,
    PrependBos,
    SpecialTokens,
    json_file,
    plainly,
    quiet,
    reading,
)

if TYPE_CHECKING:
    from rich.table import Table

    from writesae.stores.store import ActivationStore

ORDER = 3


def extract(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="Folder of the store: a new one, or one to continue.")],
    site: Annotated[list[str], typer.Option(help="LAYER.HEAD, or LAYER.all; repeat for several.")],
    text: Annotated[Path | None, typer.Option(help="A .txt file, or a folder of .txt files.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set: hub id, folder or file. Needs \\[data].")] = None,
    tokens: Annotated[Path | None, typer.Option(help="A .npy file of token ids, \\[pos] or \\[n, pos].")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    column: Annotated[str, typer.Option(help="Column of the data set that holds the texts.")] = "text",
    config: Annotated[str | None, typer.Option(help="Configuration of the data set, if it has several.")] = None,
    context: Annotated[
        int, typer.Option(help="Tokens per sequence; the remainder at the end of a text is dropped.", min=1)
    ] = 512,
    batch: Annotated[int, typer.Option(help="Sequences run at once.", min=1)] = 8,
    shard: Annotated[
        int | None, typer.Option(help="Sequences per file; without it, files of about 64 MB.", min=1)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Use at most this many tokens: spread over text files, the first ones of a data set."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the store: float16, bfloat16 or float32.")] = "float16",
    json: Annotated[Path | None, json_file("sizes and errors of the store")] = None,
    device: Device = AUTO,
    model_dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
) -> None:
    """Store what heads write, and their states, in factors on disk. The same command continues a stopped run.

    On several GPUs or processes: accelerate launch -m writesae.cli extract ...
    """
    quiet()
    with plainly(goes_on=True):
        if sum(given is not None for given in (text, dataset, tokens)) != 1:
            raise ValueError("give one source: --text PATH, --dataset NAME or --tokens FILE")
        if tokens is not None and reading(prepend_bos, special_tokens):
            raise ValueError("--tokens has token ids already: --prepend-bos and --special-tokens are about texts")
        import torch
        from rich.console import Console

        import writesae.stores.extraction as making
        from writesae.jobs.disk import plain, write_json
        from writesae.jobs.processes import Processes
        from writesae.model import HookedRecurrentModel
        from writesae.stores import texts

        if dtype not in making.DTYPES:
            raise ValueError(f"--dtype {dtype}: allowed are {', '.join(making.DTYPES)}")
        team = Processes.launched()
        hooked = HookedRecurrentModel.from_pretrained(
            model, device=device, dtype=model_dtype, kernels=kernels, **reading(prepend_bos, special_tokens)
        )  # on several GPUs, accelerate has chosen each process's own
        sites = making.parse_sites(hooked, site)
        if text is not None:
            ids, source = texts.from_files(hooked, text, context, max_tokens), f"text {text}"
        elif dataset is not None:
            ids = texts.from_dataset(hooked, dataset, context, max_tokens, split=split, column=column, config=config)
            source = f"data set {dataset}, split {split}, column {column}"
        else:
            assert tokens is not None
            n_vocab = hooked.W_E.shape[0]
            ids, source = texts.from_array(tokens, context, max_tokens, n_vocab), f"tokens {tokens}"
        store = making.extract(
            hooked, ids, sites, out, batch_size=batch, shard_sequences=shard, dtype=getattr(torch, dtype), source=source
        )
        if json is not None and team.first:
            sizes = ("n_sequences", "context", "bytes_per_token", "times_smaller", "report")
            record = {"folder": str(out), "sites": list(map(str, store.info.sites)), "dtype": store.info.dtype}
            write_json(json, plain(record | {name: getattr(store, name) for name in sizes}))
    if team.first:
        console = Console()
        console.print(_errors(store))
        console.print(
            f"{out}: {store.n_sequences:,} sequences of {store.context} tokens, {store.bytes_per_token:,.0f} bytes per "
            f"token, {store.times_smaller:.1f} times smaller than these heads' dense states in float16",
            highlight=False,
            soft_wrap=True,
        )


def _errors(store: ActivationStore) -> Table:
    """What keeping values in half precision costs."""
    from rich.table import Table

    table = Table(title=f"Error of states rebuilt from {store.info.dtype}, against float32")
    for name in ("site", "state", "largest error", "median error"):
        table.add_column(name, justify="right")
    errors = store.report.get("state_error", {})
    for site in store.info.sites:
        error = errors.get(str(site), {})
        found = (f"{error[name]:.2g}" if name in error else "?" for name in ("max", "median"))
        table.add_row(str(site), f"{site.d_key} x {site.d_value}", *found)
    return table
