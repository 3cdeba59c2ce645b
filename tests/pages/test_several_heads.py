"""Pages of several SAEs under one index: each is what it is alone, the text is read once, and atoms say their head."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from browser import chromium, watch
from pages import heads, hooked, part, site_of_heads, texts
from writesae.cli import app
from writesae.pages import write_pages
from writesae.pages.study import studies
from writesae.pages.survey import cut_windows, survey, surveys

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Playwright's pipes, when it is torn down
HEADS = {"L2H1": 40, "L0H0": 24}


def passes(run: Any) -> int:
    """How often a function runs the model."""
    n: list[int] = []
    with hooked().hf_model.register_forward_pre_hook(lambda *_: n.append(1)):
        run()
    return len(n)


def rows_of(index: Path) -> list[dict[str, Any]]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', index.read_text(), re.S)[0])


def test_one_pass_serves_all_heads():
    model, windows = hooked(), cut_windows(hooked(), texts())
    both = surveys(model, heads(), windows)
    for sae, found, other in zip(heads(), both, reversed(both), strict=True):
        alone = survey(model, sae, windows).tensors()
        assert alone.keys() == found.tensors().keys()
        assert all(torch.equal(x, found.tensors()[name]) for name, x in alone.items())
        assert not torch.equal(alone["top.tokens"], other.tensors()["top.tokens"]), "twin: the other head's"
    one = passes(lambda: survey(model, part(), windows))
    assert one > 1 and passes(lambda: surveys(model, heads(), windows)) == one
    assert passes(lambda: [survey(model, sae, windows) for sae in heads()]) == 2 * one, "twin: a pass for each"


def test_what_one_head_has_is_not_read_again(tmp_path):
    model, read = hooked(), [text[:700] for text in texts()[:2]]

    def again(*which: int) -> int:
        folders, names = [tmp_path / str(i) for i in which], [str(i) for i in which]
        return passes(lambda: studies(model, [heads()[i] for i in which], read, folders=folders, names=names, atoms=0))

    one = again(0)
    assert one > 0 and again(0, 1) == one and again(0, 1) == 0


def test_the_index_has_the_atoms_of_all_heads():
    site = site_of_heads()
    rows = rows_of(site / "index.html")
    assert [(row["head"], row["atom"]) for row in rows] == [(head, i) for head, n in HEADS.items() for i in range(n)]
    kept = json.loads((site / "rows.json").read_text())
    assert kept["atoms"] == rows and kept["name"] == "2 heads of tiny-gdn"
    for head, n in HEADS.items():
        assert sorted(path.name for path in (site / head / "atom").iterdir()) == [f"{i:05d}.html" for i in range(n)]
        measured = {int(path.stem) for path in (site / head / "data" / "atoms").iterdir()}
        assert measured == {row["atom"] for row in rows if row["head"] == head and row["measured"]}
        assert len(measured) == 2 and (site / head / "neuronpedia" / "batch-0.json").is_file()
        assert not (site / head / "index.html").exists() and not (site / "atom").exists()
        page = (site / head / "atom" / "00003.html").read_text()
        assert f"Atom 3 · tiny-gdn/{head}</title>" in page
        for link in re.findall(r'(?:href|src)="([^"#]+)', page):
            assert (site / head / "atom" / link).is_file(), link
    assert (site / "help.html").exists() is False and (site / "L0H0" / "help.html").is_file()
    shown = heads()[1].show(3, pages=site / "L0H0").html
    assert "Atom 3" in shown and "tiny-gdn/L0H0" in shown


def test_what_cannot_be_one_site_is_said(tmp_path):
    model, (one, other), read = hooked(), heads(), texts()[:1]

    def write(saes: Any, out: str = "site", **settings: Any) -> Path:
        return write_pages(model, saes, read, tmp_path / out, atoms=0, **settings)

    with pytest.raises(ValueError, match="two SAEs of layer 2 head 1: a site has one per head"):
        write([one, part(n_atoms=7)])
    with pytest.raises(ValueError, match="1 names for 2 SAEs"):
        write([one, other], name="one")
    with pytest.raises(ValueError, match="0 names for 0 SAEs: give at least one SAE"):
        write([])
    assert not (tmp_path / "site").exists(), "all this is said before anything is written"
    write([one, other])
    with pytest.raises(ValueError, match="holds a site of several SAEs, and this one would be of one"):
        write(one)
    write(one, "alone")
    with pytest.raises(ValueError, match="holds a site of one SAE, and this one would be of several"):
        write([one, other], "alone")


def test_an_sae_that_is_no_more_in_the_site(tmp_path):
    """Its pages go, and its data stay; a folder with an index of its own is another site."""
    model, (one, other), read = hooked(), heads(), texts()[:1]
    third = part("tiny-gdn/L0H0", 5)
    third.cfg = type(third.cfg)(**{**vars(third.cfg), "head": 2})
    write_pages(model, third, read, tmp_path / "L0H2", atoms=0)
    write_pages(model, [one, other], read, tmp_path, atoms=0)
    write_pages(model, [one], read, tmp_path / "L3H3", atoms=0)
    write_pages(model, [one, third], read, tmp_path, atoms=0)
    pages_of = {head: len(list((tmp_path / head / "atom").iterdir())) for head in ("L2H1", "L0H0", "L0H2", "L3H3")}
    assert pages_of == {"L2H1": 40, "L0H0": 0, "L0H2": 5, "L3H3": 40}
    assert (tmp_path / "L0H0" / "data" / "survey.json").is_file() and not (tmp_path / "L0H2" / "index.html").exists()
    assert {row["head"] for row in rows_of(tmp_path / "index.html")} == {"L2H1", "L0H2"}


def test_a_site_of_several_is_not_served():
    pytest.importorskip("starlette", reason="needs the extra [serve]")
    from writesae.pages.serve import application

    with pytest.raises(ValueError, match="holds a site of several SAEs, and the server runs one"):
        application(hooked(), part(), site_of_heads())


def test_the_command(tmp_path):
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    saes = [str(sae.save_pretrained(tmp_path / sae.place.folder)) for sae in heads()]
    (tmp_path / "text.txt").write_text(texts()[0])
    asked = ["pages", *saes, "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "site"), "--atoms", "0"]
    asked += ["--dtype", "float32", "--kernels", "writesae", "--no-special-tokens"]
    result = runner.invoke(app, [*asked, "--json", str(tmp_path / "rows.json"), "--neuronpedia"])
    assert result.exit_code == 0, result.output
    assert f"Open {tmp_path / 'site' / 'index.html'} in a browser." in result.output
    assert len(json.loads((tmp_path / "rows.json").read_text())["atoms"]) == sum(HEADS.values())
    page = (tmp_path / "site" / "L0H0" / "atom" / "00003.html").read_text()
    assert f"writesae pages {saes[0]} {saes[1]} --text" in page
    assert "--out . --dtype float32 --kernels writesae --no-special-tokens" in page
    for wrong, said in (
        (["pages", saes[0], "tiny-rwkv7/L3H1"], "of several models"),
        (["pages", saes[0], saes[0]], "two SAEs of layer 2 head 1"),
        (["serve", saes[0], "--out", str(tmp_path / "site")], "holds a site of several SAEs"),
    ):
        result = runner.invoke(app, wrong)
        assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def ids(page: Any) -> list[str]:
    """The atoms that the index shows, with their heads."""
    lines = page.locator("#atoms tbody tr")
    texts = lines.evaluate_all("rows => rows.map(row => [row.children[1].textContent, row.children[2].textContent])")
    return ["#".join(pair) for pair in texts]


@pytest.mark.parametrize("width", [1200, 400])
def test_the_index_searches_and_sorts_over_all_heads(browser, width):
    site = site_of_heads()
    rows = {f"{row['head']}#{row['atom']}": row for row in rows_of(site / "index.html")}
    seen = watch(browser, viewport=dict(width=width, height=900))
    page = seen.page
    page.goto((site / "index.html").as_uri())
    assert page.title() == "Atoms of 2 heads of tiny-gdn" and page.locator("#count").inner_text() == "64 of 64 atoms"
    rates = [rows[i]["rate"] for i in ids(page)]
    assert rates == sorted(rates, reverse=True) and {i[:4] for i in ids(page)[:30]} == set(HEADS)
    bars = page.locator("#density .bars button")
    counts = [int(bars.nth(i).get_attribute("title").split()[0]) for i in range(bars.count())]
    assert sum(counts) == sum(row["rate"] > 0 for row in rows.values()), "the plot is over all heads"
    for words, wanted in (
        ("#3", {"L2H1#3", "L0H0#3"}),
        ("l0h0#3", {"L0H0#3"}),
        ("L0H0#39", set()),
        ("L0H0", {i for i in rows if i.startswith("L0H0")}),
    ):
        page.locator("#search").fill(words)
        assert set(ids(page)) == wanted, words
    page.locator("#search").fill("the")
    both = set(ids(page))
    page.locator("#head").select_option("L0H0")
    assert set(ids(page)) == {i for i in both if i.startswith("L0H0")} and 0 < len(ids(page)) < len(both)
    page.reload()
    assert page.locator("#head").input_value() == "L0H0" and {i[:4] for i in ids(page)} == {"L0H0"}
    page.locator("#head").select_option("")
    page.locator("#search").fill("")
    page.locator("#sort").select_option("head")
    assert ids(page) == sorted(rows, key=lambda i: (i[:4], list(rows).index(i)))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#search").fill("L0H0#3")
    page.locator("#atoms tbody a").click()
    page.wait_for_url("**/L0H0/atom/00003.html")
    assert "layer 0, head 0" in page.locator("header").inner_text()
    page.get_by_role("link", name="All atoms").click()
    page.wait_for_url("**/index.html*")
    assert not page.url.split("/index.html")[0].endswith("L0H0") and page.locator("#atoms tbody tr").count() == 64
    seen.check()


def test_marks_know_their_head(browser, tmp_path):
    seen = watch(browser, viewport=dict(width=1200, height=900), accept_downloads=True)
    page = seen.page
    page.goto((site_of_heads() / "index.html").as_uri())
    for atom in ("L0H0#3", "L2H1#17"):
        page.get_by_label(f"mark atom {atom}", exact=True).check()
    page.reload()
    page.locator("#marked").check()
    assert sorted(ids(page)) == ["L0H0#3", "L2H1#17"]
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "marked.csv")
    with (tmp_path / "marked.csv").open(newline="") as file:
        assert [(row["head"], row["atom"]) for row in csv.DictReader(file)] == [("L2H1", "17"), ("L0H0", "3")]
    assert seen.errors == []


def test_head_twin(browser, tmp_path):
    """A script that knows atoms by their number alone marks those of both heads: the test above would see it."""
    shutil.copytree(site_of_heads(), tmp_path / "site")
    script = tmp_path / "site" / "assets" / "index.js"
    broken = script.read_text().replace('row.head + "#" + row.atom : row.atom', "row.atom : row.atom")
    assert broken != script.read_text()
    script.write_text(broken)
    page = watch(browser, viewport=dict(width=1200, height=900)).page
    page.goto((tmp_path / "site" / "index.html").as_uri())
    page.get_by_label("mark atom 3", exact=True).first.check()
    page.locator("#marked").check()
    assert sorted(ids(page)) == ["L0H0#3", "L2H1#3"]
