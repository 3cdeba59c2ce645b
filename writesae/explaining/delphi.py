"""Firings in the form of delphi's cache, so that its samplers, explainers and scorers read them (Paulo et al. 2024).

A folder has one folder for each hook point, in it ``0_<last atom>.safetensors`` with ``locations [n, 3]`` (sequence,
token, atom), ``activations [n]`` and ``tokens [sequence, pos]``, and ``config.json``: delphi's `LatentDataset` reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from writesae.hooks.attachable import fit
from writesae.jobs.arguments import named_kinds
from writesae.jobs.disk import write_whole
from writesae.jobs.progress import track
from writesae.saes.activity.reading import encode
from writesae.stores.windows import Texts, Windows

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE


@named_kinds
@torch.no_grad()
def write_delphi(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    texts: Texts,
    folder: str | Path,
    *,
    context: int = 256,
    batch_size: int = 8,
    check_model: bool = True,
    progress: bool = True,
) -> Path:
    """Write where atoms fire, for delphi.

    Args:
        model: the model that the SAE is of.
        sae: an SAE of one of its heads.
        texts: texts, or token ids ``[n, pos]``; cut into windows of ``context`` tokens, what is left over is dropped.
        folder: delphi's ``raw_dir``; the hook point's folder in it is made here.
        context: tokens of a sequence.
        batch_size: sequences run at once.
        check_model: refuse an SAE trained on other weights.
        progress: show a progress bar.

    Returns:
        The hook point's folder, ``blocks.<layer>.mixer.head.<head>``.

    Raises:
        ValueError: no window in the texts; an SAE of another model.
    """
    fit(sae, model, check_model=check_model)
    layer, head = sae.place
    tokens = Windows.cut(model, texts, context).enough().tokens
    where, strengths = [], []
    starts = range(0, len(tokens), batch_size)
    for start in track(starts, "reading firings", progress):
        ids = tokens[start : start + batch_size].to(model.device)
        codes = encode(model, sae, ids, check_model=False, batch_size=batch_size)
        row, pos, k = codes.values.nonzero(as_tuple=True)
        atoms = codes.indices[row, pos, k]
        where.append(torch.stack([row + start, pos, atoms], 1).cpu())
        strengths.append(codes.values[row, pos, k].cpu())
    locations = torch.cat(where)
    small = len(tokens) < 2**16 and sae.cfg.n_atoms <= 2**16
    made = {
        "locations": locations.to(torch.uint16 if small else torch.uint32),
        "activations": torch.cat(strengths).half(),
        "tokens": tokens.cpu().to(torch.int64),
    }
    place = Path(folder) / f"blocks.{layer}.mixer.head.{head}"
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / f"0_{sae.cfg.n_atoms - 1}.safetensors", safetensors.torch.save(made))
    about = {
        "model_name": model.model_id, "cache_ctx_len": context, "n_tokens": tokens.numel(), "n_splits": 1,
        "batch_size": batch_size, "dataset_repo": "", "dataset_split": "", "dataset_name": "", "dataset_column": "text",
    }  # fmt: skip
    write_whole(place / "config.json", (json.dumps(about, indent=1) + "\n").encode())
    return place
