"""Decay within a chunk of tokens: one number per head and token, or one per key channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch._subclasses.fake_tensor import FakeTensor

from writesae.recurrence.spec import Sees
from writesae.recurrence.write import at_least_float32

CHUNK = 32  # tokens, with one decay per head, or with one per key channel that is mild
CHUNK_PER_KEY = 16  # tokens, with stronger decays per key channel: scores need [chunk, chunk, d_key]
MILD = 20.0  # exp(x) has x times the rounding error of x, so factors up to exp(20) are right to some 1e-6


def cut(x: Tensor, size: int) -> Tensor:
    """``[batch, pos, head, ...]`` to ``[batch*head, chunk, token, ...]``. Padding writes nothing, decays nothing."""
    return chunks(at_least_float32(x).transpose(1, 2).flatten(0, 1), size)


def chunks(x: Tensor, size: int) -> Tensor:
    """``[sequence, pos, ...]`` to ``[sequence, chunk, token, ...]``, zero-padded at the end."""
    pad = -x.shape[1] % size
    if pad:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, pad])
    return x.unflatten(1, (-1, size))


def cut_decay(log_decay: Tensor, chunk: int | None) -> tuple[Tensor, int, bool]:
    """Log decays in chunks, ``[batch*head, chunk, token, d_key or 1]``; the size of a chunk; whether these decays, one
    per key channel, are mild: ``exp`` of half a chunk's whole decay, and its inverse, are accurate. See `Decay`."""
    per_key, n_pos = log_decay.ndim == 4, log_decay.shape[1]
    if not per_key:
        log_decay = log_decay[..., None]
    for size in (chunk,) if chunk else (CHUNK, CHUNK_PER_KEY) if per_key else (CHUNK,):
        size = min(size, n_pos)
        g = cut(log_decay, size)
        mild = per_key and _values_are_known(g) and bool(g.sum(2).amin() >= -2 * MILD)
        if mild:
            break
    return g, size, mild


def _values_are_known(x: Tensor) -> bool:
    """Whether code may branch on numbers: not while torch.export traces, nor under torch.func, whose vmap has many, nor
    where tensors are shapes alone.

    There decays are taken to be strong, which is right for all and slower for mild ones.
    """
    if torch.compiler.is_exporting() or isinstance(x, FakeTensor):
        return False
    return torch.compiler.is_compiling() or maybe_current_level() is None


class Decay:
    """Decay within each chunk, from log decays ``g [batch*head, chunk, token, d_key or 1]``.

    Between two tokens it is one number if there is one decay per head. With one per key channel it is the product of a
    factor for each token, ``exp(G_t - R) exp(R - G_j)``, if ``factored``, as mild decays may be, and otherwise a number
    for each channel, which is much slower.
    """

    def __init__(self, g: Tensor, factored: bool):
        G = g.cumsum(-2)  # from the chunk's start through token t
        G_before = torch.cat([torch.zeros_like(G[..., :1, :]), G[..., :-1, :]], -2)
        self.from_start, self.before_from_start = G.exp(), G_before.exp()
        self.per_key = g.shape[-1] > 1
        self.factored = factored
        if factored:
            R = G[..., -1:, :] / 2
            self.reads, self.reads_before, self.writes = (G - R).exp(), (G_before - R).exp(), (R - G).exp()
            self.to_end = self.writes * R.exp()
        else:
            self.between = between(g.mT if self.per_key else g[..., 0])
            self.to_end = self.between[..., -1, :].mT if self.per_key else self.between[..., -1, :, None]

    def scores(self, x: Tensor, y: Tensor, sees: Sees, rank: int = 1, reads: int = 1) -> Tensor:
        """``sum_d x[t, d] y[j, d] D[t, j, d]``, ``D`` the decay from ``j``'s write to ``t``; per token ``rank`` writes
        ``y`` and so many ``reads`` ``x``, one after the other.

        The read at ``t`` sees writes up to its own token's (``same``), or up to the token's before it (``next``);
        ``before`` is what ``t``'s erase reads, before ``t`` decays; in RWKV-6 its read too.
        """
        if self.factored:
            decayed = self.reads_before if sees == "before" else self.reads
            scores = (x * each(decayed, reads, -2)) @ (y * each(self.writes, rank, -2)).mT
            n = decayed.shape[-2]
            seen = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-(sees != "same"))
            return scores.masked_fill(~each(each(seen, rank, -1), reads, -2), 0)
        between = self.between
        if sees == "next":
            between = between.tril(-1)
        elif sees == "before":
            between = F.pad(between[..., :-1, :], (0, 0, 1, 0))
        between = each(each(between, rank, -1), reads, -2)
        if self.per_key:
            return torch.einsum("...td,...jd,...dtj->...tj", x, y, between)
        return (x @ y.mT) * between

    def spread(self, scores: Tensor, y: Tensor) -> Tensor:
        """``sum_j scores[t, j] D[t, j, d] y[j, d]`` over the tokens ``j`` up to ``t``, for each channel ``d``."""
        if self.factored:
            return self.reads * (scores.tril() @ (y * self.writes))
        if self.per_key:
            return torch.einsum("...tj,...dtj,...jd->...td", scores, self.between, y)
        return (scores * self.between) @ y


def each(x: Tensor, n: int, dim: int) -> Tensor:
    """``n`` copies of each entry, one after the other; without a copy if it is one."""
    return x if n == 1 else x.repeat_interleave(n, dim)


def between(g: Tensor) -> Tensor:
    """The decay from ``j`` to ``t``, ``[..., t, j]``, 0 for ``j > t``.

    A sum over the tokens between, and not the difference of two sums from the chunk's start: one strong decay before
    them would take the last digits of both.
    """
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
    # Sums from j on are 0 before it, where exp has nothing to overflow; masked, that is an exact 0 without a gradient.
    return torch.where(later, g[..., :, None], 0).cumsum(-2).exp().tril()
