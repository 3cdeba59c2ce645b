"""What every experiment returns: its numbers with intervals, its records, a table and a plot."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool
from rich.table import Table
from rich.text import Text
from torch import Tensor

from writesae.jobs.extras import extra
from writesae.results.statistics import Array, Interval, Rate, Values, bootstrap, wilson

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
else:  # imported when the first table or plot is made
    Figure = Any

Unit = Literal["%", "nats", "bits", ""]


def id_of(name: str) -> str:
    """The id that a number has unless it is given one: its name in lower case, parts at commas as a path.

    >>> id_of("atom beats deletion, mean of sites")
    'atom-beats-deletion/mean-of-sites'
    """
    return "/".join(re.sub(r"[\s-]+", "-", part.strip().lower()) for part in re.split(r",\s", name))


@dataclass(frozen=True)
class Number:
    """One reported number.

    Attributes:
        name: what it is, for readers.
        value: in ``unit``; a share is a fraction, shown in percent.
        low, high: its 95% interval, None where it has none.
        n: from how many observations, None where that says nothing.
        id: what it is, for programs: the paper's number is found by it. Made from the name (`id_of`) unless given, so
            give one where a name is changed.
    """

    name: str
    value: float
    unit: Unit = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or id_of(self.name))

    @classmethod
    def of(cls, name: str, found: Rate | Interval | float, unit: Unit = "") -> Number:
        """From a rate (in percent), an estimate with its interval, or a plain number."""
        if isinstance(found, Rate | Interval):
            return cls(name, found.value, "%" if isinstance(found, Rate) else unit, found.low, found.high, found.n)
        return cls(name, float(found), unit)

    @classmethod
    def share(cls, name: str, hits: Bool[Tensor, " n"]) -> Number:
        """How often something is so, with its Wilson interval."""
        return cls.of(name, share(hits))

    @classmethod
    def estimate(
        cls,
        name: str,
        values: Values,
        clusters: Tensor | Array | None = None,
        statistic: Callable[[Array], float] = np.mean,  # type: ignore[assignment]
        unit: Unit = "",
        n_resamples: int = 2000,
    ) -> Number:
        """A mean, or another statistic, with its bootstrap interval; without one where there is a single cluster."""
        groups = range(len(values)) if clusters is None else clusters.tolist()
        if len(set(groups)) > 1:
            return cls.of(name, bootstrap(values, clusters, statistic, n_resamples=n_resamples), unit)
        x = torch.as_tensor(values).double().numpy()
        return cls(name, float(statistic(x)), unit, n=len(x))

    @classmethod
    def median(
        cls, name: str, values: Values, clusters: Tensor | Array | None = None, unit: Unit = "", **options: Any
    ) -> Number:
        """The median as `estimate`."""
        return cls.estimate(name, values, clusters, np.median, unit, **options)  # type: ignore[arg-type]

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
    """The outcome of an experiment. Subclasses are frozen dataclasses of its records and settings.

    ``ROWS`` names attributes that are columns of its records. ``VALUE`` is the column that it is about, and ``KEYS``
    are those that say which part of the model an entry is of: over several texts, means are taken by these.
    """

    ROWS: ClassVar[tuple[str, ...]] = ()
    KEYS: ClassVar[tuple[str, ...]] = ("part", "layer", "head")
    VALUE: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # that of a dataclass would be pages of numbers
            cls.__repr__ = Result.__repr__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title}; it has .table(), .numbers(), .records(), .plot())"

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

    def columns(self) -> dict[str, Any]:
        """The columns of `records`: the attributes that `ROWS` names, those that are dicts one column per entry."""
        found: dict[str, Any] = {}
        for name in self.ROWS:
            value = getattr(self, name)
            found |= value if isinstance(value, Mapping) else {name: value}
        return {name: x.numpy() if isinstance(x, Tensor) else x for name, x in found.items()}

    def records(self) -> pd.DataFrame:
        """One row per observation, columns of plain numbers and strings."""
        return frame(self.columns())

    @abstractmethod
    def plot(self) -> Figure:
        """A picture of it (a figure of its own, not shown)."""

    def table(self) -> Table:
        """The numbers, for a terminal or a notebook."""
        table = Table(title=self.title)
        table.add_column()
        for name in ("", "n"):
            table.add_column(name, justify="right")
        for number in self.numbers():
            table.add_row(Text(number.name), Text(str(number)), "" if number.n is None else f"{number.n:,}")
        return table


def frame(*parts: Mapping[str, Any]) -> pd.DataFrame:
    """A table of columns; of several, one below the other."""
    pd = extra("pandas")
    tables = [pd.DataFrame(dict(part)) for part in parts]
    return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of several parts as one, on the CPU; a column may be several columns by name itself."""
    found = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: joined(of_each) if isinstance(of_each[0], Mapping) else torch.cat([x.cpu() for x in of_each])
        for name, of_each in found.items()
    }


def share(hits: Bool[Tensor, " n"]) -> Rate:
    """How often something is so."""
    return wilson(int(hits.sum()), len(hits))


def figure(n_columns: int = 1, width: float | Sequence[float] = 4.6, height: float = 3.4) -> tuple[Figure, list]:
    """A figure with axes side by side, in the style that all plots share; nothing is shown or kept open.

    ``width`` and ``height`` are of each, in inches; several widths are those of the axes in turn.
    """
    widths = [width] * n_columns if isinstance(width, int | float) else list(width)
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with extra("matplotlib").rc_context(style):
        made: Any = extra("matplotlib.figure").Figure(figsize=(sum(widths), height), layout="constrained")
        extra("matplotlib.backends.backend_agg").FigureCanvasAgg(made)
        axes = made.subplots(1, n_columns, squeeze=False, width_ratios=widths)[0]
    made._repr_png_ = lambda: png_of(made)  # notebooks show figures that pyplot made; with this, also this one
    return made, list(axes)


def png_of(made: Figure, **options: Any) -> bytes:
    """A figure as a picture."""
    with BytesIO() as file:
        made.savefig(file, format="png", **options)
        return file.getvalue()


def intervals(
    axis: Any, at: Any, found: Sequence[Rate | Interval | Number], *, width: float | None = None, **style: Any
) -> None:
    """Draw values with their intervals at ``at``: points joined by lines, or bars of a ``width``."""
    values = [x.value for x in found]
    error = [[0.0 if x.low is None else x.value - x.low for x in found]]
    error += [[0.0 if x.high is None else x.high - x.value for x in found]]
    if width is not None:
        axis.bar(at, values, width, yerr=error, error_kw={"lw": 0.8}, **style)
    else:
        axis.errorbar(at, values, yerr=error, **{"fmt": "o-", "ms": 4} | style)


def predicted_and_measured(axis: Any, predicted: Any, measured: Any, **style: Any) -> None:
    """Draw what was measured over what was predicted, with the line on which they agree."""
    axis.scatter(predicted, measured, **{"s": 5, "alpha": 0.5} | style)
    ends = [float(measured.min()), float(measured.max())]
    axis.plot(ends, ends, color="0.3", lw=0.8, ls="--")
