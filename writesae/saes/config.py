"""What an SAE is: its sizes, what it reads, and the one head of the one model it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Target = Literal["write", "delta", "state"]


@dataclass(frozen=True)
class SAEConfig:
    """Everything about an SAE but its weights; ``cfg.json`` in a saved folder.

    Attributes:
        d_key: rows of the matrices it reads, as in ``model.sites``.
        d_value: columns.
        n_atoms: number of rank-1 atoms ``v_i w_i^T``.
        k: how many atoms may be active in one matrix (TopK), 1 to ``n_atoms``.
        target: what it reads. ``"write"``: the native write ``k (beta v)^T``. ``"delta"``: what the state really gains
            beyond its decay. ``"state"``: the state, less its mean over the training data (the paper, section 2).
        tied: the encoder is the decoder, so that an activation is the exact inner product with its atom.
        type: architecture; names the class that can load the file.
        layer: layer of the model, None if unknown.
        head: value head of that layer, None if unknown.
        model_id: hub id or name of the model, None if unknown.
        model_revision: commit of that hub model, None if unknown.
        fingerprint: ``model.fingerprint(layer)`` of the layer it was trained on, None if unknown.
        training: record of the training: settings, data and what was measured. Free form, JSON values only.
    """

    d_key: int
    d_value: int
    n_atoms: int
    k: int
    target: Target = "write"
    tied: bool = True
    type: str = "write_sae"
    layer: int | None = None
    head: int | None = None
    model_id: str | None = None
    model_revision: str | None = None
    fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(vars(self))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_dict`; raises ValueError that names fields missing or not known."""
        known = {f.name for f in fields(cls)}
        missing = sorted({"d_key", "d_value", "n_atoms", "k", "target", "tied"} - values.keys())
        unknown = sorted(values.keys() - known)
        if missing or unknown:
            pairs = ("lacks", missing), ("has unknown", unknown)
            wrong = [f"{what} {', '.join(names)}" for what, names in pairs if names]
            raise ValueError(f"the configuration {' and '.join(wrong)}; its fields are {', '.join(sorted(known))}")
        _check(values)
        return cls(**values)


def _check(values: Mapping[str, Any]) -> None:
    for name in ("d_key", "d_value", "n_atoms", "k"):
        size = values[name]
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {size!r}")
    for name in ("layer", "head"):
        place = values.get(name)
        if place is not None and (type(place) is not int or place < 0):
            raise ValueError(f"{name} must be a whole number of at least 0, or None; got {place!r}")
    for name in ("model_id", "model_revision", "fingerprint"):
        if not isinstance(values.get(name), str | None):
            raise ValueError(f"{name} must be text or None; got {values[name]!r}")
    if values["k"] > values["n_atoms"]:
        raise ValueError(f"k={values['k']} active atoms out of n_atoms={values['n_atoms']}: k must be 1 to n_atoms")
    if values["target"] not in get_args(Target):
        raise ValueError(f"target must be one of {', '.join(get_args(Target))}; got {values['target']!r}")
    if type(values["tied"]) is not bool:
        raise ValueError(f"tied must be true or false; got {values['tied']!r}")
