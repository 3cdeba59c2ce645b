"""Atom pages in a real Chromium, from disk: they search, sort and show values; nothing is fetched; text stays text."""

from __future__ import annotations

import csv
import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pages
from browser import Watched, chromium, watch
from pages import SEARCHED, hooked, part, studied, texts
from writesae.pages.render import percent

WIDE, PHONE = dict(width=1200, height=900), dict(width=400, height=800)
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Playwright's pipes, when it is torn down


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def site() -> Path:
    return pages.site()


def opened(browser: Any, path: Path, **settings: Any) -> Watched:
    watched = watch(browser, **dict(viewport=WIDE) | settings)
    watched.page.goto(path.as_uri())
    return watched


def column(page: Any, name: str) -> list[str]:
    """What a column of the index shows, row by row."""
    heads = page.locator("#atoms thead th").all_inner_texts()
    number = next(i for i, head in enumerate(heads, 1) if head.strip() == name)
    return [x.strip() for x in page.locator(f"#atoms tbody tr > :nth-child({number})").all_inner_texts()]


def measured_atom() -> int:
    return studied().survey.most_frequent(1)[0]


def test_the_index_searches(browser, site):
    seen = opened(browser, site / "index.html")
    page, found = seen.page, studied().survey
    assert column(page, "atom") == [str(i) for i in sorted(range(40), key=lambda i: (-int(found.seen.firings[i]), i))]
    assert page.locator("#count").inner_text() == "40 of 40 atoms"
    for words, wanted in (
        (SEARCHED, {i for i in range(40) if any(SEARCHED in "".join((*c.before, c.token, *c.after))
                                                for c in found.strongest[i])}),
        ("17", {17} | {i for i in range(40) if re.search(r"(?<!\w)17(?!\w)", page.evaluate(f"rows[{i}].haystack"))}),
        ("#17", {17}),
        (SEARCHED.upper(), None),
        (studied().distinct[5].promoted[0][0], None),
        (f"{SEARCHED} island", {i for i in range(40) if all(w in page.evaluate(f"rows[{i}].haystack").lower()
                                                           for w in (SEARCHED, "island"))}),
        (SEARCHED[:-1], set()),  # a whole word
        (f"{SEARCHED[:-1]}*", None),
        (f'"sailed to {SEARCHED}"', None),
        (f'"{SEARCHED} to sailed"', set()),
        ("no such words anywhere", set()),
    ):  # fmt: skip
        page.locator("#search").fill(words)
        shown = {int(x) for x in column(page, "atom")}
        assert shown == wanted if wanted is not None else 0 < len(shown) <= 40, words
        assert page.locator("#none").is_visible() == (not shown)
        assert page.locator("#count").inner_text() == f"{len(shown)} of 40 atoms"
        if words == studied().distinct[5].promoted[0][0]:
            assert 5 in shown
    page.locator("#where").select_option("fires")  # at a token, not anywhere
    for token in ("the", "State"):
        page.locator("#search").fill(token)
        fires = {
            i for i in range(40) for t, _ in found.fires_at[i] if studied().string(t).strip().lower() == token.lower()
        }
        assert {int(x) for x in column(page, "atom")} == fires
    page.locator("#where").select_option("")
    page.locator("#search").fill("")
    page.locator("#class").select_option("null")
    assert {int(x) for x in column(page, "atom")} == {i for i in range(40) if not found.seen.firings[i]}
    page.locator("#class").select_option("")
    page.locator("#measured").check()
    assert {int(x) for x in column(page, "atom")} == set(studied().measured)
    seen.check()


def test_the_index_sorts_and_remembers(browser, site):
    seen = opened(browser, site / "index.html")
    page = seen.page
    shares = lambda: [float(x.rstrip("%")) for x in column(page, "rate")]  # noqa: E731
    assert shares() == sorted(shares(), reverse=True)
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.locator("th[data-key=rate] button").click()
    assert shares() == sorted(shares())
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.locator("th[data-key=atom] button").click()
    assert column(page, "atom") == [str(i) for i in range(40)]
    page.locator("th[data-key=wins] button").click()
    wins = column(page, "stands in")
    n = sum(m.replaced is not None for m in studied().measured.values())
    assert n and "–" not in wins[:n] and set(wins[n:]) == {"–"}, "what is missing comes last"
    page.locator("th[data-key=wins] button").press("Enter")
    assert "–" not in column(page, "stands in")[:n], "the other way round too"
    page.locator("#search").fill("the")
    before = column(page, "atom")
    page.locator("#atoms tbody a").first.click()
    page.wait_for_url("**/atom/*.html")
    page.go_back()
    page.wait_for_selector("#atoms tbody tr")
    assert page.locator("#search").input_value() == "the" and column(page, "atom") == before
    seen.check()


