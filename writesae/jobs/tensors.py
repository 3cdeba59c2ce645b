"""Tensors in files, with what they are, and their checksums. No pickle."""

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


def write_tensors(path: Path, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what they are to one safetensors file, whole or not at all.

    Args:
        path: the file.
        key: a word for what it is, under which ``about`` stands in its metadata.
        tensors: by name.
        about: what JSON can say.
    """
    kept = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    described = json.dumps(sealed({**about, "tensors": checksum(kept)}))
    write_whole(path, safetensors.torch.save(kept, {key: described}))


def read_tensors(path: Path, key: str, what: str, again: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: the tensors, on the CPU, and what they are.

    Args:
        path: the file.
        key: the word for what it is.
        what: the same for messages.
        again: what to do about a damaged one, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {}).get(key, "null"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        about = None if about is None else unsealed(about)
        if about is not None and about.pop("tensors", None) not in (None, checksum(tensors)):
            raise ValueError("its tensors were altered")
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, OSError) as e:
        raise ValueError(f"{path} is not a whole {what} ({e}); {again}") from e
    if about is None:
        raise ValueError(f"{path} is not a {what}; give another file")
    return tensors, about
