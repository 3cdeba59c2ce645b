"""Files for delphi and circuit-tracer, read by their own classes.

Neither can be installed beside today's transformers with all that it wants. `.ci/run` lays them beside the environment,
without what they need for models of their own; elsewhere these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import urllib.request
from functools import partial
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import planted
import writesae as ws
from architectures import architecture_named


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a package importable: modules that are ``absent`` are empty, and with ``bare`` its ``__init__`` is too."""

    def make(package: str, bare: bool = False, **absent: dict[str, Any]) -> None:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"needs {package}: see .ci/run")
        if bare:
            monkeypatch.setitem(sys.modules, package, importlib.util.module_from_spec(spec))
        for name, values in absent.items():
            module = ModuleType(name)
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)

    return make


def test_circuit_tracer_serves_and_reads_a_graph(beside: Any, tmp_path: Path) -> None:
    """What its viewer asks its server for first, and its schema of what comes."""
    beside("circuit_tracer", bare=True)
    schema = import_module("circuit_tracer.frontend.graph_models").Model
    handler = import_module("circuit_tracer.frontend.local_server").CircuitGraphHandler
    model = ws.HookedRecurrentModel(architecture_named("qwen3_5").build())
    found = ws.circuit(model, torch.arange(5), ws.Logit(5, minus=11), max_nodes=20)
    found.save(tmp_path / "mine.json")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, frontend_dir=tmp_path, data_dir=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

        def fetched(path: str) -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{http.server_address[1]}{path}") as answer:
                return json.load(answer)

        (listed,) = fetched("/data/graph-metadata.json")["graphs"]
        graph = fetched(f"/graph_data/{listed['slug']}.json")
        http.shutdown()
    read = schema.model_validate(graph)
    assert listed == read.metadata.model_dump() and len(read.nodes) == len(found.nodes)
    assert len(read.links) == int((found.edges != 0).sum())
    written = [node.model_dump() for node in read.nodes]
    assert written == graph["nodes"], "nothing that its schema does not know"
    del graph["nodes"][0]["layer"]  # the twin
    with pytest.raises(ValueError, match="layer"):
        schema.model_validate(graph)


def test_delphi_reads_where_atoms_fire(beside: Any, tmp_path: Path) -> None:
    """Records of its `LatentDataset`: examples that fire at the planted word alone, and others without it."""
    beside("delphi", blobfile={}, faiss={}, sentence_transformers={"SentenceTransformer": None})
    config = import_module("delphi.config")
    model, sae, texts = planted.model(), planted.sae(), torch.stack(planted.texts())
    folder = ws.write_delphi(model, sae, texts, tmp_path, context=32, progress=False)
    sampled = config.SamplerConfig(n_examples_train=8, n_examples_test=8, n_quantiles=4)
    made = config.ConstructorConfig(
        min_examples=8, example_ctx_len=16, n_non_activating=8, non_activating_source="random"
    )
    records = list(
        import_module("delphi.latents").LatentDataset(
            raw_dir=tmp_path, sampler_cfg=sampled, constructor_cfg=made, tokenizer=model.tokenizer,
            modules=[folder.name], latents={folder.name: torch.arange(3)},
        )
    )  # fmt: skip
    assert [record.latent.latent_index for record in records] == [0, 1, 2]
    for record, name in zip(records, planted.NAMES, strict=True):
        word = planted.token(name)
        assert len(record.train) == 8 and len(record.not_active) == 8
        for example in (*record.train, *record.test):
            assert torch.equal(example.activations > 0, example.tokens == word) and (example.tokens == word).any()
        assert not any((example.tokens == word).any() for example in record.not_active)
