"""The SAE whose atoms have the shape of a write: bilinear encoder, TopK, rank-1 decoder (the paper, section 2).

Letters, for matrices ``X [d_key, d_value]`` (a write, a delta or a state)::

    pre_i = v_i^T (X - M) w_i + b_i        (v_i, w_i) = V_enc[i], W_enc[i]    M = mean, of states only
    a     = ReLU(TopK(pre))                at most k numbers are not zero
    X^    = M + sum_i a_i v_i w_i^T        (v_i, w_i) = V_dec[i], W_dec[i], both of norm 1, so is the atom

Matrices given as a `Write` are never built: ``v^T (k u^T) w = (v.k)(u.w)``, and the error of a reconstruction needs
only inner products and the ``k x k`` Gram matrix of the active atoms. ``...`` stands for any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae.kernels import decayed_sum
from writesae.recurrence import Write
from writesae.saes import files
from writesae.saes.config import SAEConfig

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

Matrices = Write | Tensor  # matrices [..., d_key, d_value], in factors or dense


@dataclass(frozen=True)
class SAELoss:
    """The reconstruction of one batch of matrices with leading dimensions ``...``. The first three carry gradients.

    Attributes:
        loss: ``nmse + aux_weight * aux``: what training minimises.
        nmse: squared error over squared norm, both summed over the batch (about the mean of states); 0 is perfect,
            1 as bad as reconstructing nothing.
        aux: the same ratio for what is left, reconstructed by dead atoms; 0 if none is dead.
        error2: ``[...]`` squared error of each matrix.
        norm2: ``[...]`` squared norm of each.
        cosine: ``[...]`` cosine of each to its strongest atom; 0 where no atom is active.
        values: ``[..., k]`` activations, strongest first.
        indices: ``[..., k]`` their atoms.
        n_dead: atoms that were dead when the batch came.
    """

    loss: Float[Tensor, ""]
    nmse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    error2: Float[Tensor, "..."]
    norm2: Float[Tensor, "..."]
    cosine: Float[Tensor, "..."]
    values: Float[Tensor, "... k"]
    indices: Int[Tensor, "... k"]
    n_dead: int

    @property
    def l0(self) -> float:
        """Mean number of active atoms."""
        return float((self.values > 0).sum(-1).double().mean())


class WriteSAE(nn.Module):
    """Sparse autoencoder with rank-1 atoms ``v_i w_i^T`` over matrices ``[d_key, d_value]`` of one head.

    A new one has random unit atoms; `writesae.saes.train_sae` starts them from data. Computes in the dtype of its
    parameters (float32) whatever the input's.

    Attributes:
        cfg: what it is and where it belongs.
        V_enc, W_enc: encoder factors ``[n_atoms, d_key]``, ``[n_atoms, d_value]``; the decoder's if ``cfg.tied``.
        V_dec, W_dec: decoder factors, rows of norm 1.
        b_enc: ``[n_atoms]``, zero unless trained: with zeros the choice of atoms does not depend on a matrix's scale.
        mean: ``[d_key, d_value]`` for target ``"state"``, else None.
    """

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        if cfg.type != "write_sae":
            raise ValueError(f"WriteSAE cannot be of type {cfg.type!r}; its type is write_sae")
        self.cfg = cfg
        self.V_dec = nn.Parameter(F.normalize(torch.randn(cfg.n_atoms, cfg.d_key), dim=-1))
        self.W_dec = nn.Parameter(F.normalize(torch.randn(cfg.n_atoms, cfg.d_value), dim=-1))
        if not cfg.tied:
            self.V_enc = nn.Parameter(self.V_dec.detach().clone())
            self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(cfg.n_atoms))
        self.register_buffer("mean", torch.zeros(cfg.d_key, cfg.d_value) if cfg.target == "state" else None)
        self.mean: Tensor | None

    def extra_repr(self) -> str:
        c = self.cfg
        site = f"layer={c.layer}, head={c.head}, " if c.layer is not None else ""
        return f"{site}target={c.target!r}, {c.n_atoms} atoms of {c.d_key}x{c.d_value}, k={c.k}, tied={c.tied}"

    # Encoder

    def encoder(self) -> tuple[Float[Tensor, "n_atoms d_key"], Float[Tensor, "n_atoms d_value"]]:
        """Factors ``v_i``, ``w_i`` that read; the decoder's own if tied."""
        return (self.V_dec, self.W_dec) if self.cfg.tied else (self.V_enc, self.W_enc)

    def pre(self, x: Matrices) -> Float[Tensor, "... n_atoms"]:
        """Pre-activations of all atoms, ``v_i^T (X - M) w_i + b_i``. Raises ValueError if ``x`` is of another size."""
        return self._project(x) + self._offset()

    def sparsify(self, pre: Float[Tensor, "... n_atoms"]) -> tuple[Float[Tensor, "... k"], Int[Tensor, "... k"]]:
        """TopK, then ReLU: activations, largest first, and their atoms. Inactive ones among them are 0."""
        values, indices = pre.topk(self.cfg.k, -1)
        return values.relu(), indices

    def topk(self, x: Matrices) -> tuple[Float[Tensor, "... k"], Int[Tensor, "... k"]]:
        """Activations ``[..., k]``, largest first, and their atoms: `encode` in sparse form.

        Gradients are those of TopK, to the chosen atoms alone; they cost ``k`` atoms, not ``n_atoms``.
        """
        if not torch.is_grad_enabled():
            return self.sparsify(self.pre(x))
        with torch.no_grad():
            indices = self.sparsify(self.pre(x))[1]
        return (self._inner(x, *self._rows(indices, encoder=True)) + self.b_enc[indices]).relu(), indices

    def encode(self, x: Matrices) -> Float[Tensor, "... n_atoms"]:
        """Activations of all atoms, at most ``k`` of them not zero."""
        values, indices = self.topk(x)
        return values.new_zeros(*values.shape[:-1], self.cfg.n_atoms).scatter(-1, indices, values)

    def encode_states(
        self,
        delta: Write,
        log_decay: Float[Tensor, "batch pos *channel"],
        initial_codes: Float[Tensor, "batch n_atoms"] | None = None,
    ) -> Float[Tensor, "batch pos n_atoms"]:
        """Pre-activations of the states ``S_t`` at every position, no state built: equal to ``pre`` of each.

        ``v^T S_t w`` decays with the state and gains ``(v.k_t)(w.delta_t)``. Costs ``d_key + d_value`` an atom and
        token, not ``d_key * d_value``. Give the result to `sparsify` for activations.

        Args:
            delta: what each token adds to this head's decayed state, ``[batch, pos]``, any rank: the model's delta, or
                its write where nothing is erased.
            log_decay: natural log of the decay, one number a token, ``<= 0``.
            initial_codes: ``pre`` of the state before the first token, e.g. the last position of the previous piece;
                None for a zero state.

        Raises:
            ValueError: the target is not ``"state"``, or there is one decay a key channel, under which an atom's
                reading of the state does not decay as one number (encode dense states there).
        """
        if self.cfg.target != "state":
            raise ValueError(f"encode_states is for target 'state'; this SAE reads each {self.cfg.target}: use encode")
        if log_decay.ndim != 2:
            raise ValueError(
                f"log_decay must be [batch, pos], one decay a token; got {list(log_decay.shape)}. With one decay a key "
                f"channel, encode dense states"
            )
        offset = self._offset()
        initial = None if initial_codes is None else initial_codes - offset
        return decayed_sum(self._project(delta), log_decay, initial) + offset

    # Decoder

    def decode(self, codes: Float[Tensor, "... n_atoms"]) -> Float[Tensor, "... d_key d_value"]:
        """The dense reconstruction, the mean included. Costs ``n_atoms`` a matrix; `decode_write` costs ``k``."""
        dense = (codes[..., None] * self.V_dec).mT @ self.W_dec
        return dense if self.mean is None else dense + self.mean

    def decode_write(self, values: Float[Tensor, "... k"], indices: Int[Tensor, "... k"]) -> Write:
        """The reconstruction in factors, of rank ``k``, from `topk`'s pair. The mean of states is not in it."""
        v, w = self._rows(indices)
        w = w * values[..., None]
        if indices.shape[-1] == 1:
            return Write(v.squeeze(-2), w.squeeze(-2))
        return Write(v, w, rank=indices.shape[-1])

    def atom(self, index: int | Int[Tensor, "..."]) -> Write:
        """Atoms ``v_i w_i^T``, of Frobenius norm 1, leading dimensions as ``index``.

        Raises IndexError for a number outside ``0`` to ``n_atoms - 1``.
        """
        index = torch.as_tensor(index, device=self.V_dec.device)
        if index.dtype.is_floating_point or index.dtype == torch.bool:
            raise TypeError(f"an atom is asked for by a whole number or a tensor of them; got {index.dtype}")
        bad = index[(index < 0) | (index >= self.cfg.n_atoms)]
        if bad.numel():
            raise IndexError(f"atom {bad.flatten()[0].item()}: this SAE has atoms 0 to {self.cfg.n_atoms - 1}")
        return Write(self.V_dec[index], self.W_dec[index])

    # Training

    def loss(
        self,
        x: Matrices,
        *,
        dead: Bool[Tensor, "n_atoms"] | None = None,
        aux_weight: float = 0.01,
        aux_k: int = 32,
    ) -> SAELoss:
        """Reconstruction error of ``x``, plus the auxiliary loss that revives dead atoms (the paper, appendix D).

        Args:
            x: matrices, any leading dimensions; those in factors are never built.
            dead: atoms to revive: what is left of ``x`` is reconstructed by their ``aux_k`` strongest.
            aux_weight: weight of that auxiliary loss; the paper has 0.01.
            aux_k: dead atoms used a matrix; the paper has 256.
        """
        x = self._checked(x)
        values, indices = self.topk(x)
        v, w = self._rows(indices)
        read = self._inner(x, v, w)  # <X - M, atom>
        norm2 = self._norm2(x)
        error2 = norm2 - 2 * (values * read).sum(-1) + _quadratic(values, gram(v, w, v, w))
        nmse = error2.sum() / norm2.sum().clamp_min(1e-30)
        aux = torch.zeros_like(nmse)
        n_dead = 0 if dead is None else int(dead.sum())
        if dead is not None and n_dead and aux_weight:
            with torch.no_grad():
                pre = self.pre(x).masked_fill(~dead, -torch.inf)
                dead_indices = pre.topk(min(aux_k, n_dead), -1).indices
            dead_values = self._inner(x, *self._rows(dead_indices, encoder=True)) + self.b_enc[dead_indices]
            dead_values = dead_values.relu()
            dv, dw = self._rows(dead_indices)
            # <what is left, dead atom>: what is left is given, only the dead atoms learn from it.
            cross = (gram(dv, dw, v.detach(), w.detach()) @ values.detach()[..., None]).squeeze(-1)
            left2 = error2.detach()
            gain = 2 * (dead_values * (self._inner(x, dv, dw) - cross)).sum(-1)
            aux = (left2 - gain + _quadratic(dead_values, gram(dv, dw, dv, dw))).sum() / left2.sum().clamp_min(1e-30)
        cosine = (read[..., 0] * (values[..., 0] > 0) / norm2.sqrt().clamp_min(1e-30)).detach()
        return SAELoss(
            nmse + aux_weight * aux, nmse, aux, error2.detach(), norm2.detach(), cosine, values, indices, n_dead
        )

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring every decoder factor back to norm 1."""
        for p in (self.V_dec, self.W_dec):
            p.copy_(F.normalize(p, dim=-1))

    # Files and models

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into ``folder``, each whole or not at all.

        ``dtype=torch.float16`` halves the file; it is read back as float32. ValueError if a number is not finite.
        """
        files.save(Path(folder), self.cfg, {name: t.to(dtype) for name, t in self.state_dict().items()})
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, subfolder: str | None = None, *, revision: str | None = None
    ) -> WriteSAE:
        """Load a saved SAE from a folder, the ones shipped here (``"tiny-gdn/L2H0"``), or the hub, as float32.

        Args:
            folder_or_hub_id: a folder wins over a hub id of the same name.
            subfolder: where in it the SAE lies.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: no such folder or hub repository, or a file is missing in it.
            ValueError: a file is damaged, of another kind, or the two files do not fit together.
        """
        folder = files.locate(folder_or_hub_id, subfolder, revision)
        cfg, tensors = files.load(folder)
        sae = cls(cfg)
        path = folder / files.WEIGHTS
        files.check_tensors(tensors, sae.state_dict(), path)
        sae.load_state_dict({name: t.to(torch.float32) for name, t in tensors.items()})
        for name in ("V_dec", "W_dec"):
            off = (tensors[name].float().norm(dim=-1) - 1).abs().max().item()
            if off > 0.02:
                raise ValueError(f"{path}: rows of {name} must have norm 1, as atoms have; one is off by {off:.3g}")
        if tensors["V_dec"].dtype != torch.float32:  # rounding moved the norms: put them right
            sae.normalize_decoder()
        return sae

    def check_fits(self, model: HookedRecurrentModel, *, check_model: bool = True) -> None:
        """Raise ValueError unless the SAE belongs to a head of this model.

        Args:
            model: anything with ``sites`` (each with layer, n_heads, d_key, d_value) and ``fingerprint(layer)``.
            check_model: False accepts a head of the right size of another model than the SAE was trained on.
        """
        c = self.cfg
        if c.layer is None or c.head is None:
            raise ValueError(
                "this SAE does not say its layer and head; if you know them: "
                "sae.cfg = dataclasses.replace(sae.cfg, layer=..., head=...)"
            )
        sites = {site.layer: site for site in model.sites}
        if c.layer not in sites:
            layers = ", ".join(map(str, sites)) or "none"
            raise ValueError(f"this SAE is for layer {c.layer}, not recurrent here; recurrent layers: {layers}")
        site = sites[c.layer]
        if c.head >= site.n_heads:
            raise ValueError(f"this SAE is for head {c.head}; layer {c.layer} has heads 0 to {site.n_heads - 1}")
        if (c.d_key, c.d_value) != (site.d_key, site.d_value):
            raise ValueError(
                f"this SAE reads {c.d_key}x{c.d_value} matrices; layer {c.layer} writes {site.d_key}x{site.d_value}"
            )
        if not check_model or c.fingerprint is None:
            return
        found = model.fingerprint(c.layer)
        if found is not None and found != c.fingerprint:
            raise ValueError(
                f"this SAE was trained on layer {c.layer} of {c.model_id or 'another model'} (fingerprint "
                f"{c.fingerprint}); the weights of that layer here are others ({found}). "
                f"check_model=False uses it all the same"
            )

    # Inner products with X - M

    def _checked(self, x: Matrices) -> Matrices:
        """``x`` in the parameters' dtype; ValueError if its matrices are of another size than the SAE's."""
        size = (x.d_key, x.d_value) if isinstance(x, Write) else tuple(x.shape[-2:])
        if size != (self.cfg.d_key, self.cfg.d_value):
            raise ValueError(
                f"this SAE reads matrices [..., {self.cfg.d_key}, {self.cfg.d_value}]; "
                f"got [..., {', '.join(map(str, size))}]"
            )
        return x.to(self.V_dec.dtype)

    def _rows(self, indices: Tensor, encoder: bool = False) -> tuple[Tensor, Tensor]:
        """Factors of the atoms at ``indices [..., k]``: ``[..., k, d_key]`` and ``[..., k, d_value]``."""
        V, W = self.encoder() if encoder else (self.V_dec, self.W_dec)
        return F.embedding(indices, V), F.embedding(indices, W)  # its backward adds up in a fixed order

    def _project(self, x: Matrices) -> Tensor:
        """``v_i^T X w_i`` for all encoder atoms, ``[..., n_atoms]``."""
        x = self._checked(x)
        V, W = self.encoder()
        if not isinstance(x, Write):
            if x[..., 0, 0].numel() <= self.cfg.d_key:
                return ((V @ x) * W).sum(-1)
            return x.flatten(-2) @ (V[:, :, None] * W[:, None, :]).flatten(1).T  # less memory for many matrices
        terms = (x.key @ V.T) * (x.value @ W.T)
        return terms if x.rank == 1 else terms.sum(-2)

    def _offset(self) -> Tensor:
        """What pre-activations have beyond ``v^T X w``: bias, less the atom's inner product with the mean."""
        if self.mean is None:
            return self.b_enc
        V, W = self.encoder()
        return self.b_enc - ((V @ self.mean) * W).sum(-1)

    def _inner(self, x: Matrices, v: Tensor, w: Tensor) -> Tensor:
        """``<X - M, v_j w_j^T>`` for factors ``v [..., j, d_key]``, ``w [..., j, d_value]``; ``[..., j]``."""
        x = self._checked(x)
        if isinstance(x, Write):
            keys, values = x.factors()
            inner = ((v @ keys.mT) * (w @ values.mT)).sum(-1)
        else:
            inner = ((v @ x) * w).sum(-1)
        return inner if self.mean is None else inner - ((v @ self.mean) * w).sum(-1)

    def _norm2(self, x: Matrices) -> Tensor:
        """``||X - M||^2``, ``[...]``."""
        if not isinstance(x, Write):
            return (x if self.mean is None else x - self.mean).square().sum((-1, -2))
        if self.mean is None:
            return x.inner(x)
        keys, values = x.factors()
        return x.inner(x) - 2 * ((keys @ self.mean) * values).sum((-1, -2)) + self.mean.square().sum()


def gram(v1: Tensor, w1: Tensor, v2: Tensor, w2: Tensor) -> Float[Tensor, "... i j"]:
    """Inner products ``<v1_i w1_i^T, v2_j w2_j^T> = (v1_i.v2_j)(w1_i.w2_j)`` of rank-1 matrices."""
    return (v1 @ v2.mT) * (w1 @ w2.mT)


def _quadratic(values: Tensor, matrix: Tensor) -> Tensor:
    return (values[..., None, :] @ matrix @ values[..., :, None])[..., 0, 0]
