"""Outcomes on disk, and reports of them: what is written is read, damage is noticed, text stays text."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from html.parser import HTMLParser
from typing import Any

import markupsafe
import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from writesae.experiments.report import report
from writesae.experiments.report.outcome import load_outcome, save_outcome
from writesae.experiments.report.paper import CELLS, TABLE, paper_value
from writesae.experiments.report.report import write_report
from writesae.jobs.disk import read_json
from writesae.results.result import Number, Result, figure
from writesae.results.statistics import wilson

NASTY = "<script>alert(1)</script> a|b *c* _d_ `e` [f](http://g) &amp; # 1. - \\"


@dataclasses.dataclass(frozen=True)
class Made(Result):
    """A result with everything that is hard to keep."""

    text: str = "plain"
    found: tuple[Number, ...] = (
        Number.of("atom beats deletion", wilson(90, 100)),
        Number("p", 1.07e-6, n=12_345),
        Number("Cohen's d", float("inf")),
        Number("lift", float("nan"), "nats", low=float("-inf"), high=2.5),
    )

    @property
    def title(self) -> str:
        return f"Title {self.text}"

    @property
    def about(self) -> str:
        return f"About {self.text}"

    def numbers(self) -> tuple[Number, ...]:
        return self.found

    def records(self) -> pd.DataFrame:
        columns = {
            "atom": [1, 2, 3],
            "kl": np.array([0.1, np.nan, 1e-12], dtype=np.float32),
            "fires": [True, False, True],
        }
        return pd.DataFrame(
            columns | {"text": [self.text, "", "NA"], "lines": ['a\n"b"', "c\r\nd", "null"], "digits": ["1", "02", "3"]}
        )

    def plot(self) -> Any:
        made, axes = figure(1)
        axes[0].plot([1, 2])
        return made


SETTINGS = {"n_firings": 300, "scales": (1.5, 3.0), "atom": None, "threshold": float("nan"), "path": NASTY}
PLACE: dict[str, Any] = dict(model_id="tiny-gdn", sites=[(2, 0)], rule="gated_delta", seconds=12.3)


@pytest.fixture
def saved(tmp_path):
    return save_outcome(Made(), tmp_path / "one", "replacement_test", SETTINGS, **PLACE)


# Outcomes ------------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_read(saved):
    read = load_outcome(saved.folder)
    assert str(read.numbers) == str(Made().numbers()) == str(saved.numbers), "nan and inf included"
    assert {**vars(read), "numbers": ()} == {**vars(saved), "numbers": ()}
    assert read.settings == {"n_firings": 300, "scales": [1.5, 3.0], "atom": None, "threshold": "nan", "path": NASTY}
    assert read.sites == ((2, 0),) and read.seconds == 12.3 and read.error is None and read.key == "one"
    assert {"writesae", "python", "torch", "transformers"} <= read.versions.keys()
    records = read.records()
    pd.testing.assert_frame_equal(records, Made().records(), check_dtype=False)
    assert records.kl.dtype == np.float32 and records.fires.dtype == bool and list(records.digits) == ["1", "02", "3"]
    assert json.loads((saved.folder / "outcome.json").read_text(), parse_constant=pytest.fail)["seconds"] == 12.3


def test_an_outcome_from_before_there_were_ids_still_finds_the_papers_numbers(saved, tmp_path):
    path = saved.folder / "outcome.json"
    described = read_json(path)
    for number in described["numbers"]:
        assert number.pop("id")
    path.write_text(json.dumps(described))
    assert load_outcome(saved.folder).numbers[0].id == "atom-beats-deletion"
    write_report(tmp_path, [saved.folder])
    assert "section 3.2" in (tmp_path / "report.md").read_text()


def test_a_number_is_found_by_its_id_whatever_it_is_called(tmp_path):
    number = Number("how often atoms win", 0.9, "%", id="atom-beats-deletion")
    save_outcome(Made(found=(number,)), tmp_path / "renamed", "replacement_test", SETTINGS, **PLACE)
    write_report(tmp_path, [tmp_path / "renamed"])
    assert "92.4%" in (tmp_path / "report.md").read_text()


def test_the_same_outcome_makes_the_same_files(saved, tmp_path):
    again = save_outcome(Made(), tmp_path / "again", "replacement_test", SETTINGS, **PLACE)
    assert again.files == saved.files and saved.files.keys() == {"records.csv.gz", "figure.png"}
    assert (again.folder / "outcome.json").read_bytes() == (saved.folder / "outcome.json").read_bytes()


def test_a_failure_is_an_outcome_too_and_replaces_what_was_there(saved):
    save_outcome(ValueError("atom 3 never fires"), saved.folder, "erase", {"atom": 3})
    read = load_outcome(saved.folder)
    assert read.error == "ValueError: atom 3 never fires" and read.numbers == () and read.figure is None
    assert [path.name for path in saved.folder.iterdir()] == ["outcome.json"]
    with pytest.raises(ValueError, match=r"has no records: erase failed \(ValueError: atom 3 never fires\)"):
        read.records()


def spoil_figure(folder):
    data = bytearray((folder / "figure.png").read_bytes())
    data[-20] ^= 1
    (folder / "figure.png").write_bytes(data)


def other_records(folder):
    (folder / "records.csv.gz").write_bytes(gzip.compress(b"atom\n1\n"))


def cut(folder):
    path = folder / "outcome.json"
    path.write_text(path.read_text()[:300])


def change(**values):
    def spoil(folder):
        path = folder / "outcome.json"
        path.write_text(json.dumps(read_json(path) | values))

    return spoil


KIND = "is damaged, or no outcome"
DAMAGE = {
    "a bit of the figure": (spoil_figure, ValueError, r"figure\.png is damaged"),
    "other records": (other_records, ValueError, r"records\.csv\.gz is damaged"),
    "no records": (lambda f: (f / "records.csv.gz").unlink(), FileNotFoundError, r"records\.csv\.gz is missing"),
    "not written to the end": (lambda f: (f / "outcome.json").unlink(), FileNotFoundError, "no outcome, or not yet"),
    "half a file": (cut, ValueError, KIND),
    "no JSON": (lambda f: (f / "outcome.json").write_bytes(b"\x00\xff"), ValueError, KIND),
    "other JSON": (lambda f: (f / "outcome.json").write_text("[1]"), ValueError, KIND),
    "another format": (change(format="writesae outcome 9"), ValueError, "of another format"),
    "an unknown field": (change(extra=1), ValueError, "fields missing or unknown: extra"),
    "a number without a value": (change(numbers=[{"name": "p"}]), ValueError, KIND),
    "a file elsewhere": (change(files={"../../secret": "0"}), ValueError, "it names a file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(saved, damage):
    spoil, error, message = DAMAGE[damage]
    load_outcome(saved.folder)
    spoil(saved.folder)
    with pytest.raises(error, match=message) as raised:
        load_outcome(saved.folder)
    assert str(saved.folder) in str(raised.value)
    with pytest.raises(error):
        write_report(saved.folder.parent / "report", [saved])


# Reports -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        self.open += [] if tag in ("meta", "img", "br") else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are nested"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            if "td" in self.open:
                self.rows[-1][-1] += data


@pytest.fixture
def written(saved, tmp_path):
    nasty = save_outcome(Made(text=NASTY), tmp_path / "t w|o<b>", "replacement_test", SETTINGS, model_id=NASTY)
    failed = save_outcome(ValueError(NASTY), tmp_path / "three", "erase", {NASTY: NASTY})
    path = write_report(
        tmp_path / "report", [saved, nasty.folder, failed], title=f"Report {NASTY}", intro=f"Intro {NASTY}"
    )
    return path, Page(path.read_text(encoding="utf-8")), (path.parent / "report.md").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(written, saved):
    path, page, _ = written
    assert page.open == [] and sorted(p.name for p in path.parent.iterdir()) == ["figures", "report.html", "report.md"]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "video") and not any(
            a.startswith("on") for a in attributes
        )
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in path.read_text(encoding="utf-8") and "url(" not in path.read_text(encoding="utf-8")
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert base64.b64decode((images[0] or "").split(",")[1]) == (saved.folder / "figure.png").read_bytes()
    anchors = [a["href"] for tag, a in page.tags if tag == "a"]
    assert anchors == [f"#{a['id']}" for tag, a in page.tags if tag == "h2"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_numbers_stand_beside_the_papers(written):
    _, page, markdown = written
    beats = Made().numbers()[0]
    row = [
        "atom beats deletion",
        str(beats),
        "100",
        "92.4% [91.6, 93.1] †",
        "Qwen3.5-0.8B L1, L9 and L17, H4, section 3.2",
    ]
    assert row in page.rows and ["p", "1.07e-06", "12,345", "", ""] in page.rows
    assert ["lift", str(Made().numbers()[3]), "", "", ""] in page.rows
    assert row in cells(markdown) and ["p", "1.07e-06", "12,345", "", ""] in cells(markdown)
    # Another model without a rule has nothing beside it.
    assert [r for r in page.rows if r[:1] == row[:1] and not r[3]] == [[*row[:3], "", ""]]


def cells(markdown: str) -> list[list[str]]:
    """The rows of all tables, as a renderer of Markdown reads them; text only."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and token.level and token.children is not None and rows and token.level >= 4:
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_text_stays_text(written):
    _, page, markdown = written
    one_line = " ".join(NASTY.split())
    for words in (
        f"Report {NASTY}",
        f"Intro {NASTY}",
        f"Title {NASTY}",
        f"About {NASTY}",
        f"Failed. ValueError: {NASTY}",
    ):
        assert words in page.text
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {"text", "text_special", "image", "strong_open", "strong_close"}, "no links, no code, no HTML"
    inline = ["".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"]
    for words in (f"Report {one_line}", f"Intro {one_line}", f"About {one_line}", f"Failed. ValueError: {one_line}"):
        assert words in inline
    assert ["path", one_line] in cells(markdown) and [one_line, one_line] in cells(markdown)
    heads = [token.tag for token in tokens if token.type == "heading_open"]
    assert heads == ["h1", "h2", "h2", "h2"], "no heading or list comes from the text"
    assert not any(token.type in ("html_block", "bullet_list_open", "ordered_list_open") for token in tokens)
    images = [child.attrs["src"] for token in tokens for child in token.children or [] if child.type == "image"]
    assert images == ["figures/01-one.png", "figures/02-t-w-o-b-.png"]


@pytest.mark.parametrize("broken", ["html", "markdown"])
def test_without_escaping_it_would_not(saved, tmp_path, broken):
    """The twins: reports that have the text as it is."""
    nasty = save_outcome(Made(text=NASTY), tmp_path / "nasty", "replacement_test", {})
    path = write_report(tmp_path / "report", [nasty])
    texts = {"html": path.read_text(encoding="utf-8"), "markdown": path.with_name("report.md").read_text("utf-8")}
    escaped = {"html": str(markupsafe.escape(NASTY)), "markdown": report._as_text(NASTY)}[broken]
    assert escaped in texts[broken]
    texts[broken] = texts[broken].replace(escaped, NASTY)
    page = Page(texts["html"])
    kinds = {c.type for t in MarkdownIt("commonmark").parse(texts["markdown"]) for c in t.children or []}
    assert (("script", {}) in page.tags) == (broken == "html") and ("html_inline" in kinds) == (broken == "markdown")


def test_leading_marks_are_no_markup():
    for text in ("- a", "+ a", "1. a", "12) a", "= a", "> a", "# a", "a\n\n- b", "~~~", "***"):
        (inline,) = [t for t in MarkdownIt("commonmark").parse(report._as_text(text)) if t.type == "inline"]
        assert "".join(c.content for c in inline.children or []) == " ".join(text.split())


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one outcome"):
        write_report(tmp_path, [])
    with pytest.raises(FileNotFoundError, match=r"outcome\.json is missing"):
        write_report(tmp_path, [tmp_path / "nowhere"])


# The paper's numbers -------------------------------------------------------------------------------------------------


def test_the_papers_number_of_the_same_site_of_another_and_of_another_model():
    ask = ("replacement_test", "atom beats deletion")
    same = paper_value(*ask, "Qwen/Qwen3.5-0.8B", [(9, 4)])
    assert same is not None and str(same) == "91.2% (Qwen3.5-0.8B L9 H4, Table 2)" and same.how == "same site"
    pooled = paper_value(*ask, "Qwen/Qwen3.5-0.8B", [(17, 4), (1, 4), (9, 4)])
    assert pooled is not None and (pooled.text, pooled.how) == ("92.4% [91.6, 93.1]", "same site")
    other_head = paper_value(*ask, "qwen/qwen3.5-0.8b-base", [(9, 5)], rule="gated_delta")
    assert other_head is not None and other_head.how == "another site" and other_head.text.startswith("92.4%")
    for model, site, text in (
        ("AntonV/mamba2-370m-hf", (24, 0), "88.08% [86.8, 89.3]"),
        ("state-spaces/mamba2-370m", (24, 0), "88.08% [86.8, 89.3]"),
        ("fla-hub/rwkv7-1.5B-world", (12, 0), "45.3%"),
        ("Qwen/Qwen3.5-4B", (12, 8), "48%"),
        ("fla-hub/delta_net-1.3B-100B", (12, 8), "48.3%"),
    ):
        found = paper_value(*ask, model, [site])
        assert found is not None and (found.text, found.how) == (text, "same site")
    for rule, text in (("gated_delta", "92.4%"), ("mamba2", "88.08%"), ("rwkv7", "45.3%")):
        family = paper_value(*ask, "tiny", [(2, 0)], rule=rule)
        assert family is not None and family.how == "another model" and family.text.startswith(text)
    assert paper_value(*ask, "tiny-gdn", [(2, 0)]) is None, "another model only if its rule is given"
    assert paper_value(*ask, "tiny", [], rule="kimi_delta") is None and paper_value("no", "such", None) is None
    assert paper_value(*ask, "Qwen/Qwen3.5-27B", [(32, 16)]) is None


def test_numbers_may_be_asked_for_by_pattern():
    for size in ("0.1", "3"):
        found = paper_value(
            "logit_change",
            f"R² of a cell, three factors, prefactor fitted, epsilon {size}",
            "Qwen/Qwen3.5-4B",
            [(12, 8)],
        )
        assert found is not None and found.text == "-0.05"
    assert paper_value("seed_stability", "variation of the number of bundles", None, (), "gated_delta") is not None


def test_the_table_names_cells_that_exist():
    for (experiment, name), rows in TABLE.items():
        assert experiment.isidentifier() and name and rows
        assert len({cell for cell, _, _ in rows}) == len(rows), "a cell has one value"
        for cell, text, source in rows:
            assert cell in CELLS and text and source.startswith(("section ", "Table ", "App. ", "Fig. "))


def test_a_figure_shows_itself_in_a_notebook():
    """IPython asks for `_repr_png_`: what it knows of matplotlib's figures, it learns when pyplot is imported."""
    made, (axis,) = figure()
    blank = made._repr_png_()
    axis.plot([0, 1])
    assert made._repr_png_().startswith(b"\x89PNG") and made._repr_png_() != blank
