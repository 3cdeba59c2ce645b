"""What is installed: everything under writesae/, nothing else, and no more packages than it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from writesae.jobs.extras import EXTRAS, MissingExtra, extra

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


PLAIN = """
import sys
from writesae.jobs.extras import EXTRAS
others = ["sae_lens", "transformer_lens", "nnsight", "peft", "rwkv", "fla", "beartype", "playwright"]
sys.modules.update(dict.fromkeys([*EXTRAS, *others]))  # importing one of these is now an error
"""


def plainly_installed(code: str, folder: Path) -> str:
    """What code prints in a process that has no package of an extra."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-c", PLAIN + code], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ten_lines() -> str:
    found = re.search(r"(?ms)^## Ten lines\n\n```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"))
    assert found
    return found[1]


def test_a_plain_install_suffices_to_import(tmp_path: Path) -> None:
    """No module that everybody loads needs a package of an extra."""
    plainly_installed(
        "import writesae as ws\n"
        "for name in ws.__all__: getattr(ws, name)\n"
        "from typer.testing import CliRunner; from writesae.cli import app\n"
        "assert CliRunner().invoke(app, ['hooks', 'tiny-gdn']).exit_code == 0",
        tmp_path,
    )


def test_a_plain_install_edits_trains_and_attributes(tmp_path: Path) -> None:
    """And what shows tables and plots says which extra it needs; the same code with them must not."""
    code = (
        ten_lines()
        + """
from writesae.jobs.extras import MissingExtra
from writesae.zoo import heldout_documents
texts = heldout_documents()[:6]
trained = ws.train_site(model, texts, layer=2, head=0, n_atoms=16, steps=3, context=64, progress=False)
assert ws.top_contexts(model, sae, texts, n=2).most_frequent(1)
ws.record(model, model.to_tokens(texts[0])[0][:, :64], [(2, 1)])
text = story.format("Henry")
number = ws.Logit(" Robert", minus=" Henry")
made = [
    ws.attribute(model, text, " Henry"), ws.direct_attribution(model, text, number), ws.logit_lens(model, text[:60]),
    ws.patching(model, story.format("Robert"), text, number, "write"), ws.memory_length(model, texts, max_tokens=2000),
    ws.evaluate(model, [sae], texts, max_tokens=2000),
]
for result in made:
    assert result.numbers(), result
    result.table()
ws.gradient(model, text, number), ws.circuit(model, text, number)
assert ws.replacement_test(model, sae, texts, n_firings=8).wins("atom", "delete").n == 8
for result in made:
    for name, extra in (("plot", "plots"), ("records", "stats")):
        try:
            getattr(result, name)()
            raise SystemExit(f"{type(result).__name__}.{name}() needs no extra")
        except MissingExtra as error:
            assert f"[{extra}]" in str(error) and f"pip install 'writesae[{extra}]'" in str(error), error
for needs, call in {
    "stats": lambda: ws.atom_classes(model, sae, texts), "plots": lambda: ws.reproduce(model, [sae], texts, "report"),
}.items():
    try:
        call()
        raise SystemExit(f"{needs} is not asked for")
    except MissingExtra as error:
        assert f"[{needs}]" in str(error)
"""
    )
    assert "Robert" in plainly_installed(code, tmp_path)


def test_what_an_extra_is_for_is_known_of_each_package() -> None:
    """`EXTRAS` says where pyproject.toml has a package, and the error of a package that is there is left as it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    distribution = {"sklearn": "scikit-learn"}
    for package, name in EXTRAS.items():
        listed = [re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"][name]]
        assert distribution.get(package, package) in listed
    always = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    assert not always & {distribution.get(package, package) for package in EXTRAS}
    with pytest.raises(ModuleNotFoundError, match=r"scipy\.nothing") as error:
        extra("scipy.nothing")
    assert not isinstance(error.value, MissingExtra)


def test_the_demo_without_matplotlib_says_so_and_goes_on(tmp_path: Path) -> None:
    code = "from writesae.cli import app; app(['demo', '--firings', '8'])"
    said = " ".join(plainly_installed(code, tmp_path).split())
    assert "No picture: this needs matplotlib" in said and "writesae[plots]" in said and "Done in" in said
    assert not list(tmp_path.glob("*.png"))


def test_the_weight_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Nearly all of it are the shipped models and SAEs, which the demo needs; code and recipes are a small part."""
    size = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    shipped = sum(n for name, n in size.items() if name.endswith((".safetensors", "tokenizer.json", "heldout.txt")))
    assert sum(size.values()) < 15e6
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
    start = 'python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e ".[all]"'
    assert f"{start} && writesae demo" in readme and 'pip install -c constraints.txt -e ".[test]" && pytest' in readme
    assert len([line for line in ten_lines().splitlines() if line]) <= 12
