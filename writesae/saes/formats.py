"""Where SAEs come from: folders, shipped ones and the hub; and the formats of checkpoints that can be loaded.

Ours is one format, the paper's code has another (`writesae.saes.paper.reference`). Others can be added from outside:
see `register_format`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from writesae.jobs.choices import meant
from writesae.saes import files
from writesae.saes.config import SAEConfig
from writesae.zoo import ZOO, shipped_model, shipped_models, shipped_saes


class Format(ABC):
    """One kind of checkpoint.

    Attributes:
        holds: what a folder of it holds, for messages: ``"best.pt of the paper's code"``.
        wanted: its files, relative to the SAE's folder, as far as they are needed; the first tells it from others.
        wanted_of_root: what else is needed from a repository on the hub, relative to its root.
    """

    holds: ClassVar[str]
    wanted: ClassVar[tuple[str, ...]]
    wanted_of_root: ClassVar[tuple[str, ...]] = ()

    def recognises(self, folder: Path) -> bool:
        """Whether the folder is of this format; true as well if it is but is damaged."""
        return (folder / self.wanted[0]).is_file()

    @abstractmethod
    def load(self, folder: Path, root: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
        """The configuration, and the tensors by the names in `WriteSAE`, as float32.

        ``root`` is the folder or repository that was named, where ``folder`` may be a subfolder of it. Raises
        FileNotFoundError for a file that is missing, ValueError for one that is damaged.
        """

    def names(self, folder: Path) -> tuple[str, str]:
        """What to call the tensors and the configuration in messages."""
        return str(folder), f"the configuration that {type(self).__name__} read"


FORMATS: list[Format] = []
"""All that exist. The first that recognises a folder loads it."""

F = TypeVar("F", bound=Format)


def register_format(cls: type[F]) -> type[F]:
    """A decorator: `WriteSAE.from_pretrained` can load this kind of checkpoint from now on.

    >>> @register_format
    ... class Mine(Format): ...
    """
    name = cls.__module__, cls.__qualname__
    FORMATS[:] = [one for one in FORMATS if (type(one).__module__, type(one).__qualname__) != name]  # a cell run again
    FORMATS.append(cls())
    return cls


@register_format
class Ours(Format):
    """``cfg.json`` and ``sae_weights.safetensors``, see `writesae.saes.files`."""

    holds = f"{files.CONFIG} and {files.WEIGHTS}"
    wanted = (files.CONFIG, files.WEIGHTS)

    def load(self, folder: Path, root: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
        others = ", or ".join(format.holds for format in FORMATS[1:])
        cfg, tensors = files.load(folder, f" (or {others})" if others else "")
        return cfg, {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}

    def names(self, folder: Path) -> tuple[str, str]:
        return str(folder / files.WEIGHTS), f"{files.CONFIG} beside it"


def recognised(folder: Path) -> Format:
    """The first format that recognises a folder. If none does, ours, which will say what is missing."""
    return next((format for format in FORMATS if format.recognises(folder)), FORMATS[0])


def locate(folder_or_hub_id: str | Path, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The root folder in which an SAE, or the subfolder with it, lies: one that exists here, else a shipped one
    (``"tiny-gdn/L2H1"``), else ``"owner/name"`` on the hub, of which only the files of one format are fetched."""
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if folder.is_dir():
        return folder
    model, _, site = name.partition("/")
    if shipped_model(model):
        folder = ZOO / model / "saes" / site
        if not site or not folder.is_dir():
            have = ", ".join(f"{model}/{saes.name}" for saes in shipped_saes(model)) or "none"
            wrong = f"no SAE {name} is shipped" if site else f"{name} is a model, not an SAE"
            raise FileNotFoundError(f"{wrong}; shipped with {model}: {have}")
        return folder
    within = f"{subfolder}/" if subfolder else ""
    for format in FORMATS:
        wanted = [*(within + file for file in format.wanted), *format.wanted_of_root]
        folder = fetch(name, wanted, revision)
        if format.recognises(folder / within):
            break
    return folder


def fetch(hub_id: str, wanted: list[str], revision: str | None = None) -> Path:
    """What of a hub repository matches ``wanted``, in the hub's cache; FileNotFoundError if it does not come."""
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{hub_id} is neither a folder here nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as e:
        ours = [f"{model}/{sae.name}" for model in shipped_models() for sae in shipped_saes(model)]
        near = meant(hub_id, ours, 0.8).removeprefix("; ")
        raise FileNotFoundError(
            f"{hub_id} is no folder here, and the hub did not give it{f' ({near})' if near else ''}: {e}"
        ) from e
