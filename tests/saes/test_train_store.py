"""Training from a store: several heads, buffers, processes, kills; the same numbers whichever way."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import writesae as ws
from writesae.cli import app
from writesae.jobs.disk import CHECKSUM
from writesae.jobs.processes import Processes
from writesae.recurrence.dynamics import States
from writesae.saes import WriteSAE, evaluate, train_store
from writesae.saes.training.collect import planned
from writesae.saes.training.data import FromStore
from writesae.saes.training.run import Run, Settings
from writesae.stores.extraction import extract, record

SITES = [(2, 0), (0, 3)]
SMALL = dict(n_atoms=24, steps=30, progress=False, held_out=0.2)


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(0)
    return torch.randint(100, 900, (20, 24))


@pytest.fixture(scope="module")
def model():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def store(model, tokens):
    return record(model, tokens, SITES, progress=False)


@pytest.fixture(scope="module")
def on_disk(model, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    return extract(model, tokens, SITES, folder, batch_size=2, shard_sequences=4, progress=False)


def weights(sae):
    return {name: t.tolist() for name, t in sae.state_dict().items()}


def test_heads_side_by_side_are_the_heads_alone(store, tmp_path):
    both = train_store(store, target="state", k=4, **SMALL)
    assert list(both) == SITES
    for layer, head in SITES:
        alone = train_store(store, [(layer, head)], target="state", k=4, **SMALL)[layer, head]
        assert weights(alone) == weights(both[layer, head]) and alone.cfg == both[layer, head].cfg
    assert weights(both[2, 0]) != weights(both[0, 3])
    cfg = both[2, 0].cfg
    assert (cfg.layer, cfg.head, cfg.model_id, cfg.encoder, cfg.center) == (2, 0, "tiny-gdn", "bilinear", True)
    both[2, 0].check_fits(ws.HookedRecurrentModel.from_pretrained("tiny-gdn"))


def test_encoders_suit_the_number_of_active_atoms():
    """One atom of a write is the one that is most like it; several are chosen by encoders of their own."""
    chosen = {k: planned(k=k)[1]["name"] for k in (None, 1, 2, 8)}
    assert chosen == {None: "TiedSAE", 1: "TiedSAE", 2: "WriteSAE", 8: "WriteSAE"}
    assert planned(k=4, variant="TiedSAE")[1]["name"] == "TiedSAE"
    assert planned(target="state")[1]["name"] == "WriteSAE" and planned(target="state")[1]["k"] == 32


@pytest.mark.parametrize("target", ["write", "delta", "state"])
def test_what_is_read_is_what_the_model_writes(model, tokens, store, target):
    _, cache = model.run_with_cache(tokens)
    data = FromStore(store, 2, 1 - 1, target, held_out=0.2)
    expected = {
        "write": lambda: cache.write(2)[:, :, 0].dense(),
        "delta": lambda: cache.delta(2)[:, :, 0].dense(),
        "state": lambda: cache.state(2, range(24))[:, :, 0],
    }[target]()
    held_out = [2, 7, 12, 17]  # one in five, evenly spread
    rest = [i for i in range(20) if i not in held_out]
    assert data.sequences.tolist() == rest
    for found, rows in ((data.held_out, held_out), (data.at(0, 64), rest)):
        torch.testing.assert_close(
            found.dense().reshape(-1, 32, 32), expected[rows].flatten(0, 1), atol=1e-5, rtol=1e-4
        )
    assert isinstance(data.held_out, States) == (target == "state")


def test_states_under_a_decay_a_channel_are_built(tokens):
    model = ws.HookedRecurrentModel.from_pretrained("tiny-rwkv7")
    store = record(model, tokens, [(3, 4)], progress=False)
    data = FromStore(store, 3, 4, "state", stride=10, held_out=0.2)
    _, cache = model.run_with_cache(tokens[[2, 7, 12, 17]])
    torch.testing.assert_close(data.held_out, cache.state(3, [9, 19])[:, :, 4].flatten(0, 1))
    sae = train_store(store, target="state", k=4, stride=10, choices={"rank": 2}, **SMALL)[3, 4]
    assert sae.cfg.rank == 2 and sae.cfg.training["held_out"]["n"] == 8


def test_a_large_store_is_read_in_pieces(on_disk):
    data = FromStore(on_disk, 2, 0, "state", held_out=0.2, buffer_tokens=4 * 24, seed=3)
    assert data.per_buffer == 4 and len(data.sequences) == 16
    seen = []
    for step in range(16):  # 48 states a step: two steps a buffer, eight a pass
        buffer = data.at(step, 48)
        assert data.at(step, 48) is buffer and buffer.shape == (4, 24)
        if step % 2 == 0:
            seen.append(buffer.gain.key.sum((1, 2)).tolist())
    first, second = (sorted(x for buffer in part for x in buffer) for part in (seen[:4], seen[4:]))
    assert first == second and len(set(first)) == 16 and seen[:4] != seen[4:]  # each once a pass, in another order
    again = FromStore(on_disk, 2, 0, "state", held_out=0.2, buffer_tokens=4 * 24, seed=3)
    assert again.at(7, 48).gain.key.sum((1, 2)).tolist() == seen[3]  # found again from any step


def test_half_precision_hardly_matters(store, on_disk):
    one, other = (train_store(s, [(2, 0)], **SMALL)[2, 0] for s in (store, on_disk))
    data = FromStore(store, 2, 0, "write", held_out=0.2).held_out
    assert abs(evaluate(one, data)["nmse"] - evaluate(other, data)["nmse"]) < 0.02


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", CHECKSUM)} for row in rows]


OPTIONS = dict(target="state", k=4, log_every=3, evaluate_every=10, checkpoint_every=4, sparsity="jumprelu")


def trained(store, out):
    torch.set_num_threads(1)
    train_store(store, out=out, **SMALL | dict(steps=60), **OPTIONS)


def test_killed_at_any_moment_it_ends_the_same(store, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    trained(store, whole)
    duration = time.monotonic() - began
    fork = multiprocessing.get_context("fork")
    times_killed = 0
    for attempt in range(3):
        process = fork.Process(target=trained, args=(store, killed))
        process.start()
        process.join(duration * (0.3 + 0.2 * attempt))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            times_killed += 1
        process.join()
    assert times_killed
    trained(store, killed)
    for name in ("L2H0", "L0H3"):
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert (whole / name / file).read_bytes() == (killed / name / file).read_bytes()
        rows = lines(whole / name / "metrics.jsonl")
        assert rows == lines(killed / name / "metrics.jsonl")
        assert [row["step"] for row in rows if "nmse" in row] == list(range(3, 61, 3))
        assert [row["step"] for row in rows if "held_out_nmse" in row] == [10, 20, 30, 40, 50, 60]
        assert WriteSAE.from_pretrained(whole / name).cfg.sparsity == "jumprelu"


@pytest.mark.parametrize("sparsity", ["batch_topk", "gated"])
def test_several_processes_train_as_one(on_disk, tmp_path, sparsity):
    """The loss of one process on the same batch, and so the same SAE but for rounding."""
    arguments = [
        "train", str(on_disk.folder), "{}", "--target", "state", "--k", "4", "--atoms", "24", "--steps", "25",
        "--batch", "96", "--held-out", "0.2", "--sparsity", sparsity, "--site", "2.0", "--evaluate-every", "5",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, launch in (("one", [sys.executable]), ("two", launcher)):
        command = [*launch, "-m", "writesae.cli", *(a.format(tmp_path / name) for a in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (WriteSAE.from_pretrained(tmp_path / name / "L2H0") for name in ("one", "two"))
    torch.testing.assert_close(
        one.atom(torch.arange(24)).dense(), two.atom(torch.arange(24)).dense(), atol=1e-3, rtol=0
    )
    records = [lines(tmp_path / name / "L2H0" / "metrics.jsonl") for name in ("one", "two")]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
    for a, b in zip(*records, strict=True):
        if "held_out_nmse" in a:
            assert abs(a["held_out_nmse"] - b["held_out_nmse"]) < 1e-3


def test_a_batch_too_small_to_share(store):
    cfg = ws.SAEConfig(d_key=32, d_value=32, n_atoms=24, k=4, target="state")
    run = Run(cfg, FromStore(store, 2, 0, "state"), Settings(batch_size=24))
    run.one_step()
    run.processes = Processes(2, 0)
    with pytest.raises(ValueError, match=r"batch_size=24 is 1 sequence\(s\) of 24 states.*at least 48"):
        run.one_step()


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_on_the_command_line(on_disk, tmp_path):
    out = tmp_path / "saes"
    arguments = ("train", on_disk.folder, out, "--steps", "10", "--atoms", "16", "--variant", "MatrixSAE")
    code, output = run(*arguments)
    assert code == 0 and "L2H0" in output and "L0H3" in output and "normalised MSE" in output
    sae = WriteSAE.from_pretrained(out / "L0H3")
    assert (sae.cfg.encoder, sae.cfg.n_atoms, sae.cfg.training["steps"]) == ("dense", 16, 10)
    before = (out / "L0H3" / "sae_weights.safetensors").read_bytes()
    assert run(*arguments)[0] == 0 and (out / "L0H3" / "sae_weights.safetensors").read_bytes() == before


def test_from_a_model_on_the_command_line(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("The state of the Union is strong, and the people of these States are its strength. " * 30)
    where = ("train", "tiny-gdn", tmp_path / "saes", "--text", text, "--site", "2.0")
    code, output = run(*where, "--steps", "5", "--atoms", "16", "--context", "32")
    assert code == 0 and "2.0" in output
    assert (tmp_path / "saes" / "L2H0" / "cfg.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("tiny-gdn", "out"), "tiny-gdn is no store, so it is taken for a model: that needs --text and --site"),
        (("STORE", "out", "--site", "1.7"), "the store has no site '1.7'; it has 2.0, 0.3"),
        (("STORE", "out", "--variant", "Flat"), "no variant 'Flat': allowed are WriteSAE"),
        (("STORE", "out", "--atoms", "4", "--k", "5"), "k=5 active atoms out of n_atoms=4"),
        (("STORE", "out", "--held-out", "0.01"), "held_out=0.01 of 20 sequences is none"),
        (("STORE", "out", "--dtype", "float16", "--kernels", "writesae"), "without --dtype and --kernels, which"),
        (("STORE", "out", "--tracker", "comet_ml"), "--tracker comet_ml is not installed"),
        (("STORE", "out", "--lr", "-1"), "lr must be a number above 0; got -1.0"),
    ],
)
def test_bad_input_on_the_command_line(on_disk, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, output = run("train", *(on_disk.folder if a == "STORE" else a for a in arguments))
    assert code == 1 and message in output
    assert not Path("out").exists()


def test_a_shard_altered_is_named(on_disk, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(on_disk.folder, folder)
    shard = sorted(folder.glob("shard-*"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"{shard.name}.*checksum|{shard.name}.*sha256"):
        train_store(ws.ActivationStore.open(folder), **SMALL)
