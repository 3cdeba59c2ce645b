"""One checkpoint of the paper's own code (github.com/JackYoung27/writesae), read without running anything in it.

Its training leaves ``best.pt``: ``model_state_dict``, ``config`` and what was measured, with ``config.json`` beside it.
Older files hold the weights alone, or factors ``[n, d]`` where later ones have ``[n, rank, d]``. Its SAEs read states,
are not centred, add a bias to every reconstruction, and their atoms' norms drift between renormalisations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writesae.jobs.disk import read_json
from writesae.saes.autoencoder import Autoencoder
from writesae.saes.config import SAEConfig
from writesae.saes.files import check_finite
from writesae.saes.formats import Format, register_format
from writesae.saes.paper.manifest import MANIFEST, verify
from writesae.saes.sae import WriteSAE

CHECKPOINTS = ("best.pt", "final.pt", "checkpoint.pt")  # what its training leaves in a folder, best first
ON_HUB = (CHECKPOINTS[0], "config.json")  # and what of it the hub has

_LINEAR = {"encoder.weight": "A_enc", "encoder.bias": "b_enc"}
_DENSE = {"decoder.weight": "A_dec", "decoder.bias": "b_dec"}
_BILINEAR = {"V_enc": "V_enc", "W_enc": "W_enc"}
_FACTORED = {"V_dec": "V_dec", "W_dec": "W_dec", "bias": "b_dec"}
_BIAS = {"b_enc": "b_enc"}
_GATES = {"b_gate": "b_enc", "r_mag": "r_mag", "b_mag": "b_mag"}

TYPES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "flat": (dict(encoder="dense", decoder="dense"), _LINEAR | _DENSE),
    "rank1": (dict(encoder="dense"), _LINEAR | {"V": "V_dec", "W": "W_dec", "bias": "b_dec"}),
    "bilinear": (dict(encoder="bilinear"), _BILINEAR | _BIAS | _FACTORED),
    "bilinear_tied": (dict(encoder="tied"), _BIAS | _FACTORED),
    "bilinear_flat": (dict(encoder="bilinear", decoder="dense"), _BILINEAR | _BIAS | _DENSE),
    "bilinear_gated": (
        dict(encoder="bilinear", sparsity="gated", gate_temperature=0.1),
        _BILINEAR | _GATES | _FACTORED,
    ),
    "bilinear_jumprelu": (
        dict(encoder="bilinear", sparsity="jumprelu"),
        _BILINEAR | _BIAS | {"log_threshold": "log_threshold"} | _FACTORED,
    ),
}
"""Its ``sae_type``s: our choices, and its names of tensors with ours."""


def load_reference(
    path: str | Path,
    *,
    model_id: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    root: str | Path | None = None,
) -> WriteSAE:
    """The SAE in a checkpoint of the paper's code: the same activations and reconstructions.

    One that chooses over the batch (``use_batchtopk``) comes without a threshold: ``encode(x, over_batch=True)`` is
    what its own code does, `calibrate` finds one. What the file does not say is read off names and shapes of tensors
    and the folder's name. What is left to assume (k=32, as its code does; square matrices) is listed in
    ``cfg.training["reference"]["assumed"]``, beside what was recorded of the training.

    Args:
        path: the ``.pt`` file, or its folder.
        model_id: the model that it belongs to, which no checkpoint says.
        layer: default: what the checkpoint or its folder (``.._L9_H4..``) says.
        head: likewise.
        root: folder whose ``manifest.json`` has checksums; default: the checkpoint's own.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: damaged, wants to run code, of an unknown type, or tensors do not fit; the message names them.
    """
    cfg, weights = read_reference(path, model_id=model_id, layer=layer, head=head, root=root)
    return WriteSAE.from_tensors(cfg, weights, str(path))


def read_reference(
    path: str | Path,
    *,
    model_id: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    root: str | Path | None = None,
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """`load_reference` up to the SAE: its configuration and its tensors under our names."""
    path = _file(Path(path))
    root = path.parent if root is None else Path(root)
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    verified = verify(path, digest, root)
    tensors, config, record = _read(path)
    assumed: list[str] = []
    try:
        sae_type = _type(config, tensors)
        _check_names(sae_type, tensors)
        cfg = _config(sae_type, config, tensors, path, assumed)
        place = _place(path, config, layer, head)
        with torch.device("meta"):  # sizes only: dense atoms take gigabytes
            ours = Autoencoder(cfg)
        weights = _weights(sae_type, cfg, tensors, ours.state_dict())
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    check_finite(weights, cfg, f"{path} is not usable")
    weights |= {name: torch.tensor(float("nan")) for name in ours.sparsity.calibrated}  # which its code does not store
    where = path.relative_to(root if path.parent != root else root.parent).as_posix()
    record = config | record | {"sae_type": sae_type, "file": where, "sha256": digest, "verified": verified}
    record = {name: _plain(value) for name, value in record.items()} | {"assumed": assumed}
    return dataclasses.replace(cfg, model_id=model_id, training={"reference": record}, **place), weights


@register_format
class OfThePaper(Format):
    """A folder that a training of the paper's code left, as a format of `WriteSAE.from_pretrained`."""

    holds = f"{CHECKPOINTS[0]} of the paper's code"
    wanted = ON_HUB
    wanted_of_root = (MANIFEST,)

    def load(self, folder: Path, root: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
        return read_reference(folder, root=root)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in CHECKPOINTS:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} is neither a checkpoint nor a folder with {' or '.join(CHECKPOINTS)}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, configuration, and what else the file records."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as e:  # a damaged file can fail anywhere in zip, pickle or torch
        wanted = re.search(r"GLOBAL (\S+)", str(e)) if isinstance(e, pickle.UnpicklingError) else None
        if wanted is None:
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise ValueError(f"{path} is damaged, or no checkpoint ({reason}); fetch it again") from e
        raise ValueError(
            f"{path} wants to run code when it is loaded ({wanted[1]}), which is refused, and nothing was run; have it "
            f"saved again by somebody who trusts it, as torch.save({{'model_state_dict': ..., 'config': ...}}, path)"
        ) from e
    if not isinstance(payload, dict):
        raise ValueError(f"{path} holds a {type(payload).__name__}, not a dict of tensors")
    tensors: Any = payload.get("model_state_dict", payload)
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(
            f"{path} holds no weights: neither model_state_dict nor tensors by name, but {_listed(payload)}"
        )
    rest = {} if tensors is payload else payload
    inside, beside = rest.get("config") or {}, path.with_name("config.json")
    if not isinstance(inside, Mapping):
        raise ValueError(f"{path}: config must be a dict; got {type(inside).__name__}")
    outside = read_json(beside) if beside.is_file() else {}
    dropped = ("model_state_dict", "optimizer_state_dict", "config")
    kept = {name: t for name, t in tensors.items() if name != "steps_since_active"}
    # A run that is repeated writes config.json before it has a better best.pt: what lies inside belongs to the weights.
    return kept, outside | dict(inside), {name: value for name, value in rest.items() if name not in dropped}


