"""Pages of the site that are made from what lies elsewhere: README, the zoo's README, tutorials, the command line.

mkdocs calls the functions named ``on_...`` (mkdocs.yml has this file under ``hooks``). Links in the sources stay those
of the repository, so that the same files read well there; here they are turned into links of the site.
"""

from __future__ import annotations

import html
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

from latex2mathml.converter import convert as mathml
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
READMES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
    "tutorials/README.md": "tutorials/index.md",
    "writesae/zoo/README.md": "zoo.md",
}
LINK = re.compile(r"""(\]\(|src(?:set)?=")([^)"#\s:]+)""")  # Markdown, <img>, <source>; a colon: an address


def notebooks() -> list[str]:
    by_number = sorted(ROOT.glob("tutorials/*.ipynb"), key=lambda path: int(path.stem.partition("_")[0]))
    return [path.relative_to(ROOT).as_posix() for path in by_number]


def pages() -> dict[str, str]:
    """Page of the site for each file of the repository that is one, beside those in this folder."""
    return READMES | {name: str(Path(name).with_suffix(".md")) for name in notebooks()}


@event_priority(100)  # before mkdocstrings, which takes the extensions over for docstrings
def on_config(config: Any) -> Any:
    """The tutorials in the navigation are those that are there; examples in docstrings are shown as code."""
    for entry in config.nav:
        if "Tutorials" in entry:
            entry["Tutorials"] += [pages()[name] for name in notebooks()]
    config.markdown_extensions.append(Doctests())
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, page in READMES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for source in notebooks():
        for page, content in of_notebook(source):
            files.append(File.generated(config, page, content=content))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository, as links between pages."""
    uri = page.file.src_uri
    source = {there: here for here, there in pages().items()}.get(uri, f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = f"{target}/README.md" if (ROOT / target).is_dir() else target  # which GitHub shows with a folder
        there = pages().get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if there is None:
            return match[0]  # mkdocs warns of it, if it is meant as a link
        return match[1] + posixpath.relpath(there, posixpath.dirname(uri) or ".")

    return LINK.sub(link, markdown)


def on_page_content(content: str, **_: Any) -> str:
    r"""Formulas as MathML, which browsers set themselves, in place of arithmatex's \(...\) and \[...\]."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return mathml(html.unescape(match[2].strip()[2:-2]), display=display)

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)


def of_notebook(source: str) -> Iterator[tuple[str, str | bytes]]:
    """A notebook's page, and its pictures; as it was saved, nothing is run."""
    name = Path(source).stem
    keep = {"unique_key": name, "output_files_dir": f"{name}_files"}
    body, found = MarkdownExporter().from_filename(str(ROOT / source), resources=keep)
    yield pages()[source], re.sub(r"\n(?: *\n){3,}(?=    )", "\n\n", body)  # between outputs of one cell
    for picture, data in found["outputs"].items():
        yield f"tutorials/{picture}", data


def command_line() -> str:
    """What ``writesae --help`` and the help of its commands say."""
    run = [
        sys.executable,
        "-m",
        "typer",
        "writesae.cli",
        "utils",
        "docs",
        "--name",
        "writesae",
        "--title",
        "Command line",
    ]
    text = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = re.sub(r"\[/?bold\]", "", html.unescape(text)).replace("\\[", "[")
    head, *commands = re.split(r"(?m)^(?=## )", text)
    head = re.sub(r"(?ms)^\*\*(Usage|Options|Commands)\*\*.*?(?=^\*\*|^Start|\Z)", "", head)
    return "\n\n".join([head, *commands])


class Doctests(Extension, Preprocessor):
    """Lines that begin with >>>, up to the next empty one, are code; Markdown would quote them three times."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(self, "doctests", 28)  # before fences, at 25, are looked for

    def run(self, lines: list[str]) -> list[str]:
        fenced = lambda match: match[0] if match[0][0] == "`" else f"```pycon\n{dedent(match[0])}\n```"  # noqa: E731
        return re.sub(r"(?ms)^```.*?^```|^ *>>> .+?(?=\n\n|\Z)", fenced, "\n".join(lines)).split("\n")
