"""Chunked forms of the recurrence: same arguments and results as `writesae.recurrence.step_loop`, matmuls inside.

Within a chunk, write ``r_t = b_t^T S_{t-1}`` for what the erase reads. Then ``r`` solves a unit lower-triangular system
(the "UT transform" of DeltaNet), with a right-hand side for the chunk's first state and one for the writes::

    r_t = b_t^T D(0..t-1) S_0 + sum_{j<t} b_t^T D(j..t-1) (a_j r_j + k_j v_j^T)

The write keys enter only on the right, so they need not be the erase keys, and a token may write any number of rank-1
terms. It may erase any number of them too: all of them read the state before the token, so the system is the same with
so many rows per token. Reads have rows too, as many per token as it reads times (`Recurrence.read_weights`). Where the
erase does write along the key (``a = c k``), ``v_j + c_j r_j`` solves a system of its own, with fewer scores. All
exponents are sums of log decays over a later stretch, hence ``<= 0``: nothing overflows however strong the decay (or,
for mild decays per key channel, at most 2 MILD in size).

Where the state has few columns and a decay per key channel (Mamba-1: one column per head, heads by the thousand), a
matmul has nothing to save, and the chunks go token by token, all at once (`_scan_columns`).

A CPU computes a stretch of a few chunks at a time, small enough for its cache: memory is then that of the result, and
several times less work waits for memory. Elsewhere all chunks are one stretch; its memory per head is
``pos * (chunk + d_key + d_value)`` (``pos * chunk * d_key`` for strong decays per key channel, with a smaller chunk),
and one matrix of a state's size per chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence.decay import CHUNK, Decay, between, chunks, cut, cut_decay, each
from writesae.recurrence.spec import Read, Recurrence, Sees, Write, at_least_float32, check_dense, first_state
from writesae.recurrence.write import in_terms

CACHED = 2**18  # numbers: what is computed at once on a CPU
FEW = 4  # columns of a state, below which scores between tokens cost more than the states themselves

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
    strength: Float[Tensor, "batch pos head"] | Float[Tensor, "batch pos head rank"] | None = None,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"]]:
    """Outputs and final state of the recurrence; see `writesae.recurrence.step_loop` for the arguments.

    Args:
        chunk: the chunk length in tokens (default 32, or 16 for strong decays per key channel).
        strength: where the erase writes along the keys of the write's first terms, ``a_t = strength_t k_t`` as in delta
            rules: this number, for each term of the erase. Erase and write are then computed as one, in two thirds of
            the time.

    Neither changes results.
    """
    dense = check_dense(dense, rec.n_pos)
    S, sees = first_state(rec, write, initial_state), rec.sees(read)
    if sees == "next":
        strength = None  # the read sees the token's erase and not its write: these are not one
    outputs, start = [], 0
    for t, E in dense.items():  # a dense edit is a new initial state: cut the sequence after it
        here = (slice(None), slice(start, t + 1))
        o, _, S = _scan(rec[here], write[here], S, sees, chunk, _of(strength, here))
        E = at_least_float32(E)
        if sees == "same":
            seen = rec[:, t : t + 1].float().read(E[:, None])
            o = torch.cat([o[:, :-1], o[:, -1:] + seen], 1)
        S = S + E
        outputs.append(o)
        start = t + 1
    if start < rec.n_pos:
        o, _, S = _scan(
            rec[:, start:], write[:, start:], S, sees, chunk, _of(strength, (slice(None), slice(start, None)))
        )
        outputs.append(o)
    return torch.cat(outputs, 1), S


def erase_reads(
    rec: Recurrence, write: Write, initial_state: Float[Tensor, "batch head d_key d_value"] | None = None
) -> Float[Tensor, "batch pos head d_value"] | Float[Tensor, "batch pos head rank d_value"]:
    """What the erase reads before each write, ``r_t = b_t^T S_{t-1}``, with a dimension ``rank`` if ``b`` has one. The
    delta rule's delta is ``beta v - c r``."""
    S = first_state(rec, write, initial_state)
    _, r, _ = _scan(rec, write, S, erased=True)
    if r is None:
        raise ValueError("this recurrence erases nothing: its delta is its write")
    return r.view(*rec.b.shape[:-1], -1) if rec.b is not None else r


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

    the same recurrence with erase write and read exchanged, and native write ``q g^T`` (`adjoint_write`). So every
    function of this file does for gradients what it does for states: with ``back = adjoint(rec, p)`` and ``w =
    adjoint_write(rec, g)``, ``chunked(back, w)[0].flip(1)`` is ``M_t^T p_t`` (with ``read="next"`` that of edits which
    ``t`` itself does not see), and ``states_at(back, w, ...)`` the ``M_t``.

    Where a token reads before it writes, its read sees no edit of its own, and the last term is ``q_{t+1} g_{t+1}^T``.
    The adjoint is then the same, and what differs is in `adjoint_write`; ``read`` has to be ``"same"``.

    Args:
        rec: the recurrence as it ran.
        reads: vectors to read the gradients with, in the order of the text; None to read them as ``rec`` reads states.
    """
    q, weights = (rec.q, rec.read_weights) if reads is None else (reads, None)
    a, b = (None if x is None else _of_next(x) for x in (rec.b, rec.a))
    weights = None if weights is None else weights.flip(1)
    return Recurrence(q.flip(1), _of_next(rec.log_decay), a, b, read_weights=weights)


def adjoint_write(rec: Recurrence, gradient: Float[Tensor, "batch pos head d_value"]) -> Write:
    """What `adjoint` gains at each token, from last to first: ``q_t g_t^T``, or that of the next token where a token
    reads before it writes.

    Args:
        rec: the recurrence as it ran.
        gradient: of the number, with respect to the outputs ``o_t``.
    """
    w = gradient_of_read(rec, gradient)
    turn: Callable[[Tensor], Tensor] = _of_next if rec.reads_before else lambda x: x.flip(1)
    return replace(w, key=turn(w.key), value=turn(w.value))


def gradient_of_read(rec: Recurrence, gradient: Float[Tensor, "batch pos head d_value"]) -> Write:
    """The gradient with respect to the state that each token reads, ``q_t g_t^T``; of several reads their sum,
    ``sum_r q_tr (w_tr g_t)^T``, so in as many terms."""
    q, g = at_least_float32(rec.q), at_least_float32(gradient)
    return (
        Write(q, g) if rec.read_weights is None else in_terms(q, at_least_float32(rec.read_weights) * g[..., None, :])
    )


def _of_next(x: Tensor) -> Tensor:
    """At each token what the next one has, zero at the last, from last to first."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1).flip(1)


