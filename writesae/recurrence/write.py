"""`Write`: a low-rank matrix that stays in factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Write:
    """A low-rank matrix in factors, ``sum_r key_r value_r^T``; only `dense` builds the ``[d_key, d_value]`` matrix.

    Attributes:
        key: ``[..., d_key]``, or ``[..., rank, d_key]`` if ``rank > 1``.
        value: ``[..., d_value]``, or ``[..., rank, d_value]`` if ``rank > 1``; same leading dimensions as ``key``.
        rank: number of rank-1 terms. With ``rank=1`` there is no rank dimension.

    >>> w = Write(torch.ones(2, 7, 4, 32), torch.ones(2, 7, 4, 16))   # batch 2, 7 tokens, 4 heads
    >>> w.shape, w.dense().shape
    (torch.Size([2, 7, 4]), torch.Size([2, 7, 4, 32, 16]))
    """

    key: Float[Tensor, "..."]
    value: Float[Tensor, "..."]
    rank: int = 1

    def __post_init__(self) -> None:
        lead = 1 if self.rank == 1 else 2
        key, value = self.key, self.value
        if min(key.ndim, value.ndim) < lead or key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"a Write needs key [..., d_key] and value [..., d_value] with equal leading dimensions; "
                f"got key {list(key.shape)} and value {list(value.shape)}"
            )
        if self.rank != 1 and key.shape[-2] != self.rank:
            raise ValueError(f"rank={self.rank} needs key [..., {self.rank}, d_key]; got {list(key.shape)}")

    def __repr__(self) -> str:
        return f"Write({list(self.shape)}, {self.d_key} x {self.d_value}, rank {self.rank})"

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions, without factors and rank."""
        return self.key.shape[:-1] if self.rank == 1 else self.key.shape[:-2]

    @property
    def d_key(self) -> int:
        return self.key.shape[-1]

    @property
    def d_value(self) -> int:
        return self.value.shape[-1]

    def factors(self) -> tuple[Float[Tensor, "... rank d_key"], Float[Tensor, "... rank d_value"]]:
        """Key and value factors with the rank dimension always present."""
        if self.rank == 1:
            return self.key.unsqueeze(-2), self.value.unsqueeze(-2)
        return self.key, self.value

    def dense(self) -> Float[Tensor, "... d_key d_value"]:
        """The matrix itself. Costs ``d_key * d_value`` per write: ask for it at few positions."""
        key, value = self.factors()
        return key.mT @ value

    def inner(self, other: Write) -> Float[Tensor, "..."]:
        """Frobenius inner product ``<self, other>`` from the factors; leading dimensions broadcast."""
        (k1, v1), (k2, v2) = self.factors(), other.factors()
        return ((k1 @ k2.mT) * (v1 @ v2.mT)).sum((-1, -2))

    def norm(self) -> Float[Tensor, "..."]:
        """Frobenius norm, from the factors."""
        if self.rank == 1:
            return self.key.norm(dim=-1) * self.value.norm(dim=-1)
        return self.inner(self).clamp_min(0).sqrt()

    def cosine(self, other: Write) -> Float[Tensor, "..."]:
        """Cosine of the two matrices; 0 where either is zero."""
        return self.inner(other) / (self.norm() * other.norm()).clamp_min(1e-30)

    def to(self, *args: Any) -> Write:
        """Both factors moved or converted, as by ``Tensor.to``."""
        return replace(self, key=self.key.to(*args), value=self.value.to(*args))

    def detach(self) -> Write:
        """The same write, cut off from gradients."""
        return replace(self, key=self.key.detach(), value=self.value.detach())

    def __getitem__(self, index) -> Write:
        """Index the leading dimensions (one basic or tensor index per leading dimension, no ellipsis)."""
        return replace(self, key=self.key[index], value=self.value[index])

    def __iter__(self) -> Iterator[Tensor | int]:
        """Key, value and rank, as of a named tuple, for tools that take values apart; for its writes, index them."""
        return iter((self.key, self.value, self.rank))

    def expand(self, *shape: int) -> Write:
        """The same with leading dimensions broadcast to ``shape``, without copying."""
        n = len(self.shape)
        grow = lambda x: x.expand(*shape, *x.shape[n:])  # noqa: E731
        return replace(self, key=grow(self.key), value=grow(self.value))

    def __mul__(self, scale: float | int | Tensor) -> Write:
        """Scale each write; a tensor scale has the leading dimensions' shape (or broadcasts to it)."""
        if isinstance(scale, Tensor):
            scale = scale[..., None] if self.rank == 1 else scale[..., None, None]
        return replace(self, value=self.value * scale)

    __rmul__ = __mul__

    def __neg__(self) -> Write:
        return replace(self, value=-self.value)

    def __add__(self, other: Write) -> Write:
        """Sum of the matrices, kept in factors: the ranks add."""
        (k1, v1), (k2, v2) = self.factors(), other.factors()
        lead = torch.broadcast_shapes(self.shape, other.shape)
        k1, v1, k2, v2 = (x.expand(*lead, *x.shape[-2:]) for x in (k1, v1, k2, v2))
        return Write(torch.cat([k1, k2], -2), torch.cat([v1, v2], -2), rank=self.rank + other.rank)

    def __sub__(self, other: Write) -> Write:
        return self + (-other)


def in_terms(key: Float[Tensor, "*lead rank d_key"], value: Float[Tensor, "*lead rank d_value"]) -> Write:
    """A write of these terms, without the rank dimension if there is one."""
    rank = key.shape[-2]
    return Write(key, value, rank) if rank > 1 else Write(key.squeeze(-2), value.squeeze(-2))


def of_rank(write: Write, rank: int) -> Write:
    """The same matrix as ``rank`` terms: terms of zero are added."""
    if write.rank == rank:
        return write
    return Write(*(F.pad(x, (0, 0, 0, rank - write.rank)) for x in write.factors()), rank=rank)


def memory_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and edits beside ``x``: float32, or float64 if ``x`` has that."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """float32, or float64 if it already is."""
    return x.to(memory_dtype(x))


def widest(device: torch.device) -> torch.dtype:
    """The widest floats of a device, for sums that cancel: float64; float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """``x`` in the widest floats of its device."""
    return x.to(widest(x.device))


def index_of(heads: Sequence[int] | None) -> slice | list[int]:
    """What picks heads out of a dimension; None for all. Neighbours are a slice: a list would be copied to a device
    wherever it is used, and that would wait for it."""
    if heads is None:
        return slice(None)
    n = len(heads)
    neighbours = n > 0 and list(heads) == list(range(heads[0], heads[0] + n))
    return slice(heads[0], heads[0] + n) if neighbours else list(heads)
