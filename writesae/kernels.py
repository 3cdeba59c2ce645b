"""Chunked forms of the recurrence: same arguments and results as `writesae.recurrence.step_loop`, matmuls inside.

Within a chunk, write ``r_t = b_t^T S_{t-1}`` for what the erase reads. Then ``r`` solves a unit lower-triangular system
(the "UT transform" of DeltaNet), with a right-hand side for the chunk's first state and one for the writes::

    r_t = b_t^T D(0..t-1) S_0 + sum_{j<t} b_t^T D(j..t-1) (a_j r_j + k_j v_j^T)

The write keys enter only on the right, so they need not be the erase keys, and a token may write any number of rank-1
terms. All exponents are sums of log decays over a later stretch, hence ``<= 0``: nothing overflows however strong the
decay. Memory is ``pos * (chunk + d_key + d_value)`` a head (``pos * chunk * d_key`` for per-key decay, with a smaller
chunk); states exist only at chunk borders, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from writesae.recurrence import Read, Recurrence, Write, at_least_float32, check_dense, first_state

CHUNK = 64  # tokens, one decay a head
CHUNK_PER_KEY = 16  # tokens, one decay a key channel: scores need [chunk, chunk, d_key]


def chunked(
    rec: Recurrence,
    write: Write,
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    *,
    dense: Mapping[int, Float[Tensor, "batch head d_key d_value"]] | None = None,
    read: Read = "same",
    chunk: int | None = None,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"]]:
    """Outputs and final state of the recurrence; see `writesae.recurrence.step_loop` for the arguments.

    ``chunk`` is the chunk length in tokens (default 64, or 16 for per-key decay); it changes speed, not results.
    """
    dense = check_dense(dense, rec.n_pos)
    S = first_state(rec, write, initial_state)
    outputs, start = [], 0
    for t, E in dense.items():  # a dense edit is a new initial state: cut the sequence after it
        o, _, S = _scan(rec[:, start : t + 1], write[:, start : t + 1], S, read, chunk)
        E = at_least_float32(E)
        if read == "same":
            seen = torch.einsum("bhk,bhkv->bhv", at_least_float32(rec.q[:, t]), E)
            o = torch.cat([o[:, :-1], o[:, -1:] + seen[:, None]], 1)
        S = S + E
        outputs.append(o)
        start = t + 1
    if start < rec.n_pos:
        o, _, S = _scan(rec[:, start:], write[:, start:], S, read, chunk)
        outputs.append(o)
    return torch.cat(outputs, 1), S


def erase_reads(
    rec: Recurrence, write: Write, initial_state: Float[Tensor, "batch head d_key d_value"] | None = None
) -> Float[Tensor, "batch pos head d_value"]:
    """What the erase reads before each write, ``r_t = b_t^T S_{t-1}``. The delta rule's delta is ``beta v - c r``."""
    S = first_state(rec, write, initial_state)
    _, r, _ = _scan(rec, write, S, "same", None)
    if r is None:
        raise ValueError("this recurrence erases nothing: its delta is its write")
    return r


def states_at(
    rec: Recurrence,
    write: Write,
    positions: Sequence[int],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    *,
    dense: Mapping[int, Float[Tensor, "batch head d_key d_value"]] | None = None,
) -> Float[Tensor, "batch n_positions head d_key d_value"]:
    """The states ``S_t`` after the tokens at ``positions`` (0 to pos-1, any order): only those are ever built."""
    dense = check_dense(dense, rec.n_pos)
    for t in positions:
        if not 0 <= t < rec.n_pos:
            raise IndexError(f"state at position {t}: allowed are 0 to {rec.n_pos - 1}")
    S = first_state(rec, write, initial_state)
    found: dict[int, Tensor] = {}
    start = 0
    for t in sorted({*positions, *(t for t in dense if t <= max(positions, default=-1))}):
        _, _, S = _scan(rec[:, start : t + 1], write[:, start : t + 1], S, "same", None)
        if t in dense:
            S = S + at_least_float32(dense[t])
        found[t], start = S, t + 1
    if not positions:
        return S.new_zeros(S.shape[0], 0, *S.shape[1:])
    return torch.stack([found[t] for t in positions], 1)


def decayed_sum(
    x: Float[Tensor, "batch pos feature"],
    log_decay: Float[Tensor, "batch pos"],
    initial: Float[Tensor, "batch feature"] | None = None,
) -> Float[Tensor, "batch pos feature"]:
    """``y_t = exp(log_decay_t) y_{t-1} + x_t``: the code of every atom at every position without any state.

    With ``x_i(t) = (v_i . k_t)(w_i . delta_t)`` and a scalar decay, ``y_i(t) = v_i^T S_t w_i`` exactly.
    """
    x, log_decay = at_least_float32(x), at_least_float32(log_decay)
    n_pos = x.shape[1]
    x, G = _chunks(x, CHUNK), _chunks(log_decay, CHUNK).cumsum(-1)
    y = _decays(G, G, 0) @ x
    carried = torch.zeros_like(x[:, 0, 0]) if initial is None else at_least_float32(initial)
    out = []
    for n in range(x.shape[1]):
        y_n = y[:, n] + G[:, n, :, None].exp() * carried[:, None]
        carried = y_n[:, -1]
        out.append(y_n)
    return torch.cat(out, 1)[:, :n_pos]


