"""Outcomes of experiments on disk, so that reports are made of files alone::

    <folder>/outcome.json     what was done and found: `Outcome`; with checksums of the others
    <folder>/records.csv.gz   one row per observation
    <folder>/figure.png

Files appear whole, and ``outcome.json`` last: a folder without it holds nothing yet. A failed experiment has only that.
"""

from __future__ import annotations

import gzip
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from writesae.hooks.sites import Head
from writesae.jobs.disk import plain, read_json, remove_halves, write_json, write_whole
from writesae.jobs.extras import extra
from writesae.jobs.versions import versions
from writesae.results.result import Number, Result, png_of

if TYPE_CHECKING:
    import pandas as pd

OUTCOME, RECORDS, FIGURE = "outcome.json", "records.csv.gz", "figure.png"
FORMAT = "writesae outcome 1"


@dataclass(frozen=True)
class Outcome:
    """What one experiment found, or why it failed.

    Attributes:
        folder: where it lies.
        experiment: name of its function; the paper's numbers are found by it.
        title, about: of the result.
        settings: what the experiment was run with.
        numbers: what it found; none if it failed.
        model_id: of the model, as it was asked for.
        sites: the heads it is about.
        rule: the model's update rule.
        seconds: how long it took.
        error: why it failed, None if it did not.
        versions: of what it ran on.
        columns: of the records, and the dtype of each.
        files: sha256 of records and figure.
    """

    folder: Path
    experiment: str
    title: str
    about: str
    settings: dict[str, Any]
    numbers: tuple[Number, ...]
    model_id: str | None = None
    sites: tuple[Head, ...] = ()
    rule: str | None = None
    seconds: float | None = None
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def figure(self) -> Path | None:
        return self.folder / FIGURE if FIGURE in self.files else None

    def to_dict(self) -> dict[str, Any]:
        """All of it but the folder, as JSON has it."""
        return {name: plain(value) for name, value in asdict(self).items() if name != "folder"}

    def records(self) -> pd.DataFrame:
        """One row per observation; ValueError if the experiment failed."""
        pd = extra("pandas")
        if RECORDS not in self.files:
            raise ValueError(f"{self.folder} has no records: {self.experiment} failed ({self.error})")
        # Text stays what it is, "NA" and "" too; what is missing is missing from a column of numbers.
        numbers = {name: [""] for name, dtype in self.columns.items() if dtype.startswith("float")}
        columns: Any = self.columns
        return pd.read_csv(self.folder / RECORDS, dtype=columns, keep_default_na=False, na_values=numbers)


def save_outcome(
    result: Result | BaseException,
    folder: str | Path,
    experiment: str,
    settings: Mapping[str, Any],
    *,
    model_id: str | None = None,
    sites: Sequence[tuple[int, int]] = (),
    rule: str | None = None,
    seconds: float | None = None,
) -> Outcome:
    """Write what an experiment returned, or the exception that it raised; what the folder held before is replaced.

    Args:
        result: of the experiment, or its exception.
        folder: where to; made if it is not there.
        experiment: name of its function, ``"replacement_test"``.
        settings: what it was run with; what JSON does not have is kept as text.
        model_id, sites, rule: what it ran on: name of the model, ``(layer, head)`` of each head, ``site.rule``.
        seconds: how long it took.
    """
    folder = Path(folder)
    contents: dict[str, bytes] = {}
    columns: dict[str, str] = {}
    if isinstance(result, BaseException):
        error = f"{type(result).__name__}: {result}"
        found: dict[str, Any] = dict(title=experiment, about="", numbers=(), error=error)
    else:
        records = result.records()
        dtypes: Any = records.dtypes.items()
        columns = {name: dtype.name if dtype.kind in "biuf" else "str" for name, dtype in dtypes}
        contents[RECORDS] = gzip.compress(records.to_csv(index=False, lineterminator="\n").encode(), mtime=0)
        contents[FIGURE] = png_of(result.plot(), dpi=120)
        found = dict(title=result.title, about=result.about, numbers=tuple(result.numbers()))
    outcome = Outcome(
        folder, experiment, settings=plain(dict(settings)), model_id=model_id, rule=rule, seconds=seconds,
        sites=tuple(Head(int(layer), int(head)) for layer, head in sites), versions=_versions(),
        columns=columns, files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}, **found,
    )  # fmt: skip
    (folder / OUTCOME).unlink(missing_ok=True)
    remove_halves(folder, OUTCOME, RECORDS, FIGURE)
    for name in (RECORDS, FIGURE):
        if name in contents:
            write_whole(folder / name, contents[name])
        else:
            (folder / name).unlink(missing_ok=True)
    write_json(folder / OUTCOME, {"format": FORMAT} | outcome.to_dict())
    return outcome


def load_outcome(folder: str | Path) -> Outcome:
    """Read an outcome, and check that its files are those it was written with.

    Raises:
        FileNotFoundError: there is no outcome in the folder, or a file of it is missing.
        ValueError: a file is damaged, or of another kind.
    """
    folder = Path(folder)
    path = folder / OUTCOME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no outcome, or not yet; run the experiment again")
    try:
        read = read_json(path)
        if read.pop("format") != FORMAT:
            raise ValueError("of another format")
        unknown = read.keys() ^ {f.name for f in fields(Outcome) if f.name != "folder"}
        if unknown:
            raise ValueError(f"fields missing or unknown: {', '.join(sorted(unknown))}")
        numbers = tuple(_number(number) for number in read.pop("numbers"))
        sites = tuple(Head(int(layer), int(head)) for layer, head in read.pop("sites"))
        outcome = Outcome(folder, numbers=numbers, sites=sites, **read)
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # JSON errors are ValueErrors
        raise ValueError(f"{path} is damaged, or no outcome of an experiment ({e}); run the experiment again") from e
    for name, checksum in outcome.files.items():
        if name not in (RECORDS, FIGURE):
            raise ValueError(f"{path} is damaged: it names a file {name!r}; allowed are {RECORDS} and {FIGURE}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; run the experiment again")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != checksum:
            raise ValueError(f"{folder / name} is damaged, or of another outcome; run the experiment again")
    return outcome


def _number(read: dict[str, Any]) -> Number:
    floats: Any = {name: None if read[name] is None else float(read[name]) for name in ("value", "low", "high")}
    return Number(**read | floats)


def _versions() -> dict[str, str]:
    ours, *others = versions("writesae", "torch", "transformers", "numpy", "scipy", "scikit-learn").items()
    return dict([ours, ("python", platform.python_version()), *others])
