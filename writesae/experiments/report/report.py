"""A report of saved outcomes, each number beside the paper's: in Markdown, and in one HTML file that needs no other."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from writesae.experiments.report.outcome import Outcome, load_outcome
from writesae.experiments.report.paper import paper_value
from writesae.jobs.disk import write_whole
from writesae.results.result import Number

FIGURES = "figures"
ELSEWHERE = "†"
LEGEND = f"{ELSEWHERE} another model, or another site, than the one here: not comparable one to one."

TEMPLATES = Path(__file__).parent / "templates"
HTML = (TEMPLATES / "report.html").read_text("utf-8")
MARKDOWN = (TEMPLATES / "report.md").read_text("utf-8")


def write_report(
    folder: str | Path, outcomes: Sequence[Outcome | str | Path], *, title: str = "writesae report", intro: str = ""
) -> Path:
    """Write ``report.md``, the figures beside it, and ``report.html``, in which they are contained.

    Args:
        folder: where to; made if it is not there.
        outcomes: what `save_outcome` made, or folders of such, in the order of the report.
        title, intro: of the report.

    Returns:
        The path of ``report.html``.

    Raises:
        FileNotFoundError, ValueError: there are no outcomes, or a folder holds none that is whole.
    """
    import jinja2

    if not outcomes:
        raise ValueError("a report needs at least one outcome; got none")
    # What is in memory may be older than what is on disk: a report is made of files alone.
    read = [load_outcome(outcome.folder if isinstance(outcome, Outcome) else outcome) for outcome in outcomes]
    folder, parts = Path(folder), []
    for number, outcome in enumerate(read, 1):
        parts.append(part := _part(outcome, number))
        if outcome.figure is not None:
            write_whole(folder / part["figure"], outcome.figure.read_bytes())
    values = dict(title=title, intro=intro, parts=parts, summary=_summary(read), legend=LEGEND)
    options: Any = dict(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = jinja2.Environment(autoescape=True, **options).from_string(HTML)
    text = jinja2.Environment(autoescape=False, finalize=_as_text, **options).from_string(MARKDOWN)
    write_whole(folder / "report.md", text.render(values).encode())
    write_whole(folder / "report.html", page.render(values).encode())
    return folder / "report.html"


def _part(outcome: Outcome, number: int) -> dict[str, Any]:
    """What the templates show of one outcome: text, nothing escaped."""
    sites = " ".join(head.folder for head in outcome.sites[:8])
    more = f" and {len(outcome.sites) - 8} more" if len(outcome.sites) > 8 else ""
    model = " ".join(filter(None, [outcome.model_id, sites + more]))
    seconds = "" if outcome.seconds is None else f"{outcome.seconds:.0f}"
    about = [outcome.experiment, model, f"{seconds} s" if seconds else "", f"records: {outcome.key}/records.csv.gz"]
    image = None if outcome.figure is None else base64.b64encode(outcome.figure.read_bytes()).decode()
    rows = [_row(outcome, number) for number in outcome.numbers]
    first = "failed" if outcome.error else f"{rows[0]['name']}: {rows[0]['value']}" if rows else ""
    return dict(
        title=outcome.title, about=outcome.about, error=outcome.error, model=model, seconds=seconds,
        what=" · ".join(filter(None, about[:3] if outcome.error else about)),
        rows=rows, first=first, first_paper=rows[0]["paper"] if rows else "",
        settings=[(name, str(value)) for name, value in (outcome.settings | outcome.versions).items()],
        image=image, figure=f"{FIGURES}/{number:02d}-{re.sub(r'[^A-Za-z0-9.]+', '-', outcome.key)}.png",
    )  # fmt: skip


def _row(outcome: Outcome, number: Number) -> dict[str, str]:
    paper = paper_value(outcome.experiment, number.id, outcome.model_id, outcome.sites, outcome.rule)
    row = dict(name=number.name, value=str(number), n="" if number.n is None else f"{number.n:,}", paper="", source="")
    if paper is not None:
        row["paper"] = paper.text + ("" if paper.how == "same site" else f" {ELSEWHERE}")
        row["source"] = f"{paper.model} {paper.where}, {paper.source}"
    return row


def _summary(outcomes: Sequence[Outcome]) -> str:
    failed, seconds = sum(o.error is not None for o in outcomes), sum(o.seconds or 0 for o in outcomes)
    return (
        f"{len(outcomes)} experiment{'s' if len(outcomes) > 1 else ''}"
        + (f", {failed} of them failed" if failed else "")
        + f", {seconds:.0f} s. Intervals are 95%; how each was made, its paragraph says. The paper: Young, WriteSAE: "
        f"Sparse Autoencoders for Recurrent State, arXiv 2605.12770."
    )


def _as_text(value: Any) -> str:
    """Markdown that shows the text as it is: on one line, with whatever would be markup escaped."""
    text = re.sub(r"([\\`*_{}\[\]<>|#~&$!])", r"\\\1", " ".join(str(value).split()))
    return re.sub(r"^([-+=]|\d+(?=[.)]\s))", lambda m: m[1] + "\\" if m[1][0].isdigit() else "\\" + m[1], text)
