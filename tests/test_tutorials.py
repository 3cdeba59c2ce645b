"""The notebooks as they are kept, without running them (CI does): whole, executed, clean, and readable on GitHub."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"), key=lambda path: int(path.stem.partition("_")[0]))
WIDTH = 100  # characters of code that a page shows without scrolling
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def faults(notebook: Any) -> list[str]:
    """What must not be in a notebook that is shown with its outputs."""
    found = []
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("another kernel than python3")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("cells that were not run in order, from a new kernel")
    for cell in notebook.cells:
        if cell.metadata:
            found.append(f"{cell.id} has metadata: {dict(cell.metadata)}")
        if cell.cell_type != "code":
            continue
        found += [f"{cell.id} has a line of over {WIDTH}" for line in cell.source.splitlines() if len(line) > WIDTH]
        for output in cell.outputs:
            text = json.dumps(output)
            if output.output_type == "error":
                found.append(f"{cell.id} ends in {output.ename}")
            if output.get("name") == "stderr":
                found.append(f"{cell.id} writes to stderr: {output.text[:80]}")
            if "application/vnd.jupyter.widget-view+json" in text:
                found.append(f"{cell.id} shows a progress bar, which is nothing in a kept notebook")
            if match := re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|var|opt)/", text):
                found.append(f"{cell.id} shows a path of the machine, {match[0]}")
            if re.search(r"<Figure size [^>]+>", text) and "image/png" not in text:
                found.append(f"{cell.id} names a figure and does not show it")
    return found


def test_there_are_eleven_in_order() -> None:
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == [str(i) for i in range(1, 12)]


@each
def test_is_whole_and_clean(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert path.stat().st_size < 600_000


def test_faults_are_found() -> None:
    """Each of the checks above, on a notebook that has the fault."""
    v4 = nbformat.v4
    bad = {
        "another kernel": lambda nb: nb.metadata.kernelspec.update(name="mine"),
        "not run in order": lambda nb: nb.cells[1].update(execution_count=3),
        "has metadata": lambda nb: nb.cells[0].metadata.update(trusted=True),
        "a line of over": lambda nb: nb.cells[1].update(source="x = 1  #" + WIDTH * "-"),
        "ends in ValueError": lambda nb: nb.cells[1].outputs.append(v4.new_output("error", ename="ValueError")),
        "stderr": lambda nb: nb.cells[1].outputs.append(v4.new_output("stream", name="stderr", text="UserWarning")),
        "progress bar": lambda nb: nb.cells[1].outputs.append(
            v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
        ),
        "path of the machine": lambda nb: nb.cells[1].outputs.append(
            v4.new_output("stream", text='File "/home/me/a.py"')
        ),
        "does not show it": lambda nb: nb.cells[1].outputs.append(
            v4.new_output("execute_result", {"text/plain": "<Figure size 640x480 with 1 Axes>"})
        ),
    }
    for what, spoil in bad.items():
        cells = [v4.new_markdown_cell("# A"), v4.new_code_cell("x = 1", execution_count=1)]
        notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python"}})
        assert faults(notebook) == []
        spoil(notebook)
        assert [fault for fault in faults(notebook) if what in fault], what


@each
def test_begins_with_a_title_and_what_it_teaches(path: Path) -> None:
    title, about = (block for block in read(path).cells[0].source.split("\n\n")[:2])
    assert re.fullmatch(rf"# {path.stem.partition('_')[0]}\. \S.*", title)
    assert about.startswith("**What you will learn.** ") and len(about) > 150


@each
def test_shows_pictures_and_explains_itself(path: Path) -> None:
    cells = read(path).cells
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    assert pictures >= 2
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert len(prose) > len(cells) / 4
    assert ("Next:" in prose[-1]) != (path == NOTEBOOKS[-1])


@each
def test_links_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
                assert (path.parent / target).exists(), target


def test_the_table_of_contents() -> None:
    """Titles and files in tutorials/README.md are those of the notebooks."""
    rows = re.findall(r"^\| (\d+) \| \[(.+?)\]\((.+?)\)", (FOLDER / "README.md").read_text(), flags=re.M)
    titles = [read(path).cells[0].source.splitlines()[0] for path in NOTEBOOKS]
    assert [(f"# {number}. {title}", name) for number, title, name in rows] == [
        (title, path.name) for title, path in zip(titles, NOTEBOOKS, strict=True)
    ]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_the_library_exist() -> None:
    """Every `ws.name` in code and prose is one."""
    import writesae as ws

    used = {name for path in NOTEBOOKS for name in re.findall(r"\bws\.([A-Za-z_]\w*)", path.read_text())}
    assert len(used) > 20 and sorted(name for name in used if not hasattr(ws, name)) == []