def test_the_index_sorts_by_more_and_shows_rates(browser, site):
    seen = opened(browser, site / "index.html")
    page, found = seen.page, studied().survey
    for key, name in (("mean", "mean"), ("focus", "share"), ("peak", "strongest")):
        page.locator("#sort").select_option(key)
        shown = [float(x.rstrip("%")) for x in column(page, name) if x != "–"]
        assert shown == sorted(shown, reverse=True) and len(set(shown)) > 3
    bars = page.locator("#density .bars button")
    titles = [bars.nth(i).get_attribute("title") for i in range(bars.count())]
    counts = [int(title.split()[0]) for title in titles]
    assert sum(counts) == int((found.seen.firings > 0).sum())
    fullest = counts.index(max(counts))
    bars.nth(fullest).click()
    assert len(column(page, "atom")) == counts[fullest]
    page.locator("#all-rates").click()
    assert len(column(page, "atom")) == 40
    seen.check()


def test_marks_are_kept_and_exported(browser, site, tmp_path):
    seen = opened(browser, site / "index.html")
    page = seen.page
    assert page.locator("#export").is_disabled()
    for atom in (3, 17):
        page.get_by_label(f"mark atom {atom}", exact=True).check()
    page.reload()
    page.locator("#marked").check()
    assert sorted(column(page, "atom"), key=int) == ["3", "17"]
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "marked.csv")
    with (tmp_path / "marked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["atom"] for row in rows] == ["3", "17"]
    found = studied().survey
    assert float(rows[0]["rate"]) == pytest.approx(int(found.seen.firings[3]) / found.n_tokens)
    page.locator("#unmark").click()
    assert column(page, "atom") == [] and page.locator("#none").is_visible()
    assert [url for url in seen.requests if not url.startswith(("file:", "blob:"))] == [] and seen.errors == []


def test_every_column_can_be_reached_on_a_phone(browser, site):
    seen = opened(browser, site / "index.html", viewport=PHONE)
    page = seen.page
    for name in page.locator("#atoms thead th").all_inner_texts():
        head = page.locator("#atoms thead th", has_text=name.strip()).first
        head.scroll_into_view_if_needed()
        box = head.bounding_box()
        assert box["width"] > 0 and box["x"] + box["width"] > 0 and box["x"] < PHONE["width"], name
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    seen.check()


def test_activations_do_not_stand_over_tokens(browser, site):
    """Shown under the tokens, each has room of its own: boxes of tokens on one line do not overlap."""
    atom = measured_atom()
    seen = opened(browser, site / "atom" / f"{atom:05d}.html")
    page = seen.page
    page.locator("#values").check()
    overlaps = page.evaluate("""() => {
      let found = 0, seen = 0;
      for (const line of document.querySelectorAll("#strongest p")) {
        const boxes = [...line.querySelectorAll(".t[data-v]")].map((t) => t.getBoundingClientRect());
        seen += boxes.length;
        boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
          const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          if (across > 0.5 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.5) found++;
        }));
      }
      return [found, seen];
    }""")
    assert overlaps[0] == 0 and overlaps[1] > 5
    inside = page.locator("#strongest .t.here").first.evaluate(
        "e => { const s = getComputedStyle(e, '::after'); return [s.position, getComputedStyle(e).display]; }"
    )
    assert inside == ["static", "inline-flex"], "the number takes room in the line"
    seen.check()


def test_values_on_hover(browser, site):
    atom = measured_atom()
    seen = opened(browser, site / "atom" / f"{atom:05d}.html")
    page, tip = seen.page, seen.page.locator("#tip")
    assert tip.is_hidden()
    context = studied().survey.strongest[atom][0]
    page.locator("#strongest li").first.locator(".t.here").hover()
    value = tip.inner_text().split(": ")[-1]
    assert float(value) == pytest.approx(context.activation, rel=0.01)
    page.locator("#strongest .t:not(.on)").first.hover()
    assert tip.inner_text().endswith(": not active")
    page.locator("#positions .bars span").first.hover()
    assert tip.inner_text().startswith("tokens 0 to 15 of a window: ")
    page.locator("#factors .strip span").nth(3).hover()
    assert tip.inner_text().startswith("key[3] = ")
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1200
    page.locator("h1").hover()
    assert tip.is_hidden()
    page.locator("#values").check()
    shown = page.locator(".t.here").first.evaluate("e => getComputedStyle(e, '::after').content")
    assert float(shown.strip('"')) == pytest.approx(context.activation, rel=0.01)
    seen.check()


def test_hover_twin(browser, site, tmp_path):
    """A page whose script does not run shows no value: the test above would see it."""
    atom = measured_atom()
    shutil.copytree(site / "assets", tmp_path / "assets")
    script = tmp_path / "assets" / "atom.js"
    script.write_text(script.read_text().replace('"pointerover"', '"pointer-over"'))
    (tmp_path / "atom").mkdir()
    broken = tmp_path / "atom" / "broken.html"
    page_text = (site / "atom" / f"{atom:05d}.html").read_text()
    broken.write_text(page_text)
    page = opened(browser, broken)
    page.page.locator(".t.here").first.hover()
    assert page.page.locator("#tip").is_hidden()
    alone = tmp_path / "atom" / "alone.html"
    shown = part().show(atom, pages=site).html
    alone.write_text(shown.replace('"pointerover"', '"pointer-over"'))
    page = opened(browser, alone)
    assert page.errors, "the policy of a page by itself lets no changed script run, and says so"


def test_nothing_is_fetched_and_markup_stays_text(browser, site, tmp_path):
    paths = [site / "index.html", site / "help.html", *sorted((site / "atom").iterdir())]
    seen = watch(browser, viewport=WIDE)
    for path in paths:
        seen.page.goto(path.as_uri())
        assert seen.page.locator("img, b#bold, iframe, form").count() == 0
        names = seen.page.evaluate("[...document.querySelectorAll('*')].map(e => e.getAttributeNames()).flat()")
        assert "onerror" not in names
    assert len(paths) == 42 and all(url.startswith(site.as_uri()) for url in seen.requests)
    files = {f"{site.as_uri()}/assets/{name}" for name in ("style.css", "atom.js", "index.js", "help.js")}
    assert set(seen.requests) == files | {path.as_uri() for path in paths}
    seen.check()
    for name, text in pages.nasty_pages().items():
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        seen = opened(browser, path)
        if name == "index":
            seen.page.locator("#search").fill('<script>alert("a")')
            assert seen.page.locator("#atoms tbody tr").count() > 3
        elif name != "help":
            seen.page.locator(".t").first.hover()
            assert "<script>" in seen.page.locator("#tip").inner_text()
            assert '<script>alert("a")</script>' in seen.page.locator("#contexts").inner_text()
        assert seen.page.locator("img, b#bold").count() == 0 and seen.requests == [path.as_uri()]
        seen.check()


def test_markup_twin(browser, site, tmp_path):
    """Unescaped, the same text would make elements, and the watch would see a request."""
    atom = measured_atom()
    page = html.unescape((site / "atom" / f"{atom:05d}.html").read_text()).replace(
        "<h1>", '<img src="https://example.com/a.png" onerror="alert(1)"><script>alert(2)</script><h1>'
    )
    unescaped = tmp_path / "unescaped.html"
    unescaped.write_text(page)
    seen = opened(browser, unescaped)
    assert seen.page.locator("img").count() > 0 and seen.errors
    with pytest.raises(AssertionError):
        seen.check()
    assert seen.dialogs == [], "even then the page's policy runs no script that is not ours"


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_the_screen(browser, site, viewport, scheme):
    atoms = [measured_atom(), int((studied().survey.seen.firings == 0).nonzero()[0])]
    for path in [site / "index.html", *(site / "atom" / f"{atom:05d}.html" for atom in atoms)]:
        seen = opened(browser, path, viewport=viewport, color_scheme=scheme)
        page = seen.page
        wide, high = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollHeight]")
        assert wide <= viewport["width"] and high > 300
        colors = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.documentElement))")
        light = [sum(map(int, color[4:-1].split(","))) for color in colors]
        assert (light[0] > light[1]) == (scheme == "dark") and abs(light[0] - light[1]) > 450
        seen.check()
        page.close()


