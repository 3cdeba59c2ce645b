"""What is installed: everything under writesae/, nothing else, and no more packages than it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = (path.relative_to(ROOT) for path in (ROOT / "writesae").rglob("*") if path.is_file())
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    for kind in ("py.typed", "zoo/heldout.txt", "zoo/tiny-rwkv7/model.safetensors", "pages/templates/atom.html"):
        assert f"writesae/{kind}" in found


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    about = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    read = lambda name: wheel.read(f"{about}/{name}").decode()  # noqa: E731
    metadata, project = Parser().parsestr(read("METADATA")), tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "writesae = writesae.cli:app" in read("entry_points.txt")
    assert {f"{about}/licenses/LICENSE", f"{about}/licenses/NOTICE"} <= set(wheel.namelist())
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["project"]["optional-dependencies"])
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(always) == len(project["project"]["dependencies"])


def test_a_plain_install_suffices_to_import() -> None:
    """No module that everybody loads needs a package of an extra."""
    extras = ["sae_lens", "transformer_lens", "nnsight", "peft", "datasets", "rwkv", "fla", "beartype", "playwright"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"  # importing one of these is now an error
        "import writesae as ws\n"
        "for name in ws.__all__: getattr(ws, name)\n"
        "from typer.testing import CliRunner; from writesae.cli import app\n"
        "assert CliRunner().invoke(app, ['hooks', 'tiny-gdn']).exit_code == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_weight_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Nearly all of it are the shipped models and SAEs, which the demo needs; code and recipes are a small part."""
    size = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    shipped = sum(n for name, n in size.items() if name.endswith((".safetensors", "tokenizer.json", "heldout.txt")))
    assert sum(size.values()) < 14.5e6
    assert sum(size.values()) - shipped < 0.75e6


def test_the_import_is_quick_and_loads_no_torch() -> None:
    """Seconds of CPU time, the least of five processes; the time on the wall depends on what else runs."""
    code = (
        "import sys, time; start = time.process_time(); import writesae; used = time.process_time() - start\n"
        "assert not {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules), 'torch and its kin come later'\n"
        "print(used)"
    )
    run = [sys.executable, "-c", code]
    used = [float(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout) for _ in range(5)]
    assert min(used) < 0.3


def test_the_version_stands_in_one_place() -> None:
    """In pyproject.toml; what a user asks for is what was installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    code = "import importlib.metadata as m, writesae; assert writesae.__version__ == m.version('writesae')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for path in (ROOT / "writesae").rglob("*.py"):
        assert f'"{project["version"]}"' not in path.read_text("utf-8"), path
    assert not any(line.startswith("version:") for line in (ROOT / "CITATION.cff").read_text("utf-8").splitlines())


def test_readme_is_one_page_and_has_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    start = "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e . && writesae demo"
    assert start in readme and 'pip install -c constraints.txt -e ".[test]" && pytest' in readme
    code = re.search(r"(?ms)^## Ten lines\n\n```python\n(.*?)^```", readme)
    assert code and len([line for line in code[1].splitlines() if line]) <= 12
