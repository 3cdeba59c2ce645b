"""Inner products of matrices in any of their forms; matrices that are given in factors are not built.

*Data* ``X`` are writes or deltas in factors (`Write`), states along sequences (`States`), or dense tensors. *Atoms*
are ``Write``s with leading dimension ``[n_atoms]`` (rank 1 or more), or dense ``[n_atoms, d_key, d_value]``. For
rank-1 atoms and data in factors an inner product is ``<k u^T, v w^T> = (k.v)(u.w)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence.dynamics import States
from writesae.recurrence.spec import Write

Matrices = Write | States | Tensor  # data [..., d_key, d_value]
Atoms = Write | Tensor  # [n_atoms, d_key, d_value]


def size(x: Matrices) -> tuple[int, ...]:
    """``(..., d_key, d_value)``."""
    return tuple(x.shape) if isinstance(x, Tensor) else (*x.shape, x.d_key, x.d_value)


def parts(x: Matrices) -> tuple[Tensor, ...]:
    """The tensors that the data consist of."""
    if isinstance(x, Tensor):
        return (x,)
    return (x.key, x.value) if isinstance(x, Write) else (x.gain.key, x.gain.value, x.log_decay)


def joined(xs: Sequence[Matrices]) -> Matrices:
    """Several pieces of data of the same form as one, along the first dimension."""
    found = [torch.cat(part) for part in zip(*map(parts, xs), strict=True)]
    first = xs[0]
    if isinstance(first, Tensor):
        return found[0]
    rank = first.rank if isinstance(first, Write) else first.gain.rank
    write = Write(found[0], found[1], rank=rank)
    return write if isinstance(first, Write) else States(write, found[2])


def dense(x: Matrices) -> Float[Tensor, "... d_key d_value"]:
    """The matrices themselves, built."""
    return x if isinstance(x, Tensor) else x.dense()


def norm2(x: Matrices) -> Float[Tensor, "..."]:
    """Squared Frobenius norms."""
    if isinstance(x, States):
        return x.norm2
    return x.square().sum((-1, -2)) if isinstance(x, Tensor) else x.inner(x)


def project(x: Matrices, atoms: Atoms) -> Float[Tensor, "... n_atoms"]:
    """``<X, atom_i>`` for all atoms."""
    if isinstance(x, States):
        return x.read(project(x.gain, atoms)) if x.one_decay else project(x.dense(), atoms)
    if isinstance(atoms, Tensor):
        return dense(x).flatten(-2) @ atoms.flatten(1).T
    V, W = (f.flatten(0, 1) for f in atoms.factors())  # [n_atoms * rank, d]
    if isinstance(x, Write):
        found, of_values = x.key @ V.T, x.value @ W.T
        found = found * of_values if torch.is_grad_enabled() else found.mul_(of_values)  # memory is what takes the time
        found = found if x.rank == 1 else found.sum(-2)
    elif x[..., 0, 0].numel() <= x.shape[-2]:
        found = ((V @ x) * W).sum(-1)
    else:
        found = x.flatten(-2) @ (V[:, :, None] * W[:, None, :]).flatten(1).T  # less memory for many matrices
    return found if atoms.rank == 1 else found.unflatten(-1, (-1, atoms.rank)).sum(-1)


def paired(x: Write | Tensor, rows: Write) -> Float[Tensor, "... k"]:
    """``<X, row_j>`` of each matrix with atoms of its own, ``rows`` with leading dimensions ``[..., k]``."""
    v, w = (f.flatten(-3, -2) for f in rows.factors())
    if isinstance(x, Write):
        keys, values = x.factors()
        found = ((v @ keys.mT) * (w @ values.mT)).sum(-1)
    else:
        found = ((v @ x) * w).sum(-1)
    return found if rows.rank == 1 else found.unflatten(-1, (-1, rows.rank)).sum(-1)


def gram(a: Write, b: Write) -> Float[Tensor, "... i j"]:
    """``<a_i, b_j>`` for leading dimensions ``[..., i]`` and ``[..., j]``."""
    (v1, w1), (v2, w2) = ([f.flatten(-3, -2) for f in x.factors()] for x in (a, b))
    found = (v1 @ v2.mT) * (w1 @ w2.mT)
    if a.rank > 1:
        found = found.unflatten(-2, (-1, a.rank)).sum(-2)
    return found if b.rank == 1 else found.unflatten(-1, (-1, b.rank)).sum(-1)


def sum_norm2(values: Float[Tensor, "... k"], rows: Write) -> Float[Tensor, "..."]:
    """``||sum_i a_i row_i||^2`` for ``rows`` with leading dimensions ``[..., k]``."""
    v, w = (f.flatten(-3, -2) for f in rows.factors())
    return _SumNorm2.apply(values.repeat_interleave(rows.rank, -1), v, w)  # type: ignore[return-value]


class _SumNorm2(torch.autograd.Function):
    """``sum_ij a_i a_j (v_i.v_j)(w_i.w_j)``. By hand, because the sum is symmetric: half of the work going back."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, v: Tensor, w: Tensor) -> Tensor:
        vv, ww = v @ v.mT, w @ w.mT
        half = ((vv * ww) @ a[..., None])[..., 0]
        ctx.save_for_backward(a, v, w, vv, ww, half)
        return (half * a).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, v, w, vv, ww, half = ctx.saved_tensors
        grad = 2 * grads[0][..., None]
        aa = (grad * a)[..., :, None] * a[..., None, :]
        return grad * half, (aa * ww) @ v, (aa * vv) @ w


