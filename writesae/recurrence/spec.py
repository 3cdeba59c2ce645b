"""The one recurrence behind every matrix-state model, and the readable loop that is its specification.

Per head, with state ``S [d_key, d_value]``::

    S_t = D_t S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T          o_t = S_t^T q_t

    D_t  decay, ``exp(log_decay)``: one scalar per head, or one per key channel
    a_t  erase write, b_t erase read (both absent where the architecture erases nothing); where a token takes several
         steps, a sum of such terms
    k_t v_t^T  the native write; here ``v`` is what is written, so for Gated DeltaNet it is ``beta * v``
    q_t  read; in RWKV-6 it reads the state before the token, ``o_t = S_{t-1}^T q_t``. A token may read several times,
         each read weighted per column: ``o_t = sum_r w_tr * (S_t^T q_tr)`` (Mamba-3's MIMO form)

Dimension letters used in the code and in shape annotations:

    batch  sequences            head   value heads (keys already expanded to them)
    pos    tokens in this call  d_key  rows of the state      d_value  columns of the state
    rank   rank-1 terms of one write or erase                  read     reads of one token

Decay, erase and weights do not depend on the state, so the outputs and states are **linear in the writes**: an edit
``E_t`` added to the state changes everything after it by the same recurrence run on ``E`` alone. Edits rest on that
fact.

Everything is computed in float32 (float64 if the inputs are), whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.recurrence.write import Write, at_least_float32

Read = Literal["same", "next"]
Sees = Literal["same", "next", "before"]
Erase: TypeAlias = tuple[Float[Tensor, "batch pos head rank d_key"], Float[Tensor, "batch pos head rank d_key"]]


@dataclass(frozen=True)
class Recurrence:
    """How a layer remembers and reads: everything of the recurrence except what is written.

    Attributes:
        q: read vectors, canonical (normalised and scaled); with a dimension ``read`` where a token reads several times.
        log_decay: natural log of the decay, ``<= 0``; ``[batch, pos, head]`` or ``[batch, pos, head, d_key]``.
        a: erase write, None where nothing is erased; with a dimension ``rank`` where an erase has several terms.
        b: erase read, likewise.
        reads_before: a token reads before it decays, erases and writes, ``o_t = S_{t-1}^T q_t``. What is written at a
            token is then first read by the next one.
        read_weights: where ``q`` has several reads, what each is multiplied by, per column of the state, before they
            are added up; None where a token reads once.
    """

    q: Float[Tensor, "batch pos head d_key"] | Float[Tensor, "batch pos head read d_key"]
    log_decay: Float[Tensor, "batch pos head"] | Float[Tensor, "batch pos head d_key"]
    a: Float[Tensor, "batch pos head d_key"] | Float[Tensor, "batch pos head rank d_key"] | None = None
    b: Float[Tensor, "batch pos head d_key"] | Float[Tensor, "batch pos head rank d_key"] | None = None
    reads_before: bool = False
    read_weights: Float[Tensor, "batch pos head read d_value"] | None = None

    def __post_init__(self) -> None:
        if (self.a is None) != (self.b is None):
            raise ValueError("erase write a and erase read b come together: give both or neither")
        if (self.q.ndim == 5) != (self.read_weights is not None):
            raise ValueError("a dimension of reads in q and read_weights come together: give both or neither")
        *lead, d_key = *self.q.shape[:3], self.q.shape[-1]  # one of another length would be broadcast silently
        for name in ("log_decay", "a", "b", "read_weights"):
            x = getattr(self, name)
            ranks = [] if x is None or x.ndim < 5 else [x.shape[3]]
            allowed = [lead, [*lead, d_key]] if name == "log_decay" else [[*lead, *ranks, d_key]]
            if x is not None and name == "read_weights":
                allowed = [[*self.q.shape[:4], x.shape[-1]]]
            if x is not None and list(x.shape) not in allowed:
                raise ValueError(f"{name} {list(x.shape)} does not fit q {list(self.q.shape)}")
        if self.a is not None and self.b is not None and self.a.shape != self.b.shape:
            raise ValueError(f"erase write a {list(self.a.shape)} and erase read b {list(self.b.shape)} differ in rank")

    @property
    def n_pos(self) -> int:
        return self.q.shape[1]

    def erase(self) -> Erase | None:
        """Erase write and read with the rank dimension always present; None where nothing is erased."""
        if self.a is None or self.b is None:
            return None
        return (self.a, self.b) if self.a.ndim == 5 else (self.a[..., None, :], self.b[..., None, :])

    def queries(self) -> Float[Tensor, "batch pos head read d_key"]:
        """The read vectors with the dimension of reads always present."""
        return self.q[..., None, :] if self.read_weights is None else self.q

    def joined(self, each: Float[Tensor, "batch pos head read d_value"]) -> Float[Tensor, "batch pos head d_value"]:
        """What a token's reads are together: their weighted sum, or the only one."""
        return each.squeeze(-2) if self.read_weights is None else (self.read_weights * each).sum(-2)

    def read(self, S: Float[Tensor, "batch #pos head d_key d_value"]) -> Float[Tensor, "batch pos head d_value"]:
        """What each token reads of its own one of these states, or all of the only one."""
        return self.joined(self.queries() @ S)

    def single_reads(self) -> list[Recurrence]:
        """For each read of a token the recurrence with that read alone, unweighted."""
        return [replace(self, q=q, read_weights=None) for q in self.queries().unbind(-2)]

    def __getitem__(self, index) -> Recurrence:
        """Index ``[batch, pos, head]`` with slices, e.g. ``rec[:, 5:, 2:3]``."""
        return self._each(lambda x: x[index])

    def float(self) -> Recurrence:
        """At least float32, as the recurrence is computed."""
        return self._each(at_least_float32)

    def _each(self, make: Callable[[Tensor], Tensor]) -> Recurrence:
        a, b, read_weights = (None if x is None else make(x) for x in (self.a, self.b, self.read_weights))
        return Recurrence(make(self.q), make(self.log_decay), a, b, self.reads_before, read_weights)

    def sees(self, read: Read) -> Sees:
        """What a token's read sees of the token itself: its write too (``same``), its decay and erase alone (``next``),
        or nothing (``before``), whatever is asked for."""
        return "before" if self.reads_before else read


