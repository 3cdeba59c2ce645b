"""Interventions as a file: what was done to a model, to be done again by somebody else."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from writesae.hooks import Intervention, Patch, PointEdit
from writesae.hooks.positions import Positions, PositionSet
from writesae.jobs.tensors import read_tensors, write_tensors
from writesae.models.fingerprint import same_weights
from writesae.recurrence import Read, Write
from writesae.saes.config import SAEConfig
from writesae.saes.sae import WriteSAE

KEY, WHAT = "writesae_interventions", "file of interventions"


def save_interventions(
    path: str | Path,
    model: Any,
    edits: Intervention | PointEdit | Patch | Sequence[Intervention | PointEdit | Patch],
    *,
    positions: Positions = None,
    read: Read = "same",
) -> Path:
    """Write interventions into one safetensors file, with all that they need: writes, vectors, whole SAEs.

    >>> ws.save_interventions("forget.safetensors", model, [ws.Recode(sae, ablate=[53], error_term=True)])
    >>> with model.intervene(**ws.load_interventions("forget.safetensors", model)): ...

    Args:
        path: the file.
        model: whose edits they are; the weights of the layers edited are recorded by fingerprint.
        edits: one or several, also of a class of your own, if it is a dataclass of numbers, tensors, writes and SAEs.
        positions, read: of `intervene`.

    Returns:
        The file's path.

    Raises:
        TypeError: something in them cannot be written, for instance an SAE of another library.
        ValueError: they do not fit the model.
    """
    edits = [x.edit() if isinstance(x, Patch) else x for x in (edits if isinstance(edits, Sequence) else [edits])]
    with model.intervene(edits, positions=positions, read=read):
        pass  # raises what it would raise
    pack = _Packing()
    about = {
        "edits": [pack.of(edit) for edit in edits],
        "positions": pack.value(positions, "positions"),
        "read": read,
        "model_id": model.model_id,
        "fingerprints": {str(layer): model.fingerprint(layer) for layer in _layers(model, edits)},
    }
    write_tensors(Path(path), KEY, pack.tensors, about)
    return Path(path)


def load_interventions(path: str | Path, model: Any, *, check_model: bool = True) -> dict[str, Any]:
    """What `save_interventions` wrote, as arguments of `intervene`: ``model.intervene(**load_interventions(...))``.

    Args:
        path: the file.
        model: the model to be edited.
        check_model: refuse edits that were made for other weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or something else, for a model with other weights, or has an intervention of a
            class that is not known here: import the module that defines it first.
    """
    tensors, about = read_tensors(Path(path), KEY, WHAT, "save or fetch it again")
    for layer, fingerprint in about["fingerprints"].items() if check_model else ():
        recurrent = [site.layer for site in model.sites]
        if int(layer) not in recurrent:
            raise ValueError(f"{path} edits layer {layer}, which is not recurrent here; recurrent layers: {recurrent}")
        if not same_weights(fingerprint, found := model.fingerprint(int(layer))):
            raise ValueError(
                f"{path} was made for layer {layer} of {about['model_id']} (fingerprint {fingerprint}); the weights of "
                f"that layer here are others ({found}). check_model=False uses it all the same"
            )
    unpack = _Unpacking(tensors, Path(path))
    made = [unpack.edit(edit) for edit in about["edits"]]
    return {
        "what": made,
        "positions": unpack.value(about["positions"]),
        "read": about["read"],
        "check_model": check_model,
    }


def _layers(model: Any, edits: Sequence[Intervention | PointEdit]) -> list[int]:
    """The recurrent layers whose weights say whether a model is the one that the edits are for."""
    edited = {edit.layer for edit in edits if isinstance(edit, Intervention)}
    return sorted(edited) or [model.sites[-1].layer]


class _Packing:
    """Edits as what JSON can say, beside tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[int, tuple[Any, str]] = {}  # one entry for each object; it is kept, so its id stays its own

    def of(self, edit: Any) -> dict[str, Any]:
        if not dataclasses.is_dataclass(edit):
            raise TypeError(f"{type(edit).__name__} cannot be saved: make it a dataclass")
        takes = inspect.signature(type(edit)).parameters
        fields = [field.name for field in dataclasses.fields(edit) if field.name in takes]
        values = {name: self.value(getattr(edit, name), f"{type(edit).__name__}.{name}") for name in fields}
        return {"class": type(edit).__name__, "fields": values}

    def value(self, x: Any, where: str) -> Any:
        """Plain values as they are, everything else as ``{kind: ...}``."""
        match x:
            case None | bool() | int() | float() | str():
                return x
            case Tensor():
                return {"tensor": self.kept(x, lambda name: {name: x})}
            case Write():
                return {"write": [*self.factors(x), x.rank]}
            case WriteSAE():
                named = lambda name: {f"{name}.{key}": value for key, value in x.state_dict().items()}  # noqa: E731
                return {"sae": [self.kept(x, named), x.cfg.to_dict()]}
            case PositionSet():
                return {"positions": self.value(x.asked, where)}
            case slice():
                return {"slice": [x.start, x.stop, x.step]}
            case Mapping():
                return {"map": [[self.value(key, where), self.value(value, where)] for key, value in x.items()]}
            case Sequence():
                return {"list": [self.value(item, where) for item in x]}
        raise TypeError(
            f"{where} is a {type(x).__name__}, which cannot be saved: numbers, strings, tensors, writes and SAEs of "
            f"writesae can. For an SAE of another library save what it does as a vector (AddVector)"
        )

    def factors(self, x: Write) -> list[str]:
        return [self.kept(factor, lambda name, factor=factor: {name: factor}) for factor in (x.key, x.value)]

    def kept(self, x: Any, named: Any) -> str:
        """The name under which it is kept."""
        if id(x) not in self.known:
            name = str(len(self.known))
            self.known[id(x)] = (x, name)
            self.tensors |= {key: tensor.detach() for key, tensor in named(name).items()}
        return self.known[id(x)][1]


