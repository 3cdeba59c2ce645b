"""One function that loads a model, whichever format its checkpoint has.

| checkpoint | model |
|---|---|
| what flash-linear-attention trained (`OURS`) | ours, also where that package is installed |
| RWKV-7 or RWKV-6 of their authors, one ``.pth`` file | ours |
| Mamba and Mamba-2 of their authors (``state-spaces/mamba-130m``, ``mamba2-370m``) | transformers' |
| anything else | transformers', through ``AutoModelForCausalLM`` |

Weights that are missing, left over or of another shape are an error (transformers warns and goes on with random ones).
No pickle can run code.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from writesae.jobs.disk import read_json
from writesae.models.comba import CombaForCausalLM
from writesae.models.common import RecurrentForCausalLM
from writesae.models.delta_net import DeltaNetForCausalLM
from writesae.models.formats import mamba_of_authors, mamba_tensors_of_authors, rwkv7_of_early_fla, rwkv_of_authors
from writesae.models.gated_delta_net import GatedDeltaNetForCausalLM
from writesae.models.gated_delta_product import GatedDeltaProductForCausalLM
from writesae.models.gdn2 import GDN2ForCausalLM
from writesae.models.gla import GLAForCausalLM
from writesae.models.gsa import GSAForCausalLM
from writesae.models.hgrn2 import HGRN2ForCausalLM
from writesae.models.kda import KDAForCausalLM
from writesae.models.kinds import OF_FLA, OF_TRANSFORMERS
from writesae.models.linear_attn import LinearAttentionForCausalLM
from writesae.models.mamba3 import Mamba3ForCausalLM
from writesae.models.retnet import RetNetForCausalLM
from writesae.models.rwkv6 import RWKV6ForCausalLM
from writesae.models.rwkv7 import RWKV7ForCausalLM

OURS: dict[str, type[RecurrentForCausalLM]] = {
    cls.config_class.model_type: cls  # type: ignore[union-attr]
    for cls in (
        RWKV6ForCausalLM,
        RWKV7ForCausalLM,
        DeltaNetForCausalLM,
        GatedDeltaNetForCausalLM,
        GLAForCausalLM,
        HGRN2ForCausalLM,
        RetNetForCausalLM,
        LinearAttentionForCausalLM,
        KDAForCausalLM,
        CombaForCausalLM,
        GatedDeltaProductForCausalLM,
        GDN2ForCausalLM,
        Mamba3ForCausalLM,
        GSAForCausalLM,
    )
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip


def load_model(source: str | Path, *, dtype: torch.dtype | str = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint.

    Args:
        source: a folder, a hub id, or a ``.pth`` file of RWKV-7 or RWKV-6 (on the hub: ``owner/name/file.pth``).
        dtype: of the weights; ``"auto"`` for the checkpoint's own.
        **kwargs: for ``from_pretrained`` (``device_map``, ``revision``, ``local_files_only``, ...).

    Raises:
        OSError: no such folder, file or hub id.
        ValueError: a model that is not supported, weights that do not fit it, or a file that would run code.
    """
    hub = hub_arguments(kwargs)
    rest = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
    if is_pth(source):
        config, tensors = rwkv_of_authors(read_tensors_of(_find_pth(str(source), hub)))
        return _build(OURS[config.model_type], config, tensors, source, dtype=dtype, **rest)

    fields = read_config(source, hub)
    kind = fields.get("model_type")
    if kind in OURS:
        cls = OURS[kind]
        # auto_map names remote code, which this class stands in for.
        fields = {name: x for name, x in fields.items() if name != "auto_map" and not name.startswith("_")}
        config = cls.config_class.from_dict(fields)  # type: ignore[union-attr]
        tensors = read_tensors(source, hub)
        if kind == "rwkv7":
            tensors = rwkv7_of_early_fla(tensors)
        return _build(cls, config, tensors, source, hub, dtype=dtype, **rest)
    if is_mamba_of_authors(fields):
        config, tensors = mamba_of_authors(fields), mamba_tensors_of_authors(read_tensors(source, hub))
        cls = Mamba2ForCausalLM if isinstance(config, Mamba2Config) else MambaForCausalLM
        return _build(cls, config, tensors, source, dtype=dtype, **rest)
    if kind in OF_FLA:
        raise ValueError(
            f"{source} is a {kind!r} of flash-linear-attention, which cannot be wrapped: {OF_FLA[kind]}; of its kinds "
            f"{', '.join(sorted(OURS))} are supported"
        )
    if reason := OF_TRANSFORMERS.get(str(kind)):
        raise ValueError(f"{source} is a {kind!r} of transformers, which cannot be wrapped: {reason}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {source} are no whole safetensors file ({error}); fetch them again"
        ) from error
    model, found = loaded
    parameters = {name for name, _ in model.named_parameters()}
    _check(source, missing=parameters & set(found["missing_keys"]))
    return model


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s arguments that say where on the hub, or in its cache, files are."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def is_pth(source: str | Path) -> bool:
    return str(source).endswith(".pth")


