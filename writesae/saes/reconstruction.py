"""How well some atoms at some activations make up a matrix, without building either where both are in factors.

    ||X - C - sum_i a_i A_i||^2 = ||X - C||^2 - 2 sum_i a_i <X - C, A_i> + sum_ij a_i a_j <A_i, A_j>

``C`` is what every reconstruction contains. Dense atoms leave no choice: there the difference itself is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.jobs.processes import ALONE, Processes
from writesae.recurrence import Write
from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import (
    Atoms,
    Matrices,
    combined,
    dense,
    gram,
    norm2,
    paired,
    pick,
    project,
    size,
    sum_norm2,
    take,
    with_one,
)


class Reading:
    """``<X, A_i> + offset_i``: of all atoms, or only of those that each matrix has chosen.

    States are read by all atoms at once, and dense atoms cost more to pick than to use: there `at` picks from `all`.
    ``shared`` is a reading of the same matrices by the same atoms, with another offset.
    """

    def __init__(self, x: Matrices, atoms: Atoms, offset: Tensor | None = None, shared: Reading | None = None) -> None:
        self.x, self.atoms, self.offset, self.shared = x, atoms, offset, shared
        self.whole = isinstance(x, States) or isinstance(atoms, Tensor)

    @cached_property
    def plain(self) -> Float[Tensor, "... n_atoms"]:
        """Without the offset."""
        return project(self.x, self.atoms) if self.shared is None else self.shared.plain

    @property
    def all(self) -> Float[Tensor, "... n_atoms"]:
        return self.plain if self.offset is None else self.plain + self.offset

    def chosen_from(self) -> Float[Tensor, "... n_atoms"]:
        """`all` without a gradient, to choose by."""
        if self.whole and torch.is_grad_enabled():
            return self.all.detach()
        with torch.no_grad():
            found = project(self.x, self.atoms)
            return found if self.offset is None else found.add_(self.offset)

    def at(self, indices: Int[Tensor, "... m"], rows: Write | None = None) -> Float[Tensor, "... m"]:
        """Of the atoms at ``indices``; ``rows`` are these atoms, if they have been taken already."""
        if self.whole:
            found = self.plain.gather(-1, indices)
        else:
            assert isinstance(self.atoms, Write) and not isinstance(self.x, States)
            found = paired(self.x, take(self.atoms, indices) if rows is None else rows)
        return found if self.offset is None else found + pick(self.offset, indices)


def against(constant: Tensor | None, atoms: Atoms) -> Float[Tensor, " n_atoms"] | None:
    """``-<C, A_i>``, which turns readings of ``X`` into readings of ``X - C``."""
    if constant is None:
        return None
    return -(with_one(atoms, constant))


@dataclass(frozen=True)
class SparseActivations:
    """Activations ``[..., m]`` of the atoms at ``indices``, largest first; ``rows`` are these atoms, if in factors."""

    values: Float[Tensor, "... m"]
    indices: Int[Tensor, "... m"]
    rows: Write | None

    def cross(self, reading: Reading) -> Float[Tensor, "..."]:
        """``sum_i a_i <X - C, A_i>``"""
        return (self.values * reading.at(self.indices, self.rows)).sum(-1)

    def norm2(self, atoms: Write) -> Float[Tensor, "..."]:
        """``||sum_i a_i A_i||^2``"""
        assert self.rows is not None
        return sum_norm2(self.values, self.rows)

    def overlap(self, dead: SparseActivations, atoms: Write) -> Float[Tensor, "... m"]:
        """``<sum_i a_i A_i, A_j>`` for the atoms ``j`` of other activations; a gradient goes to those only."""
        assert self.rows is not None and dead.rows is not None
        return (gram(dead.rows, self.rows.detach()) @ self.values.detach()[..., None])[..., 0]

    def spread(self, n_atoms: int) -> Float[Tensor, "... n_atoms"]:
        return self.values.new_zeros(*self.values.shape[:-1], n_atoms).scatter(-1, self.indices, self.values)

    def strongest(self) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
        return self.values[..., 0].detach(), self.indices[..., 0]

    def fired(self, n_atoms: int) -> Int[Tensor, " n_atoms"]:
        return self.indices[self.values > 0].bincount(minlength=n_atoms)


@dataclass(frozen=True)
class DenseActivations:
    """Activations of all atoms, ``[..., n_atoms]``; what `SparseActivations` does."""

    values: Float[Tensor, "... n_atoms"]

    def cross(self, reading: Reading) -> Float[Tensor, "..."]:
        return (self.values * reading.all).sum(-1)

    def norm2(self, atoms: Write) -> Float[Tensor, "..."]:
        return ((self.values @ gram(atoms, atoms)) * self.values).sum(-1)

    def overlap(self, dead: SparseActivations, atoms: Write) -> Float[Tensor, "... m"]:
        return (self.values.detach() @ gram(atoms.detach(), atoms)).gather(-1, dead.indices)

    def spread(self, n_atoms: int) -> Float[Tensor, "... n_atoms"]:
        return self.values

    def strongest(self) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
        found = self.values.detach().max(-1)
        return found.values, found.indices

    def fired(self, n_atoms: int) -> Int[Tensor, " n_atoms"]:
        return (self.values > 0).flatten(0, -2).sum(0)


Activations = SparseActivations | DenseActivations


class Batch:
    """One batch of matrices ``X``, and all that an SAE reads of it to reconstruct it.

    Attributes:
        x: the matrices.
        atoms: the decoder's.
        constant: what every reconstruction contains, ``C``: mean, bias, both, or None.
        tied: the encoder reads with the atoms themselves.
        encoding: pre-activations.
        reading: ``<X - C, A_i>``.
        whole2: ``||X - mean||^2``; given2: ``||X - C||^2``.
        processes: those that share the batch; power: sum of ``whole2`` over all of them.
    """

    def __init__(
        self,
        x: Matrices,
        encoding: Reading,
        atoms: Atoms,
        *,
        constant: Tensor | None = None,
        mean: Tensor | None = None,
        tied: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.x, self.encoding, self.atoms, self.constant, self.tied = x, encoding, atoms, constant, tied
        self.processes = processes
        self.n_atoms = size(atoms)[0]
        self.reading = Reading(x, atoms, against(constant, atoms), encoding if tied else None)
        self.whole2 = norm2_about(x, mean)
        self.given2 = self.whole2 if constant is mean else norm2_about(x, constant)
        self.power = processes.total(self.whole2.sum()).clamp_min(1e-30)

    def count(self) -> Float[Tensor, ""]:
        """How many matrices there are, over all processes."""
        return self.processes.total(torch.ones_like(self.whole2).sum())

    def chosen(self, indices: Int[Tensor, "... m"], active: Float[Tensor, "... m"]) -> Activations:
        """Activations of the chosen atoms, in the form that costs less: one matrix may have very many of them, and the
        Gram matrix of the active atoms is made for each matrix, that of all atoms only once."""
        m, n, rows, d = active.shape[-1], self.n_atoms, active[..., 0].numel(), sum(size(self.x)[-2:])
        if m * m * d <= n * n * (1 + d / rows):
            return self.sparse(indices, active)
        kept = torch.zeros(*indices.shape[:-1], n, dtype=active.dtype, device=active.device)
        return DenseActivations(self.encoding.all.relu() * kept.scatter(-1, indices, active))

    def sparse(self, indices: Int[Tensor, "... m"], active: Tensor | float = 1.0) -> SparseActivations:
        rows = take(self.atoms, indices) if isinstance(self.atoms, Write) else None
        values = self.encoding.at(indices, rows if self.tied else None).relu() * active
        return SparseActivations(values, indices, rows)

    def error2(self, active: Activations) -> tuple[Float[Tensor, "..."], Tensor | None]:
        """Squared error of each reconstruction; and what is left, if it had to be built."""
        return error2(self.x, active, self.atoms, self.reading, self.given2, self.constant)

    def error2_of_frozen(self, active: Activations) -> Float[Tensor, "..."]:
        """The same with a decoder that learns nothing."""
        atoms, constant = self.atoms.detach(), None if self.constant is None else self.constant.detach()
        reading = Reading(self.x, atoms, against(constant, atoms))
        return error2(self.x, active, atoms, reading, self.given2.detach(), constant)[0]

    def revived_error2(
        self, revived: SparseActivations, active: Activations, found2: Tensor, left: Tensor | None
    ) -> Float[Tensor, "..."]:
        """Squared error of what `error2` left, reconstructed by atoms that are dead."""
        constant = None if self.constant is None else self.constant.detach()
        reading = Reading(self.x, self.atoms, against(constant, self.atoms), self.reading)
        return revived_error2(revived, active, self.atoms, reading, found2, left)

    def cosine(self, active: Activations) -> Float[Tensor, "..."]:
        """Of each matrix to its strongest atom; 0 where none is active."""
        strength, which = active.strongest()
        scale = (norm2(self.atoms)[which] * self.given2).sqrt().clamp_min(1e-30)
        return self.reading.at(which[..., None])[..., 0] * (strength > 0) / scale


def norm2_about(x: Matrices, C: Tensor | None) -> Float[Tensor, "..."]:
    """``||X - C||^2``; ``C`` is zero if None."""
    if C is None:
        return norm2(x)
    if isinstance(x, Tensor):
        return norm2(x - C)
    return norm2(x) - 2 * with_one(x, C) + C.square().sum()


def error2(
    x: Matrices, active: Activations, atoms: Atoms, reading: Reading, given2: Tensor, constant: Tensor | None
) -> tuple[Float[Tensor, "..."], Tensor | None]:
    """Squared error of the reconstruction; and what is left, if it had to be built.

    ``reading`` is ``<X - C, A_i>``, ``given2`` is ``||X - C||^2``.
    """
    if isinstance(atoms, Write):
        return given2 - 2 * active.cross(reading) + active.norm2(atoms), None
    left = dense(x) if constant is None else dense(x) - constant
    left = left - combined(active.spread(len(atoms)), atoms)
    return left.square().sum((-1, -2)), left


def revived_error2(
    dead: SparseActivations, active: Activations, atoms: Atoms, reading: Reading, left2: Tensor, left: Tensor | None
) -> Float[Tensor, "..."]:
    """Squared error of what is left of ``X``, reconstructed by ``dead`` atoms: only they learn from it.

    ``left2`` is its squared norm, ``left`` the thing itself if it was built.
    """
    if isinstance(atoms, Tensor):
        assert left is not None
        return (left.detach() - combined(dead.spread(len(atoms)), atoms)).square().sum((-1, -2))
    left_over = reading.at(dead.indices, dead.rows) - active.overlap(dead, atoms)  # <what is left, dead atom>
    gain = (dead.values * left_over).sum(-1)
    return left2.detach() - 2 * gain + dead.norm2(atoms)