def test_an_atoms_page_says_the_numbers(browser, site):
    atom = measured_atom()
    seen = opened(browser, site / "atom" / f"{atom:05d}.html")
    page, made = seen.page, studied()
    found = made.survey
    assert page.title() == f"Atom {atom} · tiny-gdn/L2H1"
    rate = int(found.seen.firings[atom]) / found.n_tokens
    assert page.locator(".tiles dd").first.inner_text() == percent(rate)
    assert page.locator("#strongest li").count() == len(found.strongest[atom])
    shown = page.locator("#strongest p").first.evaluate("e => [...e.children].map(t => t.textContent)")
    context = found.strongest[atom][0]
    assert len(shown) == len(context.activations)
    assert page.locator("#tokens ol.tokens").count() == 4
    other = page.locator("#nearest a").first
    wanted = made.nearest[0][atom][0]
    assert other.inner_text() == str(wanted)
    other.click()
    page.wait_for_url(f"**/{wanted:05d}.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(f"**/{wanted - 1:05d}.html" if wanted else f"**/{wanted:05d}.html")
    page.get_by_role("link", name="All atoms").click()
    page.wait_for_url("**/index.html*")
    seen.check()


def test_a_notebook_shows_the_page(browser, tmp_path):
    """In a frame of another page, as notebooks do."""
    atom = measured_atom()
    shown = part().show(atom, model=hooked(), texts=texts())
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><p>Out[1]:</p>{shown._repr_html_()}")
    seen = opened(browser, notebook)
    frame = seen.page.frame_locator("iframe")
    assert frame.locator("h1").inner_text() == f"Atom {atom}"
    assert frame.locator("nav.site").is_hidden(), "there are no other pages to go to"
    frame.locator(".t.here").first.hover()
    value = frame.locator("#tip").inner_text().split(": ")[-1]
    assert float(value) == pytest.approx(studied().survey.strongest[atom][0].activation, rel=0.01)
    seen.check()
