"""Labels of atoms that are known, by a real server on the loopback."""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import chat_server
import planted
import writesae as ws
from browser import chromium, watch
from chat_server import Handler, oracle
from writesae.cli import app
from writesae.explaining.examples import gather
from writesae.explaining.prompts import NoAnswer, answers_reader, marked, read_label, strong
from writesae.pages.survey import cut_windows, survey

KEY = "sk-this-is-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):
        monkeypatch.setattr(f"openai._base_client.{name}", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def explained(url: str, **given) -> ws.Labels:
    server = ws.ChatServer(
        url, "oracle", **{name: given.pop(name) for name in ("timeout", "tries", "at_once") if name in given}
    )
    given = {"atoms": [0, 1, 2], "width": 16} | given
    return ws.explain(planted.model(), planted.sae(), torch.stack(planted.texts()), server, **given)


def right(labels: ws.Labels) -> bool:
    return all(labels[atom].text == f'the word "{name}"' for atom, name in enumerate(planted.NAMES))


def shares(labels: ws.Labels) -> list[float]:
    return [x.balanced_accuracy for atom in labels for x in (labels[atom].detection, labels[atom].fuzzing) if x]


# --- planted atoms ----------------------------------------------------------------------------------------------------


def test_labels_of_planted_atoms_are_right_and_score_high(tmp_path):
    with oracle() as server:
        labels = explained(server.url, out=tmp_path / "labels.json")
    assert right(labels) and len(shares(labels)) == 6
    assert min(shares(labels)) >= 0.95
    assert all(key == f"Bearer {KEY}" for key in server.keys)
    again = ws.Labels.load(tmp_path / "labels.json", planted.sae())
    assert again.atoms == labels.atoms and again.by == "oracle"


def test_labels_of_other_atoms_score_as_chance(tmp_path):
    """The twin: the same contexts and the same judge, each label with another atom."""
    out = tmp_path / "labels.json"
    with oracle() as server:
        labels = explained(server.url, out=out, scores=False)
        assert shares(labels) == []
        labels.atoms = {atom: labels[(atom + 1) % 3] for atom in labels}
        labels.save(out)
        n = server.n
        turned = explained(server.url, out=out)
    assert server.n == n + 3 * 2 * 8, "labels that are there are not asked for again"
    assert not right(turned) and len(shares(turned)) == 6
    assert sum(shares(turned)) / 6 == pytest.approx(0.5, abs=0.12)


def test_examples_are_what_the_model_does():
    model, sae = planted.model(), planted.sae()
    windows = cut_windows(model, torch.stack(planted.texts()))
    found = survey(model, sae, windows)
    given = {"width": 16, "n_shown": 8, "n_counter": 3, "n_test": 6}
    for atom, one in enumerate(gather(model, sae, windows, found, [0, 1], **given)):
        name = planted.NAMES[atom]
        assert [len(x) for x in (one.shown, one.counter, one.active)] == [8, 3, 6] and len(one.inactive) >= 6
        for example in (*one.shown, *one.active):
            fires = [x > 0 for x in example.activations]
            assert fires == [token == planted.token(name) for token in example.ids] and any(fires)
            assert set(re.findall(r"<<(.*?)>>", marked(example, strong(example)))) <= {f" {name}", f" {name} {name}"}
        assert all(x == 0 for example in (*one.counter, *one.inactive) for x in example.activations)
        assert [x.peak for x in one.shown] == sorted((x.peak for x in one.shown), reverse=True)
        assert {x.quantile for x in one.active} == {0, 1, 2, 3}
        assert not set(one.shown) & set(one.active) and not set(one.counter) & set(one.inactive)
        alone = model.encode(sae, planted.texts()[0])
        assert one.largest >= float(alone.values[alone.indices == atom].max())


# --- a server that misbehaves -----------------------------------------------------------------------------------------


def nonsense(handler: Handler, number: int) -> bool:
    if number % 3 == 0:
        handler.answer("Well, I think that ...")
    return number % 3 == 0


def too_long(handler: Handler, number: int) -> bool:
    if number % 3 == 0:
        handler.answer('{"label": "' + 400 * "very " + '"}', "stop" if number % 2 else "length")
    return number % 3 == 0


def no_completion(handler: Handler, number: int) -> bool:
    if number % 3 == 0:
        handler.send(200, {"choices": []})
    return number % 3 == 0


def dropped(handler: Handler, number: int) -> bool:
    if number % 3 == 0:
        chat_server.drop(handler)
    return number % 3 == 0


def busy(handler: Handler, number: int) -> bool:
    if number % 3 == 0:
        handler.send(429 if number % 2 else 500, {"error": "busy"}, Retry_After="0.02")
    return number % 3 == 0


def slow(handler: Handler, number: int) -> bool:
    if number % 40 == 9:
        chat_server.sleep(4.0)
    return False


@pytest.mark.parametrize("fault", [nonsense, too_long, no_completion, dropped, busy, slow])
def test_what_goes_wrong_is_asked_again(fault):
    with oracle(fault) as server:
        labels = explained(server.url, timeout=2.0, at_once=1, tested=10)
    assert right(labels) and min(shares(labels)) >= 0.9
    assert server.n > 3 + 3 * 2 * 4, "nothing went wrong"


def test_a_server_that_says_nothing_of_use_is_said(tmp_path):
    out = tmp_path / "labels.json"
    with oracle(lambda handler, number: handler.answer("no") or True) as server:
        labels = explained(server.url, out=out)
    assert all(labels[i].text is None and "no label: no JSON: 'no'" in str(labels[i].problem) for i in range(3))
    with oracle() as server:
        assert right(explained(server.url, out=out)), "asked again by the next call"


def test_a_server_that_goes_away_loses_nothing(tmp_path):
    out = tmp_path / "labels.json"

    def gone(handler: Handler, number: int) -> bool:
        if number > 20:
            handler.send(503, {})
        return number > 20

    with oracle(gone) as server, pytest.raises(ConnectionError, match=r"no answer in 2 tries .*503.*is kept"):
        explained(server.url, out=out, tries=2)
    there = ws.Labels.load(out, planted.sae())
    assert len(there) == 3 and right(there)
    with oracle() as server:
        labels = explained(server.url, out=out)
        n = server.n
        assert min(shares(labels)) >= 0.95 and len(shares(labels)) == 6
        explained(server.url, out=out)
    assert server.n == n and n <= 3 * 2 * 8, "what is there was asked again"


def test_errors_say_the_fix(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match=r"no server answers at .*--base-url"):
        explained(nobody)
    with pytest.raises(ValueError, match="is no address; for instance"):
        ws.ChatServer("localhost:8000", "m")
    for status, words in ((401, "OPENAI_API_KEY, was refused"), (404, "check the model's name")):
        fault = lambda handler, number, status=status: handler.send(status, {"you sent": KEY}) or True  # noqa: E731
        with oracle(fault) as server, pytest.raises(ValueError, match=words) as error:
            explained(server.url)
        assert KEY not in str(error.value)
    with oracle() as server:
        explained(server.url, out=tmp_path / "x.json", atoms=[0], scores=False)
        with pytest.raises(ValueError, match="begun otherwise: width 16 there, 8 now"):
            explained(server.url, out=tmp_path / "x.json", width=8)
        with pytest.raises(IndexError):
            explained(server.url, atoms=[4])
    other = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
    with pytest.raises(ValueError, match=r"labels of another SAE .*give the file of this SAE"):
        ws.Labels.load(tmp_path / "x.json", other)
    text = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(text.replace("the word", "the wort"))
    with pytest.raises(ValueError, match="was altered"):
        ws.Labels.load(tmp_path / "x.json")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'writesae\[explain\]'"):
        ws.ChatServer("http://localhost:8000/v1", "m")


def test_an_atom_that_never_fires_is_said():
    with oracle() as server:
        labels = explained(server.url, atoms=[3])
    assert server.n == 0 and labels[3].text is None and "too few contexts" in str(labels[3].problem)


def test_dry_run_asks_nobody():
    said = []
    with oracle() as server:
        assert len(explained(server.url, dry_run=True, say=said.append)) == 0
        assert server.n == 0
        explained(server.url)
    assert f"3 atoms to label with oracle: {server.n} calls with about" in said[0]
    characters = sum(len(m["content"]) for body in server.seen for m in body["messages"])
    tokens = int(said[0].split("about ")[1].split()[0].replace(",", ""))
    assert tokens == pytest.approx(characters / 4, rel=0.1)


def test_answers_are_read_strictly():
    assert read_label('<think>{"label": 3}</think>\n```json\n{"label": " a\\nb "}\n```') == "a b"
    assert answers_reader(2)('{"answers": [1, 0]}') == [True, False]
    for bad in ("", "label", "[1]", '{"label": ""}', '{"label": 3}', '{"label": "a", "b": 1}', '{"label": "a"} yes'):
        with pytest.raises(NoAnswer):
            read_label(bad)
    for bad in ('{"answers": [1]}', '{"answers": [1, 2]}', '{"answers": "10"}', '{"answers": ["1", "0"]}'):
        with pytest.raises(NoAnswer):
            answers_reader(2)(bad)


# --- a model on this machine ------------------------------------------------------------------------------------------


def test_a_local_model_that_answers_nonsense(tmp_path):
    tokenizer = planted.model().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, sae, texts = planted.model(), planted.sae(), torch.stack(planted.texts())
    chat = ws.ChatModel(str(tmp_path))
    labels = ws.explain(model, sae, texts, chat, atoms=[0], width=16, shown=4)
    assert labels[0].text is None and "no label: no JSON" in str(labels[0].problem)
    chat._model.config.max_position_embeddings = 50
    with pytest.raises(ValueError, match=r"are more than the 50 that .*--shown"):
        ws.explain(model, sae, texts, chat, atoms=[0], width=16)


# --- pages, Neuronpedia, the command line -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Playwright's pipes, when it is torn down
def test_the_command_line_and_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted.sae().save_pretrained(tmp_path / "sae")
    words = [planted.model().to_string(text) for text in planted.texts()]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(words):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    ask = ["explain", "sae", "--model", "oracle", "--text", "texts", "--out", "labels.json", "--width", "16"]
    with oracle() as server:
        command = [*ask, "--base-url", server.url]
        dry = runner.invoke(app, [*command, "--dry-run", "--json", "plan.json"])
        assert dry.exit_code == 0 and "3 atoms to label with oracle" in dry.output and server.n == 0
        assert not Path("labels.json").exists()
        assert "3 atoms to label with oracle" in json.loads(Path("plan.json").read_text())["plan"][0]
        result = runner.invoke(app, [*command, "--json", "shown.json"])
    kept, shown = (json.loads(Path(name).read_text())["atoms"] for name in ("labels.json", "shown.json"))
    assert len(kept) == 3 and shown == kept
    assert result.exit_code == 0, result.output
    assert all(f'the word "{name}"' in result.output for name in planted.NAMES)
    result = runner.invoke(app, [*ask, "--base-url", server.url])
    assert result.exit_code == 1 and "no server answers at" in result.output and "Traceback" not in result.output

    made = ["pages", "sae", "--text", "texts", "--out", "site", "--atoms", "0", "--neuronpedia"]
    result = runner.invoke(app, [*made, "--labels", "labels.json"])
    assert result.exit_code == 0, result.output
    page = Path("site/atom/00000.html").read_text()
    score = ws.Labels.load("labels.json", planted.sae())[0].detection.balanced_accuracy
    assert f"the word &#34;{planted.NAMES[0]}&#34;" in page and f"detection {score:.2f}" in page and score >= 0.95
    assert "A label by" not in Path("site/atom/00003.html").read_text()
    index = Path("site/index.html").read_text()
    rows = json.loads(re.findall(r'id="data">(.*?)</script>', index, re.S)[0])
    assert [row["label"] for row in rows] == [*(f'the word "{name}"' for name in planted.NAMES), ""]
    with chromium() as browser:
        seen = watch(browser)
        seen.page.goto(Path("site/index.html").resolve().as_uri())
        seen.page.locator("#where").select_option("label")
        for words, atoms in (("word", {"0", "1", "2"}), (planted.NAMES[1], {"1"}), ("nothing", set())):
            seen.page.locator("#search").fill(words)
            assert set(seen.page.locator("#atoms tbody a").all_inner_texts()) == atoms
        seen.check()
    lines = gzip.decompress(Path("site/neuronpedia/explanations/batch-0.jsonl.gz").read_bytes()).decode().splitlines()
    assert [json.loads(line)["description"] for line in lines] == [f'the word "{name}"' for name in planted.NAMES]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path

    other = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
    with pytest.raises(ValueError, match="labels of another SAE"):
        ws.write_pages(planted.model(), other, words[:1], tmp_path / "y", labels="labels.json")
    assert not (tmp_path / "y").exists()


def test_delphi_reads_where_atoms_fire(tmp_path):
    """As delphi's `TensorBuffer` reads a file (latents/loader.py of eai-delphi 0.1.3)."""
    model, sae, texts = planted.model(), planted.sae(), planted.texts()
    folder = ws.write_delphi(model, sae, torch.stack(texts), tmp_path, context=32, batch_size=3, progress=False)
    assert folder == tmp_path / f"blocks.{sae.cfg.layer}.mixer.head.{sae.cfg.head}"
    (path,) = folder.glob("*.safetensors")
    first, last = map(int, path.stem.split("_"))
    assert (first, last) == (0, sae.cfg.n_atoms - 1)
    data = load_file(path)  # numpy's, which delphi uses
    locations, activations, tokens = (data[name] for name in ("locations", "activations", "tokens"))
    assert locations.dtype == "uint16" and activations.dtype == "float16" and tokens.shape[1] == 32
    about = json.loads((folder / "config.json").read_text())
    assert about["cache_ctx_len"] == 32 and about["model_name"] == model.model_id
    for atom, name in enumerate(planted.NAMES):
        fires = {(int(row), int(pos)) for row, pos, which in locations if which == atom}
        there = {(row, pos) for row, pos in zip(*(tokens == planted.token(name)).nonzero(), strict=True)}
        assert fires == there and there, "the planted atoms fire at their words alone"
    one = model.encode(sae, torch.from_numpy(tokens[:1]))
    strongest = float(one.values.max())
    assert activations[locations[:, 0] == 0].max() == pytest.approx(strongest, rel=1e-3)
