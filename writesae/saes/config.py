"""What an SAE is: its sizes, three choices (encoder, sparsity, decoder), and the one head it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from writesae.hooks.sites import Head
from writesae.jobs.choices import one_of
from writesae.models.fingerprint import same_weights
from writesae.recurrence.dynamics import Target
from writesae.saes.sparsities import sparsity_named

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

Encoder = Literal["tied", "bilinear", "dense"]
Decoder = Literal["factored", "dense"]

VARIANTS: dict[str, dict[str, Any]] = {
    "WriteSAE": dict(encoder="bilinear", decoder="factored"),  # the paper's; its tables also call it Bilinear
    "BilinearSAE": dict(encoder="bilinear", decoder="factored"),
    "TiedSAE": dict(encoder="tied", decoder="factored"),
    "BilinearFlatSAE": dict(encoder="bilinear", decoder="dense"),
    "MatrixSAE": dict(encoder="dense", decoder="factored"),
    "FlatSAE": dict(encoder="dense", decoder="dense"),
    "Rank2SAE": dict(encoder="bilinear", decoder="factored", rank=2),  # as what RWKV-7 writes and erases
}
"""Names of the paper and its code for combinations of encoder and decoder; any sparsity goes with each."""


@dataclass(frozen=True)
class SAEConfig:
    """Everything about an SAE but its weights; ``cfg.json`` in a saved folder.

    Attributes:
        d_key: rows of the matrices it reads, as in ``model.sites``.
        d_value: columns.
        n_atoms: number of atoms, matrices ``A_i``.
        k: active atoms per matrix, 1 to ``n_atoms``: at most (``"topk"``), on average (``"batch_topk"``), or what
            training aims at (``"jumprelu"``, ``"gated"``).
        target: what it reads. ``"write"``: the native write ``k (beta v)^T``. ``"delta"``: what the state really gains
            beyond its decay. ``"state"``: the state (the paper, section 2).
        encoder: ``"bilinear"``: ``<X, V^T W>`` with factors of its own. ``"tied"``: the decoder's atoms, so that an
            activation is the exact inner product with its atom. ``"dense"``: a free matrix per atom.
        sparsity: ``"topk"``, ``"batch_topk"``, ``"jumprelu"`` or ``"gated"``, see `writesae.saes.sparsities`; or one of
            yours, see `writesae.saes.register_sparsity`.
        decoder: ``"factored"``: atoms ``sum_r v_r w_r^T`` of ``rank`` terms. ``"dense"``: a free matrix per atom.
        rank: terms of a factored atom, of a bilinear encoder too; ``min(d_key, d_value)`` makes full matrices of them.
        center: subtract the mean over the training data before encoding. Default: for states.
        decoder_bias: a learnt matrix is added to every reconstruction.
        unit_atoms: atoms have Frobenius norm 1, and are kept there in training.
        gate_temperature: for ``"gated"``: 0 is a hard gate; else ``sigmoid(gate / temperature)``.
        type: names the class that can load the file.
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
    encoder: Encoder = "tied"
    sparsity: str = "topk"
    decoder: Decoder = "factored"
    rank: int = 1
    center: bool | None = None
    decoder_bias: bool = False
    unit_atoms: bool = True
    gate_temperature: float = 0.0
    type: str = "write_sae"
    layer: int | None = None
    head: int | None = None
    model_id: str | None = None
    model_revision: str | None = None
    fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.center is None:
            object.__setattr__(self, "center", self.target == "state")
        _check(vars(self))

    @property
    def place(self) -> Head:
        """The head that it belongs to; ValueError if it does not say."""
        if self.layer is None or self.head is None:
            raise ValueError(
                "this SAE does not say its layer and head; if you know them: "
                "sae.cfg = dataclasses.replace(sae.cfg, layer=..., head=...)"
            )
        return Head(self.layer, self.head)

    @property
    def chooses(self) -> bool:
        """Whether atoms are chosen by rank among others (topk, batch_topk), not by thresholds of their own that are
        learnt (jumprelu, gated)."""
        return sparsity_named(self.sparsity).chooses

    def check_fits(self, model: HookedRecurrentModel, *, check_model: bool = True) -> None:
        """See `WriteSAE.check_fits`."""
        layer, head = self.place
        sites = {site.layer: site for site in model.sites}
        if layer not in sites:
            layers = ", ".join(map(str, sites)) or "none"
            raise ValueError(f"this SAE is for layer {layer}, not recurrent here; recurrent layers: {layers}")
        site = sites[layer]
        if head >= site.n_heads:
            raise ValueError(f"this SAE is for head {head}; layer {layer} has heads 0 to {site.n_heads - 1}")
        if (self.d_key, self.d_value) != (site.d_key, site.d_value):
            raise ValueError(
                f"this SAE reads {self.d_key}x{self.d_value} matrices; layer {layer} writes {site.d_key}x{site.d_value}"
            )
        if not check_model or self.fingerprint is None:
            return
        found = model.fingerprint(layer)
        if found is not None and not same_weights(self.fingerprint, found):
            raise ValueError(
                f"this SAE was trained on layer {layer} of {self.model_id or 'another model'} (fingerprint "
                f"{self.fingerprint}); the weights of that layer here are others ({found}), active "
                f"adapters included. check_model=False uses it all the same"
            )

    @classmethod
    def variant(cls, name: str, **values: Any) -> SAEConfig:
        """A configuration by name: ``SAEConfig.variant("FlatSAE", d_key=32, d_value=32, n_atoms=512, k=8)``.

        Raises:
            ValueError: no such name; the names are the keys of `VARIANTS`.
        """
        return cls(**VARIANTS[one_of("variant", name, VARIANTS)] | values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_dict`; raises ValueError that names fields missing or not known."""
        known = {f.name for f in fields(cls)}
        missing = sorted({"d_key", "d_value", "n_atoms", "k", "target", "encoder"} - values.keys())
        unknown = sorted(values.keys() - known)
        if missing or unknown:
            pairs = ("lacks", missing), ("has unknown", unknown)
            wrong = [f"{what} {', '.join(names)}" for what, names in pairs if names]
            raise ValueError(f"the configuration {' and '.join(wrong)}; its fields are {', '.join(sorted(known))}")
        _check({f.name: f.default for f in fields(cls)} | values)
        return cls(**values)


_CHOICES = {"target": Target, "encoder": Encoder, "decoder": Decoder}


def _check(values: Mapping[str, Any]) -> None:
    for name in ("d_key", "d_value", "n_atoms", "k", "rank"):
        number = values[name]
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {number!r}")
    for name in ("layer", "head"):
        place = values[name]
        if place is not None and (type(place) is not int or place < 0):
            raise ValueError(f"{name} must be a whole number of at least 0, or None; got {place!r}")
    for name in ("model_id", "model_revision", "fingerprint"):
        if not isinstance(values[name], str | None):
            raise ValueError(f"{name} must be text or None; got {values[name]!r}")
    for name, choices in _CHOICES.items():
        one_of(name, values[name], get_args(choices))
    sparsity_named(values["sparsity"])
    for name in ("center", "decoder_bias", "unit_atoms"):
        if type(values[name]) is not bool and not (name == "center" and values[name] is None):
            raise ValueError(f"{name} must be true or false; got {values[name]!r}")
    if values["k"] > values["n_atoms"]:
        raise ValueError(f"k={values['k']} active atoms out of n_atoms={values['n_atoms']}: k must be 1 to n_atoms")
    most = min(values["d_key"], values["d_value"])
    if values["rank"] > most:
        raise ValueError(f"rank={values['rank']}: {values['d_key']}x{values['d_value']} matrices have rank 1 to {most}")
    if type(values["type"]) is not str or values["type"] != "write_sae":
        raise ValueError(f"type must be write_sae; got {values['type']!r}")
    temperature = values["gate_temperature"]
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 <= temperature < float("inf"):
        raise ValueError(f"gate_temperature must be a number of at least 0; got {temperature!r}")
