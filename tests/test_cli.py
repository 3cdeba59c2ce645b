"""The command line, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import writesae.cli
from writesae.cli import app
from writesae.zoo import shipped_models

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})


def test_help_names_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output and "hooks" in result.output


def test_a_file_is_a_command():
    """Nothing else lists them, so that a new one is one file; --help keeps their order."""
    files = {path.stem for path in Path(writesae.cli.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    found = [command.name for command in app.registered_commands]
    assert set(found) == files
    assert found == [
        "demo",
        "hooks",
        "check",
        "extract",
        "train",
        "evaluate",
        "contexts",
        "pages",
        "explain",
        "reproduce",
        "convert",
    ]
    places = [runner.invoke(app, ["--help"]).output.index(f" {name} ") for name in found]
    assert places == sorted(places)


def test_help_does_not_wait_for_torch():
    code = "import sys, writesae.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_hooks_lists_sites_and_names():
    result = runner.invoke(app, ["hooks", "tiny-gdn"])
    assert result.exit_code == 0
    assert "gated_delta" in result.output and "blocks.{layer}.mixer.hook_k" in result.output
    assert "[batch, pos, head, d_key]" in result.output, "shapes must not be taken for markup"
    result = runner.invoke(app, ["hooks", "tiny-gdn", "--names"])
    assert result.output.splitlines()[:2] == ["blocks.0.hook_resid_pre", "blocks.0.mixer.hook_q_raw"]


@pytest.mark.parametrize("command", [["hooks", "no-such-model"], ["demo", "--model", "no-such-model"]])
def test_an_unknown_model_is_one_clear_line(command):
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert "no-such-model" in result.output and "tiny-gdn" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("model", shipped_models())
def test_demo_runs_and_leaves_a_picture(model, tmp_path):
    picture = tmp_path / "demo.png"
    result = runner.invoke(app, ["demo", "--model", model, "--firings", "12", "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    for part in ("bits per byte", "writes at each token", "Replacement test", "beats deletion", "Steering", "Done in"):
        assert part in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
