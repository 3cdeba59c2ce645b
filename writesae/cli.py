"""The command line. Imports what it needs only when it needs it, so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE
    from writesae.stores.store import ActivationStore

app = typer.Typer(
    name="writesae",
    help="Look inside recurrent language models, and change what they remember.",
    epilog="Start with [bold]writesae demo[/bold]: offline, no GPU, about a minute.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _quiet() -> None:
    """Without transformers' advice to install GPU kernels, and without bars for loading small files."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _plainly() -> Iterator[None]:
    """What the user can mend is said in a line, without a traceback."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, ImportError) as error:
        from rich.console import Console

        Console(stderr=True).print(f"writesae: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A shipped model: tiny-gdn, tiny-mamba2 or tiny-rwkv7.")] = "tiny-gdn",
    firings: Annotated[int, typer.Option(help="Firings of the replacement test, for each SAE.", min=1)] = 300,
    picture: Annotated[Path, typer.Option(help="Where to leave the picture.")] = Path("writesae-demo.png"),
) -> None:
    """See what a model writes to memory, an atom stand in for it, and an atom steer a generation."""
    from writesae.demo import run

    _quiet()
    with _plainly():
        run(model, firings, picture)


@app.command()
def hooks(
    model: Annotated[str, typer.Argument(help="A shipped model (tiny-gdn), a hub id or a folder.")],
    names: Annotated[bool, typer.Option("--names", help="Only the names, one a line.")] = False,
) -> None:
    """List a model's recurrent sites and its hook points."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from writesae.model import HookedRecurrentModel

    _quiet()
    with _plainly():
        hooked = HookedRecurrentModel.from_pretrained(model)
    if names:
        print("\n".join(hooked.hook_names))
        return
    console = Console()
    table = Table(title=f"{model}: {type(hooked.hf_model).__name__}")
    for column in ("layer", "heads", "d_key", "d_value", "rule"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for site in hooked.sites:
        table.add_row(*map(str, (site.layer, site.n_heads, site.d_key, site.d_value, site.rule)))
    console.print(table)
    table = Table(title="Hook points of each layer, in the order in which they fire")
    for column in ("name", "shape", "what"):
        table.add_column(column, no_wrap=column == "name")
    for row in hooked.describe_hooks():
        table.add_row(*map(Text, row))  # plain text: shapes have brackets, which rich would take for markup
    console.print(table)


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="A shipped model (tiny-gdn), a hub id or a folder.")],
    out: Annotated[Path, typer.Argument(help="Folder of the store: a new one, or one to continue.")],
    site: Annotated[list[str], typer.Option(help="LAYER.HEAD, or LAYER.all; repeat for several.")],
    text: Annotated[Path | None, typer.Option(help="A .txt file, or a folder of such.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set: hub id, folder or file. Needs \\[data].")] = None,
    tokens: Annotated[Path | None, typer.Option(help="A .npy file of token ids, \\[pos] or \\[n, pos].")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    column: Annotated[str, typer.Option(help="Column of its texts.")] = "text",
    config: Annotated[str | None, typer.Option(help="Configuration of the data set, if it has several.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence; what is left of a text is dropped.", min=1)] = 512,
    batch: Annotated[int, typer.Option(help="Sequences run at once.", min=1)] = 8,
    shard: Annotated[
        int | None, typer.Option(help="Sequences of a file; without it, files of about 64 MB.", min=1)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="At most so many tokens: spread over files, the beginning of a data set.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is kept: float16, bfloat16 or float32.")] = "float16",
) -> None:
    """Keep what heads write, and their states, on disk in factors. The same command continues a stopped one.

    On several GPUs or processes: accelerate launch -m writesae.cli extract ...
    """
    _quiet()
    with _plainly():
        if sum(given is not None for given in (text, dataset, tokens)) != 1:
            raise ValueError("give one source: --text PATH, --dataset NAME or --tokens FILE")
        import torch
        from rich.console import Console

        import writesae.stores.extraction as making
        from writesae.jobs.processes import Processes
        from writesae.model import HookedRecurrentModel
        from writesae.stores import texts

        if dtype not in making.DTYPES:
            raise ValueError(f"--dtype {dtype}: allowed are {', '.join(making.DTYPES)}")
        team = Processes.launched()
        hooked = HookedRecurrentModel.from_pretrained(model)
        sites = making.parse_sites(hooked, site)
        hooked.to("cuda" if torch.cuda.is_available() else "cpu")  # accelerate has chosen each process's own
        if text is not None:
            ids, source = texts.from_files(hooked, text, context, max_tokens), f"text {text}"
        elif dataset is not None:
            ids = texts.from_dataset(hooked, dataset, context, max_tokens, split=split, column=column, config=config)
            source = f"data set {dataset}, split {split}, column {column}"
        else:
            assert tokens is not None
            ids, source = texts.from_array(tokens, context, max_tokens), f"tokens {tokens}"
        store = making.extract(
            hooked, ids, sites, out, batch_size=batch, shard_sequences=shard, dtype=getattr(torch, dtype), source=source
        )
    if team.first:
        console = Console()
        console.print(_store_table(store))
        console.print(
            f"{out}: {store.n_sequences:,} sequences of {store.context} tokens, {store.bytes_per_token:,.0f} bytes a "
            f"token, {store.times_smaller:.1f} times smaller than these heads' dense states in float16",
            highlight=False,
        )


