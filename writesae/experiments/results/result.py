"""What every experiment returns: its numbers with intervals, its records, a table and a plot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from writesae.experiments.results.statistics import Interval, Rate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Unit = Literal["%", "nats", "bits", ""]


@dataclass(frozen=True)
class Number:
    """One reported number.

    Attributes:
        name: what it is; the report finds the paper's number by it.
        value: in ``unit``; a share is a fraction, shown in percent.
        low, high: its 95% interval, None where it has none.
        n: from how many observations, None where that says nothing.
    """

    name: str
    value: float
    unit: Unit = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, name: str, found: Rate | Interval | float, unit: Unit = "") -> Number:
        """From a rate (in percent), an estimate with its interval, or a plain number."""
        if isinstance(found, Rate):
            return cls(name, found.rate, "%", found.low, found.high, found.n)
        if isinstance(found, Interval):
            return cls(name, found.value, unit, found.low, found.high, found.n)
        return cls(name, float(found), unit)

    def __str__(self) -> str:
        text = self._show(self.value)
        if self.low is not None and self.high is not None:
            text += f" [{self._show(self.low, bare=True)}, {self._show(self.high, bare=True)}]"
        return text

    def _show(self, x: float, bare: bool = False) -> str:
        if self.unit == "%":
            return f"{100 * x:.1f}" + ("" if bare else "%")
        shown = (
            f"{x:,.0f}" if float(x).is_integer() and 10 <= abs(x) < 1e9 else f"{x:.3g}" if abs(x) < 0.99 else f"{x:.4g}"
        )
        return shown + ("" if bare or not self.unit else f" {self.unit}")


class Result(ABC):
    """The outcome of an experiment. Subclasses are frozen dataclasses of its records and settings."""

    @property
    @abstractmethod
    def title(self) -> str:
        """One line: which experiment, where."""

    @property
    @abstractmethod
    def about(self) -> str:
        """A paragraph for the report: what was done, what the numbers mean, which section of the paper."""

    @abstractmethod
    def numbers(self) -> Sequence[Number]:
        """What it found, most important first."""

    @abstractmethod
    def records(self) -> pd.DataFrame:
        """One row an observation, columns of plain numbers and strings."""

    @abstractmethod
    def plot(self) -> Figure:
        """A picture of it (a figure of its own, not shown)."""

    def table(self) -> Table:
        """The numbers, for a terminal or a notebook."""
        table = Table(title=self.title)
        table.add_column("")
        table.add_column("", justify="right")
        table.add_column("n", justify="right")
        for number in self.numbers():
            table.add_row(Text(number.name), Text(str(number)), "" if number.n is None else f"{number.n:,}")
        return table


def figure(n_columns: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list]:
    """A figure with axes side by side, in the style that all plots share; nothing is shown or kept open."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with rc_context(style):
        made: Any = Figure(figsize=(width * n_columns, height), layout="constrained")
        FigureCanvasAgg(made)
        axes = made.subplots(1, n_columns, squeeze=False)[0]
    made._repr_png_ = lambda: _png(made)  # notebooks show figures that pyplot made; with this, also this one
    return made, list(axes)


def _png(made: Figure) -> bytes:
    with BytesIO() as file:
        made.savefig(file, format="png")
        return file.getvalue()
