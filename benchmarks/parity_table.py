"""How close edits come to brute force, by architecture and mode: the numbers behind tests/hooks/test_parity.py.

    python benchmarks/parity_table.py
    python benchmarks/parity_table.py --only qwen3_5 --only olmo_hybrid --json parity.json

Each number is the largest difference of a logit over all cases, tokens and vocabulary, in float32. The oracle replays
each sequence token by token and applies each edit as a dense matrix to the state (tests/helpers/brute_force.py). Each
kind of edit by itself is measured for the first architecture of each update rule, combinations of all for every one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "hooks"))

import torch
import typer
from rich.console import Console
from rich.table import Table
from test_parity import EFFECT, measure

from architectures import ARCHITECTURES
from edit_cases import TOLERANCE


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help="An architecture of the shared list; may be given several times."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers there.")] = None,
) -> None:
    torch.set_num_threads(1)
    measured: dict[str, dict[str, Any]] = {a.name: measure(a) for a in ARCHITECTURES if only is None or a.name in only}
    table = Table(
        title="Largest difference of a logit from brute force",
        caption=f"Tolerance {TOLERANCE:g}. 'unedited': wrapped, nothing attached, against the model as it was; "
        f"'oracle': brute force without edits against the same. 'moved': by the weakest edit, at least {EFFECT:g}.",
    )
    modes = list(dict.fromkeys(mode for numbers in measured.values() for mode in numbers))
    table.add_column("architecture")
    table.add_column("worst", justify="right")
    for mode in modes:
        table.add_column(mode.replace("_", " "), justify="right")
    for name, numbers in measured.items():
        worst = max(x for mode, x in numbers.items() if mode not in ("oracle, unedited", "moved"))
        table.add_row(name, *(_shown(x) for x in (worst, *(numbers.get(mode) for mode in modes))))
    Console(width=240).print(table)
    if json_path:
        json_path.write_text(json.dumps(measured, indent=1) + "\n")


def _shown(x: float | None) -> str:
    return "" if x is None else "0" if x == 0 else f"{x:.1e}"


if __name__ == "__main__":
    typer.run(main)
