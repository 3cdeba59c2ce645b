"""Chunked forms of the recurrence: same arguments and results as `writesae.recurrence.step_loop`, matmuls inside.

Within a chunk, write ``r_t = b_t^T S_{t-1}`` for what the erase reads. Then ``r`` solves a unit lower-triangular system
(the "UT transform" of DeltaNet), with a right-hand side for the chunk's first state and one for the writes::

    r_t = b_t^T D(0..t-1) S_0 + sum_{j<t} b_t^T D(j..t-1) (a_j r_j + k_j v_j^T)

The write keys enter only on the right, so they need not be the erase keys, and a token may write any number of rank-1
terms. All exponents are sums of log decays over a later stretch, hence ``<= 0``: nothing overflows however strong the
decay (or, for mild decays per key channel, at most 2 MILD in size). Memory per head is
``pos * (chunk + d_key + d_value)`` (``pos * chunk * d_key`` for strong decays per key channel, with a smaller chunk),
and one matrix of a state's size per chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch._subclasses.fake_tensor import FakeTensor

from writesae.recurrence.spec import Read, Recurrence, Write, at_least_float32, check_dense, first_state

CHUNK = 64  # tokens, with one decay per head
CHUNK_SUM = 32  # tokens, for numbers that decay: their only work is within chunks
CHUNK_MILD = 32  # tokens, with one decay per key channel, and no chunk that forgets more than exp(-2 MILD)
CHUNK_PER_KEY = 16  # tokens, with stronger decays per key channel: scores need [chunk, chunk, d_key]
MILD = 20.0  # exp(x) has x times the rounding error of x, so factors up to exp(20) are right to some 1e-6

F_ = TypeVar("F_", bound=Callable[..., Any])


def full_precision(device: torch.device) -> torch.autocast:
    """Switch autocast off: it would turn the matmuls inside to bfloat16, and memories need float32 throughout."""
    return torch.autocast(device.type, enabled=False)


def _without_autocast(compute: F_) -> F_:
    @functools.wraps(compute)
    def computed(first: Recurrence | Tensor, *args: Any, **kwargs: Any) -> Any:
        with full_precision(first.device if isinstance(first, Tensor) else first.q.device):
            return compute(first, *args, **kwargs)

    return computed  # type: ignore[return-value]


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

    ``chunk`` is the chunk length in tokens (default 64, or 32 or 16 for per-key decay); it changes speed, not results.
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
    _, r, _ = _scan(rec, write, S, erased=True)
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
        _, _, S = _scan(rec[:, start : t + 1], write[:, start : t + 1], S)
        if t in dense:
            S = S + at_least_float32(dense[t])
        found[t], start = S, t + 1
    if not positions:
        return S.new_zeros(S.shape[0], 0, *S.shape[1:])
    return torch.stack([found[t] for t in positions], 1)


def adjoint(rec: Recurrence, reads: Float[Tensor, "batch pos head d_key"] | None = None) -> Recurrence:
    """The recurrence, over tokens from last to first, of the gradient of any number with respect to what is written.

    Let ``g_t`` be the number's gradient with respect to the output ``o_t``, and ``M_t`` that with respect to an edit
    ``E_t`` of the state, so that ``<M_t, E_t>`` is the edit's effect to first order. Then, from the last token on::

        M_t = D_{t+1} M_{t+1} + b_{t+1} (a_{t+1}^T M_{t+1}) + q_t g_t^T

    the same recurrence with erase write and read exchanged, and native write ``q g^T``. So every function of this file
    does for gradients what it does for states: with ``back = adjoint(rec, p)`` and ``w = Write(q.flip(1), g.flip(1))``,
    ``chunked(back, w)[0].flip(1)`` is ``M_t^T p_t`` (with ``read="next"`` that of edits which ``t`` itself does not
    see), and ``states_at(back, w, ...)`` the ``M_t``.

    Args:
        rec: the recurrence as it ran.
        reads: vectors to read the gradients with, in the order of the text; None for ``rec.q``.
    """

    def of_next(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1).flip(1)

    reads = rec.q if reads is None else reads
    log_decay = of_next(rec.log_decay)
    assert log_decay is not None
    return Recurrence(reads.flip(1), log_decay, a=of_next(rec.b), b=of_next(rec.a))


@_without_autocast
def carried(
    rec: Recurrence, keys: Float[Tensor, "batch n d_key"], positions: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch pos n"]:
    """How strongly each later read sees an edit: ``q_t^T A_t ... A_{j+1} p`` for a key ``p`` written at ``j``.

    Decay and erase act on keys alone, so an edit ``p u^T`` changes the output at ``t`` by this number times ``u``,
    whatever ``u`` is: the key travels as a vector, and no state is built. 0 before the edit.

    Args:
        rec: the recurrence of one head, ``[batch, pos, 1]``.
        keys: the keys of ``n`` edits per sequence, each edit by itself.
        positions: the token of each edit.
    """
    rec = rec[:, :, 0:1].float()
    found, x = [], torch.zeros_like(at_least_float32(keys))
    for t in range(rec.n_pos):
        decay = rec.log_decay[:, t].exp()
        x_t = x * (decay[..., None] if decay.ndim == 2 else decay)
        if rec.a is not None and rec.b is not None:
            x_t = x_t + (x @ rec.b[:, t].mT) * rec.a[:, t]
        x = x_t + keys * (positions == t)[..., None]
        found.append((x @ rec.q[:, t].mT)[..., 0])
    return torch.stack(found, 1)


@_without_autocast
def decayed_sum(
    x: Float[Tensor, "batch pos feature"],
    log_decay: Float[Tensor, "batch pos"],
    initial: Float[Tensor, "batch feature"] | None = None,
) -> Float[Tensor, "batch pos feature"]:
    """``y_t = exp(log_decay_t) y_{t-1} + x_t``: the code of every atom at every position without any state.

    With ``x_i(t) = (v_i . k_t)(w_i . delta_t)`` and a scalar decay, ``y_i(t) = v_i^T S_t w_i`` exactly.
    """
    x, log_decay = at_least_float32(x), at_least_float32(log_decay)
    first = x.new_zeros(x[:, 0].shape) if initial is None else at_least_float32(initial)
    return _decayed_sum(x, log_decay, first)


def _decayed_sum(x: Tensor, log_decay: Tensor, first: Tensor) -> Tensor:
    n_pos = x.shape[1]
    if n_pos <= CHUNK_SUM:
        return (_between(log_decay) @ x).addcmul_(log_decay.cumsum(-1).exp()[..., None], first[:, None])
    x, g = _chunks(x, CHUNK_SUM), _chunks(log_decay, CHUNK_SUM)
    between = _between(g)
    # Sums at the chunks' ends are sums of the same kind, of what each chunk adds; the rest is one matmul for all.
    ends = _decayed_sum((between[..., -1:, :] @ x)[:, :, 0], g.sum(-1), first)
    firsts = torch.cat([first[:, None], ends[:, :-1]], 1)
    y = (between @ x).addcmul_(g.cumsum(-1).exp()[..., None], firsts[:, :, None])
    return y.flatten(1, 2)[:, :n_pos]


@_without_autocast
def _scan(
    rec: Recurrence, write: Write, S: Tensor, read: Read = "same", chunk: int | None = None, erased: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Chunked recurrence from state ``S``: outputs, what the erase read (if ``erased``), final state."""
    n_pos = rec.n_pos
    g, size, mild = _cut_decay(rec.log_decay, chunk)
    q = _cut(rec.q, size)
    p, u = (_cut(x, size) for x in write.factors())
    rank = p.shape[-2]
    p, u = (rearrange(x, "b h n c r d -> b h n (c r) d") for x in (p, u))  # writes of one chunk, token by token

    decay = _Decay(g, factored=mild)
    own = decay.scores(q, p, read, rank) @ u  # output due to this chunk's own writes
    q_first = q * decay.from_start  # ... and to its first state
    # What is left at the chunk's end of the writes and of the first state.
    gained = (p * decay.to_end.repeat_interleave(rank, 3)).mT @ u
    left_first = decay.from_start[..., -1:, :].mT

    erase = rec.a is not None and rec.b is not None
    if erase:
        a, b = _cut(rec.a, size), _cut(rec.b, size)  # type: ignore[arg-type]
        from_writes = decay.scores(b, p, "before", rank) @ u
        r_first, r_writes = torch.linalg.solve_triangular(
            -decay.scores(b, a, "before"),
            torch.cat([b * decay.before_from_start, from_writes], -1),
            upper=False,
            unitriangular=True,
        ).split([b.shape[-1], u.shape[-1]], -1)
        scores_e = decay.scores(q, a, "same")
        left_e = (a * decay.to_end).mT
        # Fold the erase in, so that the loop over chunks needs two matmuls each for output and state.
        own = own + scores_e @ r_writes
        q_first = q_first + scores_e @ r_first
        gained = gained + left_e @ r_writes
        carry = left_e @ r_first

    # From chunk to chunk only the state goes on; everything else waits and is one matmul for all chunks.
    first_states = []
    for n in range(q.shape[2]):
        first_states.append(S)
        gain = gained[:, :, n] + carry[:, :, n] @ S if erase else gained[:, :, n]
        S = torch.addcmul(gain, left_first[:, :, n], S)
    first = torch.stack(first_states, 2)
    reads = _join(r_writes + r_first @ first, n_pos) if erase and erased else None
    return _join(own + q_first @ first, n_pos), reads, S