class _Unpacking:
    """The inverse."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.tensors, self.path = tensors, path
        self.saes: dict[str, WriteSAE] = {}
        self.classes = {cls.__name__: cls for base in (Intervention, PointEdit) for cls in _below(base)}

    def edit(self, described: Mapping[str, Any]) -> Any:
        name = described["class"]
        if name not in self.classes:
            raise ValueError(
                f"{self.path} has an intervention of the class {name}, which is not known here: import the module that "
                f"defines it, or update writesae"
            )
        fields = {field: self.value(x) for field, x in described["fields"].items()}
        try:
            return self.classes[name](**fields)
        except TypeError as error:
            raise ValueError(f"{self.path}: {name} takes other arguments here ({error})") from error

    def value(self, x: Any) -> Any:
        if not isinstance(x, Mapping):
            return x
        ((kind, held),) = x.items()
        match kind:
            case "tensor":
                return self.tensors[held]
            case "write":
                return Write(self.tensors[held[0]], self.tensors[held[1]], held[2])
            case "sae":
                return self.sae(*held)
            case "positions":
                return PositionSet(self.value(held))
            case "slice":
                return slice(*held)
            case "map":
                return {self.value(key): self.value(value) for key, value in held}
            case "list":
                return [self.value(item) for item in held]
        raise ValueError(f"{self.path} holds a {kind}, which this version does not know: update writesae")

    def sae(self, name: str, cfg: Mapping[str, Any]) -> WriteSAE:
        if name not in self.saes:
            held = {key.partition(".")[2]: x for key, x in self.tensors.items() if key.startswith(f"{name}.")}
            self.saes[name] = WriteSAE.from_tensors(SAEConfig.from_dict(dict(cfg)), held, f"an SAE in {self.path}")
        return self.saes[name]


def _below(cls: type) -> Iterator[type]:
    """All classes made from a class."""
    for child in cls.__subclasses__():
        yield child
        yield from _below(child)
