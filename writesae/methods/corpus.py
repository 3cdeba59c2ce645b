"""A method that looks at one text, over many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Progress
from writesae.results.result import Figure, Number, Result, figure, frame

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class EachText(Result):
    """The results of one method on many texts, and their means.

    Attributes:
        results: one of each text.
    """

    results: tuple[Result, ...]

    def __getitem__(self, i: int) -> Result:
        """The result of one text."""
        return self.results[i]

    def __len__(self) -> int:
        return len(self.results)

    @property
    def title(self) -> str:
        return f"{self.results[0].title}; {len(self.results)} texts"

    @property
    def about(self) -> str:
        return f"Means over {len(self.results)} texts, each looked at by itself. {self.results[0].about}"

    def numbers(self) -> Sequence[Number]:
        """The means, with intervals over texts, of the largest groups, and of the numbers that all texts have."""
        found = [
            {number.id: number for number in result.numbers() if not np.isnan(number.value)} for result in self.results
        ]
        shared = [number for key, number in found[0].items() if all(key in numbers for numbers in found)]
        made = [
            Number.estimate(number.name, np.array([numbers[number.id].value for numbers in found]), unit=number.unit)
            for number in shared
        ]
        return [*self._largest(12), *made]

    def columns(self) -> dict[str, Any]:
        return {str(name): column.to_numpy() for name, column in self.records().items()}

    def records(self) -> pd.DataFrame:
        """The records of all texts, one below the other, with a column that says which text."""
        of_each = (dict(result.records().items()) for result in self.results)
        return frame(*({"text": i, **columns} for i, columns in enumerate(of_each)))

    def mean(self, *by: str, of: str | None = None) -> pd.DataFrame:
        """The mean of a column over texts, by other columns; within a text, entries of one group are summed first.

        >>> found.mean("layer", "head")                  # largest first

        Args:
            by: columns of `records`; none: those that say which part of the model it is.
            of: the column; None: the one that the method is about.

        Raises:
            KeyError: no such column.
        """
        value = of or self.results[0].VALUE
        table = self._of_texts(by or self._keys, value).mean(axis=1).rename(value)
        return table.reset_index().sort_values(value, key=abs, ascending=False, ignore_index=True)

    def _of_texts(self, keys: Sequence[str], value: str) -> Any:
        """A table with a row for each group and a column for each text."""
        records: Any = self.records()
        for name in (*keys, value):
            if name not in records:
                raise KeyError(f"no column {name!r} in the records: there are {', '.join(map(str, records.columns))}")
        return records.groupby([*keys, "text"], dropna=False)[value].sum().unstack("text", fill_value=0.0)

    @property
    def _keys(self) -> tuple[str, ...]:
        return tuple(name for name in self.results[0].KEYS if name in self.results[0].columns())

    def _largest(self, n: int) -> list[Number]:
        """The means of the largest groups, with their intervals."""
        if not self.results[0].VALUE or not self._keys:
            return []
        value, keys = self.results[0].VALUE, self._keys
        of_texts = self._of_texts(keys, value)
        order = of_texts.mean(axis=1).abs().sort_values(ascending=False).index[:n]
        made = []
        for group in order:
            parts = group if isinstance(group, tuple) else (group,)
            name = ", ".join(f"{key} {part}" for key, part in zip(keys, parts, strict=True) if part != -1)
            made.append(Number.estimate(f"{value} of {name}", of_texts.loc[group].to_numpy()))
        return made

    def plot(self) -> Figure:
        """The largest groups, with intervals over texts."""
        shown = self._largest(24)[::-1] or list(self.numbers())[::-1]
        made, (axis,) = figure(1, 5.4, 0.19 * len(shown) + 1.0)
        axis.barh(range(len(shown)), [number.value for number in shown], color="C0")
        for i, number in enumerate(shown):
            if number.low is not None:
                axis.plot([number.low, number.high], [i, i], color="0.2", lw=0.8)
        axis.set_yticks(range(len(shown)), [number.name for number in shown], fontsize=7, parse_math=False)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.set_xlabel(f"mean over {len(self.results)} texts")
        return made


@named_kinds
def each_text(
    method: Callable[..., Result],
    model: Any,
    texts: Sequence[Any],
    *args: Any,
    per_text: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> EachText:
    """Run a method that looks at one text on many: `patching`, `deletion_sweep`, `direct_attribution`, `pattern`,
    and so on.

    >>> found = ws.each_text(ws.direct_attribution, model, prompts, by="head",
    ...                      per_text=[{"of": ws.Logit(answer)} for answer in answers])
    >>> found.mean("layer", "head")                     # which heads, on average
    >>> pairs = [(clean, corrupted), ...]               # several texts for each call, as patching takes them
    >>> ws.each_text(ws.patching, model, pairs, ws.Logit(a, minus=b), "write").plot()

    Args:
        method: ``method(model, text, *args, **kwargs)``, which returns a `Result`.
        model: its model.
        texts: a text for each call, or a tuple of several.
        *args, **kwargs: what every call gets.
        per_text: what each call gets beside that, by name.
        progress: called with the number of texts done.

    Raises:
        ValueError: no text, or another number of ``per_text``; and what the method raises, with the number of the text.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError("texts= must be several texts, in a list; for one, call the method itself")
    own = [{}] * len(texts) if per_text is None else list(per_text)
    if len(own) != len(texts):
        raise ValueError(f"{len(own)} entries in per_text= for {len(texts)} texts: give one for each")
    results = []
    for i, (text, given) in enumerate(zip(texts, own, strict=True)):
        try:
            results.append(method(model, *(text if isinstance(text, tuple) else (text,)), *args, **kwargs, **given))
        except (ValueError, IndexError) as error:
            raise type(error)(f"text {i}: {error}") from error
        if progress is not None:
            progress(i + 1)
    return EachText(tuple(results))
