"""What a check returns: a row for everything that was measured, beside what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from writesae.jobs.disk import write_json
from writesae.jobs.extras import extra

if TYPE_CHECKING:
    import pandas as pd

SHOWS = 4.0
"""An edit has to move what is compared by so many times the error, or the comparison would show nothing of it."""


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes:
        check: what, in words.
        where: the layer or the hook point; empty for the whole model.
        measured: the error, or the cost; None if it could not be measured, and `note` says why.
        allowed: the largest error that is right; None where there is no limit, as for a cost.
        unit: of both: ``logit``; ``of max``, relative to the largest value of the head; ``of slope``, relative to what
            the gradient says; ``value``; ``x native``, times the unwrapped model's; ``MiB`` above what is loaded.
        moves: how much the edit or perturbation itself moves what is compared; None where nothing is edited.
        note: what else to know.
    """

    check: str
    where: str = ""
    measured: float | None = None
    allowed: float | None = None
    unit: str = "logit"
    moves: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within what is allowed, and far below what the edit itself moves."""
        if self.allowed is None:
            return True
        return self.measured is not None and self.measured <= self.allowed and self._shows  # a NaN is within nothing

    @property
    def _shows(self) -> bool:
        return self.moves is None or (self.moves > 0 and self.moves >= SHOWS * (self.measured or 0.0))

    @property
    def verdict(self) -> str:
        """``ok``, ``FAIL``, or ``-`` where nothing is demanded."""
        return "-" if self.allowed is None else "ok" if self.ok else "FAIL"

    @property
    def reason(self) -> str:
        """Why it failed, as far as the numbers do not say it, and the note."""
        weak = "" if self._shows else f"the edit moves less than {SHOWS:.0f} times the error, which shows nothing of it"
        return "; ".join(filter(None, (weak, self.note)))


@dataclass(frozen=True)
class CheckResult:
    """What `check` found.

    Attributes:
        model: the name of the model.
        environment: versions, device, dtype, and the functions that ran the recurrences.
        rows: what was measured, in order.
        seconds: how long it took.
    """

    model: str
    environment: dict[str, str]
    rows: tuple[Row, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """The rows that are not."""
        return [row for row in self.rows if not row.ok]

    @property
    def summary(self) -> str:
        """One line."""
        n = sum(row.allowed is not None for row in self.rows)
        found = f"all {n} checks ok" if self.ok else f"{len(self.failed)} of {n} checks FAILED"
        return f"{self.model}: {found}, {self.seconds:.0f} s"

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"{row.check}, {row.where}: {row.reason}" for row in self.failed)])

    def to_dataframe(self) -> pd.DataFrame:
        """A table with a row for each of `rows`."""
        return extra("pandas").DataFrame(self._records())

    def table(self) -> Table:
        """The rows, for a terminal or a notebook; the environment stands above them."""
        head = "\n".join(f"{name}: {value}" for name, value in self.environment.items())
        title, caption = Text(f"{self.model}\n{head}"), Text(self.summary)
        table = Table(title=title, caption=caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("", "check", "where"):
            table.add_column(name, no_wrap=not name, overflow="fold")
        for name in ("measured", "allowed", "edit moves", "in"):
            table.add_column(name, justify="left" if name == "in" else "right", no_wrap=True)
        for row in self.rows:
            note = f"\n{row.reason}" if row.reason and not row.ok else ""
            numbers = (_number(x) for x in (row.measured, row.allowed, row.moves))
            cells = (row.verdict, row.check + note, row.where, *numbers, row.unit)
            table.add_row(*map(Text, cells), style="" if row.ok else "bold red")
        return table

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        about = {"model": self.model, "ok": self.ok, "seconds": self.seconds, "environment": self.environment}
        write_json(Path(path), {**about, "rows": self._records()})

    def _records(self) -> Sequence[dict[str, Any]]:
        finite = lambda x: x if not isinstance(x, float) or math.isfinite(x) else None  # noqa: E731  # JSON has no NaN
        each = ({**asdict(row), "ok": row.ok, "note": row.reason} for row in self.rows)
        return [{name: finite(x) for name, x in record.items()} for record in each]


def _number(x: float | None) -> str:
    return "" if x is None else "0" if x == 0 else f"{x:.2g}" if x < 10 else f"{x:.0f}"
