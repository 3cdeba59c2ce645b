"""SAE folders on disk: ``cfg.json`` and ``sae_weights.safetensors``, written whole, checked when read, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from writesae.saes.config import SAEConfig
from writesae.zoo import ZOO, shipped_model, shipped_saes

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
CHECKSUM = "weights_sha256"  # in cfg.json: which weights belong to this configuration


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(folder: Path, cfg: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an SAE folder. Weights go first: a crash in between leaves a checksum that fails, not a mixture."""
    check_finite(tensors, "not saved")
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    described = cfg.to_dict() | {CHECKSUM: hashlib.sha256(data).hexdigest()}
    write_whole(folder / WEIGHTS, data)
    write_whole(folder / CONFIG, (json.dumps(described, indent=2) + "\n").encode())


def load(folder: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Read an SAE folder: its configuration and its tensors in the dtype they are stored in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, foreign, or not the one the other was written with.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: an SAE folder holds {CONFIG} and {WEIGHTS}; "
                f"point to the folder with both, or give the subfolder"
            )
    cfg, checksum = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as e:
        raise ValueError(
            f"{path} is not a whole safetensors file ({e}): cut off, or of another kind; fetch or save it again"
        ) from e
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(
            f"{path} is not the file that {CONFIG} was written with ({CHECKSUM} differs): it was damaged or exchanged; "
            f"fetch or save the folder again"
        )
    check_finite(tensors, f"{path} is not usable")
    return cfg, tensors


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError that names every tensor missing, unknown or of another shape than the configuration asks for."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit {CONFIG} beside it: {'; '.join(wrong)}; save the SAE again")


def check_finite(tensors: Mapping[str, Tensor], trouble: str) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"{trouble}: {bad} of {tensor.numel()} numbers in {name} are NaN or infinite")


def locate(folder_or_hub_id: str | Path, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The folder of an SAE: one that exists here, else a shipped one (``"tiny-gdn/L2H0"``), else ``"owner/name"`` on
    the hub, downloaded into its cache."""
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    model, _, site = name.partition("/")
    if not folder.is_dir() and shipped_model(model):
        folder = ZOO / model / "saes" / site
        if not folder.is_dir():
            have = ", ".join(f"{model}/{saes.name}" for saes in shipped_saes(model)) or "none"
            raise FileNotFoundError(f"no SAE {name} is shipped; shipped with {model}: {have}")
    elif not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{name} is neither a folder here nor a hub id of the form owner/name")
        from huggingface_hub import snapshot_download

        wanted = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG, WEIGHTS)]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        except (OSError, ValueError) as e:
            raise FileNotFoundError(f"{name} is no folder here, and the hub did not give it: {e}") from e
    return folder / subfolder if subfolder else folder


def _read_config(path: Path) -> tuple[SAEConfig, str]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}): it was cut off or edited; fetch or save it again") from e
    if not isinstance(values, dict) or not isinstance(values.get("type"), str):
        raise ValueError(f'{path} does not say its "type": it is not an SAE configuration of this library')
    if not isinstance(values.get(CHECKSUM), str):
        raise ValueError(f"{path} lacks {CHECKSUM}, the checksum of {WEIGHTS}; save the SAE again")
    checksum = values.pop(CHECKSUM)
    if values["type"] != "write_sae":
        raise ValueError(f"{path} says type {values['type']!r}; this version can load: write_sae")
    try:
        return SAEConfig.from_dict(values), checksum
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