# Not inside `_scan`: where annotations are checked, a function is compiled anew whenever its `def` runs.
def _cut(x: Tensor, size: int) -> Tensor:
    """``[batch, pos, head, ...]`` to ``[batch, head, chunk, token, ...]``. Padding writes nothing, decays nothing."""
    return _chunks(at_least_float32(x).transpose(1, 2), size, dim=2)


def _join(x: Tensor, n_pos: int) -> Tensor:
    """``[batch, head, chunk, token, ...]`` to ``[batch, pos, head, ...]``, without the padding."""
    return x.flatten(2, 3)[:, :, :n_pos].transpose(1, 2)


def _chunks(x: Tensor, size: int, dim: int = 1) -> Tensor:
    """Split ``dim`` into ``[n_chunks, size]``, zero-padded at the end."""
    pad = -x.shape[dim] % size
    if pad:
        x = F.pad(x, [0, 0] * (x.ndim - dim - 1) + [0, pad])
    return x.unflatten(dim, (-1, size))


# --- decay within a chunk ---------------------------------------------------------------------------------------------


def _cut_decay(log_decay: Tensor, chunk: int | None) -> tuple[Tensor, int, bool]:
    """Log decays in chunks, ``[batch, head, chunk, token, d_key or 1]``; the size of a chunk; whether these decays, one
    per key channel, are mild: ``exp`` of half a chunk's whole decay, and its inverse, are accurate. See `_Decay`."""
    per_key, n_pos = log_decay.ndim == 4, log_decay.shape[1]
    if not per_key:
        log_decay = log_decay[..., None]
    for size in (chunk,) if chunk else (CHUNK_MILD, CHUNK_PER_KEY) if per_key else (CHUNK,):
        size = min(size, n_pos)
        g = _cut(log_decay, size)
        mild = per_key and _values_are_known(g) and bool(g.sum(3).amin() >= -2 * MILD)
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


