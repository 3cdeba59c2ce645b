"""The paper's numbers, to stand beside ours: by experiment, id of the number (`Number.id`), model and head.

A value is the paper's own text. A number of another model is not comparable one to one, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from writesae.results.result import id_of

How: TypeAlias = Literal["same site", "another site", "another model"]


@dataclass(frozen=True)
class Cell:
    """What the paper measured at: a model, and heads of it.

    Attributes:
        model: its name.
        ids: regular expression for hub ids of it.
        rule: update rule, as `Site.rule` has it.
        sites: ``(layer, head)`` of each head.
        where: these in words.
    """

    model: str
    ids: str
    rule: str
    sites: tuple[tuple[int, int], ...]
    where: str


_SMALL = ("Qwen3.5-0.8B", r"qwen3\.5-0\.8b(-base)?$", "gated_delta")
_FOUR = ("Qwen3.5-4B", r"qwen3\.5-4b(-base)?$", "gated_delta")
CELLS = {
    "0.8B": Cell(*_SMALL, ((1, 4), (9, 4), (17, 4)), "L1, L9 and L17, H4"),
    "L1": Cell(*_SMALL, ((1, 4),), "L1 H4"),
    "L9": Cell(*_SMALL, ((9, 4),), "L9 H4"),
    "L17": Cell(*_SMALL, ((17, 4),), "L17 H4"),
    "all L9": Cell(*_SMALL, tuple((9, head) for head in range(16)), "L9, all heads"),
    "4B": Cell(*_FOUR, ((12, 8),), "L12 H8"),
    "4B L9": Cell(*_FOUR, tuple((9, head) for head in range(32)), "L9, ten atoms per head"),
    "27B": Cell("Qwen3.5-27B", r"qwen3\.5-27b(-base)?$", "gated_delta", ((32, 16),), "L32 H16"),
    "Mamba-2": Cell("Mamba-2-370M", r"mamba-?2-370m(-hf)?$", "mamba2", ((24, 0),), "L24 H0"),
    "RWKV-7": Cell("RWKV-7-1.5B", r"rwkv-?7.*1\.5b", "rwkv7", ((12, 0),), "L12 H0"),
    "DeltaNet": Cell("DeltaNet-1.3B", r"delta_?net-1\.3b", "delta", ((12, 8),), "L12 H8"),
    "GLA": Cell("GLA-1.3B", r"gla-1\.3b", "gla", ((12, 0),), "L12 H0"),
}


@dataclass(frozen=True)
class PaperValue:
    """A number of the paper.

    Attributes:
        text: as it is printed there.
        source: section or table.
        model, where: what it was measured on.
        how: whether that is what was asked about: ``"another site"`` of the same model, or ``"another model"`` of the
            same update rule, is not comparable one to one.
    """

    text: str
    source: str
    model: str
    where: str
    how: How

    def __str__(self) -> str:
        return f"{self.text} ({self.model} {self.where}, {self.source})"


_Rows: TypeAlias = dict[tuple[str, str], list[tuple[str, str, str]]]


def _read(table: str) -> _Rows:
    """``(experiment, id) -> [(cell, value, source)]`` from the table beside this file."""
    found: _Rows = {}
    experiment = number = ""
    for line in table.splitlines():
        first, *row = (part.strip() for part in line.partition("#")[0].split("|"))
        if row:
            number = first or number
            cell, value, source = row
            found.setdefault((experiment, number), []).append((cell, value, source))
        elif line.startswith(" "):
            number = first
        else:
            experiment = first or experiment
    return found


TABLE = _read(Path(__file__).with_name("paper.txt").read_text("utf-8"))


def paper_value(
    experiment: str, number: str, model_id: str | None, sites: Sequence[tuple[int, int]] = (), rule: str | None = None
) -> PaperValue | None:
    """What the paper has for a number; None if nothing.

    Args:
        experiment: name of its function, ``"replacement_test"``.
        number: its id, or a name that the id is made from (outcomes made before there were ids have names only).
        model_id: of the model it was measured on here.
        sites: ``(layer, head)`` of each head it is about.
        rule: the model's update rule (``model.sites[0].rule``). With it, a model that the paper does not have gets the
            number of the paper's model of that rule, marked ``"another model"``.

    >>> str(paper_value("replacement_test", "atom beats deletion", "Qwen/Qwen3.5-0.8B", [(9, 4)]))
    '91.2% (Qwen3.5-0.8B L9 H4, Table 2)'
    >>> paper_value("replacement_test", "atom beats deletion", "tiny-gdn", [(2, 0)], rule="gated_delta").how
    'another model'
    """
    number = id_of(number)
    rows = TABLE.get((experiment, number)) or TABLE.get((experiment, number.rpartition("/epsilon-")[0]), [])
    of_model = [row for row in rows if model_id is not None and re.search(CELLS[row[0]].ids, model_id.lower())]
    of_site = [row for row in of_model if set(CELLS[row[0]].sites) == set(sites)]
    of_rule = [row for row in rows if CELLS[row[0]].rule == rule]
    choices: tuple[tuple[How, list[tuple[str, str, str]]], ...] = (
        ("same site", of_site), ("another site", of_model), ("another model", of_rule)
    )  # fmt: skip
    for how, found in choices:
        if found:
            cell, text, source = found[0]
            return PaperValue(text, source, CELLS[cell].model, CELLS[cell].where, how)
    return None
