"""The command line. A command is one file of this folder: a function of the file's name, which is found here.

Commands import what they need when they run, so that ``--help`` is instant. `ORDER`, a number in the file, places a
command in the list of ``--help``; those without one come last. Files whose names begin with an underscore are none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="writesae",
    help="Look inside recurrent language models, and change what they remember.",
    epilog="Start with [bold]writesae demo[/bold]: offline, no GPU, about a minute.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _say_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"writesae {version('writesae')}")
        raise typer.Exit
    return asked


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Look inside recurrent language models, and change what they remember."""


def _prose(run: Callable[..., Any]) -> str:
    """What a command's docstring says: paragraphs without the line ends of the source, brackets that are no markup."""
    paragraphs = (inspect.getdoc(run) or "").split("\n\n")
    return "\n\n".join(" ".join(words.split()) for words in paragraphs).replace("[", r"\[")


_commands = [
    import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__) if not found.name.startswith("_")
]
for _module in sorted(_commands, key=lambda module: getattr(module, "ORDER", len(_commands) + 1)):
    _name = _module.__name__.rpartition(".")[2]
    _run = getattr(_module, _name)
    app.command(_name, help=_prose(_run))(_run)
