"""The command line, as a user types it."""

import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import writesae.cli
from writesae.cli import app
from writesae.cli._shared import plainly
from writesae.jobs.disk import read_json
from writesae.zoo import heldout_documents, shipped_models, shipped_saes

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
        "serve",
        "explain",
        "reproduce",
        "convert",
    ]
    places = [runner.invoke(app, ["--help"]).output.index(f" {name} ") for name in found]
    assert places == sorted(places)


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.name)
def test_help_says_all_of_the_docstring(command):
    """Brackets are no markup, and paragraphs do not end where lines of the source do."""
    words = " ".join((command.callback.__doc__ or "").split())
    narrow = runner.invoke(app, [command.name, "--help"], env={"COLUMNS": "80"}).output
    assert words in " ".join(narrow.split())
    lines = [line.rstrip() for line in narrow.split("\u256d")[0].splitlines()]
    short = [line for line, after in pairwise(lines) if line and after and len(line) < 60]
    assert not short, "a line ended before its words reached the margin"


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


def test_records_in_a_file(tmp_path):
    """What a command shows as tables, as JSON."""
    text = tmp_path / "text.txt"
    text.write_text("The state of the Union is strong.")
    assert runner.invoke(app, ["hooks", "tiny-gdn", "--json", str(tmp_path / "hooks.json")]).exit_code == 0
    found = read_json(tmp_path / "hooks.json")
    assert found["layers"][0] | {"rule": ""} == {"layer": 0, "n_heads": 4, "d_key": 32, "d_value": 32, "rule": ""}
    assert found["names"][0] == "blocks.0.hook_resid_pre" and {"name", "shape", "what"} == set(found["hook_points"][0])
    command = ["contexts", "tiny-gdn/L2H1", "--text", str(text), "--json", str(tmp_path / "contexts.json")]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    found = read_json(tmp_path / "contexts.json")
    assert found["n_tokens"] > 5 and any(atom["contexts"] for atom in found["atoms"])


def test_every_command_with_a_result_has_json(tmp_path):
    """And a folder of that name is refused before anything is loaded; `serve`, which has none, says so."""
    for command in app.registered_commands:
        name = command.name or ""
        said = " ".join(runner.invoke(app, [name, "--help"]).output.split())
        if name == "serve":
            assert "no --json, since it has no result" in said
            continue
        needed = {"convert": ["x", "y"], "evaluate": ["x", "y"], "extract": ["x", "y"], "train": ["x", "y"]}
        result = runner.invoke(app, [name, *needed.get(name, ["x"]), "--json", str(tmp_path)])
        assert "--json" in said and result.exit_code == 2 and "directory" in result.output, name


def test_what_a_store_pages_and_a_report_are_as_records(tmp_path):
    """Each command's own numbers; also of a run that only finds everything done."""
    text, store, found = tmp_path / "text.txt", tmp_path / "store", tmp_path / "found.json"
    text.write_text("\n".join(heldout_documents()[:3]))

    def records(*command: str):
        result = runner.invoke(app, [*command, "--json", str(found)])
        assert result.exit_code == 0, result.output
        return read_json(found)

    extract = "extract", "tiny-gdn", str(store), "--site", "2.1", "--text", str(text), "--context", "64"
    first = records(*extract)
    assert first["sites"] == ["2.1"] and first["n_sequences"] > 3 and first["report"]["state_error"]["2.1"]["max"] < 0.1
    assert records(*extract) == first
    rows = records("pages", "tiny-gdn/L2H1", "--text", str(text), "--out", str(tmp_path / "site"), "--atoms", "0")
    assert [row["atom"] for row in rows["atoms"]] == list(range(2048)) and Path(rows["index"]).is_file()
    told = records(
        "reproduce", "--model", "tiny-gdn", "--only", "logit_change", "--quick", "--text", str(text),
        "--out", str(tmp_path / "report"),
    )  # fmt: skip
    assert {outcome["experiment"] for outcome in told["outcomes"]} == {"logit_change"}
    assert all(outcome["numbers"] and Path(outcome["folder"]).is_dir() for outcome in told["outcomes"])


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"writesae {version('writesae')}\n"


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [("--target", "writ", "write"), ("--variant", "Tied", "TiedSAE"), ("--sparsity", "top_k", "topk")],
)
def test_a_wrong_name_is_said_before_a_model_is_looked_for(option, value, meant, tmp_path):
    command = ["train", "no-such-model", str(tmp_path), "--text", "no-such-text", "--site", "0.0", option, value]
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert repr(value) in result.output and f"did you mean {meant!r}" in result.output
    assert "no-such" not in result.output


def test_a_training_that_ended_says_so_and_its_folder_whole(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(heldout_documents()[:4]))
    out = tmp_path / ("long" * 20)
    command = ["train", "tiny-gdn", str(out), "--text", str(text), "--site", "2.0", "--context", "64"]
    command += ["--atoms", "16", "--steps", "3", "--max-tokens", "4000", "--json", str(tmp_path / "numbers.json")]
    narrow = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    first, again = narrow.invoke(app, command), narrow.invoke(app, command)
    assert first.exit_code == again.exit_code == 0, first.output
    assert str(out / "L2H0") in first.output, "the folder must not be cut or wrapped"
    assert read_json(tmp_path / "numbers.json")["2.0"]["steps"] == 3
    assert "trained already" in again.output and "trained already" not in first.output


def test_ctrl_c_says_what_goes_on(capsys):
    for goes_on in (True, False):
        with pytest.raises(typer.Exit) as stopped, plainly(goes_on):
            raise KeyboardInterrupt("training stopped: L2H0 after step 3 of 9")
        assert stopped.value.exit_code == 130
        said = " ".join(capsys.readouterr().err.split())
        assert "after step 3 of 9" in said and ("the same command goes on" in said) == goes_on


@pytest.mark.parametrize("command", [["hooks", "no-such-model"], ["demo", "--model", "no-such-model"]])
def test_an_unknown_model_is_one_clear_line(command):
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert "no-such-model" in result.output and "tiny-gdn" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("model", shipped_models())
def test_demo_runs_and_leaves_a_picture(model, tmp_path):
    picture, kept = tmp_path / "demo.png", ["--json", str(tmp_path / "demo.json")]
    result = runner.invoke(app, ["demo", "--model", model, "--firings", "12", "--picture", str(picture), *kept])
    assert result.exit_code == 0, result.output
    found = read_json(tmp_path / "demo.json")
    assert found["model"] == model and len(found["replaced"]) == len(shipped_saes(model))
    said = {row["done"]: row["says"] for row in found["changed"]}
    kept, moved = (next(says for done, says in said.items() if text in done) for text in ("atom", "Robert's atom"))
    assert said["nothing"] == kept == " Henry" and moved == " Robert", "an atom holds a name"
    parts = ("bits per byte", "holds the name", "deleted", "exchanged", "random", "an atom", "Planted", "Done in")
    for part in parts:
        assert part in result.output
    assert max(map(len, result.output.splitlines())) <= 80 + len(str(picture)), "wider than a terminal"
    assert picture.read_bytes().startswith(b"\x89PNG")
