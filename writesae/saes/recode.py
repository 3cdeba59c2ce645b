"""A whole SAE in the place of what it reads, with some of its atoms changed on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.hooks.interventions import Moment
from writesae.hooks.positions import row_of_each
from writesae.recurrence import Write
from writesae.recurrence.matrices import Matrices, dense, in_factors
from writesae.saes.sae import WriteSAE
from writesae.saes.substitute import OfItsHead

Strength: TypeAlias = float | int | Float[Tensor, " batch"]


@dataclass(frozen=True, init=False)
class Recode(OfItsHead):
    """Read with the SAE, change activations, and put what the SAE makes of them in the place of what it read.

    >>> with model.intervene(ws.Recode(sae)): ...                             # run with the SAE
    >>> with model.intervene(ws.Recode(sae, ablate=[7], error_term=True)): ...   # take one atom out, leave the rest

    All active atoms count, whatever ``k`` and the sparsity, and mean and bias if the SAE has them; where no atom is
    active, they alone are written. `Substitute` is the paper's edit by the top atom.

    What stands for what, by the SAE's target:

    - ``"write"``: ``X^`` is written instead of the native write.
    - ``"delta"``: ``X^ - X`` is added, so the state gains ``X^`` where it would have gained its delta ``X``.
    - ``"state"``: ``X^ - X`` is added, so the state is ``X^`` after the token. That is a whole matrix a token: ask for
      few positions.

    With ``error_term`` what the SAE misses is added back as a constant, ``X + sum_i (a'_i - a_i) A_i``. So values stay
    but for the atoms that are changed (none need be), and gradients go through the atoms, as with ``use_error_term`` of
    SAELens.

    Attributes:
        sae: a `WriteSAE`; layer and head are its site's.
        ablate: atoms whose activation becomes 0.
        scale: atoms whose activation is multiplied, each by a number, or by one for each row of the batch, ``[batch]``.
        clamp: atoms whose activation becomes this number (or one for each row) wherever they are active.
        error_term: keep what the SAE misses.
    """

    ablate: tuple[int, ...] = ()
    scale: Mapping[int, Strength] = field(default_factory=dict)
    clamp: Mapping[int, Strength] = field(default_factory=dict)
    error_term: bool = False

    def __init__(
        self,
        sae: WriteSAE,
        *,
        ablate: Iterable[int] = (),
        scale: Mapping[int, Strength] | None = None,
        clamp: Mapping[int, Strength] | None = None,
        error_term: bool = False,
    ):
        ablate, scale, clamp = tuple(ablate), dict(scale or {}), dict(clamp or {})
        changed = [*ablate, *scale, *clamp]
        for atom in changed:
            sae.atom(atom)  # raises for an atom out of range
            if changed.count(atom) > 1:
                raise ValueError(
                    f"atom {atom} is given twice in ablate=, scale= and clamp=: give it once, in one of them"
                )
        for name, strengths in (("scale", scale), ("clamp", clamp)):
            for atom, x in strengths.items():
                if torch.as_tensor(x).ndim > 1:
                    raise ValueError(
                        f"{name}={{{atom}: ...}} has shape {list(torch.as_tensor(x).shape)}: give a number, or one for "
                        f"each row of the batch, [batch]"
                    )
        self._set(sae, ablate=ablate, scale=scale, clamp=clamp, error_term=error_term)

    @property
    def replaces(self) -> bool:
        return self.sae.cfg.target == "write" and not self.error_term

    def edit(self, now: Moment) -> Write | None:
        x = now.target(self.sae.cfg.target)
        values, indices = self.sae.topk(x)
        after = self._changed(values, indices)
        if not self.error_term:
            made = reconstruction(self.sae, after, indices)
            return made if self.replaces else _less(made, x)
        change = self._change(after - values, indices)
        if not torch.is_grad_enabled():
            return change
        through = _less(reconstruction(self.sae, after, indices), x)  # what gradients go through, of value zero below
        zero = through - through.detach()
        return _small(zero if change is None else change.detach() + zero)

    def _change(self, difference: Float[Tensor, "... m"], indices: Int[Tensor, "... m"]) -> Write | None:
        """``sum_i (a'_i - a_i) A_i`` over the atoms that are changed; None if none is asked to be."""
        named = torch.tensor([*self.ablate, *self.scale, *self.clamp], device=difference.device)
        if not len(named):
            return None
        if len(named) < difference.shape[-1]:
            which = indices[..., None] == named
            difference = (difference[..., None] * which).sum(-2)
            indices = named.expand(*difference.shape[:-1], -1)
        return _small(self.sae.decode_write(difference, indices))

    def _changed(self, values: Float[Tensor, "batch pos head m"], indices: Tensor) -> Float[Tensor, "batch pos head m"]:
        """The activations as asked for. An atom that is not active is left alone."""
        for atom in self.ablate:
            values = values.masked_fill(indices == atom, 0)
        for atom, factor in self.scale.items():
            values = torch.where(indices == atom, values * self._of_rows(factor, values), values)
        for atom, value in self.clamp.items():
            fires: Bool[Tensor, "..."] = (indices == atom) & (values > 0)
            values = torch.where(fires, self._of_rows(value, values), values)
        return values

    def _of_rows(self, strength: Strength, values: Tensor) -> Tensor:
        """A number, or one for each row, to go with activations."""
        x = torch.as_tensor(strength, dtype=values.dtype, device=values.device).reshape(-1)
        rows = row_of_each(len(x), len(values), f"{len(x)} strengths")
        return x[rows.to(x.device)].reshape(-1, *(1,) * (values.ndim - 1))


def reconstruction(sae: WriteSAE, values: Float[Tensor, "... m"], indices: Int[Tensor, "... m"]) -> Write:
    """``X^`` from activations and their atoms, mean and bias included, in at most ``min(d_key, d_value)`` terms."""
    if sae.cfg.decoder == "dense":  # its atoms have no factors that are shorter
        codes = values.new_zeros(*values.shape[:-1], sae.cfg.n_atoms).scatter(-1, indices, values)
        return in_factors(sae.decode(codes))
    made, constant = sae.decode_write(values, indices), sae.constant
    if constant is not None:
        made = made + _in_few_factors(constant).expand(*made.shape)
    return _small(made)


def _in_few_factors(matrix: Float[Tensor, "d_key d_value"]) -> Write:
    """A matrix in as many terms as its rank; in ``min(d_key, d_value)`` where it is differentiated, since singular
    vectors have no gradient where singular values are equal."""
    if torch.is_grad_enabled() and matrix.requires_grad:
        return in_factors(matrix)
    U, S, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    rank = max(1, int((1e-7 * S[0] < S).sum()))
    key, value = U[:, :rank].T, S[:rank, None] * Vh[:rank]
    return Write(key, value, rank) if rank > 1 else Write(key[0], value[0])


def _less(made: Write, x: Matrices) -> Write:
    """``X^ - X``."""
    return _small(made - x if isinstance(x, Write) else in_factors(made.dense() - dense(x)))


def _small(write: Write) -> Write:
    """The same in ``min(d_key, d_value)`` terms, if it has more."""
    return write if write.rank <= min(write.d_key, write.d_value) else in_factors(dense(write))
