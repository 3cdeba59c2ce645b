"""Our SAEs in SAELens 6: importing this module makes ``"writesae"`` one of its architectures.

    >>> import sae_lens, writesae.saelens
    >>> sae = sae_lens.SAE.load_from_disk("runs/saes/L2H1")    # the folder that WriteSAE.save_pretrained wrote
    >>> acts = sae.encode(write.dense().flatten(-2))           # [..., d_key * d_value] -> [..., n_atoms]
    >>> sae.save_model("runs/copy")                            # which WriteSAE.from_pretrained reads

SAELens knows vectors, so the matrices of one head come flattened, row after row (``flatten(-2)``), and
``d_in = d_key * d_value``. Nothing is converted: both libraries read the same two files, and the `WriteSAE` inside,
``sae.write_sae``, does the work. It also takes matrices in factors, which SAELens has no word for, and costs far less.

Needs the extra ``[saelens]``. SAELens 6 needs TransformerLens before 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.recurrence.matrices import dense, norm2
from writesae.saes import SAEConfig, WriteSAE
from writesae.saes.files import CONFIG, WEIGHTS, check_finite, check_saelens_fields, check_tensors, saelens_fields, save

try:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata
except ImportError as e:
    raise ImportError(
        f"writesae.saelens needs SAELens 6, which needs TransformerLens 2 or 3 (not 4): "
        f"pip install 'writesae[saelens]' ({e})"
    ) from e

ARCHITECTURE = "writesae"

# SAELens keeps of a cfg.json what the configuration's class has as a field, so ours are fields of it too.
_Fields: Any = make_dataclass(
    "_Fields",
    [(f.name, f.type, field(default=f.default, default_factory=f.default_factory)) for f in fields(SAEConfig)],  # type: ignore[call-overload]
    bases=(sae_lens.SAEConfig,),
    kw_only=True,
)


@dataclass(kw_only=True)
class SAELensConfig(_Fields):
    """SAELens' configuration of a `WriteSAE`: SAELens' fields, which follow from ours, and those of `SAEConfig`.

    Raises:
        ValueError: a field of SAELens is at odds with ours, or says what a `WriteSAE` does not do (normalise, ...).
    """

    metadata: Any = field(default_factory=SAEMetadata)  # of a file, SAELens gives a dictionary first

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.center = self.own().center  # which has a default of its own for each target

    def own(self) -> SAEConfig:
        """What of it is ours."""
        return check_saelens_fields({f.name: getattr(self, f.name) for f in fields(self)})


class SAELensWriteSAE(sae_lens.SAE[SAELensConfig]):
    """A `WriteSAE` as an SAE of SAELens, over matrices that come as vectors ``[..., d_key * d_value]``.

    As SAELens' users expect, pre-activations are ``x @ W_enc + b_enc`` and reconstructions ``acts @ W_dec + b_dec``;
    but these four are worked out from the factors each time they are asked for, not parameters to write to.

    Attributes:
        write_sae: the SAE itself, which has the parameters.
    """

    write_sae: WriteSAE

    def initialize_weights(self) -> None:
        with torch.device(self.device):
            self.write_sae = WriteSAE(self.cfg.own()).to(self.dtype)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # type: ignore[override]
        """What each atom reads, dense: ``d_in * d_sae`` numbers."""
        return dense(self.write_sae.encoder).flatten(1).T

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """The encoder's bias, less the inner product with the mean, if matrices are centred."""
        return self.write_sae.offset

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # type: ignore[override]
        """The atoms, dense: ``d_sae * d_in`` numbers."""
        return dense(self.write_sae.decoder).flatten(1)

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:  # type: ignore[override]
        """What every reconstruction contains: mean and bias."""
        constant = self.write_sae.constant
        if constant is None:
            return self.write_sae.b_enc.new_zeros(self.cfg.d_in)
        return constant.flatten()

    def process_sae_in(self, sae_in: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """The input in the SAE's dtype; ValueError if it is of another size."""
        if sae_in.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"this SAE reads {self.cfg.d_key}x{self.cfg.d_value} matrices as vectors [..., {self.cfg.d_in}]; got "
                f"{list(sae_in.shape)}: flatten the last two dimensions, x.flatten(-2)"
            )
        return self.hook_sae_input(sae_in.to(self.dtype))

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Activations of all atoms: those of ``write_sae.encode``."""
        X = self.process_sae_in(x).unflatten(-1, (self.cfg.d_key, self.cfg.d_value))
        pre = self.hook_sae_acts_pre(self.write_sae.pre(X))
        return self.hook_sae_acts_post(self.write_sae.activate(pre))

    def decode(self, feature_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """The reconstruction, flattened: that of ``write_sae.decode``."""
        return self.hook_sae_recons(self.write_sae.decode(feature_acts).flatten(-2))

    # --- files --------------------------------------------------------------------------------------------------------

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write what ``WriteSAE.save_pretrained`` writes, in this SAE's dtype, with SAELens' own notes (``metadata``).
        Returns the paths of weights and configuration."""
        path, cfg = Path(path), self.cfg
        notes = {"dtype": cfg.dtype, "device": cfg.device, "metadata": cfg.metadata.to_dict()}
        save(path, self.write_sae.cfg, self.write_sae.state_dict(), notes)
        return path / WEIGHTS, path / CONFIG

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        _rename(state_dict, {name: name.removeprefix("write_sae.") for name in state_dict})

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Check the tensors, and do to them what ``WriteSAE.from_pretrained`` does."""
        loaded = WriteSAE(self.cfg.own()).to(torch.promote_types(self.dtype, torch.float32))
        check_tensors(state_dict, loaded.state_dict(), WEIGHTS)
        check_finite(state_dict, loaded.cfg, f"{WEIGHTS} is not usable")
        loaded.load_state_dict(state_dict)
        loaded.restore_norms(WEIGHTS)
        for name, tensor in loaded.state_dict().items():
            state_dict[name] = tensor.to(state_dict[name])
        _rename(state_dict, {name: f"write_sae.{name}" for name in state_dict})

    # --- what SAELens does to dense weights in place ------------------------------------------------------------------

    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        with torch.no_grad():
            return norm2(self.write_sae.decoder).sqrt().clamp(min=1e-8)

    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """The atoms' norms, if they are 1 as they are meant to be: then there is nothing to fold."""
        if not self.cfg.unit_atoms:
            raise NotImplementedError(
                "the norms of a WriteSAE's atoms are not folded into its encoder, which may share their factors; "
                "get_W_dec_norm() tells them"
            )
        return self.get_W_dec_norm()

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise NotImplementedError(f"a WriteSAE takes activations as they are: no factor {scaling_factor} is folded in")

    def fold_activation_whitening(self, *_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError("a WriteSAE takes activations as they are: no whitening is folded in")


def to_saelens(sae: WriteSAE) -> SAELensWriteSAE:
    """The same SAE for SAELens; they share their parameters."""
    dtype = str(sae.b_enc.dtype).removeprefix("torch.")
    described = saelens_fields(sae.cfg) | {"dtype": dtype, "device": "meta"}
    found = SAELensWriteSAE(SAELensConfig.from_dict(described | sae.cfg.to_dict()))
    found.write_sae = sae
    return found.to(device=sae.b_enc.device).train(sae.training)


def from_disk(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A ``converter`` for ``sae_lens.SAE.load_from_disk``, that reads all that ``WriteSAE.from_pretrained`` does.

    Names of shipped SAEs, folders of ours that are older than this module, and checkpoints of the paper's code; the
    file's checksum is compared, as SAELens does not.
    """
    return _described(WriteSAE.from_pretrained(path), device, cfg_overrides)


def from_hub(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """The same for ``sae_lens.SAE.from_pretrained("owner/name", "folder", converter=from_hub)``."""
    if force_download:
        raise ValueError("force_download=True: remove the repository from the hub's cache instead, and load again")
    return *_described(WriteSAE.from_pretrained(repo_id, folder_name), device, cfg_overrides), None


def _described(
    sae: WriteSAE, device: str, cfg_overrides: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    described = saelens_fields(sae.cfg) | sae.cfg.to_dict() | {"device": device} | dict(cfg_overrides or {})
    return described, {name: tensor.to(device) for name, tensor in sae.state_dict().items()}


def _rename(state_dict: dict[str, Any], names: Mapping[str, str]) -> None:
    renamed = {new: state_dict.pop(old) for old, new in names.items()}
    state_dict.update(renamed)


sae_lens.register_sae_class(ARCHITECTURE, SAELensWriteSAE, SAELensConfig)
