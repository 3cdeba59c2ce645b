"""The page of a circuit in a real Chromium, from disk: nodes and their edges; nothing is fetched; text stays text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import writesae as ws
from architectures import architecture_named
from browser import chromium, watch

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Playwright's pipes, when it is torn down
NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def circuit() -> ws.Circuit:
    model = ws.HookedRecurrentModel(architecture_named("qwen3_5").build())
    ids = torch.randint(97, (5,), generator=torch.Generator().manual_seed(4))
    found = ws.circuit(model, ids, ws.Logit(5), max_nodes=20).prune()
    return replace(found, tokens=(NASTY, *found.tokens[1:]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def test_the_page_holds_all_of_it(circuit: ws.Circuit, tmp_path: Path) -> None:
    page = circuit.show()
    html = page.save(tmp_path / "circuit.html").read_text("utf-8")
    assert html.count("<circle ") == html.count("<article ") == len(circuit.nodes)
    assert NASTY not in html and "&lt;img src=x" in html
    assert "http" not in html.replace("http-equiv", "")
    assert page._repr_html_().startswith("<iframe")


def test_in_a_browser(circuit: ws.Circuit, browser: Any, tmp_path: Path) -> None:
    path = circuit.show().save(tmp_path / "circuit.html")
    seen = watch(browser, viewport=dict(width=1200, height=900))
    page = seen.page
    page.goto(path.as_uri())
    last = len(circuit.nodes) - 1
    shown = lambda: page.locator("#detail article:visible").get_attribute("id")  # noqa: E731
    lit = lambda: page.locator("#links line.on").count()  # noqa: E731
    assert page.locator("#detail article:visible").count() == 1 and shown() == f"d{last}"
    drawn = int(((circuit.edges[-1].abs() / circuit.edges.abs().max()) > 0.002).sum())
    assert lit() == drawn > 0
    page.locator(f"#d{last} a").first.click()
    heaviest = int(circuit.edges[-1].abs().argmax())
    assert shown() == f"d{heaviest}"
    page.locator("#n1").focus()
    assert shown() == "d1"
    page.keyboard.press("Enter")
    page.locator("h1").hover()
    assert shown() == "d1"
    assert NASTY in page.locator("#nodes circle").nth(0).get_attribute("aria-label")
    seen.check()
