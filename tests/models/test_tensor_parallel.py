"""A model whose weights are spread over two processes: each of them sees, edits and stores all heads."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import writesae as ws
from architectures import ARCHITECTURES
from writesae.gradients import Logit, gradient
from writesae.stores import ActivationStore, extract

SPLIT = {f"model.layers.*.linear_attn.in_proj_{name}": "colwise" for name in ("qkv", "z", "b", "a")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose attention two processes can share."""
    a = next(a for a in ARCHITECTURES if a.name == "qwen3_5")
    a = dataclasses.replace(a, values={**a.values, "num_key_value_heads": 2})
    folder = tmp_path_factory.mktemp("model")
    a.build().save_pretrained(folder)
    return folder


def seen(folder: Path, store: Path, **kwargs) -> dict[str, list[float]]:
    """What one process sees."""
    model = ws.HookedRecurrentModel.from_pretrained(folder, tokenizer=False, **kwargs)
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids)
        with model.intervene(ws.Delete(1, 2), positions=[3]):
            edited = model(ids)
    found = {name: cache[name, 1] for name in ("q", "k", "v", "log_decay", "o")}
    found |= {"logits": logits, "edited": edited, "W_O": model.W_O(1), "W_U": model.W_U}
    found["gradient"] = gradient(model, ids, Logit(5))[1].output
    extract(model, ids, [(1, 2), (3, 0)], store, shard_sequences=1, batch_size=1, progress=False)
    tensors = {name: x.detach().flatten().tolist() for name, x in found.items()}
    return tensors | {"fingerprint": [model.fingerprint(1)]}  # type: ignore[dict-item]


def of_two(folder: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "helpers")])
    command = [*launch, str(folder), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": path})


def test_both_processes_see_edit_and_store_all_heads(folder, tmp_path):
    expected = seen(folder, tmp_path / "alone")
    run = of_two(folder, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.pop("sharded")  # the twin: it is not simply the whole model twice
        assert found.pop("fingerprint") == expected["fingerprint"]
        for name, x in found.items():
            torch.testing.assert_close(
                torch.tensor(x),
                torch.tensor(expected[name]),
                rtol=1e-5,
                atol=1e-4,
                msg=lambda said, name=name: f"{name}: {said}",
            )
    one, two = (ActivationStore.open(tmp_path / name) for name in ("alone", "together"))
    torch.testing.assert_close(
        two.write(1, 2, slice(None)).dense(), one.write(1, 2, slice(None)).dense(), rtol=0, atol=1e-3
    )
    assert float(one.write(1, 2, slice(None)).dense().abs().max()) > 0.1


def test_a_plan_that_splits_the_heads_does_not_go_unnoticed(folder, tmp_path):
    run = of_two(folder, tmp_path, json.dumps(SPLIT))
    assert run.returncode != 0 and not (tmp_path / "0.json").exists()


if __name__ == "__main__":
    from writesae.jobs.processes import is_sharded

    source, out, *plan = sys.argv[1:]
    options = {"tp_plan": json.loads(plan[0]) if plan else "auto"}
    result = seen(Path(source), Path(out, "together"), **options)
    rank = torch.distributed.get_rank()
    model = ws.HookedRecurrentModel.from_pretrained(source, tokenizer=False, **options)
    result["sharded"] = any(map(is_sharded, model.parameters()))  # type: ignore[assignment]
    Path(out, f"{rank}.json").write_text(json.dumps(result))