def zero_state(rec: Recurrence, write: Write) -> Float[Tensor, "batch head d_key d_value"]:
    batch, _, head = rec.q.shape[:3]
    return at_least_float32(rec.q).new_zeros(batch, head, rec.q.shape[-1], write.d_value)


def first_state(rec: Recurrence, write: Write, initial_state: Tensor | None) -> Tensor:
    """The state before the first token, in the dtype of computing; ValueError if ``write`` has other positions, or
    another number of columns than the weights of reads."""
    if write.shape[1] != rec.n_pos:
        raise ValueError(f"the recurrence has {rec.n_pos} positions, the writes have {write.shape[1]}")
    if rec.read_weights is not None and rec.read_weights.shape[-1] != write.d_value:
        raise ValueError(f"read_weights have {rec.read_weights.shape[-1]} columns, the writes have {write.d_value}")
    return zero_state(rec, write) if initial_state is None else at_least_float32(initial_state)


def states(
    rec: Recurrence,
    write: Write,
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
) -> Iterator[Float[Tensor, "batch head d_key d_value"]]:
    """Yield ``S_t`` after each token: the recurrence as written at the top of this file, one token at a time."""
    rec = rec.float()
    keys, values = (at_least_float32(x) for x in write.factors())
    S, erase = first_state(rec, write, initial_state), rec.erase()
    for t in range(rec.n_pos):
        decay = rec.log_decay[:, t].exp()
        D = decay[..., None, None] if decay.ndim == 2 else decay[..., None]
        S_t = D * S + keys[:, t].mT @ values[:, t]
        if erase is not None:
            a, b = (x[:, t] for x in erase)
            S_t = S_t + a.mT @ (b @ S)  # b^T S_{t-1}, [batch, head, rank, d_value]
        S = S_t
        yield S


def step_loop(
    rec: Recurrence,
    write: Write,
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    *,
    dense: Mapping[int, Float[Tensor, "batch head d_key d_value"]] | None = None,
    read: Read = "same",
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"]]:
    """The recurrence token by token: slow, obvious, and what every faster form is tested against.

    Args:
        rec: decay, erase and reads.
        write: what is written at each token, leading dimensions ``[batch, pos, head]``, any rank.
        initial_state: state before the first token (zero if None).
        dense: full matrices added to the state at single positions, ``{pos: E}``, after that token's own write.
        read: ``"same"``: the read at ``t`` sees what is written at ``t``. ``"next"``: it does not (decay and erase
            are still seen); the paper's cache-slot protocol. Where a token reads before it writes
            (`Recurrence.reads_before`) neither does.

    Returns:
        Outputs ``o [batch, pos, head, d_value]`` and the final state ``[batch, head, d_key, d_value]``.
    """
    dense = check_dense(dense, rec.n_pos)
    rec = rec.float()
    keys, values = (at_least_float32(x) for x in write.factors())
    S = first_state(rec, write, initial_state)
    outputs, sees = [], rec.sees(read)
    for t in range(rec.n_pos):
        now = (slice(None), slice(t, t + 1))
        written = keys[:, t].mT @ values[:, t]
        if t in dense:
            written = written + at_least_float32(dense[t])
        kept = next(states(rec[now], write[now] * 0.0, S))  # decay and erase alone
        seen: dict[Sees, Tensor] = {"before": S, "next": kept, "same": kept + written}
        S = seen["same"]
        outputs.append(rec[now].read(seen[sees][:, None]))
    return torch.cat(outputs, 1), S


def check_dense(dense: Mapping[int, Tensor] | None, n_pos: int) -> dict[int, Tensor]:
    """Dense edits sorted by position; an error for a position outside ``0 .. n_pos - 1``."""
    for t in dense or {}:
        if not 0 <= t < n_pos:
            raise IndexError(f"dense edit at position {t}: allowed are 0 to {n_pos - 1}")
    return dict(sorted((dense or {}).items()))
