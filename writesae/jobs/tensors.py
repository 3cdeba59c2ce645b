"""Tensors in files, with what they are, and their checksum."""

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

from writesae.jobs.disk import sealed, unsealed, write_whole
from writesae.jobs.processes import gathered


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        x = gathered(x)
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what they are to one safetensors file, whole or not at all.

    Args:
        path: the file.
        kind: what it is, a word: `read_tensors` asks for it.
        tensors: by name.
        about: what JSON can say; `read_tensors` gives it back.
    """
    kept = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}  # none shares memory
    described = json.dumps(sealed({**about, "tensors": checksum(kept)}))
    write_whole(path, safetensors.torch.save(kept, {kind: described}))


def read_tensors(path: Path, kind: str, again: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: the tensors, on the CPU, and what they are.

    Args:
        path: the file.
        kind: what it should be.
        again: what to do about a damaged one, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safetensors.safe_open(path, "pt") as f:
            described = (f.metadata() or {}).get(kind)
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        about = None if described is None else unsealed(json.loads(described))
        if about is not None and about.pop("tensors", None) not in (None, checksum(tensors)):
            raise ValueError("its tensors were altered")
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, OSError) as e:
        raise ValueError(f"{path} is not a whole {kind} file ({e}); {again}") from e
    if about is None:
        raise ValueError(f"{path} is not a {kind} file: its safetensors metadata has no {kind!r}; give another file")
    return tensors, about
