"""Tensors in files: their checksums; a JSON file and the tensors that belong to it; both in one file. No pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from writesae.jobs.disk import read_json, remove_halves, sealed, unsealed, write_json, write_whole
from writesae.jobs.processes import gathered

WEIGHTS_SHA256 = "weights_sha256"  # in the JSON file: which tensors belong to it


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        x = gathered(x)
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_folder(
    folder: Path, config: str, weights: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and the JSON file that describes them. Tensors go first: a crash in between leaves a checksum that
    fails, not a mixture."""
    remove_halves(folder, weights, config)
    data = safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    write_whole(folder / weights, data)
    write_json(folder / config, {**described, WEIGHTS_SHA256: hashlib.sha256(data).hexdigest()})


def read_tensors(path: Path, sha256: str, config: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, if it is whole and the one that ``config`` beside it was written with.

    Raises:
        ValueError: it is not.
    """
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as e:
        raise ValueError(
            f"{path} is not a whole safetensors file ({e}): cut off, or of another kind; fetch or save it again"
        ) from e
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path} is not the file that {config} was written with ({WEIGHTS_SHA256} differs): it was damaged or "
            f"exchanged; fetch or save the folder again"
        )
    return tensors


def read_folder(
    folder: Path, config: str, weights: str, kind: str, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_folder` wrote: the description (without the checksum) and the tensors.

    Args:
        folder: where they are.
        config, weights: names of the two files.
        kind: what the description must say as its ``type``.
        what: what such a folder is called, for messages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another kind, or not the one that the other was written with.
    """
    for name in (config, weights):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {what} is a folder with {config} and {weights}")
    described = read_json(folder / config, "save it again")
    if described.get("type") != kind:
        raise ValueError(f"{folder / config} says type {described.get('type')!r}: {what} says {kind!r}")
    return described, read_tensors(folder / weights, str(described.pop(WEIGHTS_SHA256, "")), config)


def write_checkpoint(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write where a training is, in one file: what is known about it, and its tensors."""
    data = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    described = json.dumps(sealed({**about, "tensors": checksum(data)}))
    write_whole(path, safetensors.torch.save(data, {"training": described}))


def read_checkpoint(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_checkpoint` wrote; ``what`` it is a checkpoint of, for messages.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        with safetensors.safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {}).get("training", "null"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        about = None if about is None else unsealed(about)
        if about is not None and about.pop("tensors", None) not in (None, checksum(tensors)):
            raise ValueError("its tensors were altered")
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, OSError) as e:
        raise ValueError(f"{path} is not a whole checkpoint ({e}); delete it to start anew") from e
    if about is None:
        raise ValueError(f"{path} is not a checkpoint of {what}; give another file")
    return about, tensors
