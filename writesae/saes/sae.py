"""The SAE that users have: its mathematics (`Autoencoder`), its files, and the model it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.interventions import Add
from writesae.jobs.elsewhere import NamesElsewhere
from writesae.jobs.late import given
from writesae.models.devices import device_named
from writesae.recurrence.matrices import norm2
from writesae.saes import files, formats, hub
from writesae.saes.activity.reading import encode
from writesae.saes.autoencoder import Autoencoder
from writesae.saes.config import SAEConfig

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel


S = TypeVar("S", bound="WriteSAE")


class WriteSAE(NamesElsewhere, Autoencoder):
    """Sparse autoencoder over matrices ``[d_key, d_value]`` of one head; what it is made of, `SAEConfig` says.

    A new one has random unit atoms; `writesae.saes.train_sae` initialises them from data. Computes in the dtype of its
    parameters (float32) whatever the input's.

    Attributes:
        cfg: what it is and where it belongs.
        V_dec, W_dec: factors of the atoms, ``[n_atoms, d_key]``, ``[n_atoms, d_value]`` (``[n_atoms, rank, ...]`` for
            ``rank > 1``); V_enc, W_enc those of a bilinear encoder. The letters are the paper's: what SAELens calls
            ``W_dec`` is ``decoder``, flattened ``decoder.dense().flatten(1)  # [n_atoms, d_key * d_value]``.
        A_dec, A_enc: a dense decoder's and encoder's, ``[n_atoms, d_key, d_value]``.
        b_enc: ``[n_atoms]``, zero unless trained: with zeros the choice of atoms does not depend on a matrix's scale.
        b_dec, mean: ``[d_key, d_value]``, or None.
        threshold: for batch_topk, a number; NaN until it is known.
        log_threshold: for jumprelu, ``[n_atoms]``. r_mag, b_mag: for gated, ``[n_atoms]``.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {  # names of SAELens; dense variants lack the first two
        "W_dec": "of dense atoms there are no factors: sae.decoder [n_atoms, d_key, d_value], flattened "
        "sae.decoder.flatten(1), is what SAELens calls W_dec",
        "W_enc": "this encoder has no factors of its own: sae.encoder has what each atom reads",
        "use_error_term": "a WriteSAE is put in by model.intervene(ws.Recode(sae, error_term=True))",
    }

    # Files

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
        return hub.push(
            self, repo_id, subfolder=subfolder, private=private, commit_message=commit_message, revision=revision,
            license=license,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls: type[S],
        folder_or_hub_id: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> S:
        """Load a saved SAE from a folder, the ones shipped here (``"tiny-gdn/L2H1"``), or the hub, as float32.

        A folder with a ``best.pt`` of the paper's code in place of our two files will do (see `load_reference`), and
        so will any other format that was registered (`register_format`).

        Args:
            folder_or_hub_id: a folder wins over a hub id of the same name.
            subfolder: where in it the SAE lies.
            revision: branch, tag or commit on the hub.
            device: where to move it; ``"auto"`` for the accelerator that is there, or else the CPU. Used with a model,
                it goes where the model's layer is in any case.

        Raises:
            FileNotFoundError: no such folder or hub repository, or a file is missing in it.
            ValueError: a file is damaged, of another kind, or the two files do not fit together; no such device here.
        """
        place = device_named(device)
        root = formats.locate(folder_or_hub_id, subfolder, revision)
        folder = root / subfolder if subfolder else root
        format = formats.recognised(folder)
        cfg, tensors = format.load(folder, root)
        return cls.from_tensors(cfg, tensors, *format.names(folder)).to(place)

    @classmethod
    def from_tensors(
        cls: type[S],
        cfg: SAEConfig,
        tensors: Mapping[str, Tensor],
        whose: str = "the given tensors",
        configuration: str = "the configuration",
    ) -> S:
        """An SAE that takes these tensors as its own, after a check of their names, shapes and norms.

        Args:
            cfg: the SAE's configuration.
            tensors: by the names above, all that such an SAE has.
            whose, configuration: what to call the two, for the message.

        Raises:
            ValueError: they do not fit.
        """
        with torch.device("meta"):  # sizes only: dense atoms may take gigabytes
            sae = cls(cfg)
        files.check_tensors(tensors, sae.state_dict(), whose, configuration)
        sae.load_state_dict(tensors, assign=True)
        sae.restore_norms(whose)
        return sae

    def restore_norms(self, whose: str) -> None:
        """Bring unit atoms that were stored in half precision back to norm 1, which rounding moved; ValueError, which
        names ``whose`` they are, if it can't have been rounding."""
        if not self.cfg.unit_atoms:
            return
        off = (norm2(self.decoder).sqrt() - 1).abs().max().item()
        if off > 0.02:
            raise ValueError(f"{whose}: atoms must have norm 1; one is off by {off:.3g}")
        if off > 1e-5:  # more than float32 rounds
            self.normalize_decoder()

    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for its weights, what it reads and where: equal for equal SAEs only."""
        c = self.cfg
        digest = hashlib.sha256(f"{c.layer}.{c.head}.{c.target}.{c.sparsity}".encode())
        for name, x in sorted(self.state_dict().items()):
            digest.update(name.encode() + x.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    # A model asks

    def adding(self, atom: int, scale: float | int | Float[Tensor, " batch"]) -> Add:
        """The intervention that adds an atom at ``scale`` times the native write's norm (the paper, section 4)."""
        layer, head = self.place
        return Add(layer, head, write=self.atom(atom), scale=scale, relative=True)

    def read(self, model: Any, x: Any, *, check_model: bool = True, **kwargs: Any) -> Any:
        """Which atoms are active at every token of a text; see `writesae.saes.activity.reading.encode`."""
        return encode(model, self, x, check_model=check_model, **kwargs)

    # Looking

    def show(
        self,
        atom: int,
        *,
        model: HookedRecurrentModel | None = None,
        texts: str | Iterable[str] | Int[Tensor, "n pos"] | None = None,
        pages: str | Path | None = None,
        check_model: bool = True,
    ) -> Any:
        """An atom's page, as `writesae.pages.write_pages` writes it, shown where a notebook's cell ends with it.

        The first page of an SAE takes a pass over the texts, ten seconds or so for the shipped ones; others of the same
        SAE and texts take a second or two.

        Args:
            atom: which.
            model: the model; None loads the one that the SAE names.
            texts: held-out texts; None for those shipped, if the model is a shipped one.
            pages: folder of a site made before, in place of model and texts: the page is taken from it.
            check_model: refuse a model with other weights than the SAE was trained on.

        Raises:
            IndexError: no such atom.
            ValueError: model or texts are wanted and not given.
            FileNotFoundError: the folder has no such page.

        >>> WriteSAE.from_pretrained("tiny-gdn/L2H1").show(7)
        """
        return given("show")(self, atom, model=model, texts=texts, pages=pages, check_model=check_model)
