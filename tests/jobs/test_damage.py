"""Files that were damaged: an error that names the file, never other results without a word.

Each kind of file is damaged in 24 ways that a seed draws. What reads it must name the file, or have read the same.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import writesae as ws
from writesae.experiments.report.outcome import load_outcome, save_outcome
from writesae.jobs.disk import CHECKSUM, read_json, remove_halves, sealed, write_json
from writesae.jobs.resumable import Kept
from writesae.models.load import load_model, read_tensors, read_tensors_of
from writesae.pages import write_pages
from writesae.pages.site import read_page
from writesae.saes.training.collect import train_store
from writesae.stores.texts import from_array
from writesae.zoo import shipped_model

N = 24


def damaged(data: bytes, seed: int) -> bytes:
    """Bytes flipped, cut off, emptied, overwritten or doubled."""
    draw = np.random.default_rng(seed)
    kind, at = seed % 6, int(draw.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        n = int(draw.integers(1, 200))
        return data[:at] + draw.bytes(n) + data[at + n :]
    if kind == 2:
        return b"" if seed < 6 else data[:at] + data[at : at + 40] + data[at:]
    flipped = bytearray(data)
    for place in draw.integers(len(data), size=1 if kind == 3 else 8):
        flipped[place] ^= 1 << int(draw.integers(8))
    return bytes(flipped)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how to make a folder with one, which file it is, and what reads it."""

    name: str
    make: Callable[[Path], Any]
    file: str
    read: Callable[[Path], Any]
    may_start_anew: bool = False  # what is damaged is made again, which is right too

    def __str__(self) -> str:
        return self.name


@functools.cache
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@functools.cache
def sae() -> ws.WriteSAE:
    torch.manual_seed(0)
    site = model().site(2)
    cfg = ws.SAEConfig(
        site.d_key, site.d_value, 24, k=2, layer=2, head=0, model_id="tiny-gdn", fingerprint=model().fingerprint(2)
    )
    return ws.WriteSAE(cfg)


def make_store(folder: Path) -> None:
    tokens = torch.randint(100, 500, (6, 16), generator=torch.Generator().manual_seed(0))
    ws.extract(model(), tokens, [(2, 0)], folder, shard_sequences=3, progress=False)


def read_store(folder: Path) -> Any:
    store = ws.ActivationStore.open(folder)
    store.verify(progress=False)
    return [store.write(2, 0, slice(None)).key, store.write(2, 0, slice(None)).value, store.tokens(), store.report]


def train(folder: Path, steps: int = 6) -> Any:
    store = ws.ActivationStore.open(folder)
    trained = train_store(
        store, [(2, 0)], out=folder / "saes", n_atoms=24, k=2, steps=steps, batch_size=16, checkpoint_every=3,
        log_every=1, progress=False,
    )  # fmt: skip
    return next(iter(trained.values())).state_dict()


def make_checkpoint(folder: Path) -> None:
    make_store(folder)
    train(folder)


def go_on(folder: Path) -> Any:
    """The same training once more: it reads checkpoint and metrics, and has nothing to do."""
    return train(folder)


def make_outcome(folder: Path) -> None:
    save_outcome(
        replacement(), folder, "replacement_test", {"n": 4}, model_id="tiny-gdn", sites=[(2, 0)],
        rule="gated_delta", seconds=1.0,
    )  # fmt: skip


@functools.cache
def replacement() -> Any:
    text = Path(shipped_model("tiny-gdn") or "").parent.joinpath("heldout.txt").read_text("utf-8")[:6000]
    return ws.replacement_test(model(), ws.WriteSAE.from_pretrained("tiny-gdn/L2H1"), text, n_firings=4)


def read_outcome(folder: Path) -> Any:
    found = load_outcome(folder)
    return replace(found, folder=Path())


def make_pages(folder: Path) -> None:
    write_pages(model(), sae(), torch.randint(100, 500, (2, 80)), folder, atoms=1, prompts=["The"])


def read_pages(folder: Path) -> Any:
    return read_page(folder, "atom/00000.html")


def kept(folder: Path) -> Kept:
    return Kept(folder, {"format": 1, "settings": "a b c"})


def make_array(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ids.npy", np.arange(64, dtype=np.int64) + 100)


def make_model(folder: Path) -> None:
    source = shipped_model("tiny-mamba2")
    assert source is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)


