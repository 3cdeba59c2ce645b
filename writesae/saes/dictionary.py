"""The matrices that an SAE has one of for each atom: its atoms, and what its encoder reads with. Factored, or dense.

A dictionary holds the SAE's own tensors, so what it does in place it does to the SAE.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence import Write
from writesae.recurrence.matrices import Atoms, dense, in_factors, leading, norm2, unit_norm


@dataclass(frozen=True, eq=False)
class Dictionary(ABC):
    """``n_atoms`` matrices. Its fields are tensors, named as in files but for the side (``V`` is ``V_dec``)."""

    letters: ClassVar[tuple[str, ...]]  # names of its tensors
    rank: int

    @staticmethod
    @abstractmethod
    def random(n_atoms: int, d_key: int, d_value: int, rank: int) -> dict[str, Tensor]:
        """Tensors of a new one, by name."""

    @classmethod
    def random_reading(
        cls, decoder: Dictionary, n_atoms: int, d_key: int, d_value: int, rank: int
    ) -> dict[str, Tensor]:
        """Tensors of what an encoder reads these atoms with, before training: the atoms, as far as it can have them."""
        if isinstance(decoder, cls):
            return {letter: getattr(decoder, letter).detach().clone() for letter in cls.letters}
        return cls.random(n_atoms, d_key, d_value, rank)

    @property
    @abstractmethod
    def atoms(self) -> Atoms:
        """All of them, with leading dimension ``[n_atoms]``."""

    @abstractmethod
    def atom(self, indices: Int[Tensor, "..."]) -> Write:
        """Some of them in factors, leading dimensions as ``indices``."""

    @abstractmethod
    def normalize(self) -> None:
        """Bring every matrix back to Frobenius norm 1, in place, its key factors too."""

    @abstractmethod
    def keep_tangent(self) -> None:
        """Take out of the gradients what would only change a norm."""

    @abstractmethod
    def set_to(self, which: Int[Tensor, " n"], samples: Samples) -> None:
        """Set some atoms, to samples at norm 1."""

    @abstractmethod
    def set_to_read(self, which: Int[Tensor, " n"], samples: Samples, decoder: Dictionary, strength: float) -> None:
        """Set what an encoder reads some atoms with, once the ``decoder`` has been set to the samples: these, at norm
        ``strength``."""

    def scale(self, factor: float) -> None:
        """Multiply every matrix by a number, in place."""
        getattr(self, self.letters[0]).mul_(factor)


@dataclass(frozen=True, eq=False)
class Factored(Dictionary):
    """``sum_r v_r w_r^T``: ``V [n_atoms, d_key]`` and ``W [n_atoms, d_value]``, or ``[n_atoms, rank, ...]``."""

    letters = ("V", "W")
    V: Tensor
    W: Tensor

    @staticmethod
    def random(n_atoms: int, d_key: int, d_value: int, rank: int) -> dict[str, Tensor]:
        ranks = () if rank == 1 else (rank,)
        return {
            letter: F.normalize(torch.randn(n_atoms, *ranks, size), dim=-1)
            for letter, size in (("V", d_key), ("W", d_value))
        }

    @property
    def atoms(self) -> Write:
        return Write(self.V, self.W, rank=self.rank)

    def atom(self, indices: Tensor) -> Write:
        return self.atoms[indices]

    def normalize(self) -> None:
        if self.rank == 1:
            for p in (self.V, self.W):
                p.copy_(F.normalize(p, dim=-1))
        else:
            length = self.V.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            self.V.div_(length)
            self.W.mul_(length)
            self.W.div_(norm2(self.atoms).sqrt().clamp_min(1e-30)[:, None, None])

    def keep_tangent(self) -> None:
        _keep_tangent(self.V, (-1,))
        _keep_tangent(self.W, (-1,) if self.rank == 1 else (-2, -1))

    def set_to(self, which: Tensor, samples: Samples) -> None:
        self._set(which, *samples.factors)

    def set_to_read(self, which: Tensor, samples: Samples, decoder: Dictionary, strength: float) -> None:
        v, w = samples.factors
        self._set(which, strength * v, w)

    def _set(self, which: Tensor, v: Tensor, w: Tensor) -> None:
        for p, rows in ((self.V, v), (self.W, w)):
            p[which] = rows.reshape(-1, *p.shape[1:])


@dataclass(frozen=True, eq=False)
class Dense(Dictionary):
    """Free matrices: ``A [n_atoms, d_key, d_value]``."""

    letters = ("A",)
    A: Tensor

    @staticmethod
    def random(n_atoms: int, d_key: int, d_value: int, rank: int) -> dict[str, Tensor]:
        return {"A": torch.randn(n_atoms, d_key, d_value)}

    @classmethod
    def random_reading(
        cls, decoder: Dictionary, n_atoms: int, d_key: int, d_value: int, rank: int
    ) -> dict[str, Tensor]:
        return {"A": dense(decoder.atoms).detach().clone()}

    @property
    def atoms(self) -> Tensor:
        return self.A

    def atom(self, indices: Tensor) -> Write:
        return in_factors(self.A[indices])

    def normalize(self) -> None:
        self.A.copy_(F.normalize(self.A.flatten(1), dim=-1).view_as(self.A))

    def keep_tangent(self) -> None:
        _keep_tangent(self.A, (-2, -1))

    def set_to(self, which: Tensor, samples: Samples) -> None:
        self.A[which] = samples.unit

    def set_to_read(self, which: Tensor, samples: Samples, decoder: Dictionary, strength: float) -> None:
        self.A[which] = strength * dense(decoder.atoms[which])


DICTIONARIES: dict[str, type[Dictionary]] = {"factored": Factored, "bilinear": Factored, "dense": Dense}
"""Which one a decoder or an encoder is, by its name in `SAEConfig`. A tied encoder has none of its own."""


class Samples:
    """Matrices ``[n]`` that atoms are set to, in the forms that dictionaries ask for; each is worked out once."""

    def __init__(self, x: Write | Tensor, rank: int) -> None:
        self.x, self.rank = x, rank

    @cached_property
    def unit(self) -> Float[Tensor, "n d_key d_value"]:
        """Dense, at norm 1."""
        return dense(unit_norm(self.x))

    @cached_property
    def factors(self) -> tuple[Float[Tensor, "n rank d_key"], Float[Tensor, "n rank d_value"]]:
        """The largest part of rank ``rank`` of each, at norm 1."""
        return rank_parts(self.x, self.rank)


def rank_parts(x: Write | Tensor, rank: int) -> tuple[Float[Tensor, "n rank d_key"], Float[Tensor, "n rank d_value"]]:
    """The largest rank-``rank`` part of each matrix ``[n]``, as factors of norm 1 together."""
    if isinstance(x, Write) and x.rank == rank == 1:
        keys, values = (F.normalize(f, dim=-1) for f in x.factors())
        return keys, values
    keys, values = leading(dense(x), rank)
    if rank > 1:  # a term of size zero still needs a direction to grow in
        random = torch.Generator().manual_seed(0)
        keys, values = (
            f
            + 0.01
            * f.norm(dim=(-1, -2), keepdim=True)
            * F.normalize(torch.randn(f.shape, generator=random), dim=-1).to(f)
            for f in (keys, values)
        )
    return keys, values / values.norm(dim=(-1, -2), keepdim=True).clamp_min(1e-30)


def _keep_tangent(p: Tensor, dims: tuple[int, ...]) -> None:
    assert p.grad is not None
    p.grad -= (p.grad * p).sum(dims, keepdim=True) / p.square().sum(dims, keepdim=True).clamp_min(1e-30) * p
