"""``writesae explain``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli._shared import (
    AUTO,
    NATIVE,
    Device,
    DType,
    HeldOutText,
    Kernels,
    ModelOfSAE,
    PrependBos,
    SAEName,
    SpecialTokens,
    Unchecked,
    json_file,
    plainly,
    quiet,
    read_texts,
    sae_and_model,
)

ORDER = 7


def explain(
    sae: SAEName,
    model: Annotated[str, typer.Option(help="Who labels: a name on the server; without --base-url, a model to load.")],
    base_url: Annotated[
        str | None, typer.Option(help="A server with the chat-completions protocol, as http://localhost:8000/v1.")
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="The environment variable with its key.")] = "OPENAI_API_KEY",
    sae_model: ModelOfSAE = None,
    text: HeldOutText = None,
    out: Annotated[Path | None, typer.Option(help="File of the labels; the same file again continues.")] = None,
    atoms: Annotated[int, typer.Option(help="Label this many atoms, the most frequent.", min=1)] = 32,
    atom: Annotated[list[int] | None, typer.Option(help="Label this atom instead; repeat for several.")] = None,
    scores: Annotated[bool, typer.Option("--scores/--no-scores", help="Also score the labels.")] = True,
    width: Annotated[int, typer.Option(help="Tokens per context.", min=4)] = 32,
    shown: Annotated[int, typer.Option(help="Contexts that a label is made from.", min=1)] = 20,
    tested: Annotated[int, typer.Option(help="Contexts of each kind that it is scored with.", min=1)] = 20,
    at_once: Annotated[int, typer.Option(help="Calls that run together.", min=1)] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.", min=0.1)] = 120.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many calls and tokens it takes.")] = False,
    json: Annotated[Path | None, json_file("what was asked, the labels and their scores")] = None,
    device: Device = AUTO,
    dtype: DType = None,
    kernels: Kernels = NATIVE,
    prepend_bos: PrependBos = None,
    special_tokens: SpecialTokens = None,
    unchecked: Unchecked = False,
) -> None:
    """Say in words what atoms mean, with a language model, and score the labels by detection and fuzzing.

    The file of labels is for `writesae pages --labels`. A stopped run continues.
    """
    quiet()
    with plainly(goes_on=True):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from writesae.explaining import ChatModel, ChatServer, explain
        from writesae.jobs.disk import write_json
        from writesae.models.devices import device_named

        if base_url is not None:
            chat = ChatServer(base_url, model, api_key_env=api_key_env, at_once=at_once, timeout=timeout)
            if not dry_run:
                chat.check()
        else:
            chat = ChatModel(model, device_named(device))
        found, hooked = sae_and_model(sae, sae_model, prepend_bos, special_tokens, device, dtype, kernels)
        name = Path(sae.removesuffix("/"))
        file = out or Path("runs") / f"labels-{name.parent.name}-{name.name}.json".replace("--", "-")
        error = Console(stderr=True)
        plan: list[str] = []

        def say(words: str) -> None:
            plan.append(words)
            error.print(words, markup=False, highlight=False)

        made = explain(
            hooked, found, read_texts(text), chat, out=file, atoms=atom or atoms, scores=scores, width=width,
            shown=shown, tested=tested, check_model=not unchecked, dry_run=dry_run, console=error, say=say,
        )  # fmt: skip
        if json is not None:
            write_json(json, {"plan": plan, **made.to_dict()})
    if dry_run:
        return
    table = Table()
    for column in ("atom", "label", "detection", "fuzzing"):
        table.add_column(column)
    for i in made:
        one = made[i]
        shares = ("–" if x is None else f"{x.balanced_accuracy:.2f}" for x in (one.detection, one.fuzzing))
        table.add_row(str(i), Text(one.text or str(one.problem)), *shares)
    console = Console()
    console.print(table)
    console.print(f"Labels: {file}. On pages: writesae pages {sae} --labels {file}", markup=False, highlight=False)