def make_pth(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"a": torch.arange(64.0)}, folder / "model.pth")


def make_vector(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 32, generator=generator)
    ws.SteeringVector(("state", 2, 0), ws.Write(key, value), None, 0.5, "tiny-gdn", "abc").save(folder / "a")


def read_vector(folder: Path) -> Any:
    found = ws.SteeringVector.load(folder / "a")
    return [found.at, found.kept, found.model_id, *found.direction]


def read_memory(folder: Path) -> Any:
    found = ws.Memory.load(folder / "a")
    return [repr(found), *(found.state(layer) for layer in (0, 1, 2))]


def read_edits(folder: Path) -> Any:
    found = ws.load_interventions(folder / "a", model())
    return [found["read"], found["positions"], found["what"][0].sae.cfg, found["what"][0].sae.state_dict()]


KINDS = [
    Kind("SAE, configuration", lambda f: sae().save_pretrained(f), "cfg.json",
         lambda f: ws.WriteSAE.from_pretrained(f).cfg),
    Kind("SAE, weights", lambda f: sae().save_pretrained(f), "sae_weights.safetensors",
         lambda f: ws.WriteSAE.from_pretrained(f).state_dict()),
    Kind("steering vector", make_vector, "a", read_vector),
    Kind("memory", lambda f: model().memory("The state").save(f / "a"), "a", read_memory),
    Kind("interventions", lambda f: ws.save_interventions(f / "a", model(), ws.Substitute(sae())), "a", read_edits),
    Kind("store, header", make_store, "store.json", read_store),
    Kind("store, shard", make_store, "shard-00001.safetensors", read_store),
    Kind("store, report", make_store, "report.json", read_store),
    Kind("training, checkpoint", make_checkpoint, "saes/L2H0/checkpoint.safetensors", go_on),
    Kind("training, metrics", make_checkpoint, "saes/L2H0/metrics.jsonl", go_on),
    Kind("outcome", make_outcome, "outcome.json", read_outcome),
    Kind("outcome, records", make_outcome, "records.csv.gz", read_outcome),
    Kind("a page", make_pages, "atom/00000.html", read_pages),
    Kind("what pages are made of", lambda f: kept(f).write("a.json", {"numbers": [1.5, 2.25], "text": "The state"}),
         "a.json", lambda f: kept(f).read("a.json"), may_start_anew=True),
]  # fmt: skip


@functools.cache
def original(kind: Kind, folder: Path) -> tuple[Path, str]:
    kind.make(folder / "whole")
    return folder / "whole", repr_of(kind.read(folder / "whole"))


def repr_of(x: Any) -> str:
    """All that was read, as text."""
    if isinstance(x, torch.Tensor):
        return repr(x.tolist())
    if isinstance(x, dict):
        return repr({key: repr_of(value) for key, value in x.items()})
    return repr([repr_of(y) for y in x]) if isinstance(x, list) else repr(x)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    return functools.cache(lambda kind: tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.filterwarnings("error")
def test_damage_is_named_or_changes_nothing(kind: Kind, places: Callable[[Kind], Path], tmp_path: Path) -> None:
    whole, right = original(kind, places(kind))
    data, said = (whole / kind.file).read_bytes(), 0
    for seed in range(N):
        harmed = damaged(data, seed)
        if harmed == data:
            continue
        folder = tmp_path / str(seed)
        shutil.copytree(whole, folder)
        (folder / kind.file).write_bytes(harmed)
        try:
            found = kind.read(folder)
        except (ValueError, FileNotFoundError) as error:
            said += 1
            assert Path(kind.file).name in str(error) or str(folder) in str(error), f"seed {seed}: {error!r}"
            continue
        if found is None and kind.may_start_anew:
            said += 1
        else:
            assert repr_of(found) == right, f"seed {seed}: taken as good"
    assert said >= N // 2


def test_without_its_checksum_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """The twin: a number changed in a file of ours; and the same one as it was before there were checksums."""
    path = tmp_path / "a.json"
    write_json(path, {"seconds": 12, "name": "x"})
    assert read_json(path) == {"seconds": 12, "name": "x"}
    path.write_text(path.read_text().replace("12", "13"))
    with pytest.raises(ValueError, match=r"a\.json was altered after it was written \(its checksum differs"):
        read_json(path)
    path.write_text(json.dumps({"seconds": 13, "name": "x"}))
    assert read_json(path) == {"seconds": 13, "name": "x"}
    renamed = sealed({"seconds": 12})
    path.write_text(json.dumps({"seconds": 12, "writesae_checkzum": renamed[CHECKSUM]}))
    with pytest.raises(ValueError, match="is called 'writesae_checkzum'"):
        read_json(path)


# What others wrote ----------------------------------------------------------------------------------------------------

THEIRS = [
    Kind("token ids", make_array, "ids.npy", lambda f: from_array(f / "ids.npy", 8)),
    Kind("a model's pickle", make_pth, "model.pth", lambda f: read_tensors_of(str(f / "model.pth"))["a"]),
    Kind("a model's weights", make_model, "model.safetensors", lambda f: load_model(f).config.to_dict()),
]


@pytest.mark.parametrize("kind", THEIRS, ids=str)
def test_damage_of_others_files_is_named(kind: Kind, tmp_path: Path) -> None:
    """They carry no checksum, so what still can be read may be other content; what cannot be read is named."""
    kind.make(tmp_path / "whole")
    data = (tmp_path / "whole" / kind.file).read_bytes()
    for seed in range(N):
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / kind.file).write_bytes(damaged(data, seed))
        try:
            kind.read(folder)
        except (ValueError, OSError) as error:
            assert kind.file in str(error) or str(folder) in str(error), f"seed {seed}: {error!r}"