def is_mamba_of_authors(fields: dict[str, Any]) -> bool:
    return "model_type" not in fields and "ssm_cfg" in fields


def find(source: str | Path, name: str, hub: dict[str, Any]) -> str | None:
    """A file of a folder or hub id, downloaded if need be; None if there is none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, name, **hub, **quiet)


def read_config(source: str | Path, hub: dict[str, Any]) -> dict[str, Any]:
    """``config.json``; empty if there is none, and transformers then says what is missing or does without."""
    path = find(source, "config.json", hub)
    return {} if path is None else read_json(Path(path))


def _find_pth(source: str, hub: dict[str, Any]) -> str:
    if os.path.isfile(source):
        return source
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not file or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no file {source} (on the hub, name it as owner/name/file.pth)")
    return cached_file(f"{owner}/{name}", file, **hub)  # type: ignore[return-value]


def read_tensors(source: str | Path, hub: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a folder or hub id, from one file or several, safetensors before pickles."""
    for name in WEIGHTS:
        if path := find(source, name, hub):
            files = [path]
            if name.endswith(".json"):
                shards = _shards(Path(path))
                files = [cached_file(source, shard, **hub) for shard in shards]
            return {key: tensor for file in files for key, tensor in read_tensors_of(str(file)).items()}
    raise FileNotFoundError(f"{source} has no weights: none of {', '.join(WEIGHTS)}")


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names, all beside it."""
    named = read_json(index).get("weight_map")
    names = set(named.values()) if isinstance(named, dict) else set()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch or make it again")
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index} names the file {name!r}: allowed are files beside it")
    return sorted(names)


def read_tensors_of(path: str) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or a pickle that holds nothing else."""
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or wants to run code when it is loaded, which is refused; ask whoever made it for "
            f"safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged file fails anywhere in zip, tar, pickle or torch; TorchScript is refused
        # Its first sentence: what follows may advise to let the file run code.
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{path} is damaged, or no file of weights ({reason}); fetch it again, or ask whoever made it for "
            f"safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds something else than a model's weights, one tensor per name")
    return tensors


def _build(
    cls: Any,
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    source: str | Path,
    hub: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model with these tensors, and with the generation settings beside it (if ``hub`` says where to look)."""
    if unread := [name for name in ("gguf_file", "use_safetensors", "variant") if kwargs.get(name) is not None]:
        raise ValueError(f"{source} is in a format that writesae reads itself, without {', '.join(unread)}=")
    model, found = cls.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    shapes = [f"{name} is {[*has]}, should be {[*should]}" for name, has, should in found["mismatched_keys"]]
    _check(source, found["missing_keys"], found["unexpected_keys"], shapes)
    model.name_or_path = model.config._name_or_path = str(source)
    if hub is not None and find(source, "generation_config.json", hub):
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    return model


def _check(source: str | Path, missing: Any = (), unexpected: Any = (), shapes: Any = ()) -> None:
    """Raise ValueError if there are weights that do not fit; the message names them."""
    wrong = [
        f"{what}: {', '.join(sorted(names)[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("not part of this model", unexpected), ("of another shape", shapes))
        if names
    ]
    if wrong:
        raise ValueError(f"the weights of {source} do not fit its config; {'; '.join(wrong)}")


for _cls in OURS.values():  # so that AutoModelForCausalLM loads what these save; flash-linear-attention may come first
    if _cls.config_class.model_type not in CONFIG_MAPPING:  # type: ignore[union-attr]
        AutoConfig.register(_cls.config_class.model_type, _cls.config_class)  # type: ignore[union-attr, arg-type]
        AutoModel.register(_cls.config_class, _cls.stack)  # type: ignore[arg-type]
        AutoModelForCausalLM.register(_cls.config_class, _cls)  # type: ignore[arg-type]
