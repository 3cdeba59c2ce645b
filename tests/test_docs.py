"""The documentation says what is so: its snippets run, its messages are raised, its names exist, its site builds."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import writesae as ws
from browser import chromium, watch
from docs_pages import DOCS, Section, blocks, matches, rows, sections, setup
from writesae.cli import app
from writesae.hooks.names import resolve
from writesae.zoo import shipped_model

ROOT = DOCS.parent
terminal = CliRunner(env={"COLUMNS": "10000", "TERM": "dumb"})  # wide, so that rich breaks no line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, without the checks of annotations, which would complain first."""
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield tmp_path
    jaxtyping.config.update("jaxtyping_disable", False)


# Errors --------------------------------------------------------------------------------------------------------------


def said(language: str, code: str, names: dict[str, Any]) -> str:
    """The error that a snippet ends with, as a user reads it."""
    if language == "bash":
        result = terminal.invoke(app, shlex.split(code)[1:])
        assert result.exit_code, f"no error: {code}"
        return result.output
    try:
        exec(code, names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    pytest.fail(f"no error: {code}")


@pytest.mark.parametrize("section", sections("errors"), ids=lambda section: section.heading)
def test_an_error_of_the_pages(section: Section, here: Path) -> None:
    """It is raised in the words of its page, which has a few of them in its heading; and the fix fixes it."""
    (language, code), (kind, message), *fixes = section.blocks
    assert kind == "text" and len(message.replace("...", "")) > 30, "a message that nearly anything would match"
    names: dict[str, Any] = {}
    exec(setup("errors/README.md"), names)
    found = said(language, code, names)
    assert matches(message, found), found
    assert matches(section.heading, found, whole=False), found
    for _, fix in fixes:
        exec(fix, names)


def test_another_message_does_not_match() -> None:
    page = "ValueError: head ... at layer 1:\nallowed are 0 to 3"
    assert matches(page, "ValueError: head 4 at layer 1: allowed are 0 to 3")
    for other in ("ValueError: head 4 at layer 1: allowed are 0 to 7", "IndexError: head 4 at layer 1", ""):
        assert not matches(page, other)
    assert not matches(page, "ValueError: head 4 at layer 1: allowed are 0 to 3, or None")
    assert len(sections("errors")) > 60, "the pages are not read as they are written"


def test_the_index_of_errors_lists_every_message() -> None:
    """That the links lead somewhere is checked when the site is built."""
    index = (DOCS / "errors" / "README.md").read_text("utf-8")
    listed = re.findall(r"(?m)^- \[(.+)\]\((.+?)#", index)
    assert sorted(listed) == sorted((section.heading, section.page) for section in sections("errors"))


# What holds where ----------------------------------------------------------------------------------------------------


def test_every_cell_of_what_holds_where_is_a_test() -> None:
    """That the tests pass is seen when they run; here, that each is there, and that there are enough of them."""
    page = (DOCS / "guarantees.md").read_text("utf-8")
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    head, *rows = table
    cells = [cell for _, *row in rows for cell in row]
    assert len(rows) > 25 and all(len(row) == len(head) for row in rows)
    named = [re.findall(r"`([\w/]+)::(\w+)`", cell) for cell in cells]
    assert all(named), [cell for cell, found in zip(cells, named, strict=True) if not found]
    for file, test in re.findall(r"`([\w/]+)::(\w+)`", page):
        defined = {node.name for node in ast.walk(ast.parse((DOCS.parent / "tests" / f"{file}.py").read_text("utf-8")))
                   if isinstance(node, ast.FunctionDef)}  # fmt: skip
        assert test in defined, f"{file}::{test}"


# The picture of README -----------------------------------------------------------------------------------------------


def test_the_picture_of_readme_shows_what_the_model_does() -> None:
    """The script's numbers are those in README's description, and its first two matrices add up to the third."""
    spec = importlib.util.spec_from_file_location("memory_edited", DOCS / "img" / "memory_edited.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.no_grad():
        found = script.run()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert found["words"][0] == "Robert"
    assert f"'Robert' rises from {100 * found['p'][0]:.0f}% to {100 * found['q'][0]:.0f}%" in readme
    torch.testing.assert_close(found["before"] + found["change"], found["after"])
    assert found["change"].norm() > 0.1
    for theme in script.THEMES:
        assert (
            f"docs/img/memory_edited-{theme}.svg" in readme and (DOCS / "img" / f"memory_edited-{theme}.svg").is_file()
        )


# Names ---------------------------------------------------------------------------------------------------------------

LIBRARIES = {"TransformerLens": "transformer_lens", "nnsight": "nnsight", "SAELens": "sae_lens"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_names_of_other_libraries_exist(library: str) -> None:
    theirs = pytest.importorskip(LIBRARIES[library])  # not at the top, see `nnsight` in test_hooks.py
    names = [name for column, _ in rows("names.md", library) for name in column if not name.startswith("blocks.")]
    assert len(names) > 5
    assert [name for name in names if not has(theirs, name)] == []
    assert not has(theirs, "Renamed") and not has(theirs, f"{names[0].split('.')[0]}.renamed")


def has(library: Any, path: str) -> bool:
    """Whether a path of names exists: attributes of classes, declared ones too. ``model`` is a TransformerBridge."""
    first, *rest = path.removeprefix(f"{library.__name__}.").split(".")
    if first in ("model", "TransformerBridge"):
        first, library = "TransformerBridge", importlib.import_module("transformer_lens.model_bridge")
    found = getattr(library, first, None)
    for name in rest:
        if found is None or (not hasattr(found, name) and name not in declared(found)):
            return False
        found = getattr(found, name, None)
    return found is not None or bool(rest)


def declared(cls: Any) -> set[str]:
    """Attributes that a class annotates, or sets in its constructor."""
    classes = [base for base in cls.__mro__ if base is not object]
    annotated = {name for base in classes for name in getattr(base, "__annotations__", {})}
    constructors = (base.__init__.__code__.co_names for base in classes if hasattr(base.__init__, "__code__"))
    return annotated.union(*constructors)


@pytest.mark.parametrize("library", LIBRARIES)
def test_names_of_ours_do_what_the_page_says(library: str, here: Path) -> None:
    names: dict[str, Any] = {}
    exec(setup("names.md"), names)
    ours = [code for _, column in rows("names.md", library) for code in column if not code.startswith("blocks.")]
    assert len(ours) > 5
    for code in ours:
        exec(f"made = {code}" if code.startswith(("model.hooks(", "model.intervene(")) else code, names)
        with names.pop("made", nullcontext()):  # a block that is never opened says so
            pass


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2"])
def test_hook_points_of_transformerlens(name: str) -> None:
    """Those that the page has beside ours are ours under another name, and exist in TransformerLens."""
    bridge, model = bridged(name), ws.HookedRecurrentModel.from_pretrained(name)
    checked = 0
    for theirs, (ours,) in (row for row in rows("names.md", "TransformerLens") if row[0][0].startswith("blocks.")):
        for alias in theirs:
            if alias.replace("N", "1") in bridge.hook_dict and ours.replace("N", "1") in model.hook_names:
                assert resolve(alias.replace("N", "1"), model.hook_names, model._aliases) == ours.replace("N", "1")
                checked += 1
    assert checked > 5
    every = [alias for row in rows("names.md", "TransformerLens") for alias in row[0] if alias.startswith("blocks.")]
    mixer = "linear_attn" if name == "tiny-gdn" else "mixer"
    of_this = [alias.replace("N", "1") for alias in every if f".{mixer}." in alias]
    assert of_this and set(of_this) <= set(bridge.hook_dict)


def bridged(name: str) -> Any:
    """A shipped model in TransformerLens."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    folder = shipped_model(name)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return bridge.boot_transformers(str(folder), hf_model=hf_model, tokenizer=tokenizer, device="cpu")


def test_the_snippet_with_nnsight(tmp_path: Path) -> None:
    """As a file: nnsight reads the source of what it traces."""
    pytest.importorskip("nnsight")
    code = next(code for _, code in blocks((DOCS / "names.md").read_text("utf-8")) if "NNsight" in code)
    (tmp_path / "snippet.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "snippet.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Guides ---------------------------------------------------------------------------------------------------------------


def test_the_guide_to_interventions_runs(here: Path) -> None:
    """Every example, each after the page's first lines; and each but the identity changes what the model says."""
    text, setting = (DOCS / "interventions.md").read_text("utf-8"), setup("interventions.md")
    examples = [code for language, code in blocks(text) if language == "python" and code != setting]
    assert len(examples) == text.count("```python") - 1 > 10
    for code in examples:
        names: dict[str, Any] = {}
        exec(setting, names)
        exec(code, names)
        for name in ("ablated", "clamped", "steered", "replaced", "several", "patched", "hidden", "edited"):
            if name in names:
                assert (names[name] - names["native"]).abs().max() > 1e-5, name


# Reference -----------------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    return [name for page in DOCS.glob("api/*.md") for name in re.findall(r"(?m)^::: (\S+)$", page.read_text("utf-8"))]


def test_every_public_name_has_a_place_in_the_reference() -> None:
    places = documented()
    assert len(set(places)) == len(places)
    missing = set(ws.__all__) - {name.rsplit(".", 1)[1] for name in places}
    assert not missing, f"put them on a page in docs/api: {sorted(missing)}"


def parameters(documentation: str) -> list[str]:
    """What the Args of a docstring name; several may share a line."""
    args = re.search(r"(?ms)^Args:\n(.*?)(?=^\S|\Z)", documentation)
    return [n for line in re.findall(r"(?m)^    (\S[^:]*):", args[1]) for n in line.split(", ")] if args else []


def wrong_parameters(function: Any) -> list[str]:
    """Those in the docstring that the function does not have."""
    has = inspect.signature(function).parameters
    return [name for name in parameters(inspect.getdoc(function) or "") if name.lstrip("*") not in has]


@pytest.mark.parametrize("name", documented())
def test_parameters_in_docstrings_exist(name: str) -> None:
    module, _, own = name.rpartition(".")
    thing = getattr(__import__(module, fromlist=[own]), own)
    members = [f for _, f in inspect.getmembers(thing, inspect.isroutine)] if inspect.isclass(thing) else []
    for function in [thing, *members]:
        if (getattr(function, "__module__", None) or "").startswith("writesae"):
            assert wrong_parameters(function) == [], function


def test_a_parameter_that_does_not_exist_is_found() -> None:
    def function(one: int, two: int) -> None:
        """Do.

        Args:
            one, three: numbers.
                Of some size: any.
            two: a number.

        Raises:
            four: never.
        """

    assert parameters(inspect.getdoc(function) or "") == ["one", "three", "two"]
    assert wrong_parameters(function) == ["three"]


# The site ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: strict would then count no warnings, so that links which lead nowhere pass.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, page: str):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag != "a" and given.get("rel") != "canonical":
            self.addresses += [value for name, value in given.items() if name in ("src", "href", "srcset") and value]


def remote(folder: Path) -> set[str]:
    """What pages and styles in a folder would fetch from elsewhere."""
    found = [address for page in folder.rglob("*.html") for address in Fetched(page.read_text("utf-8")).addresses]
    for style in folder.rglob("*.css"):
        found += re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", style.read_text("utf-8"))
    return {address for address in found if re.match(r"(https?:)?//", address)}


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    assert not remote(site)


def test_what_is_fetched_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://x.org/1">x</a><script src="//x.org/2"></script><img src="3.png">'
    )
    (tmp_path / "b.css").write_text("@import 'https://x.org/4'; i {background: url(https://x.org/5)}")
    assert remote(tmp_path) == {"//x.org/2", "https://x.org/4", "https://x.org/5"}


def test_pages_made_from_elsewhere(site: Path) -> None:
    """README at home, its links leading to pages; tutorials with pictures and formulas; the command line."""
    home = (site / "index.html").read_text("utf-8")
    assert "Ten lines" in home and 'href="results/"' in home and 'href="zoo/"' in home
    for notebook in ROOT.glob("tutorials/*.ipynb"):
        page = (site / "tutorials" / notebook.stem / "index.html").read_text("utf-8")
        assert f'href="tutorials/{notebook.stem}/"' in home, "not in the navigation"
        pictures = re.findall(r'src="([^"]+\.png)"', page)
        assert all((site / "tutorials" / notebook.stem / picture).is_file() for picture in pictures)
        assert len(pictures) == notebook.read_text("utf-8").count('"image/png"') and "arithmatex" not in page
    commands = (site / "cli" / "index.html").read_text("utf-8")
    for command in app.registered_commands:
        assert command.callback and f"<code>writesae {command.callback.__name__}</code>" in commands
    assert "[bold]" not in commands
    assert "positions count from 0" in (site / "search" / "search_index.json").read_text("utf-8")


@pytest.mark.parametrize(("page", "path"), [("model", "model.HookedRecurrentModel"), ("saes", "saes.WriteSAE")])
def test_methods_are_in_the_reference_wherever_they_are_defined(site: Path, page: str, path: str) -> None:
    shown = (site / "api" / page / "index.html").read_text("utf-8")
    methods = inspect.getmembers(getattr(ws, path.split(".")[1]), inspect.isroutine)
    own = [name for name, f in methods if name[0] != "_" and f.__module__.startswith("writesae") and f.__doc__]
    assert len(own) > 10
    assert [name for name in own if f'id="writesae.{path}.{name}"' not in shown] == []


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """Address of the site on this machine; its search needs a server."""
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    "word",
    ["ablate", "clamp", "circuit", "patching", "steering", "explained variance", "GPU", "Colab", "cite", "glossary"],
)
def test_the_search_finds(site: Path, word: str) -> None:
    """In the index that the site's search reads; a word that is nowhere is not found."""
    entries = json.loads((site / "search" / "search_index.json").read_text("utf-8"))["docs"]
    found = lambda word: [e for e in entries if word.lower() in f"{e['title']} {e['text']}".lower()]  # noqa: E731
    assert found(word) and not found("no such word anywhere")


def test_the_site_in_a_browser(served: str) -> None:
    """It is all there without a network, and a message leads to its page."""
    with chromium() as browser:
        watched = watch(browser)
        for address in (
            "",
            "errors/",
            "errors/positions/",
            "concepts/",
            "benchmarks/",
            "api/model/",
            "tutorials/1_look_inside/",
        ):
            watched.page.goto(served + address, wait_until="networkidle")
            assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than its window"
        watched.page.get_by_role("textbox", name="Search").press_sequentially("positions count from 0")
        found = watched.page.locator("a[href*='errors/positions/?'][href*='positions-count-from-0']").first
        watched.page.goto(found.get_attribute("href") or "")  # a click may meet a list that is made anew
        assert "/errors/positions/" in watched.page.url
        assert watched.page.locator("#positions-count-from-0-at-the-first-token").count() == 1
        assert watched.errors == [] and [url for url in watched.requests if not url.startswith((served, "data:"))] == []
