"""What is installed: everything under writesae/, nothing else, and no more packages than it needs."""

from __future__ import annotations

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
    assert f"{about}/licenses/LICENSE" in wheel.namelist()
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
