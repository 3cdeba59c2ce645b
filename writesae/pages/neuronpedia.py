"""Atoms in the format that Neuronpedia imports, as its own tool `sae-dashboard` (0.8.0) writes it::

    <folder>/batch-0.json ...        features, a few hundred a file: `NeuronpediaDashboardBatch` there
    <folder>/skipped_indexes.json    atoms that never fire
    <folder>/run_settings.json       what it was made with
    <folder>/explanations/batch-0.jsonl.gz   labels, if there are any, as Neuronpedia's own exports have them

The format was made for SAEs of the residual stream. Fields that mean nothing for an atom of a memory (alignment with
neurons, correlations, weights by attention head) are left empty, as the format allows.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from writesae.jobs.disk import write_whole
from writesae.pages.decoder import direct_effect
from writesae.pages.study import Study
from writesae.saes.activity.contexts import Context

BATCH = 256  # features per file
BARS = 50  # bars per histogram


def export(study: Study, folder: str | Path) -> Path:
    """Write the files; returns the folder.

    ``pos_str`` and ``neg_str`` are the tokens that the atom's value promotes and suppresses directly
    (`direct_effect`); the histogram of logits shows the same numbers. ``activations`` are the strongest firings, each
    marked as Neuronpedia marks top activations (``bin_min = bin_contains = -1``).
    """
    folder, cfg, found = Path(folder), study.sae.cfg, study.survey
    alive = (found.seen.firings > 0).nonzero()[:, 0].tolist()
    layer, head = study.sae.place
    source = f"writesae-{cfg.target}-h{head}"
    model_id = str(cfg.model_id or study.model.model_id)
    for path in folder.glob("batch-*.json"):  # of another SAE there may have been more
        path.unlink()
    for number, start in enumerate(range(0, len(alive), BATCH)):
        some = alive[start : start + BATCH]
        effect = direct_effect(study.model, layer, head, study.decoder.value[torch.tensor(some)])
        features = [feature(study, atom, logits.numpy()) for atom, logits in zip(some, effect, strict=True)]
        batch = {
            "model_id": model_id, "layer": layer, "sae_set": source, "sae_id_suffix": None, "features": features
        }  # fmt: skip
        _write(folder / f"batch-{number}.json", batch)
    _explanations(study, folder / "explanations" / "batch-0.jsonl.gz", model_id, f"{layer}-{source}")
    dead = sorted(set(range(cfg.n_atoms)) - set(alive))
    skipped = {"model_id": model_id, "layer": str(layer), "sae_set": source, "log_sparsity": None}
    _write(folder / "skipped_indexes.json", skipped | {"skipped_indexes": dead})
    settings = {
        "sae_set": source, "sae_path": study.name, "model_id": model_id, "layer": layer,
        "huggingface_dataset_path": study.source, "n_prompts_total": found.n_prompts,
        "n_tokens_in_prompt": found.context, "n_features_at_a_time": BATCH, "made_with": "writesae",
    }  # fmt: skip
    _write(folder / "run_settings.json", settings)
    return folder


def _explanations(study: Study, path: Path, model_id: str, source: str) -> None:
    """Labels, one JSON object per line; no file if there are none."""
    lines = [
        {
            "modelId": model_id, "layer": source, "index": str(atom), "description": label.text,
            "explanationModelName": study.labelled_by, "typeName": "writesae",
        }
        for atom, label in sorted(study.labels.items())
        if label.text is not None
    ]  # fmt: skip
    path.unlink(missing_ok=True)
    if lines:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        write_whole(path, gzip.compress(text.encode(), mtime=0))


def feature(study: Study, atom: int, logits: np.ndarray) -> dict[str, Any]:
    """One atom, with the names of fields that Neuronpedia uses; ``logits`` are its direct effects on all tokens."""
    found, direct = study.survey, study.direct[atom]
    activations = found.sample(atom)["activation"].numpy()
    by_activation = np.histogram(activations, BARS, (0.0, float(activations.max(initial=1e-9))))
    empty = (
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
        "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
        "correlated_features_l1", "correlated_features_pearson", "decoder_weights_dist", "vector",
    )  # fmt: skip
    peak = float(found.seen.largest[atom])
    return {name: [] for name in empty} | {
        "feature_index": atom,
        "pos_str": [token for token, _ in direct.promoted],
        "pos_values": [round(value, 3) for _, value in direct.promoted],
        "neg_str": [token for token, _ in direct.suppressed],
        "neg_values": [round(value, 3) for _, value in direct.suppressed],
        "frac_nonzero": int(found.seen.firings[atom]) / found.n_tokens,
        **_bars("freq_hist_data", *by_activation),
        **_bars("logits_hist_data", *np.histogram(logits, BARS)),
        "n_prompts_total": found.n_prompts,
        "n_tokens_in_prompt": found.context,
        "dataset": study.source,
        "activations": [_activation(context, peak) for context in found.strongest[atom]],
    }


def _bars(name: str, counts: np.ndarray, edges: np.ndarray) -> dict[str, list[float]]:
    """A histogram: the middle of each bar, and its height."""
    middles = (edges[:-1] + edges[1:]) / 2
    return {
        f"{name}_bar_values": [round(float(x), 6) for x in middles],
        f"{name}_bar_heights": [float(n) for n in counts],
    }


def _activation(context: Context, peak: float) -> dict[str, Any]:
    return {
        "bin_min": -1.0,
        "bin_max": round(peak, 3),
        "bin_contains": -1.0,
        "tokens": [*context.before, context.token, *context.after],
        "values": [round(value, 4) for value in context.activations],
        "qualifying_token_index": len(context.before),
    }


def _write(path: Path, contents: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(contents, allow_nan=False).encode())
