"""Which model a memory is of, and whether another one has the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from writesae.hooks import Site, find_mixers
from writesae.models.fingerprint import fingerprint_of_module, same_weights
from writesae.models.wrappers import bare

if TYPE_CHECKING:
    from writesae.model.attaching import HookedModel


class Origin:
    """The model that made a memory.

    Fingerprints cost a look at all weights of its recurrent layers, so they are made only where a file needs them, or
    where another model object comes.

    Attributes:
        model_id: its name.
        sites: its recurrent layers.
    """

    def __init__(
        self, model_id: str, sites: Iterable[Site], model: Any = None, fingerprints: Mapping[int, str] | None = None
    ):
        self.model_id, self.sites = model_id, tuple(sites)
        self._known: WeakSet[Any] = WeakSet() if model is None else WeakSet([model])  # transformers models
        self._fingerprints = fingerprints

    @classmethod
    def of(cls, model: HookedModel) -> Origin:
        """A wrapped model."""
        hf_model = bare(model.hf_model)
        return cls(name_of_model(model), model.sites, hf_model)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it.

        Raises:
            ValueError: the model is gone.
        """
        fingerprints = {str(layer): found for layer, found in self.fingerprints().items()}
        return {"model_id": self.model_id, "sites": [vars(site) for site in self.sites], "fingerprints": fingerprints}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Origin:
        """What `to_dict` made."""
        fingerprints = {int(layer): found for layer, found in values["fingerprints"].items()}
        return cls(values["model_id"], [Site(**site) for site in values["sites"]], None, fingerprints)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return Origin.from_dict, (self.to_dict(),)

    def __deepcopy__(self, _memo: object) -> Origin:
        return self

    def fingerprints(self) -> Mapping[int, str]:
        """Of each recurrent layer.

        Raises:
            ValueError: the model is gone.
        """
        if self._fingerprints is None:
            model = next(iter(self._known), None)
            if model is None:
                raise ValueError(
                    "the model that made this memory is gone, so nobody can say which weights it is of: save or pickle "
                    "a memory while its model is there"
                )
            self._fingerprints = _fingerprints(model)
        return self._fingerprints

    def check_fits(self, model: HookedModel) -> None:
        """Raise ValueError unless a model has these weights."""
        hf_model, name = bare(model.hf_model), name_of_model(model)
        if hf_model in self._known:
            return
        self._check_sites(model.sites, f"the model is {name}", "use the model that made it")
        if not _same(self.fingerprints(), _fingerprints(hf_model)):
            raise ValueError(
                f"this is a memory of {self.model_id}, and the model is {name}, of the same size but with other "
                f"weights: use the model that made it"
            )
        self._known.add(hf_model)

    def check_same(self, other: Origin) -> None:
        """Raise ValueError unless another memory is of the same weights."""
        if self is other or set(self._known) & set(other._known):
            return
        self._check_sites(other.sites, f"the other is of {other.model_id}", "take both from one model")
        if not _same(self.fingerprints(), other.fingerprints()):
            raise ValueError(
                f"this is a memory of {self.model_id}, and the other is of {other.model_id}, of the same size but with "
                f"other weights: take both from one model"
            )

    def _check_sites(self, sites: Sequence[Site], whose: str, fix: str) -> None:
        if tuple(sites) != self.sites:
            raise ValueError(
                f"this is a memory of {self.model_id}, {_described(self.sites)}; {whose}, {_described(sites)}: {fix}"
            )


def name_of_model(model: HookedModel) -> str:
    """What a model is called in files and messages."""
    return str(getattr(model, "model_id", type(bare(model.hf_model)).__name__))


def listed(layers: Iterable[int]) -> str:
    """Layers in a sentence."""
    return ", ".join(map(str, layers))


def _described(sites: Sequence[Site]) -> str:
    sizes = sorted({f"{s.rule} with {s.n_heads} heads of {s.d_key} x {s.d_value}" for s in sites})
    return f"recurrent layers {listed(s.layer for s in sites)} of {' and '.join(sizes)}"


def _fingerprints(model: Any) -> dict[int, str]:
    return {family.layer(mixer): fingerprint_of_module(mixer) for _, mixer, family in find_mixers(model)}


def _same(ours: Mapping[int, str], theirs: Mapping[int, str]) -> bool:
    return ours.keys() == theirs.keys() and all(same_weights(ours[layer], theirs[layer]) for layer in ours)