def take(atoms: Write, indices: Int[Tensor, "..."]) -> Write:
    """The atoms at ``indices``."""
    return Write(pick(atoms.key, indices), pick(atoms.value, indices), rank=atoms.rank)


def pick(x: Float[Tensor, "n ..."], indices: Int[Tensor, "..."]) -> Tensor:
    """``x[indices]``, whose gradient adds up what was picked often in a fixed order, as indexing's need not."""
    return _Pick.apply(x, indices)  # type: ignore[return-value]


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.size = x.shape
        return x.index_select(0, indices.flatten()).unflatten(0, indices.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        grad = grads[0].flatten(0, indices.ndim - 1)
        return grad.new_zeros(ctx.size).index_add_(0, indices.flatten(), grad), None


def combined(codes: Float[Tensor, "... n_atoms"], atoms: Atoms) -> Float[Tensor, "... d_key d_value"]:
    """``sum_i a_i A_i``, dense."""
    if isinstance(atoms, Tensor):
        return (codes @ atoms.flatten(1)).unflatten(-1, atoms.shape[1:])
    V, W = (f.flatten(0, 1) for f in atoms.factors())
    return (codes.repeat_interleave(atoms.rank, -1)[..., None] * V).mT @ W


def with_one(x: Matrices, C: Float[Tensor, "d_key d_value"]) -> Float[Tensor, "..."]:
    """Inner products ``<X, C>`` with one matrix ``C``."""
    if isinstance(x, States):
        return x.read(with_one(x.gain, C)[..., None])[..., 0] if x.one_decay else with_one(x.dense(), C)
    if isinstance(x, Write):
        keys, values = x.factors()
        return ((keys @ C) * values).sum((-1, -2))
    return (x * C).sum((-1, -2))


def mean(x: Matrices) -> Float[Tensor, "d_key d_value"]:
    """The mean over all leading dimensions."""
    if isinstance(x, States):
        return x.sum() / x.shape.numel()
    if isinstance(x, Write):
        keys, values = (f.reshape(-1, f.shape[-1]) for f in x.factors())
        return keys.T @ values / x.shape.numel()
    return x.flatten(0, -3).mean(0)


def unit_norm(x: Write | Tensor) -> Write | Tensor:
    """Each matrix scaled to norm 1 (a zero matrix stays zero)."""
    if isinstance(x, Write):
        return x * (1 / x.norm().clamp_min(1e-30))
    return x / x.norm(dim=(-1, -2), keepdim=True).clamp_min(1e-30)


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


def top_pair(matrix: Float[Tensor, "... d_key d_value"]) -> Write:
    """The first singular pair, of norm 1: of all writes of norm 1 the one with the largest inner product."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Write(U[..., 0], Vh[..., 0, :])


def leading(
    x: Float[Tensor, "n d_key d_value"], rank: int = 1, rounds: int = 8
) -> tuple[Float[Tensor, "n rank d_key"], Float[Tensor, "n rank d_value"]]:
    """Factors of the best rank-``rank`` part of each matrix, by power iteration. Keys have norm 1."""
    keys, values = [], []
    for _ in range(rank):
        v = x[torch.arange(len(x)), :, x.square().sum(-2).argmax(-1)][..., None]  # its strongest column
        for _ in range(rounds):
            w = F.normalize(x.mT @ v, dim=-2)
            v = F.normalize(x @ w, dim=-2)
        w = x.mT @ v
        x = x - v @ w.mT
        keys.append(v[..., 0])
        values.append(w[..., 0])
    return torch.stack(keys, 1), torch.stack(values, 1)
