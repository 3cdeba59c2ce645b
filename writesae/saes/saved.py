"""What an SAE does with files, the hub, and the model it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from writesae.recurrence.matrices import Atoms, norm2
from writesae.saes import files
from writesae.saes.config import SAEConfig

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel


S = TypeVar("S", bound="Saved")


class Saved(nn.Module):
    """The part of `WriteSAE` that saves, loads, uploads, and checks that it fits a model."""

    cfg: SAEConfig

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg

    @property
    def decoder(self) -> Atoms:
        raise NotImplementedError

    def normalize_decoder(self) -> None:
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into ``folder``, each whole or not at all.

        ``dtype=torch.float16`` halves the file; it is read back as float32. ValueError if a number is not finite.
        """
        files.save(Path(folder), self.cfg, {name: t.to(dtype) for name, t in self.state_dict().items()})
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        private: bool = False,
        commit_message: str = "Upload SAE",
        revision: str | None = None,
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card, to the Hugging Face hub; returns the commit's URL.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            subfolder: where in it, for a repository of several SAEs. Its card lies there too; a card at the root, if
                there is one, stays as it is.
            private: for a new repository.
            commit_message: what the history will say.
            revision: branch, made if it does not exist; default: main.
            license: for the card, as the hub abbreviates it (``"apache-2.0"``); left out if not given.

        Raises:
            ValueError: a number is not finite, or ``subfolder`` leads out of the repository. Nothing is uploaded then.
        """
        from writesae.saes import hub

        return hub.push(
            self, repo_id, subfolder=subfolder, private=private, commit_message=commit_message, revision=revision,
            license=license,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls: type[S], folder_or_hub_id: str | Path, subfolder: str | None = None, *, revision: str | None = None
    ) -> S:
        """Load a saved SAE from a folder, the ones shipped here (``"tiny-gdn/L2H0"``), or the hub, as float32.

        A folder with a ``best.pt`` of the paper's code in place of our two files will do (see `load_reference`).

        Args:
            folder_or_hub_id: a folder wins over a hub id of the same name.
            subfolder: where in it the SAE lies.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: no such folder or hub repository, or a file is missing in it.
            ValueError: a file is damaged, of another kind, or the two files do not fit together.
        """
        folder = files.locate(folder_or_hub_id, subfolder, revision)
        if not (folder / files.CONFIG).is_file() and (folder / files.REFERENCE[0]).is_file():
            from writesae.saes.paper.reference import load_reference

            return load_reference(  # type: ignore[return-value]
                folder, root=folder.parents[len(Path(subfolder).parts) - 1] if subfolder else None
            )
        cfg, tensors = files.load(folder)
        sae = cls(cfg)
        path = folder / files.WEIGHTS
        files.check_tensors(tensors, sae.state_dict(), path)
        sae.load_state_dict({name: t.to(torch.float32) for name, t in tensors.items()})
        sae.mend_norms(str(path))
        return sae

    def mend_norms(self, whose: str) -> None:
        """Bring unit atoms that were stored in half precision back to norm 1, which rounding moved; ValueError, which
        names ``whose`` they are, if it can't have been rounding."""
        if not self.cfg.unit_atoms:
            return
        off = (norm2(self.decoder).sqrt() - 1).abs().max().item()
        if off > 0.02:
            raise ValueError(f"{whose}: atoms must have norm 1; one is off by {off:.3g}")
        if off > 1e-5:  # more than float32 rounds
            self.normalize_decoder()

    def check_fits(self, model: HookedRecurrentModel, *, check_model: bool = True) -> None:
        """Raise ValueError unless the SAE belongs to a head of this model.

        Args:
            model: anything with ``sites`` (each with layer, n_heads, d_key, d_value) and ``fingerprint(layer)``.
            check_model: False accepts a head of the right size of another model than the SAE was trained on.
        """
        c = self.cfg
        layer, head = c.place
        sites = {site.layer: site for site in model.sites}
        if layer not in sites:
            layers = ", ".join(map(str, sites)) or "none"
            raise ValueError(f"this SAE is for layer {c.layer}, not recurrent here; recurrent layers: {layers}")
        site = sites[layer]
        if head >= site.n_heads:
            raise ValueError(f"this SAE is for head {c.head}; layer {c.layer} has heads 0 to {site.n_heads - 1}")
        if (c.d_key, c.d_value) != (site.d_key, site.d_value):
            raise ValueError(
                f"this SAE reads {c.d_key}x{c.d_value} matrices; layer {c.layer} writes {site.d_key}x{site.d_value}"
            )
        if not check_model or c.fingerprint is None:
            return
        found = model.fingerprint(layer)
        if found is not None and found != c.fingerprint:
            raise ValueError(
                f"this SAE was trained on layer {c.layer} of {c.model_id or 'another model'} (fingerprint "
                f"{c.fingerprint}); the weights of that layer here are others ({found}), active "
                f"adapters included. check_model=False uses it all the same"
            )
