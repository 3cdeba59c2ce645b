"""The command line. Imports what it needs only when it needs it, so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

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
    except (OSError, ValueError, KeyError, IndexError) as error:
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


if __name__ == "__main__":
    app()
