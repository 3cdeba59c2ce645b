"""What several commands share: quiet libraries, errors in one line, how models, SAEs and texts are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

ModelName = Annotated[str, typer.Argument(help="A shipped model (tiny-gdn), a hub id or a folder.")]
SAEName = Annotated[str, typer.Argument(help="A shipped SAE (tiny-gdn/L2H0), a folder or a hub id.")]
ModelOfSAE = Annotated[str | None, typer.Option(help="The SAE's model, if not the one that the SAE names.")]
HeldOutText = Annotated[
    Path | None,
    typer.Option(help="A .txt file, or a folder of .txt files; without it, the shipped held-out documents."),
]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]


def quiet() -> None:
    """Without transformers' advice to install GPU kernels, and without bars for loading small files."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def plainly() -> Iterator[None]:
    """Show an error that the user can fix as one line, without a traceback, and exit with 1."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, ImportError) as error:
        from rich.console import Console

        Console(stderr=True).print(f"writesae: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def sae_and_model(sae: str, model: str | None) -> tuple[WriteSAE, HookedRecurrentModel]:
    """An SAE, and the model that was named or, without, the one that the SAE names."""
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

    found = WriteSAE.from_pretrained(sae)
    name = model or found.cfg.model_id
    if name is None:
        raise ValueError(f"{sae} does not say which model it is of: give --model")
    return found, HookedRecurrentModel.from_pretrained(name)


def read_texts(path: Path | None) -> list[str]:
    """The texts of a file or folder; without, the shipped held-out documents."""
    from writesae.stores.texts import read
    from writesae.zoo import heldout_documents

    return heldout_documents() if path is None else [document.text for document in read(path)]
