"""Progress bars: what runs, how far it is, how long it has taken and how long it still takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")
Progress = Callable[[int], Any]
"""What long work calls again and again, with the number of units that are done. A `Bar` is one."""


class Bar:
    """One line of `Bars`: a `Progress`."""

    def __init__(self, lines: RichProgress, what: str, total: int | None, done: int) -> None:
        self._lines, self._what = lines, what
        self._task = lines.add_task(what, total=total, completed=done, visible=total != 0)

    def __call__(self, done: int, what: str | None = None) -> None:
        """``done`` units are done, counted from the beginning; ``what`` replaces the words before the bar."""
        self._what = what or self._what
        self._lines.update(self._task, completed=done, description=self._what)

    def note(self, words: str) -> None:
        """Something else goes on before the next unit is done, said in words beside those of the bar until then."""
        self._lines.update(self._task, description=f"{self._what} ({words})", refresh=True)

    def advance(self, n: int = 1) -> None:
        """``n`` more units are done."""
        self._lines.advance(self._task, n)

    def remove(self) -> None:
        """Take the line away."""
        self._lines.remove_task(self._task)


class Bars:
    """Progress bars, one line each, shown inside ``with``; on the error output, or in the notebook.

    Args:
        show: False or None for none, as where another process shows them; a console shows them there.
        transient: take them away at the end.

    >>> with Bars() as bars:
    ...     done = bars.add("reading", total=2)
    ...     done(1)
    """

    def __init__(self, show: bool | Console | None = True, *, transient: bool = False) -> None:
        console = show if isinstance(show, Console) else Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._lines = RichProgress(
            *columns, TimeRemainingColumn(), console=console, transient=transient, disable=show in (False, None)
        )

    def __enter__(self) -> Bars:
        self._lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.stop()

    def add(self, what: str, total: int | None = None, done: int = 0) -> Bar:
        """A line.

        Args:
            what: the words before the bar.
            total: units of work; None if not known yet. With 0 there is nothing to show.
            done: units that are done already.
        """
        return Bar(self._lines, what, total, done)


def track(
    items: Iterable[T],
    what: str,
    show: bool | Console | None = True,
    *,
    total: int | None = None,
    transient: bool = False,
) -> Iterator[T]:
    """The items, with a bar that counts them; arguments as for `Bars`, ``total`` as known or the number of items."""
    total = len(items) if total is None and isinstance(items, Sequence) else total
    with Bars(show, transient=transient) as bars:
        bar = bars.add(what, total)
        for item in items:
            yield item
            bar.advance()
