"""SAE folders on disk: ``cfg.json`` and ``sae_weights.safetensors``, written whole, checked when read, no pickle.

The two files are SAELens' too (version 6): beside our fields ``cfg.json`` has its own, so that
``sae_lens.SAE.load_from_disk`` reads the same folder once `writesae.saelens` is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from writesae.jobs.disk import read_json, remove_halves, write_json, write_whole
from writesae.saes.config import SAEConfig
from writesae.saes.sparsities import sparsity_named

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
CHECKSUM = "weights_sha256"  # in cfg.json: which weights belong to this configuration


def save(
    folder: Path, cfg: SAEConfig, tensors: Mapping[str, Tensor], for_saelens: Mapping[str, Any] | None = None
) -> None:
    """Write an SAE folder. Weights go first: a crash in between leaves a checksum that fails, not a mixture.

    ``for_saelens`` are values of `saelens_fields` other than what follows from ``cfg``.
    """
    check_finite(tensors, cfg, "not saved")
    remove_halves(folder, WEIGHTS, CONFIG)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    described = (
        saelens_fields(cfg) | dict(for_saelens or {}) | cfg.to_dict() | {CHECKSUM: hashlib.sha256(data).hexdigest()}
    )
    write_whole(folder / WEIGHTS, data)
    write_json(folder / CONFIG, described)


def load(folder: Path, or_instead: str = "") -> tuple[SAEConfig, dict[str, Tensor]]:
    """Read an SAE folder: its configuration and its tensors in the dtype they are stored in.

    ``or_instead`` says what else a folder may hold, for the message.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, foreign, or not the one the other was written with.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: an SAE folder holds {CONFIG} and {WEIGHTS}{or_instead}; point to the "
                f"folder with both, or give the subfolder"
            )
    cfg, checksum = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as e:
        raise ValueError(
            f"{path} is not a whole safetensors file ({e}): cut off, or of another kind; fetch or save it again"
        ) from e
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(
            f"{path} is not the file that {CONFIG} was written with ({CHECKSUM} differs): it was damaged or exchanged; "
            f"fetch or save the folder again"
        )
    check_finite(tensors, cfg, f"{path} is not usable")
    return cfg, tensors


def saelens_fields(cfg: SAEConfig) -> dict[str, Any]:
    """What SAELens 6 reads in ``cfg.json``, as far as it follows from ``cfg``. Matrices come flattened there."""
    hook = {"write": "hook_write", "state": "hook_state"}.get(cfg.target)  # no hook point shows the delta
    return {
        "architecture": "writesae",
        "d_in": cfg.d_key * cfg.d_value,
        "d_sae": cfg.n_atoms,
        "dtype": "float32",  # of the loaded SAE; the file's may be narrower
        "device": "cpu",
        "apply_b_dec_to_input": False,  # the mean is subtracted by the encoder's bias
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": cfg.model_id,
            "hook_name": None if cfg.layer is None or hook is None else f"blocks.{cfg.layer}.mixer.{hook}",
            "hook_head_index": cfg.head,
            "context_size": cfg.training.get("context"),
            "sae_lens_version": "6.0.0",  # the first with this layout: an older number, or none, is read in another way
            "sae_lens_training_version": None,
        },
    }


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], whose: str, configuration: str = f"{CONFIG} beside it"
) -> None:
    """Raise ValueError that names every tensor missing, unknown or of another shape than the configuration asks for."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"{whose} does not fit {configuration}: {'; '.join(wrong)}; save the SAE again")


def check_finite(tensors: Mapping[str, Tensor], cfg: SAEConfig, trouble: str) -> None:
    """Raise ValueError unless all numbers are finite; what the sparsity has yet to calibrate may be NaN."""
    unknown = sparsity_named(cfg.sparsity).calibrated
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad and not (name in unknown and bool(torch.isnan(tensor).all())):
            raise ValueError(f"{trouble}: {bad} of {tensor.numel()} numbers in {name} are NaN or infinite")


def _read_config(path: Path) -> tuple[SAEConfig, str]:
    values = read_json(path, "fetch or save it again")
    if not isinstance(values.get("type"), str):
        raise ValueError(f'{path} does not say its "type": it is not an SAE configuration of this library')
    if not isinstance(values.get(CHECKSUM), str):
        raise ValueError(f"{path} lacks {CHECKSUM}, the checksum of {WEIGHTS}; save the SAE again")
    checksum = values.pop(CHECKSUM)
    if values["type"] != "write_sae":
        raise ValueError(f"{path} says type {values['type']!r}; this version can load: write_sae")
    try:
        return check_saelens_fields(values), checksum
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def check_saelens_fields(values: dict[str, Any]) -> SAEConfig:
    """The configuration in ``values``, once what is there for SAELens (older files lack it) agrees with it.

    The precision and device that SAELens has it in, and its notes (``metadata``), are free.
    """
    theirs = dict.fromkeys(saelens_fields(SAEConfig(1, 1, 1, 1)))
    cfg = SAEConfig.from_dict({name: value for name, value in values.items() if name not in theirs})
    for name, value in saelens_fields(cfg).items():
        if name not in ("dtype", "device", "metadata") and values.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, as its other fields say; got {values[name]!r}")
    return cfg
