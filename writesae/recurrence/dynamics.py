"""What a memory went through: all heads of a layer in one pass (`Dynamics`), and the states of one head (`States`).

Both stay in factors: atoms read the states, and norms and means are taken, without building them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.recurrence.kernels import chunked, decayed_sum, erase_reads, states_at
from writesae.recurrence.rules import Rule
from writesae.recurrence.spec import Recurrence, states
from writesae.recurrence.write import Write, at_least_float32, in_terms, index_of

Target = Literal["write", "delta", "state"]
"""What of a memory an SAE may read."""


@dataclass(frozen=True, eq=False)
class States:
    """``S_t = D_t S_{t-1} + gain_t`` from a zero state, for one head, at every token of some sequences.

    What an atom reads of the states, ``v^T S_t w``, decays with them and gains ``(v.k_t)(w.delta_t)``; so do their
    inner products with any matrix. Where the decay is one number per token, nothing here builds a state unless asked.

    Attributes:
        gain: what each token adds to the decayed state, ``[batch, pos]``, any rank: the model's *delta*, or its write
            where nothing is erased.
        log_decay: natural log of the decay, ``<= 0``; one number per token, or one per key channel.
    """

    gain: Write
    log_decay: Float[Tensor, "batch pos"] | Float[Tensor, "batch pos d_key"]

    def __post_init__(self) -> None:
        lead, size = self.gain.shape, self.log_decay.shape
        if len(lead) != 2 or size not in (lead, (*lead, self.gain.d_key)):
            raise ValueError(
                f"States need a gain of one head, [batch, pos], and log_decay [batch, pos] or [batch, pos, d_key]; got "
                f"{list(lead)} and {list(size)}"
            )

    @property
    def shape(self) -> torch.Size:
        """``[batch, pos]``."""
        return self.gain.shape

    @property
    def d_key(self) -> int:
        return self.gain.d_key

    @property
    def d_value(self) -> int:
        return self.gain.d_value

    @property
    def one_decay(self) -> bool:
        """Whether there is one decay per token, not one per key channel: then readings decay as the states do."""
        return self.log_decay.ndim == 2

    def __getitem__(self, index: slice | Tensor) -> States:
        """Some of the sequences; their norms too, if they are known."""
        some = States(self.gain[index], self.log_decay[index])
        if "norm2" in self.__dict__:
            some.__dict__["norm2"] = self.norm2[index]
        return some

    def to(self, *args: Any) -> States:
        """Moved or converted, as by ``Tensor.to``; itself where that changes nothing."""
        gain, log_decay = self.gain.to(*args), self.log_decay.to(*args)
        same = log_decay is self.log_decay and gain.key is self.gain.key and gain.value is self.gain.value
        return self if same else States(gain, log_decay)

    def read(
        self, gained: Float[Tensor, "batch pos n"], initial: Float[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch pos n"]:
        """Inner products of the states with some matrices, from those of each token's gain (``one_decay`` only)."""
        if not self.one_decay:
            raise ValueError("with one decay per key channel, readings of a state do not decay as one number")
        return decayed_sum(gained, self.log_decay, initial)

    @cached_property
    def norm2(self) -> Float[Tensor, "batch pos"]:
        """``||S_t||^2``. Each token adds ``2 <D S_{t-1}, gain> + ||gain||^2`` to what has decayed twice as fast."""
        if not self.one_decay:
            return self.dense().square().sum((-1, -2))
        gain, cross = self.gain, torch.zeros_like(self.log_decay)
        keys, values = gain.factors()
        for r in range(gain.rank):
            rec = Recurrence(keys[:, :, None, r], self.log_decay[..., None])
            before, _ = chunked(rec, self._one_head, read="next")
            cross = cross + (before[:, :, 0] * values[:, :, r]).sum(-1)
        grown = 2 * cross + gain.inner(gain)
        return decayed_sum(grown[..., None], 2 * self.log_decay)[..., 0].clamp_min(0)

    def sum(self) -> Float[Tensor, "d_key d_value"]:
        """The sum of all states, over sequences and tokens."""
        if not self.one_decay:
            return self.dense().sum((0, 1))
        # How often each token's gain is counted: in its own state and, decayed, in all later ones.
        ones = torch.ones_like(at_least_float32(self.log_decay))[..., None]
        later = torch.cat([self.log_decay[:, 1:], torch.zeros_like(self.log_decay[:, :1])], 1)
        counts = decayed_sum(ones.flip(1), later.flip(1)).flip(1)[..., 0]
        keys, values = (self.gain * counts).factors()
        return keys.flatten(0, -2).T @ values.flatten(0, -2)

    def at(self, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d_key d_value"]:
        """The states of single tokens, built: ``d_key * d_value`` numbers each, and work in proportion to ``pos``."""
        seen = torch.arange(self.shape[1], device=self.log_decay.device) <= positions[:, None]
        log_decay = at_least_float32(self.log_decay[rows])
        to_end = torch.where(seen if self.one_decay else seen[..., None], log_decay, 0)
        # The decay after each token: a sum over later tokens only, so that one strong decay before takes no digits.
        after = to_end.flip(1).cumsum(1).flip(1)
        after = torch.cat([after[:, 1:], torch.zeros_like(after[:, :1])], 1).exp() * (
            seen if self.one_decay else seen[..., None]
        )
        keys, values = (at_least_float32(x) for x in self.gain[rows].factors())
        keys = keys * (after[..., None, None] if self.one_decay else after[..., None, :])
        return keys.flatten(1, 2).mT @ values.flatten(1, 2)

    def dense(self) -> Float[Tensor, "batch pos d_key d_value"]:
        """Every state, built: ``d_key * d_value`` numbers per token."""
        reads = torch.zeros_like(self.gain.factors()[0][:, :, :1])
        rec = Recurrence(reads, self.log_decay[:, :, None])
        return torch.cat(list(states(rec, self._one_head)), 1)

    def pieces(
        self, step: int, initial: Float[Tensor, "batch d_key d_value"] | None = None
    ) -> Iterator[Float[Tensor, "batch piece d_key d_value"]]:
        """Every state, built ``step`` tokens at a time, so that no more than those are held in memory.

        ``initial`` is the state before the first token, None for zero.
        """
        state = initial
        for start in range(0, self.shape[1], step):
            here = (slice(None), slice(start, start + step))
            piece = States(self.gain[here], self.log_decay[here])
            S = piece.dense()
            if state is not None:  # a state is linear in the one before and what was gained since
                kept = piece.log_decay.cumsum(1).exp()
                S = S + (kept[..., None, None] if self.one_decay else kept[..., None]) * state[:, None]
            state = S[:, -1].clone()  # a copy, so that the piece can be freed
            yield S

    @property
    def _one_head(self) -> Write:
        """The gain, ``[batch, pos, 1]``, as the recurrence takes it."""
        return Write(self.gain.key[:, :, None], self.gain.value[:, :, None], rank=self.gain.rank)


def delta_of(rec: Recurrence, write: Write, state: Tensor | None, total: Write | None = None, rank: int = 1) -> Write:
    """What the state gains beyond decay: the native write, and what is erased, ``k v^T + a (b^T S_{t-1})``.

    Equal to the native write where nothing is erased. Otherwise twice its rank; or with ``rank=1`` of its rank, where
    the erase writes along its keys (``a = -c k``, as in delta rules): ``k delta^T`` with ``delta = v - c S_{t-1}^T b``.
    ``total`` is what was really written, if that was not ``write``: it is what later tokens erase from.
    """
    if rec.a is None:
        return write
    erased = erase_reads(rec, total or write, state)
    if rank > 1:
        return in_terms(*(x.view(*write.shape, -1, x.shape[-1]) for x in (rec.a, erased))) + write
    a, k = rec.a.view_as(write.key), write.key  # the native write's keys are those of the erase
    c = (a * k).sum(-1) / (k * k).sum(-1).clamp_min(1e-30)
    return replace(write, value=write.value + c[..., None] * erased.view_as(write.value))


@dataclass(frozen=True, eq=False)
class Dynamics:
    """What the memory of one layer went through in one pass, ``[batch, pos, head]``; nothing is built until asked.

    Attributes:
        recurrence: decay and erase. (Its reads play no part in states.)
        native: what the model wrote.
        total: what was written, edits included; `native` itself if nothing was edited.
        initial: the state before the first token, None for zero.
        delta_rank: terms that a token's state gains beyond its decay for each of its write, see `Rule`.
        dense: position -> what hooks on the state added to it; see `kernels.chunked`.
    """

    recurrence: Recurrence
    native: Write
    total: Write
    initial: Float[Tensor, "batch head d_key d_value"] | None = None
    delta_rank: int = 1
    dense: Mapping[int, Float[Tensor, "batch head d_key d_value"]] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: Rule, values: Mapping[str, Tensor]) -> Dynamics:
        """From a zero state, and the canonical quantities that the states of a rule depend on (`Rule.state_inputs`)."""
        k = values["k"]  # reads play no part in states
        none: dict[str, Any] = {**dict.fromkeys(rule.reads), "q": k if k.ndim == 4 else k[:, :, :, 0]}
        rec = rule.recurrence({**values, **none}.__getitem__)
        native = rule.write(values.__getitem__)
        return cls(rec, native, native, delta_rank=rule.delta_rank)

    def heads(self, heads: Sequence[int]) -> Dynamics:
        """The same, for some heads only."""
        where = index_of(heads)
        some = (slice(None), slice(None), where)
        native = self.native[some]
        return Dynamics(
            self.recurrence[some],
            native,
            native if self.total is self.native else self.total[some],
            None if self.initial is None else self.initial[:, where],
            self.delta_rank,
            {t: E[:, where] for t, E in self.dense.items()},
        )

    def delta(self) -> Write:
        """What the model itself adds to each token's state beyond decay, see `delta_of`.

        An edit at a token is not part of it; edits before that token act through the state that it finds.
        """
        return delta_of(self.recurrence, self.native, self.initial, self.total, self.delta_rank)

    def states(self, head: int) -> States:
        """The states of one head, from a zero state, edits included.

        Raises:
            ValueError: a hook changed the states as a whole, so that they are not made of writes.
        """
        if self.dense:
            raise ValueError("a hook on the state changed it: such states are not made of writes")
        one = self.heads([head])
        delta = one.delta()[:, :, 0]
        gain = delta if one.total is one.native else delta + (one.total - one.native)[:, :, 0]
        return States(gain, one.recurrence.log_decay[:, :, 0])

    def states_at(self, columns: Sequence[int]) -> Float[Tensor, "batch n head d_key d_value"]:
        """The states after the tokens in these columns of the pass, built; edits included."""
        return states_at(self.recurrence, self.total, columns, self.initial, dense=self.dense)

    def each_state(self) -> Iterator[Float[Tensor, "batch head d_key d_value"]]:
        """Every state in turn, built one at a time; changes of the state as a whole (`dense`) left out."""
        return states(self.recurrence, self.total, self.initial)
