"""A store rebuilds what the cache has, from few numbers; its files are whole, checked, and the same however made."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import writesae as ws
from architectures import N_VOCAB, architecture_named, each_architecture, each_rule
from writesae.cli import app
from writesae.jobs.disk import read_json
from writesae.recurrence.dynamics import States
from writesae.recurrence.rules import RULES
from writesae.stores import Windows, texts
from writesae.stores.extraction import extract, parse_sites, record
from writesae.stores.shards import RULE_OF, read_info, read_shard, shard_path, write_shard
from writesae.stores.store import OPEN_SHARDS, ActivationStore

ROOT = Path(__file__).parents[2]
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SITES = [(0, 1), (3, 0), (0, 3)]


def tokens(n=7, context=24, seed=0, below=N_VOCAB):
    return torch.randint(0, below, (n, context), generator=torch.Generator().manual_seed(seed))


def hooked(name="qwen3_5"):
    return ws.HookedRecurrentModel(architecture_named(name).build(), model_id=name)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def gdn():
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@pytest.fixture(scope="module")
def model():
    return hooked()


def make(model, folder, x=None, sites=SITES, **more):
    """A store of four shards."""
    settings = dict(batch_size=2, shard_sequences=2, progress=False) | more
    return extract(model, tokens() if x is None else x, sites, folder, **settings)


@pytest.fixture
def store(model, tmp_path):
    return make(model, tmp_path / "store")


# --- what it rebuilds -------------------------------------------------------------------------------------------------


def agree(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def matches(store, cache, layer, head, n, n_pos):
    """What of a head is rebuilt as the cache rebuilds it."""
    every = slice(0, n)
    write, delta = cache.write(layer)[:, :, head], cache.delta(layer)[:, :, head]
    S = cache.state(layer, range(n_pos), heads=[head])[:, :, 0]
    states = store.states(layer, head, every)
    rows, at = torch.tensor([n - 1, 0]), torch.tensor([n_pos - 1, 5])
    return {
        "write": agree(store.write(layer, head, every).dense(), write.dense()),
        "delta": agree(store.delta(layer, head, every).dense(), delta.dense()),
        "state": agree(store.state(layer, head, every, range(n_pos)), S),
        "states": agree(states.dense(), S) and agree(states.at(rows, at), S[rows, at]),
    }


@each_rule
def test_what_is_rebuilt_is_what_the_cache_has(architecture, monkeypatch):
    """All of it, for every update rule; and a store without the erase, or with a late or double decay, is found out."""
    model, x = ws.HookedRecurrentModel(architecture.build()), tokens(3, 70)
    store = record(model, x, SITES, batch_size=3, progress=False)
    _, cache = model.run_with_cache(x)
    assert torch.equal(store.tokens(), x) and store.sites == SITES and len(store) == 3
    for layer, head in SITES:
        found = matches(store, cache, layer, head, 3, 70)
        assert all(found.values()), found
        terms = architecture.steps[0] if architecture.steps else 1
        assert store.delta(layer, head, [0]).rank == terms * model.family(layer).rule.delta_rank

    rule = model.family(0).rule
    if store.dynamics(0, 1, [0]).recurrence.a is not None:
        forgetful = dataclasses.replace(
            rule, recurrence=lambda get: dataclasses.replace(rule.recurrence(get), a=None, b=None)
        )
        with monkeypatch.context() as m:
            m.setitem(RULES, rule.name, forgetful)
            found = matches(store, cache, 0, 1, 3, 70)
        assert found == {"write": True, "delta": False, "state": False, "states": False}
    if "log_decay" in rule.inputs:
        late = dict(store._in_memory[0])
        right = late["0.1.log_decay"]
        late["0.1.log_decay"] = right * 2 if (right == right[:1, :1]).all() else right.roll(1, 1)  # RetNet's is fixed
        found = matches(ActivationStore(store.info, shards=[late]), cache, 0, 1, 3, 70)
        assert found["write"] and not found["state"] and not found["states"]


@each_architecture
def test_every_model_runs_without_its_head(architecture):
    """The inputs do not depend on the logits, whatever model stands between them."""
    model, x = ws.HookedRecurrentModel(architecture.build()), tokens(2, 9)
    store = record(model, x, [(3, 2)], progress=False)
    _, cache = model.run_with_cache(x)
    torch.testing.assert_close(store.write(3, 2, [0, 1]).dense(), cache.write(3)[:, :, 2].dense(), rtol=0, atol=0)


@each_rule
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_costs_little(architecture, dtype, bound, tmp_path):
    model, x = ws.HookedRecurrentModel(architecture.build()), tokens(3, 70)
    exact = record(model, x, SITES, progress=False)
    kept = extract(model, x, SITES, tmp_path / "s", dtype=dtype, progress=False)
    for site in SITES:
        where = (*site, slice(None), [7, -1])
        S = exact.state(*where)
        off = (kept.state(*where) - S).norm(dim=(-2, -1)) / S.norm(dim=(-2, -1))
        assert 1e-6 < off.max() < bound
        reported = kept.report["state_error"][f"{site[0]}.{site[1]}"]
        assert 1e-6 < reported["median"] <= reported["max"] < bound
        assert off.max() < 3 * reported["max"]


def test_a_large_head_takes_a_sixtieth_of_its_states():
    a = architecture_named("qwen3_5")
    a = dataclasses.replace(a, values=a.values | dict(linear_key_head_dim=128, linear_value_head_dim=128))
    store = record(ws.HookedRecurrentModel(a.build()), tokens(), [(1, 0)], dtype=torch.float16, progress=False)
    assert store.bytes_per_token == 2 * 258 + 4
    assert store.times_smaller > 60


# --- reading ----------------------------------------------------------------------------------------------------------


def test_sequences_in_any_order(store, model):
    x, whole = tokens(), record(model, tokens(), SITES, batch_size=2, dtype=torch.float16, progress=False)
    for asked in ([6, 0, 3, 0], torch.tensor([5, 1]), slice(1, None, 2), slice(None, None, -1), []):
        rows = list(range(7))[asked] if isinstance(asked, slice) else [int(i) for i in asked]
        assert torch.equal(store.tokens(asked), x[rows])
        for name, value in store.values(0, 3, asked).items():
            assert value.dtype == torch.float32 and value.shape[:3] == (len(rows), 24, 1)
            assert torch.equal(value, whole.values(0, 3, slice(None))[name][rows])
    assert torch.equal(store.tokens(), x) and store.context == 24 and "3.0" in repr(store)
    states = store.states(0, 1, [2, 4])
    assert isinstance(states, States) and states.shape == (2, 24)
    size = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert store.bytes_per_token == size / (7 * 24)


def test_few_shards_are_open_at_once(model, tmp_path):
    x = tokens(OPEN_SHARDS + 3, 4)
    store = make(model, tmp_path / "store", x, shard_sequences=1)
    assert store.info.n_shards == OPEN_SHARDS + 3
    for asked in (slice(None), [0, 9, 4, 0]):
        assert torch.equal(store.tokens(asked), x[asked]) and len(store._open) <= OPEN_SHARDS


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda s: s.write(1, 1, [0]), "layer 1 head 1 is not in the store; it has 0.1, 3.0, 0.3"),
        (lambda s: s.write(0, 1, [7]), "sequence 7: the store has sequences 0 to 6"),
        (lambda s: s.write(0, 1, [-1]), "sequence -1"),
        (lambda s: s.state(0, 1, [0], [24]), "position 24: the store's sequences have positions 0 to 23"),
    ],
)
def test_what_is_not_there_is_named(store, ask, says):
    with pytest.raises(IndexError, match=says):
        ask(store)


def test_a_store_knows_its_model(store, model, gdn):
    store.check_fits(model)
    with pytest.raises(ValueError, match="recurrent layers"):
        store.check_fits(gdn)
    other = hooked()
    with torch.no_grad():
        next(p for name, p in other.hf_model.named_parameters() if "layers.3.linear_attn" in name).add_(1)
    with pytest.raises(ValueError, match=r"made with qwen3_5, whose layer 3 has fingerprint .* other weights"):
        store.check_fits(other)
    make(other, store.folder.parent / "first", sites=[(0, 1)]).check_fits(model)  # that layer is the same


# --- damaged files ----------------------------------------------------------------------------------------------------


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(folder):
    a, b = shard_path(folder, 1), shard_path(folder, 2)
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)


def other_store(folder, model):
    other = make(model, folder.parent / "other", tokens(seed=1))
    shutil.copy(shard_path(other.folder, 1), shard_path(folder, 1))


@pytest.mark.parametrize(
    "harm, says",
    [
        (
            lambda f, m: flip(shard_path(f, 1), -100),
            "was altered after .* expected checksum [0-9a-f]{64}, found [0-9a-f]",
        ),
        (lambda f, m: shard_path(f, 1).write_bytes(shard_path(f, 1).read_bytes()[:-7]), "is not a whole shard"),
        (lambda f, m: shard_path(f, 1).write_bytes(b""), "is not a whole shard"),
        (lambda f, m: safetensors.torch.save_file({"x": torch.ones(2)}, shard_path(f, 1)), "found shard None of store"),
        (lambda f, m: swap(f), "expected shard 1 of store .*, found shard 2"),
        (other_store, "belongs elsewhere: expected shard 1 of store"),
    ],
    ids=["bit", "cut", "empty", "foreign", "swapped", "other store"],
)
def test_a_damaged_shard_is_refused_and_made_again(store, model, harm, says):
    before = contents(store.folder)
    harm(store.folder, model)
    opened = ActivationStore.open(store.folder)
    assert torch.equal(opened.tokens([0, 6]), tokens()[[0, 6]]), "other shards can still be read"
    for read in (lambda: opened.write(3, 0, [3]), lambda: opened.verify(progress=False)):
        with pytest.raises(ValueError, match=f"shard-00001.*{says}.*delete that file and run the same"):
            read()
    for i in (1, 2):
        shard_path(store.folder, i).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 2 of 4 shards, shard-00001"):
        ActivationStore.open(store.folder)
    make(model, store.folder).verify(progress=False)
    assert contents(store.folder) == before


def test_nothing_of_a_shards_own_header_can_change(store):
    path = shard_path(store.folder, 1)
    whole = path.read_bytes()
    for at in range(0, 8 + int.from_bytes(whole[:8], "little"), 3):
        flip(path, at)
        with pytest.raises(ValueError, match="shard-00001"):
            ActivationStore.open(store.folder).tokens([2])
        path.write_bytes(whole)


def test_a_damaged_header_is_refused(store, tmp_path):
    header = store.folder / "store.json"
    for bad in (b"{", b"[]", b'{"format": 1}', header.read_bytes().replace(b'"format": 1', b'"format": 2')):
        header.write_bytes(bad)
        with pytest.raises(ValueError, match=r"store.json is not the header"):
            ActivationStore.open(store.folder)
    with pytest.raises(FileNotFoundError, match="holds no activation store"):
        ActivationStore.open(tmp_path / "nothing")
    header.unlink()


# --- stores of other versions -----------------------------------------------------------------------------------------


def renamed(store, folder, name):
    """The store as a version that calls the rule of its layers ``name`` would have written it."""
    old = dataclasses.replace(store.info, families=dict.fromkeys(store.info.families, name))
    folder.mkdir()
    (folder / "store.json").write_text(json.dumps(dataclasses.asdict(old), indent=2) + "\n")
    for i in range(old.n_shards):
        write_shard(folder, i, old, read_shard(store.folder, i, store.info))
    return ActivationStore.open(folder)


@pytest.mark.parametrize("display, rule", RULE_OF.items())
def test_a_store_that_names_families_as_messages_do_still_opens(store, tmp_path, display, rule):
    old = renamed(store, tmp_path / "old", display)
    assert old.info.families == {0: display, 3: display} and old.info.rules == {0: rule, 3: rule}
    assert rule in RULES
    if rule == "gated_delta":  # the rule of this model: the same numbers, and the same work to continue
        for site in SITES:
            assert torch.equal(old.state(*site, [0], [5]), store.state(*site, [0], [5]))
        before = contents(old.folder)
        shard_path(old.folder, 2).unlink()
        make(hooked(), old.folder)
        assert {name: x for name, x in contents(old.folder).items() if name != "report.json"} == before


def test_a_rule_that_is_not_known_here_is_named_with_those_that_are(store, tmp_path):
    other = renamed(store, tmp_path / "other", "quantum_delta")
    assert torch.equal(other.tokens(), tokens()), "what needs no rule can be read"
    for ask in (other.write, other.delta, other.states):
        with pytest.raises(ValueError, match=r"layer 3 follows the rule 'quantum_delta'.*gated_delta.*register"):
            ask(3, 0, [0])


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(sites=[(0, 1)]), "sites 0.1 3.0 0.3 there, 0.1 now"),
        (dict(x=tokens(7, 12)), "context 24 there, 12 now"),
        (dict(x=tokens(seed=5)), "tokens_sha256"),
        (dict(dtype=torch.bfloat16), "dtype float16 there, bfloat16 now"),
        (dict(batch_size=3), "batch_size 2 there, 3 now"),
        (dict(model="qwen3_next"), "model_id qwen3_5 there, qwen3_next now; weights"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_folder_begun_otherwise_is_refused(store, model, change, says):
    before = contents(store.folder)
    model = hooked(change["model"]) if "model" in change else model
    with pytest.raises(ValueError, match=f"was begun otherwise: .*{says}.*new folder"):
        make(model, store.folder, **{name: value for name, value in change.items() if name != "model"})
    assert contents(store.folder) == before


def test_a_folder_of_something_else_is_refused(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other files, and no store\.json"):
        make(model, tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_ends_with_the_same_bytes(gdn, tmp_path, how):
    """At up to three random moments; each run goes on from what the last one left."""
    x, sites, draw = tokens(24, 128, below=1000), [(0, 1), (2, 0)], random.Random(how)
    started = time.monotonic()
    whole = make(gdn, tmp_path / "whole", x, sites=sites)
    per_shard = (time.monotonic() - started) / whole.info.n_shards
    folder = tmp_path / "stopped"

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it from its start
        make(gdn, folder, x, sites)

    stopped = 0
    for n_shards in (0, 3, 7):
        child = multiprocessing.get_context("fork").Process(target=run)
        child.start()
        while child.is_alive() and len(list(folder.glob("shard-*"))) < n_shards:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 2) * per_shard)
        os.kill(child.pid, how)
        child.join()
        stopped += child.exitcode != 0 and len(list(folder.glob("shard-*"))) < whole.info.n_shards
        for path in folder.glob("shard-*"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
        if how == signal.SIGINT:
            assert not list(folder.glob(".*.tmp"))
    assert stopped, "all of them came too late"
    (folder / ".shard-00009.safetensors.4711.tmp").write_bytes(b"half of a shard")
    make(gdn, folder, x, sites)
    assert contents(folder) == contents(tmp_path / "whole")
    assert len(contents(folder)) == whole.info.n_shards + 2


def test_a_whole_store_is_left_as_it_is(store, model):
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    make(model, store.folder)
    assert {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_two_processes_make_what_one_makes(gdn, tmp_path):
    x = tokens(40, 32, below=1000)
    np.save(tmp_path / "ids.npy", x.numpy().astype(np.uint16))
    one = extract(gdn, x, [(2, 0), (0, 3)], tmp_path / "one", batch_size=4, source=f"tokens {tmp_path / 'ids.npy'}",
                  shard_sequences=8, progress=False)  # fmt: skip
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    plain = "--mixed_precision no --dynamo_backend no -m writesae.cli extract tiny-gdn"
    settings = "--site 2.0 --site 0.3 --context 32 --batch 4 --shard 8"
    paths = [str(tmp_path / "two"), "--tokens", str(tmp_path / "ids.npy")]
    result = subprocess.run(
        [sys.executable, "-m", *f"{launch} {plain} {settings}".split(), *paths],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("times smaller") == 1, "only one of them reports"
    assert one.info.n_shards == 5
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# --- what can go wrong in a pass --------------------------------------------------------------------------------------


def test_nan_in_the_model_is_located(tmp_path):
    model, x = hooked("gla"), tokens(below=N_VOCAB - 1)
    x[5, 9] = N_VOCAB - 1
    with torch.no_grad():
        model.hf_model.get_input_embeddings().weight[-1] = float("nan")
    with pytest.raises(ValueError, match="layer 0 head 1: k at sequence 5, position 9, is nan"):
        make(model, tmp_path / "s", x)


@pytest.mark.parametrize("broken", ["model.layers.3.mlp.down_proj.weight", "model.layers.0.linear_attn.A_log"])
def test_weights_that_are_not_finite_are_named(tmp_path, broken):
    """Also those that the stored numbers do not depend on."""
    model = hooked()
    make(model, tmp_path / "right", sites=[(0, 1)])
    with torch.no_grad():
        model.hf_model.get_parameter(broken).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"{broken}: 1 of its \d+ weights are NaN or infinite"):
        make(model, tmp_path / "broken", sites=[(0, 1)])
    assert not (tmp_path / "broken").exists()


def test_too_large_for_half_precision_says_what_would_do(tmp_path):
    model = hooked("gla")
    with torch.no_grad():
        next(p for name, p in model.hf_model.named_parameters() if "layers.3" in name and "v_proj" in name).mul_(1e6)
    with pytest.raises(
        ValueError, match=r"layer 3 head 0: v at .*, too large for float16, which ends at 65504: choose"
    ):
        make(model, tmp_path / "s")
    make(model, tmp_path / "b", dtype=torch.bfloat16).verify(progress=False)


def test_a_disk_too_small_is_found_before_the_pass(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(OSError, match=r"takes 0\.00 GB, and 0\.00 GB are free"):
        make(model, tmp_path / "s")
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as Linux has it")
def test_a_disk_that_fills_up_leaves_whole_shards(model, tmp_path):
    folder = tmp_path / "s"
    calls = []

    def fill(module, args, kwargs):
        calls.append(1)
        if len(calls) == 4:  # one probe, then a batch for each shard: before the third is written
            (folder / f".shard-00002.safetensors.{os.getpid()}.tmp").symlink_to("/dev/full")

    handle = model.hf_model.base_model.register_forward_pre_hook(fill, with_kwargs=True)
    with pytest.raises(OSError, match=r"the disk is full\. 2 of 4 shards are whole and stay; .* continues") as caught:
        make(model, folder)
    assert caught.value.errno == errno.ENOSPC
    handle.remove()
    assert sorted(contents(folder)) == ["shard-00000.safetensors", "shard-00001.safetensors", "store.json"]
    make(model, folder)
    make(model, tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_what_cannot_be_extracted_is_said_before_anything_is_written(model, tmp_path):
    for change, error, says in [
        (dict(sites=[]), ValueError, "no sites"),
        (dict(sites=[(2, 0)]), IndexError, "layer 2 is not recurrent"),
        (dict(sites=[(0, 4)]), IndexError, "head 4 of layer 0: allowed are 0 to 3"),
        (dict(dtype=torch.float64), ValueError, "dtype float64: allowed are float16, bfloat16, float32"),
        (dict(batch_size=0), ValueError, "batch_size=0"),
        (dict(x=tokens(below=200)), ValueError, "outside the model's vocabulary of 97"),
    ]:
        with pytest.raises(error, match=says):
            make(model, tmp_path / "s", **change)
    with model.intervene(ws.Delete(layer=0)), pytest.raises(ValueError, match="detach them"):
        make(model, tmp_path / "s")
    assert not (tmp_path / "s").exists()


# --- sources ----------------------------------------------------------------------------------------------------------


def prose(n, seed):
    draw, words = random.Random(seed), "The state of the Union is strong and the sea was calm as they sailed on"
    return " ".join(draw.choice(words.split()) for _ in range(n))


@pytest.fixture
def folder_of_texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, n in enumerate([100, 5, 60]):
        (folder / f"{i}.txt").write_text(prose(n, i))
    return folder


def test_sequences_do_not_cross_documents(gdn, folder_of_texts):
    found = texts.from_files(gdn, folder_of_texts, 16)
    rows = [gdn.to_tokens(prose(n, i))[0][0] for i, n in enumerate([100, 5, 60])]
    expected = [row[i : i + 16] for row in rows for i in range(0, len(row) - 15, 16)]
    assert torch.equal(found, torch.stack(expected).int())
    assert torch.equal(found.long(), Windows.cut(gdn, [prose(n, i) for i, n in enumerate([100, 5, 60])], 16).tokens)
    some = texts.from_files(gdn, folder_of_texts, 16, max_tokens=3 * 16 + 5)
    assert len(some) == 3 and torch.equal(some[0], found[0]) and torch.equal(some[-1], found[len(found) * 2 // 3])


def test_data_sets(gdn, tmp_path):
    rows = [prose(40, 1), "", None, prose(50, 2), prose(60, 3)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"prose": row}) + "\n" for row in rows))
    expected = Windows.cut(gdn, [row for row in rows if row], 16).tokens.int()
    for name in (folder, folder / "train.jsonl"):
        assert torch.equal(texts.from_dataset(gdn, str(name), 16, column="prose"), expected)
    assert torch.equal(texts.from_dataset(gdn, str(folder), 16, 40, column="prose"), expected[:2])
    for more, says in [
        (dict(column="text"), "has no column 'text'; its columns are prose"),
        (dict(column="prose", split="test"), "split test, cannot be read"),
    ]:
        with pytest.raises(ValueError, match=says):
            texts.from_dataset(gdn, str(folder), 16, **more)


def test_data_sets_without_the_extra(gdn, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'writesae\[data\]'"):
        texts.from_dataset(gdn, "some/name", 16)


def test_token_arrays(tmp_path):
    path = tmp_path / "ids.npy"
    x = torch.arange(100)
    np.save(path, x.numpy())
    with pytest.raises(ValueError, match=rf"{path.name} holds numbers .*allowed are 0 to {int(x.max()) - 1}"):
        texts.from_array(path, 30, n_vocab=int(x.max()))
    assert torch.equal(texts.from_array(path, 30), x[:90].view(3, 30).int())
    np.save(path, x.view(4, 25).numpy().astype(np.uint16))
    assert torch.equal(texts.from_array(path, 10), x.view(4, 25)[:, :20].reshape(8, 10).int())
    for bad, says in [
        (x.numpy() / 2, "float64"),
        (x.view(4, 5, 5).numpy(), r"\[4, 5, 5\]"),
        (x.numpy() - 1, "from -1 to 98"),
        (x[:9].numpy(), r"ids\.npy makes 0 windows of 10 tokens \(the longest text has 9\)"),
        (np.array([{}]), "is not a whole .npy file of numbers"),
    ]:
        np.save(path, bad)
        with pytest.raises(ValueError, match=says):
            texts.from_array(path, 10)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(folder_of_texts, tmp_path):
    out = tmp_path / "store"
    command = ["extract", "tiny-gdn", str(out), "--text", str(folder_of_texts), "--context", "16"]
    result = runner.invoke(app, [*command, "--site", "2.0", "--site", "0.all", "--max-tokens", "100"])
    assert result.exit_code == 0, result.output
    assert "largest error" in result.output and "times smaller than" in result.output
    store = ActivationStore.open(out)
    assert store.sites == [(2, 0), (0, 0), (0, 1), (0, 2), (0, 3)] and store.tokens().shape == (6, 16)
    assert "texts" in read_info(out).source
    result = runner.invoke(app, [*command, "--site", "2.1"])
    assert result.exit_code == 1 and "was begun otherwise" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    "more, says",
    [
        (["--site", "2.0"], "give one source"),
        (["--site", "2.0", "--text", "x", "--tokens", "y"], "give one source"),
        (["--site", "2", "--text", "x"], "site '2': write LAYER.HEAD or LAYER.all"),
        (["--site", "7.0", "--text", "x"], "layer 7 is not recurrent"),
        (["--site", "2.9", "--text", "x"], "head 9 of layer 2: allowed are 0 to 3"),
        (["--site", "2.0", "--tokens", "x"], "x does not exist"),
        (["--site", "2.0", "--text", "no-such"], "no-such does not exist"),
        (["--site", "2.0", "--text", "x", "--dtype", "int8"], "--dtype int8: allowed are float16"),
        (["--site", "2.0", "--dataset", "no-such"], "data set no-such, split train, cannot be read"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, more, says):
    result = runner.invoke(app, ["extract", "tiny-gdn", str(tmp_path / "out"), *more])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert says in result.output


def test_sites_are_parsed(gdn):
    assert parse_sites(gdn, ["1.all", "0.3"]) == [(1, 0), (1, 1), (1, 2), (1, 3), (0, 3)]
    for wrong in ("L0H1", "0.x", "-1.0", "0.1.2"):
        with pytest.raises(ValueError, match="write LAYER"):
            parse_sites(gdn, [wrong])


def test_a_store_begun_by_010_goes_on(tmp_path: Path) -> None:
    """Its header has hashes for fingerprints; those of other weights are still refused."""
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    tokens, folder = torch.arange(64).reshape(2, 32) + 40, tmp_path / "store"
    extract(model, tokens, [(2, 0)], folder, progress=False)
    for path in folder.glob("shard-*"):
        path.unlink()
    header = folder / "store.json"
    values = read_json(header)
    values["fingerprints"] = {layer: x.partition("-")[0] for layer, x in values["fingerprints"].items()}
    header.write_text(json.dumps(values), "utf-8")
    store = extract(model, tokens, [(2, 0)], folder, progress=False)
    store.check_fits(model)
    with torch.no_grad():
        model.hf_model.model.layers[2].linear_attn.out_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="other weights"):
        store.check_fits(model)
