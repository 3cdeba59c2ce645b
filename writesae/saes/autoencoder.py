"""The mathematics of an SAE of writes and states: one class, three choices (`SAEConfig`: encoder, sparsity, decoder).

Letters, for matrices ``X [d_key, d_value]`` (a write, a delta or a state) and atoms ``A_i``::

    pre_i = <X - M, E_i> + b_i            E_i: bilinear v_i w_i^T, tied A_i, or dense;  M = mean, if centred
    a     = sparsity(pre)                 `writesae.saes.sparsities`
    X^    = M + B + sum_i a_i A_i         A_i: factored sum_r v_ir w_ir^T, or dense; of norm 1;  B = bias, if any

The paper's WriteSAE (section 2) is bilinear, TopK, rank 1. Matrices in factors are never built with factored atoms:
``v^T (k u^T) w = (v.k)(u.w)``, states follow by the recurrence (`States`), and the error of a reconstruction needs only
inner products and the Gram matrix of the active atoms. ``...`` stands for any leading dimensions.

Ways to encode, all of them the same numbers: `pre` and `pre_of_states` give pre-activations, `activate` and `sparsify`
make activations of these, and `encode` and `topk` do both. `activate` and `encode` have a number for every atom,
`sparsify` and `topk` only the active ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae.hooks.sites import Head
from writesae.jobs.processes import ALONE, Processes
from writesae.recurrence import Write
from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import Atoms, Matrices, combined, project, size
from writesae.saes.config import SAEConfig
from writesae.saes.dictionary import DICTIONARIES, Dictionary
from writesae.saes.loss import SAELoss, loss_of
from writesae.saes.reconstruction import Batch, Reading, against
from writesae.saes.sparsities import Choosing, Sparsity, sparsity_named

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel


class Autoencoder(nn.Module):
    """Encoder, sparsity and decoder over matrices ``[d_key, d_value]`` of one head. `WriteSAE` adds files and models.

    Its tensors are described there.
    """

    V_dec: nn.Parameter
    W_dec: nn.Parameter
    A_dec: nn.Parameter
    V_enc: nn.Parameter
    W_enc: nn.Parameter
    A_enc: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    log_threshold: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter
    mean: Tensor | None
    threshold: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = c = cfg
        sizes = c.n_atoms, c.d_key, c.d_value, c.rank
        self._add("dec", DICTIONARIES[c.decoder].random(*sizes))
        if c.unit_atoms:
            self.normalize_decoder()
        if c.encoder != "tied":
            self._add("enc", DICTIONARIES[c.encoder].random_reading(self.dictionary, *sizes))
        self.b_enc = nn.Parameter(torch.zeros(c.n_atoms))
        if c.decoder_bias:
            self.b_dec = nn.Parameter(torch.zeros(c.d_key, c.d_value))
        self.register_buffer("mean", torch.zeros(c.d_key, c.d_value) if c.center else None)
        for name, tensor in self.sparsity.tensors(c).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def _add(self, side: str, tensors: dict[str, Tensor]) -> None:
        for letter, tensor in tensors.items():
            self.register_parameter(f"{letter}_{side}", nn.Parameter(tensor))

    def extra_repr(self) -> str:
        c = self.cfg
        site = f"layer={c.layer}, head={c.head}, " if c.layer is not None else ""
        atoms = f"{c.n_atoms} {'dense' if c.decoder == 'dense' else f'rank-{c.rank}'} atoms of {c.d_key}x{c.d_value}"
        return f"{site}target={c.target!r}, {atoms}, encoder={c.encoder!r}, sparsity={c.sparsity!r}, k={c.k}"

    @property
    def sparsity(self) -> Sparsity:
        """How pre-activations become activations."""
        return sparsity_named(self.cfg.sparsity)

    # Atoms

    @property
    def dictionary(self) -> Dictionary:
        """The atoms, with what can be done to them in place."""
        return self._side("dec", self.cfg.decoder)

    @property
    def own_encoder(self) -> Dictionary | None:
        """The same of what the encoder reads with; None if it reads with the atoms."""
        return None if self.cfg.encoder == "tied" else self._side("enc", self.cfg.encoder)

    def _side(self, side: str, name: str) -> Dictionary:
        kind = DICTIONARIES[name]
        return kind(self.cfg.rank, **{letter: getattr(self, f"{letter}_{side}") for letter in kind.letters})

    @property
    def decoder(self) -> Atoms:
        """The atoms, in factors (a `Write` with leading dimension ``[n_atoms]``) or dense."""
        return self.dictionary.atoms

    @property
    def encoder(self) -> Atoms:
        """What is read of a matrix for each atom; the atoms themselves if tied."""
        return (self.own_encoder or self.dictionary).atoms

    def atom(self, index: int | Int[Tensor, "..."]) -> Write:
        """Atoms as `Write`, leading dimensions as ``index``; a dense atom has rank ``min(d_key, d_value)``.

        Raises IndexError for a number outside ``0`` to ``n_atoms - 1``.
        """
        if isinstance(index, str):
            raise TypeError(f"an atom is asked for by a whole number or a tensor of them; got {index!r}")
        index = torch.as_tensor(index)  # looked at where it is: of a number, no device is waited for
        if index.dtype.is_floating_point or index.dtype == torch.bool:
            raise TypeError(f"an atom is asked for by a whole number or a tensor of them; got {index.dtype}")
        least, most = torch.stack(index.aminmax()).tolist() if index.numel() else (0, 0)
        if least < 0 or most >= self.cfg.n_atoms:
            bad = least if least < 0 else most
            raise IndexError(f"atom {bad}: this SAE has atoms 0 to {self.cfg.n_atoms - 1}")
        return self.dictionary.atom(index.to(self.b_enc.device))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring every atom back to norm 1, its key factors too."""
        self.dictionary.normalize()

    # Encoder

    @property
    def offset(self) -> Float[Tensor, " n_atoms"]:
        """What pre-activations have beyond ``<X, E_i>``: the bias, less the inner product with the mean."""
        centred = against(self.mean, self.encoder)
        return self.b_enc if centred is None else self.b_enc + centred

    def pre(self, x: Matrices) -> Float[Tensor, "... n_atoms"]:
        """Pre-activations of all atoms, ``<X - M, E_i> + b_i``. Raises ValueError if ``x`` is of another size."""
        reading = Reading(self._checked(x), self.encoder, self.offset)
        return reading.all if torch.is_grad_enabled() else reading.chosen_from()

    def pre_of_states(
        self,
        delta: Write,
        log_decay: Float[Tensor, "batch pos *channel"],
        initial: Float[Tensor, "batch n_atoms"] | None = None,
    ) -> Float[Tensor, "batch pos n_atoms"]:
        """Pre-activations of the states ``S_t`` at every position, no state built: equal to ``pre`` of each.

        ``v^T S_t w`` decays with the state and gains ``(v.k_t)(w.delta_t)``. Costs ``d_key + d_value`` per atom and
        token, not ``d_key * d_value``. Give the result to `sparsify` for activations. The same as
        ``pre(States(delta, log_decay))``, but for sequences in pieces.

        Args:
            delta: what each token adds to this head's decayed state, ``[batch, pos]``, any rank: the model's delta, or
                its write where nothing is erased.
            log_decay: natural log of the decay, one number per token, ``<= 0``.
            initial: ``pre`` of the state before the first token, e.g. the last position of the previous piece; None for
                a zero state.

        Raises:
            ValueError: the target is not ``"state"``, or there is one decay per key channel, under which an atom's
                reading of the state does not decay as one number (encode dense states there).
        """
        if self.cfg.target != "state":
            raise ValueError(f"encode_states is for target 'state'; this SAE reads each {self.cfg.target}: use encode")
        if log_decay.ndim != 2:
            raise ValueError(
                f"log_decay must be [batch, pos], one decay per token; got {list(log_decay.shape)}. With one decay per "
                f"key channel, encode dense states"
            )
        offset = self.offset
        gain = self._checked(delta)
        assert isinstance(gain, Write)
        first = None if initial is None else initial - offset
        return States(gain, log_decay.to(self.b_enc.dtype)).read(project(gain, self.encoder), first) + offset

    def encode_states(
        self,
        delta: Write,
        log_decay: Float[Tensor, "batch pos *channel"],
        initial_codes: Float[Tensor, "batch n_atoms"] | None = None,
    ) -> Float[Tensor, "batch pos n_atoms"]:
        """The older name of `pre_of_states`, which says what it returns: pre-activations."""
        return self.pre_of_states(delta, log_decay, initial_codes)

    def activate(self, pre: Float[Tensor, "... n_atoms"]) -> Float[Tensor, "... n_atoms"]:
        """What `encode` makes of pre-activations."""
        return self.sparsity.activate(self, pre)

    def sparsify(
        self, pre: Float[Tensor, "... n_atoms"], *, over_batch: bool = False
    ) -> tuple[Float[Tensor, "... m"], Int[Tensor, "... m"]]:
        """Activations, largest first, and their atoms, from pre-activations; see `topk`."""
        return self.sparsity.sparsify(self, pre, over_batch)

    def encode(self, x: Matrices, *, over_batch: bool = False) -> Float[Tensor, "... n_atoms"]:
        """Activations of all atoms.

        Args:
            x: matrices, any leading dimensions.
            over_batch: for batch_topk, choose the largest ``k`` per matrix on average over ``x``, as training does,
                rather than by the threshold.
        """
        if not self.sparsity.chooses:
            return self.activate(self.pre(x))
        values, indices = self.topk(x, over_batch=over_batch)
        return values.new_zeros(*values.shape[:-1], self.cfg.n_atoms).scatter(-1, indices, values)

    def topk(
        self, x: Matrices, k: int | None = None, *, over_batch: bool = False
    ) -> tuple[Float[Tensor, "... m"], Int[Tensor, "... m"]]:
        """`encode` in sparse form: activations, largest first, and their atoms; inactive ones among them are 0.

        With ``k`` the ``k`` strongest. Without, ``m`` is ``cfg.k`` for TopK, otherwise what the matrix with the most
        active atoms has. Gradients go to the chosen atoms alone, and cost as many, not ``n_atoms``.
        """
        sparsity = self.sparsity
        if isinstance(sparsity, Choosing) and torch.is_grad_enabled():
            reading = Reading(self._checked(x), self.encoder, self.offset)
            indices, active = sparsity.choose(self, reading.chosen_from(), over_batch=over_batch)
            values = reading.at(indices).relu() * active
        else:
            values, indices = self.sparsify(self.pre(x), over_batch=over_batch)
        return (values, indices) if k is None else (values[..., :k], indices[..., :k])

    @torch.no_grad()
    def calibrate(self, x: Matrices) -> float:
        """Set the threshold of a batch_topk SAE so that ``k`` atoms per matrix are active on average over ``x``."""
        return self.sparsity.calibrate(self, x)

    # Decoder

    @property
    def constant(self) -> Float[Tensor, "d_key d_value"] | None:
        """What every reconstruction contains: the mean, the bias, or both."""
        bias = self.b_dec if self.cfg.decoder_bias else None
        return bias if self.mean is None else self.mean if bias is None else self.mean + bias

    def decode(self, codes: Float[Tensor, "... n_atoms"]) -> Float[Tensor, "... d_key d_value"]:
        """The dense reconstruction from activations of all atoms, mean and bias included. Costs ``n_atoms`` per matrix;
        `decode_write` only the active ones."""
        if not isinstance(codes, Tensor):
            raise TypeError(f"decode takes activations [..., n_atoms], as encode gives them; got {codes!r:.60}")
        found, constant = combined(codes, self.decoder), self.constant
        return found if constant is None else found + constant

    def forward(self, x: Matrices) -> Float[Tensor, "... d_key d_value"]:
        """The dense reconstruction of matrices: ``sae(x)`` is ``sae.decode(sae.encode(x))``, as in SAELens."""
        return self.decode(self.encode(x))

    def decode_write(self, values: Float[Tensor, "... m"], indices: Int[Tensor, "... m"]) -> Write:
        """The reconstruction in factors, from `topk`'s pair. Mean and bias are not in it."""
        atoms = self.dictionary.atom(indices) * values
        if indices.shape[-1] == 1:
            return atoms[(slice(None),) * (indices.ndim - 1) + (0,)]
        v, w = (f.flatten(-3, -2) for f in atoms.factors())
        return Write(v, w, rank=v.shape[-2])

    # Training

    def batch(self, x: Matrices, processes: Processes = ALONE) -> Batch:
        """``x`` with all that is read of it to reconstruct it."""
        x, atoms, constant = self._checked(x), self.decoder, self.constant
        return Batch(
            x, Reading(x, self.encoder, self.offset), atoms, constant=constant, mean=self.mean,
            tied=self.cfg.encoder == "tied", processes=processes,
        )  # fmt: skip

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
            dead: atoms to revive: what is left of ``x`` is reconstructed by their ``aux_k`` strongest. For sparsities
                that choose atoms (topk, batch_topk).
            aux_weight: weight of that auxiliary loss; the paper has 0.01.
            aux_k: dead atoms used per matrix; the paper has 256.
            sparsity_weight: weight of the penalty, for jumprelu and gated.
            bandwidth: width of the thresholds' straight-through estimate, as a share of each threshold.
            over_batch: for batch_topk: see `encode`.
            processes: those that share the batch.
        """
        return loss_of(
            self, self.sparsity, self.batch(x, processes), dead=dead, aux_weight=aux_weight, aux_k=aux_k,
            sparsity_weight=sparsity_weight, bandwidth=bandwidth, over_batch=over_batch,
        )  # fmt: skip

    def _checked(self, x: Matrices) -> Matrices:
        """``x`` in the parameters' dtype; ValueError if they are of another size, or elsewhere."""
        if not isinstance(x, Tensor | Write | States):
            raise TypeError(
                f"an SAE reads matrices; got {x!r:.60}. For a text: model.encode(sae, text), or sae.read(model, text)"
            )
        given = size(x)[-2:]
        if given != (self.cfg.d_key, self.cfg.d_value):
            raise ValueError(
                f"this SAE reads matrices [..., {self.cfg.d_key}, {self.cfg.d_value}]; "
                f"got [..., {', '.join(map(str, given))}]"
            )
        where = (x.gain.key if isinstance(x, States) else x.key if isinstance(x, Write) else x).device
        if where != self.b_enc.device:
            raise ValueError(
                f"this SAE is on {self.b_enc.device}, and what it is to read on {where}: move one of them, "
                f"sae.to({str(where)!r}) or x.to({str(self.b_enc.device)!r})"
            )
        return x.to(self.b_enc.dtype)

    # A model

    @property
    def place(self) -> Head:
        """The head it belongs to; ValueError if it does not say."""
        return self.cfg.place

    def check_fits(self, model: HookedRecurrentModel, *, check_model: bool = True) -> None:
        """Raise ValueError unless the SAE belongs to a head of this model.

        Args:
            model: anything with ``sites`` (each with layer, n_heads, d_key, d_value) and ``fingerprint(layer)``.
            check_model: False accepts a head of the right size of another model than the SAE was trained on.
        """
        self.cfg.check_fits(model, check_model=check_model)
