"""The SAE of writes and states: one class, three choices (`SAEConfig`: encoder, sparsity, decoder).

Letters, for matrices ``X [d_key, d_value]`` (a write, a delta or a state) and atoms ``A_i``::

    pre_i = <X - M, E_i> + b_i            E_i: bilinear v_i w_i^T, tied A_i, or dense;  M = mean, if centred
    a     = sparsity(pre)                 `writesae.saes.sparsity`
    X^    = M + B + sum_i a_i A_i         A_i: factored sum_r v_ir w_ir^T, or dense; of norm 1;  B = bias, if any

The paper's WriteSAE (section 2) is bilinear, TopK, rank 1. Matrices in factors are never built with factored atoms:
``v^T (k u^T) w = (v.k)(u.w)``, states follow by the recurrence (`States`), and the error of a reconstruction needs only
inner products and the Gram matrix of the active atoms. ``...`` stands for any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae.hooks.interventions import Add
from writesae.hooks.sites import Head
from writesae.jobs.late import given
from writesae.jobs.processes import ALONE, Processes
from writesae.recurrence import Write
from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import Atoms, Matrices, combined, dense, norm2, project, size, take, with_one
from writesae.saes.config import SAEConfig
from writesae.saes.reconstruction import Codes, DenseCodes, Reading, SparseCodes, against, error2, revived_error2
from writesae.saes.saved import Saved
from writesae.saes.sparsity import CountActive, JumpReLU, above, batch_threshold, largest

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel


@dataclass(frozen=True)
class SAELoss:
    """The reconstruction of one batch of matrices with leading dimensions ``...``. Those up to ``aux`` carry gradients.

    Attributes:
        loss: ``nmse + aux_weight * aux + sparsity_weight * penalty (+ gate, for gated)``: what training minimises.
        nmse: squared error over squared norm, both summed over the batch (about the mean, if centred); 0 is perfect,
            1 as bad as reconstructing nothing.
        aux: the same ratio for what is left, reconstructed by dead atoms; 0 if none is dead.
        penalty: for jumprelu active atoms a matrix over ``k``; for gated the gates' sum, in the data's scale.
        error2: ``[...]`` squared error of each matrix.
        norm2: ``[...]`` squared norm of each.
        cosine: ``[...]`` cosine of each to its strongest atom; 0 where no atom is active.
        fired: ``[n_atoms]`` how many matrices each atom was active in.
        n_dead: atoms that were dead when the batch came.
    """

    loss: Float[Tensor, ""]
    nmse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    error2: Float[Tensor, "..."]
    norm2: Float[Tensor, "..."]
    cosine: Float[Tensor, "..."]
    fired: Int[Tensor, " n_atoms"]
    n_dead: int

    @property
    def l0(self) -> float:
        """Mean number of active atoms."""
        return float(self.fired.sum()) / self.error2.numel()


class WriteSAE(Saved):
    """Sparse autoencoder over matrices ``[d_key, d_value]`` of one head; what it is made of, `SAEConfig` says.

    A new one has random unit atoms; `writesae.saes.train_sae` starts them from data. Computes in the dtype of its
    parameters (float32) whatever the input's.

    Attributes:
        cfg: what it is and where it belongs.
        V_dec, W_dec: factors of the atoms, ``[n_atoms, d_key]``, ``[n_atoms, d_value]`` (``[n_atoms, rank, ...]`` for
            ``rank > 1``); V_enc, W_enc those of a bilinear encoder.
        A_dec, A_enc: a dense decoder's and encoder's, ``[n_atoms, d_key, d_value]``.
        b_enc: ``[n_atoms]``, zero unless trained: with zeros the choice of atoms does not depend on a matrix's scale.
        b_dec, mean: ``[d_key, d_value]``, or None.
        threshold: for batch_topk, a number; NaN until it is known.
        log_threshold: for jumprelu, ``[n_atoms]``. r_mag, b_mag: for gated, ``[n_atoms]``.
    """

    V_dec: nn.Parameter
    W_dec: nn.Parameter
    A_dec: nn.Parameter
    V_enc: nn.Parameter
    W_enc: nn.Parameter
    A_enc: nn.Parameter
    b_dec: nn.Parameter
    log_threshold: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter
    mean: Tensor | None
    threshold: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        c = cfg
        ranks = () if c.rank == 1 else (c.rank,)
        dense_size, sizes = (c.n_atoms, c.d_key, c.d_value), {"V": (*ranks, c.d_key), "W": (*ranks, c.d_value)}

        def add(side: str, factored: bool) -> None:
            if factored:
                for letter, rest in sizes.items():
                    start = F.normalize(torch.randn(c.n_atoms, *rest), dim=-1)
                    self.register_parameter(f"{letter}_{side}", nn.Parameter(start))
            else:
                self.register_parameter(f"A_{side}", nn.Parameter(torch.randn(dense_size)))

        add("dec", c.decoder == "factored")
        if c.unit_atoms:
            self.normalize_decoder()
        if c.encoder == "bilinear" and c.decoder == "factored":
            self.V_enc = nn.Parameter(self.V_dec.detach().clone())
            self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        elif c.encoder == "dense":
            self.A_enc = nn.Parameter(dense(self.decoder).detach().clone())
        elif c.encoder == "bilinear":
            add("enc", factored=True)
        self.b_enc = nn.Parameter(torch.zeros(c.n_atoms))
        if c.decoder_bias:
            self.b_dec = nn.Parameter(torch.zeros(c.d_key, c.d_value))
        if c.sparsity == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(c.n_atoms))
        if c.sparsity == "gated":
            self.r_mag, self.b_mag = nn.Parameter(torch.zeros(c.n_atoms)), nn.Parameter(torch.zeros(c.n_atoms))
        self.register_buffer("mean", torch.zeros(c.d_key, c.d_value) if c.center else None)
        if c.sparsity == "batch_topk":
            self.register_buffer("threshold", torch.tensor(float("nan")))

    def extra_repr(self) -> str:
        c = self.cfg
        site = f"layer={c.layer}, head={c.head}, " if c.layer is not None else ""
        atoms = f"{c.n_atoms} {'dense' if c.decoder == 'dense' else f'rank-{c.rank}'} atoms of {c.d_key}x{c.d_value}"
        return f"{site}target={c.target!r}, {atoms}, encoder={c.encoder!r}, sparsity={c.sparsity!r}, k={c.k}"

    # Atoms

    @property
    def decoder(self) -> Atoms:
        """The atoms, in factors (a `Write` with leading dimension ``[n_atoms]``) or dense."""
        return Write(self.V_dec, self.W_dec, rank=self.cfg.rank) if self.cfg.decoder == "factored" else self.A_dec

    @property
    def encoder(self) -> Atoms:
        """What is read of a matrix for each atom; the atoms themselves if tied."""
        if self.cfg.encoder == "tied":
            return self.decoder
        return Write(self.V_enc, self.W_enc, rank=self.cfg.rank) if self.cfg.encoder == "bilinear" else self.A_enc

    def atom(self, index: int | Int[Tensor, "..."]) -> Write:
        """Atoms as `Write`, leading dimensions as ``index``; a dense atom has rank ``min(d_key, d_value)``.

        Raises IndexError for a number outside ``0`` to ``n_atoms - 1``.
        """
        atoms = self.decoder
        index = torch.as_tensor(index, device=self.b_enc.device)
        if index.dtype.is_floating_point or index.dtype == torch.bool:
            raise TypeError(f"an atom is asked for by a whole number or a tensor of them; got {index.dtype}")
        bad = index[(index < 0) | (index >= self.cfg.n_atoms)]
        if bad.numel():
            raise IndexError(f"atom {bad.flatten()[0].item()}: this SAE has atoms 0 to {self.cfg.n_atoms - 1}")
        return atoms[index] if isinstance(atoms, Write) else in_factors(atoms[index])

    # Encoder

    def pre(self, x: Matrices) -> Float[Tensor, "... n_atoms"]:
        """Pre-activations of all atoms, ``<X - M, E_i> + b_i``. Raises ValueError if ``x`` is of another size."""
        reading = Reading(self._checked(x), self.encoder, self._offset())
        return reading.all if torch.is_grad_enabled() else reading.chosen_from()

    def encode(self, x: Matrices, *, over_batch: bool = False) -> Float[Tensor, "... n_atoms"]:
        """Activations of all atoms.

        Args:
            x: matrices, any leading dimensions.
            over_batch: for batch_topk, choose the largest ``k`` a matrix on average over ``x``, as training does,
                rather than by the threshold.
        """
        if not self.cfg.chooses:
            return self.activate(self.pre(x))
        values, indices = self.topk(x, over_batch=over_batch)
        return values.new_zeros(*values.shape[:-1], self.cfg.n_atoms).scatter(-1, indices, values)

    def activate(self, pre: Float[Tensor, "... n_atoms"]) -> Float[Tensor, "... n_atoms"]:
        """What `encode` makes of pre-activations."""
        if not self.cfg.chooses:
            return self._dense_codes(pre)
        values, indices = self.sparsify(pre)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def topk(
        self, x: Matrices, k: int | None = None, *, over_batch: bool = False
    ) -> tuple[Float[Tensor, "... m"], Int[Tensor, "... m"]]:
        """`encode` in sparse form: activations, largest first, and their atoms; inactive ones among them are 0.

        With ``k`` the ``k`` strongest. Without, ``m`` is ``cfg.k`` for TopK, otherwise what the matrix with the most
        active atoms has. Gradients go to the chosen atoms alone, and cost as many, not ``n_atoms``.
        """
        if self.cfg.chooses and torch.is_grad_enabled():
            reading = Reading(self._checked(x), self.encoder, self._offset())
            indices, active = self._choose(reading.chosen_from(), over_batch)
            values = reading.at(indices).relu() * active
        else:
            values, indices = self.sparsify(self.pre(x), over_batch=over_batch)
        return (values, indices) if k is None else (values[..., :k], indices[..., :k])

    def sparsify(
        self, pre: Float[Tensor, "... n_atoms"], *, over_batch: bool = False
    ) -> tuple[Float[Tensor, "... m"], Int[Tensor, "... m"]]:
        """Activations, largest first, and their atoms, from pre-activations; see `topk`."""
        if not self.cfg.chooses:
            codes = self._dense_codes(pre)
            return codes.topk(max(1, int((codes > 0).sum(-1).max())), -1)
        indices, active = self._choose(pre, over_batch)
        return pre.gather(-1, indices).relu() * active, indices

    def encode_states(
        self,
        delta: Write,
        log_decay: Float[Tensor, "batch pos *channel"],
        initial_codes: Float[Tensor, "batch n_atoms"] | None = None,
    ) -> Float[Tensor, "batch pos n_atoms"]:
        """Pre-activations of the states ``S_t`` at every position, no state built: equal to ``pre`` of each.

        ``v^T S_t w`` decays with the state and gains ``(v.k_t)(w.delta_t)``. Costs ``d_key + d_value`` an atom and
        token, not ``d_key * d_value``. Give the result to `sparsify` for activations. The same as
        ``pre(States(delta, log_decay))``, but for sequences in pieces.

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
        gain = self._checked(delta)
        assert isinstance(gain, Write)
        initial = None if initial_codes is None else initial_codes - offset
        return States(gain, log_decay.to(self.b_enc.dtype)).read(project(gain, self.encoder), initial) + offset

    # Decoder

    def decode(self, codes: Float[Tensor, "... n_atoms"]) -> Float[Tensor, "... d_key d_value"]:
        """The dense reconstruction, mean and bias included. Costs ``n_atoms`` a matrix; `decode_write` the active."""
        found, constant = combined(codes, self.decoder), self._constant()
        return found if constant is None else found + constant

    def decode_write(self, values: Float[Tensor, "... m"], indices: Int[Tensor, "... m"]) -> Write:
        """The reconstruction in factors, from `topk`'s pair. Mean and bias are not in it."""
        atoms = self.atom(indices) * values
        if indices.shape[-1] == 1:
            return atoms[(slice(None),) * (indices.ndim - 1) + (0,)]
        v, w = (f.flatten(-3, -2) for f in atoms.factors())
        return Write(v, w, rank=v.shape[-2])

    # A model asks

    @property
    def place(self) -> Head:
        """The head it belongs to; ValueError if it does not say."""
        return self.cfg.place

    def adding(self, atom: int, scale: float | int) -> Add:
        """The intervention that adds an atom at ``scale`` times the native write's norm (the paper, section 4)."""
        layer, head = self.place
        return Add(layer, head, write=self.atom(atom), scale=scale, relative=True)

    def read(self, model: Any, x: Any, *, check_model: bool = True, **kwargs: Any) -> Any:
        """Which atoms are active at every token of a text; see `writesae.saes.activity.reading.encode`."""
        from writesae.saes.activity.reading import encode

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

        >>> WriteSAE.from_pretrained("tiny-gdn/L2H0").show(53)
        """
        return given("show")(self, atom, model=model, texts=texts, pages=pages, check_model=check_model)

    # Training

    def loss(
        self,
        x: Matrices,
        *,
        dead: Bool[Tensor, "n_atoms"] | None = None,
        aux_weight: float = 0.01,
        aux_k: int = 32,
        sparsity_weight: float | Tensor = 0.0,
        bandwidth: float = 0.5,
        over_batch: bool = True,
        processes: Processes = ALONE,
    ) -> SAELoss:
        """Reconstruction error of ``x``, plus the auxiliary loss that revives dead atoms (the paper, appendix D).

        With several processes, ``x`` is this one's share; ``loss`` and its gradients add up to those of the whole.

        Args:
            x: matrices, any leading dimensions; those in factors are never built (with a factored decoder).
            dead: atoms to revive: what is left of ``x`` is reconstructed by their ``aux_k`` strongest. For topk kinds.
            aux_weight: weight of that auxiliary loss; the paper has 0.01.
            aux_k: dead atoms used a matrix; the paper has 256.
            sparsity_weight: weight of the penalty, for jumprelu and gated.
            bandwidth: width of the thresholds' straight-through estimate, as a share of each threshold.
            over_batch: for batch_topk: see `encode`.
            processes: those that share the batch.
        """
        x = self._checked(x)
        atoms, constant = self.decoder, self._constant()
        encoding = Reading(x, self.encoder, self._offset())
        shared = encoding if self.cfg.encoder == "tied" else None
        reading = Reading(x, atoms, against(constant, atoms), shared)  # of X - C
        whole2 = _about(x, self.mean)  # ||X - M||^2
        given2 = _about(x, constant) if self.cfg.decoder_bias else whole2  # ||X - C||^2
        power = processes.total(whole2.sum()).clamp_min(1e-30)

        if self.cfg.chooses:
            indices, active = self._choose(encoding.chosen_from(), over_batch, processes)
            codes = self._codes(encoding, indices, active)
        else:
            codes = DenseCodes(self._dense_codes(encoding.all, bandwidth))
        found2, left = error2(x, codes, atoms, reading, given2, constant)
        nmse = found2.sum() / power

        aux = penalty = gate = torch.zeros_like(nmse)
        n_dead = 0 if dead is None else int(dead.sum())
        if self.cfg.chooses and dead is not None and n_dead and aux_weight:
            readings = encoding.chosen_from().masked_fill(~dead, -torch.inf)
            revived = self._sparse(encoding, readings.topk(min(aux_k, n_dead), -1).indices)
            fixed = Reading(x, atoms, against(None if constant is None else constant.detach(), atoms), reading)
            aux2 = revived_error2(revived, codes, atoms, fixed, found2, left)
            aux = aux2.sum() / processes.total(found2.sum()).clamp_min(1e-30)
        if not self.cfg.chooses:
            n = processes.total(torch.ones_like(whole2).sum())
            if self.cfg.sparsity == "jumprelu":
                counts: Tensor = CountActive.apply(encoding.all, self.log_threshold, bandwidth)  # type: ignore[assignment]
                penalty = counts.sum() / (n * self.cfg.k)
            else:  # the gates alone should reconstruct too, with the decoder as it is
                gates = DenseCodes(encoding.all.relu())
                frozen, fixed = atoms.detach(), None if constant is None else constant.detach()
                alone = Reading(x, frozen, against(fixed, frozen))
                gate = error2(x, gates, frozen, alone, given2.detach(), fixed)[0].sum() / power
                penalty = gates.values.sum() / (n * power).sqrt()
        loss = nmse + aux_weight * aux + sparsity_weight * penalty + gate
        with torch.no_grad():
            strength, which = codes.strongest()
            size = (norm2(atoms)[which] * given2).sqrt().clamp_min(1e-30)
            cosine = reading.at(which[..., None])[..., 0] * (strength > 0) / size
        fired = codes.fired(self.cfg.n_atoms)
        return SAELoss(loss, nmse, aux, penalty, found2.detach(), whole2.detach(), cosine, fired, n_dead)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring every atom back to norm 1, its key factors too."""
        if self.cfg.decoder == "dense":
            self.A_dec.copy_(F.normalize(self.A_dec.flatten(1), dim=-1).view_as(self.A_dec))
        elif self.cfg.rank == 1:
            for p in (self.V_dec, self.W_dec):
                p.copy_(F.normalize(p, dim=-1))
        else:
            length = self.V_dec.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            self.V_dec.div_(length)
            self.W_dec.mul_(length)
            self.W_dec.div_(norm2(self.decoder).sqrt().clamp_min(1e-30)[:, None, None])

    # Inner products with X - M

    def _checked(self, x: Matrices) -> Matrices:
        """``x`` in the parameters' dtype; ValueError if its matrices are of another size than the SAE's."""
        given = size(x)[-2:]
        if given != (self.cfg.d_key, self.cfg.d_value):
            raise ValueError(
                f"this SAE reads matrices [..., {self.cfg.d_key}, {self.cfg.d_value}]; "
                f"got [..., {', '.join(map(str, given))}]"
            )
        return x.to(self.b_enc.dtype)

    def _offset(self) -> Float[Tensor, " n_atoms"]:
        """What pre-activations have beyond ``<X, E_i>``: bias, less the inner product with the mean."""
        centred = against(self.mean, self.encoder)
        return self.b_enc if centred is None else self.b_enc + centred

    def _constant(self) -> Float[Tensor, "d_key d_value"] | None:
        """What every reconstruction contains: the mean, the bias, or both."""
        bias = self.b_dec if self.cfg.decoder_bias else None
        return bias if self.mean is None else self.mean if bias is None else self.mean + bias

    def _choose(self, pre: Tensor, over_batch: bool, processes: Processes = ALONE) -> tuple[Tensor, Tensor]:
        """The atoms chosen by topk or batch_topk, ``[..., m]``, and 1 where they are active, else 0."""
        if self.cfg.sparsity == "topk":
            return largest(pre, self.cfg.k)
        threshold = batch_threshold(pre, self.cfg.k, processes) if over_batch else self.threshold
        if bool(torch.isnan(threshold)):
            raise ValueError(
                "this batch_topk SAE has no threshold yet to read single matrices with: sae.calibrate(data) finds it, "
                "or encode(x, over_batch=True) chooses over x"
            )
        return above(pre, threshold)

    def _codes(self, encoding: Reading, indices: Tensor, active: Tensor) -> Codes:
        """Activations of the chosen atoms, in the form that costs less: a batch_topk may choose very many of one
        matrix, and the Gram matrix of the active atoms is made for each matrix, that of all atoms but once."""
        m, n, rows, d = active.shape[-1], self.cfg.n_atoms, active[..., 0].numel(), self.cfg.d_key + self.cfg.d_value
        if m * m * d <= n * n * (1 + d / rows):
            return self._sparse(encoding, indices, active)
        kept = torch.zeros(*indices.shape[:-1], n, dtype=active.dtype, device=active.device)
        return DenseCodes(encoding.all.relu() * kept.scatter(-1, indices, active))

    def _sparse(self, encoding: Reading, indices: Tensor, active: Tensor | float = 1.0) -> SparseCodes:
        atoms = self.decoder
        rows = take(atoms, indices) if isinstance(atoms, Write) else None
        own = rows if self.cfg.encoder == "tied" else None
        return SparseCodes(encoding.at(indices, own).relu() * active, indices, rows)

    @torch.no_grad()
    def calibrate(self, x: Matrices) -> float:
        """Set the threshold of a batch_topk SAE so that ``k`` atoms a matrix are active on average over ``x``."""
        if self.cfg.sparsity != "batch_topk":
            raise ValueError(f"calibrate is for batch_topk; this SAE has sparsity {self.cfg.sparsity!r}")
        self.threshold.copy_(batch_threshold(self.pre(x), self.cfg.k))
        return float(self.threshold)

    def _dense_codes(self, pre: Tensor, bandwidth: float = 0.5) -> Tensor:
        if self.cfg.sparsity == "jumprelu":
            return JumpReLU.apply(pre, self.log_threshold, bandwidth)  # type: ignore[return-value]
        strength = (self.r_mag.exp() * (pre - self.b_enc) + self.b_mag).relu()
        temperature = self.cfg.gate_temperature
        return strength * (torch.sigmoid(pre / temperature) if temperature else (pre > 0).to(pre.dtype))


def in_factors(dense: Float[Tensor, "... d_key d_value"]) -> Write:
    """A dense matrix as a `Write` of rank ``min(d_key, d_value)``: each row, or column, under its unit vector."""
    d_key, d_value = dense.shape[-2:]
    if d_key <= d_value:
        key, value = torch.eye(d_key, dtype=dense.dtype, device=dense.device).expand(*dense.shape[:-2], -1, -1), dense
    else:
        key = dense.mT
        value = torch.eye(d_value, dtype=dense.dtype, device=dense.device).expand(*dense.shape[:-2], -1, -1)
    rank = min(d_key, d_value)
    return Write(key, value, rank=rank) if rank > 1 else Write(key[..., 0, :], value[..., 0, :])


def _about(x: Matrices, C: Tensor | None) -> Float[Tensor, "..."]:
    """``||X - C||^2``; ``C`` is zero if None."""
    if C is None:
        return norm2(x)
    if isinstance(x, Tensor):
        return norm2(x - C)
    return norm2(x) - 2 * with_one(x, C) + C.square().sum()
