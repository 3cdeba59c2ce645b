"""What several commands share: quiet libraries, errors in one line, how models, SAEs and texts are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

ModelName = Annotated[str, typer.Argument(help="A shipped model (tiny-gdn), a hub id or a folder.")]
SAEName = Annotated[str, typer.Argument(help="A shipped SAE (tiny-gdn/L2H1), a folder or a hub id.")]
ModelOfSAE = Annotated[str | None, typer.Option(help="The SAE's model, if not the one that the SAE names.")]
HeldOutText = Annotated[
    Path | None,
    typer.Option(help="A .txt file, or a folder of .txt files; without it, the shipped held-out documents."),
]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Whether texts begin with a BOS token; without it, as the tokenizer, or the SAE's training, has it.",
    ),
]
SpecialTokens = Annotated[
    bool | None,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Whether the tokenizer adds special tokens to texts; without it, yes, or as the SAE's training had it.",
    ),
]
Device = Annotated[
    str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps, ...; auto is the accelerator, or else the CPU.")
]
DType = Annotated[
    str | None,
    typer.Option(
        help="Dtype of the model's weights: float32, bfloat16, float16; without it, as the checkpoint lies, but the "
        "shipped models in float32."
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        help="What computes the recurrences: native, the model's own functions, or writesae, ours, which are faster on "
        "a CPU."
    ),
]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Take an SAE that does not say which weights it was trained on.")
]
AUTO, NATIVE = "auto", "native"  # the defaults of --device and --kernels


def json_file(what: str) -> Any:
    """The option ``--json``: what a command shows, as a file. A folder of that name is refused before anything runs."""
    return typer.Option("--json", help=f"A JSON file for {what}.", dir_okay=False, writable=True)


def quiet() -> None:
    """Without transformers' advice to install GPU kernels, and without bars for loading small files."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _say(words: str, style: str | None = None) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"writesae: {words}", style=style, markup=False, highlight=False)


@contextmanager
def plainly(goes_on: bool = False) -> Iterator[None]:
    """Show an error that the user can fix as one line, without a traceback, and exit with 1; with 130 after Ctrl-C.

    Args:
        goes_on: whether the same command goes on where Ctrl-C stopped it.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        _say(f"{str(stopped) or 'stopped'}{'; the same command goes on from here' if goes_on else ''}")
        raise typer.Exit(130) from stopped
    except (OSError, ValueError, KeyError, IndexError, ImportError) as error:
        _say(str(error), style="red")
        raise typer.Exit(1) from error


def reading(prepend_bos: bool | None, special_tokens: bool | None, saes: Iterable[WriteSAE] = ()) -> dict[str, Any]:
    """How texts become tokens, as arguments for a model: as it was said or, without, as the SAEs' training had it.

    Raises:
        ValueError: the SAEs differ.
    """
    said = {"prepend_bos": prepend_bos, "special_tokens": special_tokens}
    found = {name: value for name, value in said.items() if value is not None}
    for name in said.keys() - found.keys():
        trained = {sae.cfg.training.get(name) for sae in saes}
        if len(trained) > 1:
            option = name.replace("_", "-")
            raise ValueError(f"these SAEs were not all trained with the same {name}: say --{option} or --no-{option}")
        if (value := next(iter(trained), None)) is not None:
            found[name] = value
    return found


def sae_and_model(
    sae: str,
    model: str | None,
    prepend_bos: bool | None = None,
    special_tokens: bool | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    kernels: str = NATIVE,
) -> tuple[WriteSAE, HookedRecurrentModel]:
    """`saes_and_model` of one SAE."""
    (found,), hooked = saes_and_model([sae], model, prepend_bos, special_tokens, device, dtype, kernels)
    return found, hooked


def saes_and_model(
    saes: list[str],
    model: str | None,
    prepend_bos: bool | None = None,
    special_tokens: bool | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    kernels: str = NATIVE,
) -> tuple[list[WriteSAE], HookedRecurrentModel]:
    """SAEs, and the model that was named or, without, the one that they name.

    The model makes tokens of texts as it is told here or, without, as the SAEs' training did.

    Raises:
        ValueError: no model was named, and an SAE names none, or they name several.
    """
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

    found = [WriteSAE.from_pretrained(sae, device=device) for sae in saes]
    of = {name: one.cfg.model_id for name, one in zip(saes, found, strict=True)}
    if model is None and None in of.values():
        nameless = next(name for name, known in of.items() if known is None)
        raise ValueError(f"{nameless} does not say which model it is of: give --model")
    if model is None and len(set(of.values())) > 1:
        each = ", ".join(f"{name} of {known}" for name, known in of.items())
        raise ValueError(f"these SAEs are of several models ({each}): give those of one, or --model")
    name = model or str(of[saes[0]])
    how = reading(prepend_bos, special_tokens, found)
    return found, HookedRecurrentModel.from_pretrained(name, device=device, dtype=dtype, kernels=kernels, **how)


def site_folder(saes: list[str]) -> Path:
    """Where the pages of these SAEs go by default: ``runs/pages-tiny-gdn-L2H1``; of several ``runs/pages-tiny-gdn``."""
    first = Path(saes[0].removesuffix("/"))
    parts = [first.parent.name, first.name] if len(saes) == 1 else [first.parent.name or "saes"]
    return Path("runs") / "-".join(["pages", *parts]).replace("--", "-")


def read_texts(path: Path | None) -> list[str]:
    """The texts of a file or folder; without, the shipped held-out documents."""
    from writesae.stores.texts import read
    from writesae.zoo import heldout_documents

    return heldout_documents() if path is None else [document.text for document in read(path)]
