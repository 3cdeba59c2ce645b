"""A report of saved outcomes, each number beside the paper's: in Markdown, and in one HTML file that needs no other."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from writesae.experiments.report.outcome import Outcome, load_outcome
from writesae.experiments.report.paper import PaperValue, paper_value
from writesae.experiments.results.result import Number
from writesae.jobs.disk import write_whole

FIGURES = "figures"
ELSEWHERE = "†"
LEGEND = f"{ELSEWHERE} another model, or another site, than the one here: not comparable one to one."

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 22%, Canvas); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .number { font-variant-numeric: tabular-nums; }
.small, summary { font-size: .85rem; opacity: .75; }
.error { border-left: 4px solid #c33; padding-left: .8rem; white-space: pre-wrap; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if intro %}<p>{{ intro }}</p>
{% endif %}
<p class="small">{{ summary }}</p>
<div class="wide"><table>
<tr><th>experiment</th><th>model</th><th>first number</th><th>paper</th><th>s</th></tr>
{% for part in parts %}
<tr><td><a href="#part-{{ loop.index }}">{{ part.title }}</a></td><td>{{ part.model }}</td>
<td class="number">{{ part.first }}</td><td>{{ part.first_paper }}</td><td class="number">{{ part.seconds }}</td></tr>
{% endfor %}
</table></div>
<p class="small">{{ legend }}</p>
{% for part in parts %}
<h2 id="part-{{ loop.index }}">{{ part.title }}</h2>
<p class="small">{{ part.what }}</p>
{% if part.error %}<p class="error"><strong>Failed.</strong> {{ part.error }}</p>
{% else %}<p>{{ part.about }}</p>
<div class="wide"><table>
<tr><th></th><th>here</th><th>n</th><th>paper</th><th></th></tr>
{% for row in part.rows %}
<tr><td>{{ row.name }}</td><td class="number">{{ row.value }}</td><td class="number">{{ row.n }}</td>
<td class="number">{{ row.paper }}</td><td class="small">{{ row.source }}</td></tr>
{% endfor %}
</table></div>
{% if part.image %}<p><img alt="{{ part.title }}" src="data:image/png;base64,{{ part.image }}"></p>
{% endif %}
{% endif %}
<details><summary>Settings and versions</summary><table>
{% for name, value in part.settings %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></details>
{% endfor %}
</body>
</html>
"""

MARKDOWN = """\
# {{ title }}

{% if intro %}
{{ intro }}

{% endif %}
{{ summary }}

| experiment | model | first number | paper | s |
|---|---|---|---|---|
{% for part in parts %}
| {{ part.title }} | {{ part.model }} | {{ part.first }} | {{ part.first_paper }} | {{ part.seconds }} |
{% endfor %}

{{ legend }}
{% for part in parts %}

## {{ part.title }}

{{ part.what }}

{% if part.error %}
**Failed.** {{ part.error }}
{% else %}
{{ part.about }}

| | here | n | paper | |
|---|---|---|---|---|
{% for row in part.rows %}
| {{ row.name }} | {{ row.value }} | {{ row.n }} | {{ row.paper }} | {{ row.source }} |
{% endfor %}
{% if part.image %}

![{{ part.title }}]({{ part.figure }})
{% endif %}
{% endif %}

| setting | |
|---|---|
{% for name, value in part.settings %}
| {{ name }} | {{ value }} |
{% endfor %}
{% endfor %}
"""


def write_report(
    folder: str | Path,
    outcomes: Sequence[Outcome | str | Path],
    *,
    title: str = "writesae report",
    intro: str = "",
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
    n = "" if number.n is None else f"{number.n:,}"
    return dict(name=number.name, value=str(number), n=n, paper=_paper(paper), source=_source(paper))


def _paper(paper: PaperValue | None) -> str:
    return "" if paper is None else paper.text + ("" if paper.how == "same site" else f" {ELSEWHERE}")


def _source(paper: PaperValue | None) -> str:
    return "" if paper is None else f"{paper.model} {paper.where}, {paper.source}"


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