def test_pickles_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.arange(64.0)}, path)
    whole = path.read_bytes()
    torch.save({"a": torch.arange(64.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors_of(str(path))["a"], torch.arange(64.0))
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"PK\x03\x04 no archive",
        b"\x80\x02 no pickle",
        path.read_bytes()[:100],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pth is damaged"):
            read_tensors_of(str(path))


@pytest.mark.filterwarnings("ignore")  # TorchScript is on its way out
def test_torchscript_is_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match=r"model\.pth is damaged, or no file of weights \(.*TorchScript") as raised:
        read_tensors_of(str(path))
    assert "False" not in str(raised.value)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, secret)
    folder = tmp_path / "model"
    folder.mkdir()
    for named in ("../secret.safetensors", str(secret), ".."):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
        with pytest.raises(ValueError, match="allowed are files beside it"):
            read_tensors(folder, {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ValueError, match="has no weight_map"):
        read_tensors(folder, {})


# Headers that say anything --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_sequences": 10**12}, "lacks"),
        ({"shard_sequences": 0}, "shard_sequences is 0, and must be a whole number from 1 on"),
        ({"context": 10**12}, "belongs elsewhere|says"),
        ({"n_sequences": -1}, "n_sequences is -1"),
        ({"n_sequences": 2.5}, "n_sequences is 2.5"),
        ({"dtype": "object"}, "dtype is 'object'"),
    ],
)
def test_a_stores_header_is_not_taken_at_its_word(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    """At once, and without making room for what it says."""
    make_store(tmp_path)
    path = tmp_path / "store.json"
    values = read_json(path) | change
    path.write_text(json.dumps(values))  # as somebody would who knows of no checksum
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        ws.ActivationStore.open(tmp_path).write(2, 0, [0])


def test_json_that_is_nested_deep(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match=r"deep\.json is not JSON"):
        read_json(path)


# What killed runs leave -----------------------------------------------------------------------------------------------


def test_halves_of_killed_runs_go_and_those_of_others_stay(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    killed, running = tmp_path / f".cfg.json.{ended.stdout.strip()}.tmp", tmp_path / f".cfg.json.{os.getppid()}.tmp"
    other = tmp_path / f".notes.txt.{ended.stdout.strip()}.tmp"
    for path in (killed, running, other):
        path.write_text("half")
    remove_halves(tmp_path, "cfg.json")
    assert [path.exists() for path in (killed, running, other)] == [False, True, True]
    killed.write_text("half")
    sae().save_pretrained(tmp_path)  # the next run removes its own
    assert not killed.exists() and running.exists()


def test_two_runs_of_pages_are_the_same_bytes(tmp_path: Path) -> None:
    model(), sae()  # made before the seed, of which the first of the two would draw
    for name in ("one", "other"):
        torch.manual_seed(0)
        make_pages(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 25
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