class _Decay:
    """Decay within each chunk, from log decays ``g [batch, head, chunk, token, d_key or 1]``.

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
            self.between = _between(g.mT if self.per_key else g[..., 0])
            self.to_end = self.between[..., -1, :].mT if self.per_key else self.between[..., -1, :, None]

    def scores(self, x: Tensor, y: Tensor, read: Literal["same", "next", "before"], rank: int = 1) -> Tensor:
        """``sum_d x[t, d] y[j, d] D[t, j, d]``, ``D`` the decay from ``j``'s write to ``t``; ``rank`` writes per token.

        The read at ``t`` sees writes up to its own token's (``same``), or up to the token's before it (``next``);
        ``before`` is what ``t``'s erase reads, before ``t`` decays.
        """
        if self.factored:
            reads = self.reads_before if read == "before" else self.reads
            scores = (x * reads) @ (y * self.writes.repeat_interleave(rank, -2)).mT
            seen = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril(-(read != "same"))
            return scores.masked_fill(~seen.repeat_interleave(rank, -1), 0)
        between = self.between
        if read == "next":
            between = between.tril(-1)
        elif read == "before":
            between = F.pad(between[..., :-1, :], (0, 0, 1, 0))
        between = between.repeat_interleave(rank, -1)
        if self.per_key:
            return torch.einsum("...td,...jd,...dtj->...tj", x, y, between)
        return (x @ y.mT) * between


def _between(g: Tensor) -> Tensor:
    """The decay from ``j`` to ``t``, ``[..., t, j]``, 0 for ``j > t``.

    A sum over the tokens between, and not the difference of two sums from the chunk's start: one strong decay before
    them would take the last digits of both.
    """
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
    between = torch.where(later, g[..., :, None], 0).cumsum(-2)
    # Mask before the exponential, as -inf: an exact 0 that has no gradient.
    return between.masked_fill(later.mT, -torch.inf).exp()