def _type(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """What the configuration says, else what the names of tensors do, as in its code."""
    said = config.get("sae_type")
    if said and said not in tuple(TYPES):
        raise ValueError(f"unknown sae_type {said!r}; known are {', '.join(TYPES)}")
    if said == "bilinear" and not {"V_enc", "W_enc"} & tensors.keys():
        return "bilinear_tied"
    if said:
        return said
    if "V_enc" in tensors and "decoder.weight" in tensors and "V_dec" not in tensors:
        return "bilinear_flat"
    if "V_dec" in tensors or "W_dec" in tensors:
        if "log_threshold" in tensors:
            return "bilinear_jumprelu"
        if "b_gate" in tensors:
            return "bilinear_gated"
        return "bilinear" if "V_enc" in tensors else "bilinear_tied"
    return "rank1" if "V" in tensors or "W" in tensors else "flat"


def _check_names(sae_type: str, tensors: Mapping[str, Tensor]) -> None:
    names = TYPES[sae_type][1]
    wrong = [f"{name} is missing" for name in names if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in names]
    if wrong:
        raise ValueError(f"as an SAE of type {sae_type}, {_listed(wrong, '; ')}")


def _config(
    sae_type: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, assumed: list[str]
) -> SAEConfig:
    """Sizes from the configuration, else from shapes; ``assumed`` gains what neither says."""
    choices, names = dict(TYPES[sae_type][0]), TYPES[sae_type][1]
    shapes = {name[0]: tuple(tensors[name].shape) for name in reversed(names)}  # V and W among them, if there are any
    n_atoms = _whole(config, "n_features", next((*tensors[name].shape, 0)[0] for name in names))
    rank = 1
    if "V" in shapes:
        rank = _whole(config, "rank", shapes["V"][1] if len(shapes["V"]) == 3 else 1)
        sides = [(*shapes[letter], 0)[len(shapes[letter]) - 1] for letter in "VW"]
    else:
        size = tensors["decoder.bias"].numel()
        sides = [math.isqrt(size)] * 2
        if None in (config.get("d_k"), config.get("d_v")):
            if sides[0] ** 2 != size:
                raise ValueError(f"nothing says how {size} numbers make a matrix; put d_k and d_v into config.json")
            assumed.append(f"{sides[0]}x{sides[0]} matrices")
    d_key, d_value = (_whole(config, name, side) for name, side in zip(("d_k", "d_v"), sides, strict=True))
    if _whole(config, "d_in", d_key * d_value) != d_key * d_value:
        raise ValueError(f"the configuration says d_in={config['d_in']}, but matrices are {d_key}x{d_value}")
    tagged = re.search(r"_k(\d+)(?=_|$)", path.absolute().parent.name)
    k = _whole(config, "k", int(tagged[1]) if tagged else 32)
    if config.get("k") is None and not tagged and "sparsity" not in choices:
        assumed.append("k=32")
    over_batch = config.get("use_batchtopk") or False
    if not isinstance(over_batch, bool):
        raise ValueError(f"use_batchtopk must be true or false; got {over_batch!r}")
    if over_batch:
        choices.setdefault("sparsity", "batch_topk")  # it ignores the flag where activations are not chosen
    return SAEConfig(
        d_key=d_key, d_value=d_value, n_atoms=n_atoms, k=min(k, max(n_atoms, 1)), rank=rank, target="state",
        center=False, decoder_bias=True, unit_atoms=False, **choices,
    )  # fmt: skip


def _weights(
    sae_type: str, cfg: SAEConfig, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Its tensors under our names and in our shapes, if their own are what the sizes ask for."""
    n, size = cfg.n_atoms, cfg.d_key * cfg.d_value
    shapes = {
        "encoder.weight": (n, size), "decoder.weight": (size, n), "decoder.bias": (size,),
        "V": (n, cfg.rank, cfg.d_key), "W": (n, cfg.rank, cfg.d_value), "bias": (cfg.d_key, cfg.d_value),
    }  # fmt: skip
    wrong, found = [], {}
    for name, called in TYPES[sae_type][1].items():
        tensor = tensors[name]
        right = shapes.get(name) or shapes.get(name[0]) or (n,)
        if tensor.shape != right and (name[0] not in "VW" or cfg.rank > 1 or tensor.shape != (n, right[-1])):
            wrong.append(f"{name} is {list(tensor.shape)}, not {list(right)}")
        elif not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype}, not floating point")
        elif not wrong:
            tensor = (tensor.T if name == "decoder.weight" else tensor).reshape(ours[called].shape)
            found[called] = tensor.to(torch.float32).contiguous()
    if wrong:
        raise ValueError(f"as an SAE of {n} atoms of {cfg.d_key}x{cfg.d_value}, {_listed(wrong, '; ')}")
    return found


def _place(path: Path, config: Mapping[str, Any], layer: int | None, head: int | None) -> dict[str, int | None]:
    """Layer and head: as given, else as the configuration says, else as the nearest folder ``.._L9_H4..`` is called."""
    parts = reversed(path.absolute().with_suffix("").parts)
    named = next((x for part in parts if (x := re.search(r"(?:^|_)L(\d+)_H(\d+)(?=_|$)", part))), None)
    found = {}
    for number, (name, given) in enumerate((("layer", layer), ("head", head)), 1):
        called = int(named[number]) if named else None
        said = _whole(config, name, called)
        if given is None and called is not None and said != called:
            raise ValueError(f"its configuration says {name} {said}, its folder {called}; say which: {name}=")
        found[name] = said if given is None else given
    return found


def _whole(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    try:
        return default if value is None else int(str(value))
    except ValueError:
        raise ValueError(f"{name} must be a whole number; got {value!r}") from None


def _plain(value: Any) -> Any:
    """As JSON has it."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _listed(items: Any, between: str = ", ", most: int = 8) -> str:
    items = [str(item) for item in items]
    return between.join(items[:most]) + (f"{between}and {len(items) - most} more" if len(items) > most else "")