def _scan(
    rec: Recurrence, write: Write, S: Tensor, read: Read, chunk: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Chunked recurrence from state ``S``: outputs, what the erase read (None without erase), final state."""
    rec, S = rec.float(), at_least_float32(S)
    n_pos = rec.n_pos
    per_key = rec.log_decay.ndim == 4
    size = min(chunk or (CHUNK_PER_KEY if per_key else CHUNK), n_pos)

    # [batch, pos, head, ...] -> [batch, head, chunk, token, ...]; padding writes nothing and decays nothing.
    def cut(x: Tensor) -> Tensor:
        return _chunks(at_least_float32(x).transpose(1, 2), size, dim=2)

    q, g = cut(rec.q), cut(rec.log_decay)
    p, u = (cut(x) for x in write.factors())
    rank = p.shape[-2]
    p, u = (rearrange(x, "b h n c r d -> b h n (c r) d") for x in (p, u))  # writes of one chunk, token by token

    G = g.cumsum(3)  # log decay from the chunk's start through token t
    G_before = G - g  # ... up to but not including token t
    write_decay = G.repeat_interleave(rank, 3)

    # The reads: from the chunk's first state, from the writes, from the erases.
    scores_w = _scores(q, p, G, write_decay, 0 if read == "same" else -1, rank)
    own = scores_w @ u  # output due to this chunk's own writes
    q_first = q * (G.exp() if per_key else G.exp()[..., None])
    # What is left at the chunk's end of the first state, the writes and the erases.
    last = G[:, :, :, -1:]
    left_first = last.squeeze(3).exp()[..., None] if per_key else last.exp()[..., None]
    left_w = p * _expand((last - write_decay).exp(), per_key)
    gained = left_w.mT @ u

    erase = rec.a is not None and rec.b is not None
    if erase:
        a, b = cut(rec.a), cut(rec.b)  # type: ignore[arg-type]
        system = -_scores(b, a, G_before, G, -1, 1)
        from_first = b * _expand(G_before.exp(), per_key)
        from_writes = _scores(b, p, G_before, write_decay, -1, rank) @ u
        solved = torch.linalg.solve_triangular(
            system, torch.cat([from_first, from_writes], -1), upper=False, unitriangular=True
        )
        r_first, r_writes = solved.split([b.shape[-1], u.shape[-1]], -1)
        scores_e = _scores(q, a, G, G, 0, 1)
        left_e = a * _expand((last - G).exp(), per_key)
        # Fold the erase in, so that the loop over chunks needs two matmuls each for output and state.
        own = own + scores_e @ r_writes
        q_first = q_first + scores_e @ r_first
        gained = gained + left_e.mT @ r_writes
        carry = left_e.mT @ r_first

    outputs, erased = [], []
    for n in range(q.shape[2]):
        outputs.append(own[:, :, n] + q_first[:, :, n] @ S)
        if erase:
            erased.append(r_writes[:, :, n] + r_first[:, :, n] @ S)
            S = left_first[:, :, n] * S + carry[:, :, n] @ S + gained[:, :, n]
        else:
            S = left_first[:, :, n] * S + gained[:, :, n]

    def join(xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, 2)[:, :, :n_pos].transpose(1, 2)

    return join(outputs), join(erased) if erase else None, S


def _chunks(x: Tensor, size: int, dim: int = 1) -> Tensor:
    """Split ``dim`` into ``[n_chunks, size]``, zero-padded at the end."""
    pad = -x.shape[dim] % size
    if pad:
        x = F.pad(x, [0, 0] * (x.ndim - dim - 1) + [0, pad])
    return x.unflatten(dim, (-1, size))


def _expand(decay: Tensor, per_key: bool) -> Tensor:
    return decay if per_key else decay[..., None]


def _decays(G_to: Tensor, G_from: Tensor, diagonal: int, rank: int = 1) -> Tensor:
    """``[..., t, j]``: ``exp(G_to[t] - G_from[j])`` if ``j <= t + diagonal``, else 0; per key ``[..., d_key, t, j]``."""
    C, n = G_to.shape[-1], G_from.shape[-1]
    keep = torch.ones(C, n // rank, dtype=torch.bool, device=G_to.device).tril(diagonal).repeat_interleave(rank, 1)
    # Mask before the exponential: what is masked out would overflow, and give NaN gradients.
    return (G_to[..., :, None] - G_from[..., None, :]).masked_fill(~keep, -torch.inf).exp()


def _scores(x: Tensor, y: Tensor, G_to: Tensor, G_from: Tensor, diagonal: int, rank: int) -> Tensor:
    """``sum_d x[t, d] y[j, d] exp(G_to[t, d] - G_from[j, d])`` for ``j <= t + diagonal``, else 0."""
    if G_to.ndim < x.ndim:  # one decay a head: it factors out of the sum over d
        return (x @ y.mT) * _decays(G_to, G_from, diagonal, rank)
    decays = _decays(G_to.mT, G_from.mT, diagonal, rank)  # [..., d_key, t, j]
    return torch.einsum("...td,...jd,...dtj->...tj", x, y, decays)
