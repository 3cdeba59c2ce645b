"""The examples of docs/extending.md, run as a user would: in a folder of their own, where only the package is known.

Under each heading the first block is a module, named in its first comment (``# my_sparsity.py``); those that follow are
scripts that use it. They assert what they say.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs_pages import DOCS

PAGE = (DOCS / "extending.md").read_text("utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}


def blocks(section: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.M | re.S)


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_example(section: str, tmp_path: Path) -> None:
    module, *scripts = blocks(section)
    name = re.match(r"# (my_\w+\.py)\n", module)
    assert name and scripts, "a module, named in its first comment, and a script that uses it"
    (tmp_path / name[1]).write_text(module)
    for script in scripts:
        ran = run(tmp_path, script)
        assert ran.returncode == 0, ran.stderr
        assert "assert" in script


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_of_it_is_in_the_package(section: str, tmp_path: Path) -> None:
    """The twin: without the module, the script fails."""
    _, *scripts = blocks(section)
    ran = run(tmp_path, scripts[0])
    assert ran.returncode != 0 and "No module named 'my_" in ran.stderr