@_without_autocast
def carried(
    rec: Recurrence, keys: Float[Tensor, "batch n d_key"], positions: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch pos n"] | Float[Tensor, "batch pos n d_value"]:
    """How strongly each later read sees an edit: ``q_t^T A_t ... A_{j+1} p`` for a key ``p`` written at ``j`` (without
    ``A_t`` and from ``j + 1`` on, where a token reads before it writes). Where a token reads several times, each with
    weights per column, a number for each column.

    Decay and erase act on keys alone, so an edit ``p u^T`` changes the output at ``t`` by this number times ``u``,
    whatever ``u`` is: the key travels as a vector, and no state is built. 0 before the edit.

    Args:
        rec: the recurrence of one head, ``[batch, pos, 1]``.
        keys: the keys of ``n`` edits per sequence, each edit by itself.
        positions: the token of each edit.
    """
    rec = rec[:, :, 0:1].float()
    found, x, erase = [], torch.zeros_like(at_least_float32(keys)), rec.erase()
    for t in range(rec.n_pos):
        decay = rec.log_decay[:, t].exp()
        x_t = x * (decay[..., None] if decay.ndim == 2 else decay)
        if erase is not None:
            a, b = (y[:, t, 0] for y in erase)
            x_t = x_t + (x @ b.mT) @ a
        before, x = x, x_t + keys * (positions == t)[..., None]
        seen = (before if rec.reads_before else x) @ rec.queries()[:, t, 0].mT  # [batch, n, read]
        found.append(seen[..., 0] if rec.read_weights is None else seen @ rec.read_weights[:, t, 0])
    return torch.stack(found, 1)


@_without_autocast
def value_reads(
    x: Float[Tensor, "batch pos head d_value"],
    key: Float[Tensor, "batch pos head d_key"],
    value: Float[Tensor, "batch pos head d_value"],
    log_decay: Float[Tensor, "batch pos head d_key"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
) -> tuple[Float[Tensor, "batch pos head d_key"], Float[Tensor, "batch head d_key d_value"]]:
    """A memory that erases nothing, read from its other side: ``S_t = D_t S_{t-1} + k_t v_t^T``, and ``S_t x_t``, one
    number for each row of the state. Returns these reads, and the final state.

    Within a chunk a read is ``sum_j (x_t . v_j) D(j..t) k_j``: scores between tokens are the same for all rows, which
    differ in their decays alone.
    """
    lead, outputs = (x.shape[0], x.shape[2]), []
    S = at_least_float32(x).new_zeros(*lead, key.shape[-1], x.shape[-1]) if initial_state is None else initial_state
    S = at_least_float32(S).flatten(0, 1)
    for here in stretches(x, key, value, log_decay):
        g, size, mild = cut_decay(log_decay[here], None)
        reads, keys, values = (cut(y[here], size) for y in (x, key, value))
        decay = Decay(g, factored=mild)
        gained, left, firsts = (keys * decay.to_end).mT @ values, decay.from_start[..., -1:, :].mT, []
        for n in range(keys.shape[1]):
            firsts.append(S)
            S = torch.addcmul(gained[:, n], left[:, n], S)
        o = decay.spread(reads @ values.mT, keys) + decay.from_start * (reads @ _stacked(firsts).mT)
        o = o.flatten(1, 2)[:, : here[1].stop - here[1].start]
        outputs.append(o.unflatten(0, lead).transpose(1, 2))
    return torch.cat(outputs, 1), S.unflatten(0, lead)


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
    if n_pos <= CHUNK:
        return (between(log_decay) @ x).addcmul_(log_decay.cumsum(-1).exp()[..., None], first[:, None])
    x, g = chunks(x, CHUNK), chunks(log_decay, CHUNK)
    within = between(g)
    # Sums at the chunks' ends are sums of the same kind, of what each chunk adds; the rest is one matmul for all.
    ends = _decayed_sum((within[..., -1:, :] @ x)[:, :, 0], g.sum(-1), first)
    firsts = torch.cat([first[:, None], ends[:, :-1]], 1)
    y = (within @ x).addcmul_(g.cumsum(-1).exp()[..., None], firsts[:, :, None])
    return y.flatten(1, 2)[:, :n_pos]


@_without_autocast
def _scan(
    rec: Recurrence,
    write: Write,
    S: Tensor,
    sees: Sees = "same",
    chunk: int | None = None,
    strength: Tensor | None = None,
    erased: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Chunked recurrence from state ``S``: outputs, what the erase read (if ``erased``), final state."""
    lead, S = S.shape[:2], S.flatten(0, 1)
    outputs, reads = [], []
    for here in stretches(rec.q, write.key, write.value):
        o, r, S = _scan_stretch(rec[here], write[here], S, sees, chunk, _of(strength, here))
        outputs.append(o.unflatten(0, lead).transpose(1, 2))
        if erased and r is not None:
            reads.append(r.unflatten(0, lead).transpose(1, 2))
    return torch.cat(outputs, 1), torch.cat(reads, 1) if reads else None, S.unflatten(0, lead)


def stretches(*parts: Tensor) -> list[tuple[slice, slice]]:
    """Indices ``[batch, pos]`` of the tokens to compute at once: on a CPU whole chunks of which these, ``[batch, pos,
    ...]``, fit its cache, elsewhere all."""
    n_pos = size = parts[0].shape[1]
    if parts[0].device.type == "cpu" and not torch.compiler.is_compiling():
        size = CHUNK * max(1, CACHED // max(1, CHUNK * sum(x[:, :1].numel() for x in parts)))
    return [(slice(None), slice(start, min(start + size, n_pos))) for start in range(0, n_pos, size)]


def _scan_stretch(
    rec: Recurrence, write: Write, S: Tensor, sees: Sees, chunk: int | None, strength: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same for tokens computed at once, with sequences and heads as one dimension: ``[batch*head, pos, d]``."""
    if rec.a is None and rec.log_decay.ndim == 4 and write.d_value < FEW and rec.read_weights is None:
        return _scan_columns(rec, write, S, sees, chunk or CHUNK)
    n_pos = rec.n_pos
    g, size, mild = cut_decay(rec.log_decay, chunk)
    decay = Decay(g, factored=mild)
    in_turn = lambda x: rearrange(cut(x, size), "s n c r d -> s n (c r) d")  # noqa: E731  # terms, token by token
    weights, reads = rec.read_weights, rec.queries().shape[3]
    q = cut(rec.q, size) if weights is None else in_turn(rec.q)
    (keys, values), erase = write.factors(), rec.erase()
    wanted, m = None, 0
    if erase is not None:
        (a, b), m = erase, erase[0].shape[3]
        if strength is not None:  # the erase is one write with the first terms, of v_t + strength_t r_t
            a, b, wanted = keys[..., :m, :], b * strength.view(*b.shape[:-1], 1), in_turn(values[..., :m, :])
            keys, values = keys[..., m:, :], values[..., m:, :]
        a, b = in_turn(a), in_turn(b)

    # What each chunk reads of its own writes, and what they leave at its end.
    own = gained = None
    rank = keys.shape[-2]
    if rank:
        p, u = in_turn(keys), in_turn(values)
        own = decay.scores(q, p, sees, rank, reads) @ u
        gained = (p * each(decay.to_end, rank, 2)).mT @ u
        if m:
            wanted = _sum(wanted, decay.scores(b, p, "before", rank, m) @ u)
    if wanted is not None:
        solve = _inverse(decay.scores(b, a, "before", m, m))
        r_writes, r_first = solve @ wanted, solve @ (b * each(decay.before_from_start, m, 2))
        left_erased = (a * each(decay.to_end, m, 2)).mT
    left = decay.from_start[..., -1:, :].mT

    # From chunk to chunk only the state goes on, and what the erase writes; reads wait and are one matmul for all.
    firsts, erased = [], []
    for n in range(q.shape[1]):
        firsts.append(S)
        decayed = left[:, n] * S if gained is None else torch.addcmul(gained[:, n], left[:, n], S)
        if wanted is not None:
            erased.append(torch.baddbmm(r_writes[:, n], r_first[:, n], S))
            decayed = torch.baddbmm(decayed, left_erased[:, n], erased[-1])
        S = decayed
    from_start = decay.before_from_start if sees == "before" else decay.from_start
    outputs, r = _sum(own, (q * each(from_start, reads, 2)) @ _stacked(firsts)), None
    if wanted is not None:
        r = _stacked(erased)
        outputs = outputs + decay.scores(q, a, "before" if sees == "before" else "same", m, reads) @ r
        r = r.flatten(1, 2)[:, : n_pos * m].unflatten(1, (n_pos, m))
    if weights is not None:
        outputs = (cut(weights, size) * outputs.unflatten(2, (-1, reads))).sum(3)
    return outputs.flatten(1, 2)[:, :n_pos], r, S


def _scan_columns(rec: Recurrence, write: Write, S: Tensor, sees: Sees, size: int) -> tuple[Tensor, None, Tensor]:
    """The same where nothing is erased, for states of few columns: the recurrence as it is written, token by token
    within chunks, all chunks at once from states of zero (one alone from ``S``); then what came before each chunk,
    which its tokens read decayed. Exponents are sums of log decays, so nothing overflows."""
    size = min(size, rec.n_pos)
    (q, g), (keys, values) = (cut(x, size) for x in (rec.q, rec.log_decay)), (cut(x, size) for x in write.factors())
    one = q.shape[1] == 1
    local = S[:, None] if one else torch.zeros_like(S)[:, None].expand(-1, q.shape[1], -1, -1)
    decay, reads = g.exp()[..., None], []
    for t in range(size):
        kept = decay[:, :, t] * local
        key, value = keys[:, :, t], values[:, :, t]
        written = key.mT * value if write.rank == 1 else key.mT @ value
        seen: dict[Sees, Tensor] = {"before": local, "next": kept, "same": kept + written}
        reads.append((q[:, :, t, None] @ seen[sees])[:, :, 0])
        local = seen["same"]
    o = torch.stack(reads, 2)
    if one:
        return o[:, 0, : rec.n_pos], None, local[:, 0]
    from_start, firsts = g.cumsum(2).exp(), []
    for n in range(q.shape[1]):
        firsts.append(S)
        S = from_start[:, n, -1, :, None] * S + local[:, n]
    if sees == "before":
        from_start = torch.cat([torch.ones_like(from_start[:, :, :1]), from_start[:, :, :-1]], 2)
    o = o + (q * from_start) @ _stacked(firsts)
    return o.flatten(1, 2)[:, : rec.n_pos], None, S


def _sum(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


def _inverse(x: Tensor) -> Tensor:
    """``(1 - x)^-1`` for matrices that are 0 on and above the diagonal."""
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    return torch.linalg.solve_triangular(-x, one, upper=False, unitriangular=True)


def _of(x: Tensor | None, index: tuple[slice, ...]) -> Tensor | None:
    return None if x is None else x[index]


def _stacked(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, 1) if len(parts) > 1 else parts[0][:, None]  # without a copy