@app.command()
def train(
    source: Annotated[str, typer.Argument(help="A store made by extract; or a model, with --text and --site.")],
    out: Annotated[Path, typer.Argument(help="Each SAE goes to OUT/L<layer>H<head>; a folder to continue works too.")],
    site: Annotated[
        list[str] | None, typer.Option(help="LAYER.HEAD; repeat for several, trained side by side.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Of a model: a .txt file, or a folder of such.")] = None,
    target: Annotated[str, typer.Option(help="What is read: write, delta or state.")] = "write",
    variant: Annotated[str | None, typer.Option(help="WriteSAE, TiedSAE, BilinearFlatSAE, MatrixSAE, FlatSAE.")] = None,
    sparsity: Annotated[str, typer.Option(help="topk, batch_topk, jumprelu or gated.")] = "topk",
    atoms: Annotated[int, typer.Option(help="Atoms of each SAE.", min=1)] = 2048,
    k: Annotated[int | None, typer.Option(help="Active atoms; else 1 of a write, 32 of a state.", min=1)] = None,
    rank: Annotated[int, typer.Option(help="Terms of an atom.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 1500,
    batch: Annotated[int | None, typer.Option(help="Samples a step; else 2048 writes, or 512 states.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the sequences that is only measured on.")] = 0.1,
    evaluate_every: Annotated[int, typer.Option(help="Measure on those every so many steps.", min=1)] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 250,
    context: Annotated[int, typer.Option(help="Of a model: tokens of a sequence.", min=1)] = 512,
    max_tokens: Annotated[int, typer.Option(help="Of a model: about so many, spread over the texts.", min=1)] = 500_000,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    tracker: Annotated[
        str | None, typer.Option(help="Also log to wandb, trackio, tensorboard, ... (installed beside).")
    ] = None,
) -> None:
    """Train SAEs, one a head; the same command again goes on where it stopped.

    With several processes (accelerate launch -m writesae.cli train ...) each takes a share of every batch.
    """
    from rich.console import Console
    from rich.table import Table

    from writesae.jobs.processes import Processes
    from writesae.saes import train_store
    from writesae.stores.extraction import parse_sites, record
    from writesae.stores.store import ActivationStore
    from writesae.stores.texts import from_files

    _quiet()
    with _plainly():
        first = Processes.launched().first
        if ActivationStore.is_at(source):
            store = ActivationStore.open(source)
            sites = [store.place(name) for name in site] if site else None
        else:
            from writesae.model import HookedRecurrentModel

            if text is None or not site:
                raise ValueError(f"{source} is no store, so it is taken for a model: that needs --text and --site")
            model = HookedRecurrentModel.from_pretrained(source)
            sites = parse_sites(model, site)
            store = record(model, from_files(model, text, context, max_tokens), sites, progress=first)
        given: dict[str, Any] = dict(steps=steps, seed=seed, batch_size=batch, lr=lr)
        given = {name: value for name, value in given.items() if value is not None}
        with _tracked(tracker, {"source": source, "target": target, "variant": variant, "seed": seed}) as log:
            saes = train_store(
                store, sites, target=target, variant=variant, sparsity=sparsity, n_atoms=atoms, k=k,  # type: ignore[arg-type]
                choices={"rank": rank} if rank > 1 else None, out=out, held_out=held_out, device=device, also_log=log,
                evaluate_every=evaluate_every, checkpoint_every=save_every, progress=first, **given,
            )  # fmt: skip
    if not first:
        return
    table = Table(title=f"SAEs of {store.info.model_id}, on held-out sequences")
    for column in ("head", "folder", "nmse", "cosine of the top atom", "active atoms", "atoms ever active"):
        table.add_column(column)
    for (layer, head), sae in saes.items():
        found = sae.cfg.training.get("held_out", sae.cfg.training["train"])
        numbers = f"{found['nmse']:.3f}", f"{found['cosine']:.3f}", f"{found['l0']:.1f}", f"{found['alive']:.1%}"
        table.add_row(f"{layer}.{head}", str(out / f"L{layer}H{head}"), *numbers)
    Console().print(table)


@contextmanager
def _tracked(tracker: str | None, about: dict[str, object]) -> Iterator[Callable[[str, dict], object] | None]:
    """A function that logs a head's numbers to the tracker."""
    if tracker is None:
        yield None
        return
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    installed = [str(name.value) for name in get_available_trackers()]
    if tracker not in installed:  # it would be left out in silence
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


def _sae_and_model(sae: str, model: str | None) -> tuple[WriteSAE, HookedRecurrentModel]:
    """An SAE, and the model that was named or, without, the one that it names."""
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

    found = WriteSAE.from_pretrained(sae)
    name = model or found.cfg.model_id
    if name is None:
        raise ValueError(f"{sae} does not say which model it is of: give --model")
    return found, HookedRecurrentModel.from_pretrained(name)


def _texts(path: Path | None) -> list[str]:
    """The texts of a file or folder; without, the shipped held-out documents."""
    from writesae.zoo import corpus, heldout_documents

    if path is None:
        return heldout_documents()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .txt file, or a folder of such")
    return [document.text for document in corpus.read(path)]


@app.command()
def contexts(
    sae: Annotated[str, typer.Argument(help="A shipped SAE (tiny-gdn/L2H0), a folder or a hub id.")],
    model: Annotated[str | None, typer.Option(help="Its model, if not the one that the SAE names.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A .txt file, or a folder of such; else the shipped held-out documents.")
    ] = None,
    atom: Annotated[list[int] | None, typer.Option(help="Repeat for several; else the five that fire most.")] = None,
    n: Annotated[int, typer.Option("-n", help="Places shown of each atom.", min=1)] = 10,
    context: Annotated[int, typer.Option(help="Tokens read at once, from an empty memory.", min=1)] = 512,
    batch: Annotated[int, typer.Option(help="Sequences run at once.", min=1)] = 8,
) -> None:
    """Show where in a text atoms fire most strongly."""
    _quiet()
    with _plainly():
        from rich.console import Console

        from writesae.saes import top_contexts

        found, hooked = _sae_and_model(sae, model)
        top = top_contexts(hooked, found, _texts(text), n=n, atoms=atom, context=context, batch_size=batch)
    console = Console()
    for i in atom or top.most_frequent(5):
        console.print(top.table(i) if top[i] else top.about(i), highlight=False)


@app.command()
def pages(
    sae: Annotated[str, typer.Argument(help="A shipped SAE (tiny-gdn/L2H0), a folder or a hub id.")],
    model: Annotated[str | None, typer.Option(help="Its model, if not the one that the SAE names.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A .txt file, or a folder of such; else the shipped held-out documents.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the site; the same one again continues.")] = None,
    atoms: Annotated[int, typer.Option(help="Measure so many atoms, the most frequent.", min=0)] = 32,
    atom: Annotated[list[int] | None, typer.Option(help="Measure this one too; repeat for several.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Steered with each atom; repeat for several.")] = None,
    neuronpedia: Annotated[bool, typer.Option("--neuronpedia", help="Also write Neuronpedia's format.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Take an SAE that does not say which weights it was trained on.")
    ] = False,
) -> None:
    """Write a site with a page for every atom, and an index to search and sort them. It opens from disk.

    One pass over the text serves all atoms. What needs further runs of the model (measured effects on tokens, the
    replacement test, a steered text) is done for the most frequent atoms; the same command with others adds them.
    """
    import shlex

    from rich.console import Console

    _quiet()
    with _plainly():
        from writesae.pages import write_pages

        found, hooked = _sae_and_model(sae, model)
        name = sae.removesuffix("/")
        folder = out or Path("runs") / f"pages-{Path(name).parent.name}-{Path(name).name}".replace("--", "-")
        again = ["writesae", "pages", sae, *(["--model", model] if model else [])]
        again += [*(["--text", str(text)] if text else []), "--out", str(folder)]
        index = write_pages(
            hooked.to(device), found.to(device), _texts(text), folder, atoms=atoms, also=atom or (), prompts=prompt,
            name=name, source=str(text or "Shipped held-out documents"), neuronpedia=neuronpedia,
            command=shlex.join(again), check_model=not unchecked, console=Console(),
        )  # fmt: skip
    console = Console()
    console.print(f"Open {index} in a browser.", markup=False, highlight=False)
    if neuronpedia:
        console.print(f"For Neuronpedia: {folder / 'neuronpedia'}", markup=False, highlight=False)


@app.command()
def reproduce(
    model: Annotated[str, typer.Option(help="A shipped model (tiny-gdn), a hub id or a folder.")],
    sae: Annotated[
        list[str] | None, typer.Option(help="An SAE of one of its heads; repeat for several. Else those shipped.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; the same one again continues.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="An experiment; repeat for several. Else all.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A .txt file, or a folder of such; else the shipped held-out documents.")
    ] = None,
    flat: Annotated[list[str] | None, typer.Option(help="Flat SAEs of states, one for each head: a control.")] = None,
    other_seed: Annotated[
        list[str] | None, typer.Option(help="SAEs of the same heads trained with other seeds.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small samples: a look in a minute or two.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Take SAEs that do not say which weights they were trained on.")
    ] = False,
) -> None:
    """Run the paper's experiments on a model and its SAEs, and write a report beside the paper's numbers.

    Stopped, the same command goes on with the first experiment that is not there. --only names one of:
    replacement_test, population_test, atom_classes, seed_stability, logit_change, attribution_test, erase, sign_test,
    install, amplify.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from writesae.experiments.report.reproduction import Sizes
    from writesae.experiments.report.reproduction import reproduce as run
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE
    from writesae.zoo import shipped_saes

    _quiet()
    with _plainly():
        names = sae or [str(folder) for folder in shipped_saes(model)]
        if not names:
            raise ValueError(f"no SAEs are shipped with {model}: give --sae, a folder or a hub id, once for each head")
        texts = _texts(text)
        hooked = HookedRecurrentModel.from_pretrained(model).to(device)
        load = lambda names: [WriteSAE.from_pretrained(name).to(device) for name in names or ()]  # noqa: E731
        folder = out or Path("runs") / f"reproduce-{Path(model).name}"
        outcomes = run(
            hooked, load(names), texts, folder, only=only, sizes=Sizes.quick() if quick else None, flat=load(flat),
            other_seeds=load(other_seed), seed=seed, check_model=not unchecked, console=Console(),
        )  # fmt: skip
    table = Table(title=f"{model}: first number of each experiment")
    for column in ("experiment", "", "", "s"):
        table.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    for outcome in outcomes:
        first = outcome.numbers[0] if outcome.numbers else None
        what = (first.name, str(first)) if first is not None else ("failed", outcome.error or "")
        table.add_row(*map(Text, (outcome.key, *what, f"{outcome.seconds or 0:.0f}")))
    console = Console()
    console.print(table)
    console.print(f"Report: {folder / 'report.html'} and report.md beside it", highlight=False)
    if any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(1)


def _store_table(store: ActivationStore) -> Table:
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


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .pt file, a folder or a tree of them; or owner/name\\[/folder].")],
    out: Annotated[Path, typer.Argument(help="Where the SAE goes; of a tree, the same tree again.")],
    model: Annotated[str | None, typer.Option(help="The model they belong to: hub id, folder or name.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer, where the checkpoint does not say.", min=0)] = None,
    head: Annotated[int | None, typer.Option(help="Head, where the checkpoint does not say.", min=0)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Make SAEs of checkpoints of the paper's own code (JackYoung27/writesae-ckpts)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from writesae.saes.paper.convert import conversions

    names = ("checkpoint", "type", "site", "matrices", "atoms", "k", "val. MSE", "SHA-256", "to")
    table, remarks, failed = Table(*names), [], []
    with _plainly():
        for done in conversions(source, out, model_id=model, layer=layer, head=head, revision=revision):
            if isinstance(done.result, Exception):
                failed.append(str(done.result))
                continue
            cfg, record = done.result.cfg, done.result.cfg.training["reference"]
            site = "?" if cfg.layer is None or cfg.head is None else f"{cfg.layer}.{cfg.head}"
            mse = record.get("val_mse", record.get("best_val_mse"))
            cells = (
                done.checkpoint, record["sae_type"], site, f"{cfg.d_key}x{cfg.d_value}", f"{cfg.n_atoms:,}",
                cfg.k if cfg.chooses else "", "" if mse is None else f"{mse:.3g}",
                "verified" if record["verified"] else "not listed", done.folder,
            )  # fmt: skip
            table.add_row(*(Text(str(cell)) for cell in cells))
            if record["assumed"]:
                remarks.append(f"{done.checkpoint}: assumed {', '.join(record['assumed'])}, which nothing says")
            if done.passed_over:
                remarks.append(f"{done.checkpoint}: left {', '.join(done.passed_over)} beside it alone")
        console = Console()
        if table.row_count:
            console.print(table)
        for remark in remarks:
            console.print(remark, markup=False, highlight=False)
        if failed:
            raise ValueError("\nwritesae: ".join(failed))


if __name__ == "__main__":
    app()
