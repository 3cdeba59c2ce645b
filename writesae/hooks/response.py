"""The algebra of edits: what they change of a layer's reads and states. No model and no module in sight.

Decay and erase do not depend on the state, so a layer is linear in what it writes: an edit ``E`` changes outputs and
states by the same recurrence run on ``E`` alone, for the edited heads only and from the first edited token on.

A native write that an edit takes out is not subtracted afterwards but never made: the native function gets ``v = 0``
there (`kept_of`). A difference of nearly equal numbers would leave rounding errors, which the norm behind the
recurrence blows up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from writesae.recurrence import Read, Recurrence, Write, at_least_float32
from writesae.recurrence.kernels import chunked
from writesae.recurrence.write import index_of, of_rank

OfHeads: TypeAlias = Callable[[Sequence[int] | None], Recurrence]


@dataclass
class Edit:
    """What was written in one call, beside the native write or instead of it.

    Attributes:
        heads: the heads written to, None for all.
        write: what was written from token ``start`` on, ``[batch, pos, head]``; None for nothing.
        read: which read first sees it.
        start: the first token.
        instead: 1 where it comes instead of the native write, 0 where it comes beside it; None for beside it
            everywhere.
    """

    heads: tuple[int, ...] | None
    write: Write | None
    read: Read
    start: int
    instead: Float[Tensor, "batch pos head"] | None = None

    @property
    def index(self) -> tuple[Any, ...]:
        """Its heads and tokens, in something that has all of them ``[batch, pos, head]``."""
        return slice(None), slice(self.start, None), index_of(self.heads)

    def to(self, device: torch.device | str) -> Edit:
        """The same on another device."""
        return replace(self, write=_moved(self.write, device), instead=_moved(self.instead, device))

    @classmethod
    def of_tokens(
        cls,
        heads: Sequence[int],
        read: Read,
        made: Sequence[tuple[int, Write]],
        mask: Bool[Tensor, "batch pos"],
        replaces: bool,
    ) -> Edit:
        """Writes of single tokens ``(token, [batch, 1, head])``, of any ranks, as one edit from the first on."""
        rank = max(write.rank for _, write in made)
        made = [(t, of_rank(write, rank)) for t, write in made]
        start, first = made[0]
        where = torch.tensor([t - start for t, _ in made], device=mask.device)

        def spread(x: Tensor, parts: list[Tensor]) -> Tensor:
            full = x.new_zeros(x.shape[0], mask.shape[1] - start, *x.shape[2:])
            return full.index_copy(1, where, torch.cat(parts, 1))

        write = Write(
            spread(first.key, [w.key for _, w in made]), spread(first.value, [w.value for _, w in made]), first.rank
        )
        instead = mask[:, start:, None].to(write.value.dtype).expand(write.shape) if replaces else None
        return cls(tuple(heads), write, read, start, instead)


@dataclass
class Record:
    """What one call's states depend on beside the canonical quantities. See `ActivationCache.state`.

    Attributes:
        initial_state: before the call, None if zero.
        edits: made in it.
        dense: what hooks on the state added to it, by token.
        write: what hooks made of the native write, None if nothing.
    """

    initial_state: Float[Tensor, "batch head d_key d_value"] | None
    edits: list[Edit]
    dense: dict[int, Float[Tensor, "batch head d_key d_value"]]
    write: Write | None

    def to(self, device: torch.device | str) -> Record:
        """The same on another device."""
        edits, dense = [edit.to(device) for edit in self.edits], {t: E.to(device) for t, E in self.dense.items()}
        return Record(_moved(self.initial_state, device), edits, dense, _moved(self.write, device))


@dataclass
class Unread:
    """What some reads of one call do not see of the memory: what certain tokens wrote, and what became of it.

    Attributes:
        heads: the heads of these reads, None for all.
        start: the first token of ``o``.
        o: what each read would have seen of it, zero at reads that see it.
        state: what these writes have left in the state after the last of these tokens.
    """

    heads: tuple[int, ...] | None
    start: int
    o: Float[Tensor, "batch pos head d_value"]
    state: Float[Tensor, "batch head d_key d_value"]

    @classmethod
    def of(
        cls,
        recurrence: OfHeads,
        heads: tuple[int, ...] | None,
        hidden: Write,
        reads: Bool[Tensor, "batch pos"],
        tokens: slice,
        before: Float[Tensor, "batch head d_key d_value"] | None,
    ) -> Unread:
        """The recurrence run on the hidden writes alone: erased and decayed as they are in the memory itself.

        Args:
            recurrence: decay, erase and reads of the heads it is given, None for all.
            heads: whose reads.
            hidden: what is not to be read, all tokens and these heads; zero for what is.
            reads: the tokens that do not read it.
            tokens: from the first hidden write to the last such read.
            before: what hidden writes of earlier calls have left in the state.
        """
        o, state = chunked(recurrence(heads)[:, tokens], hidden[:, tokens], before, read="next")
        return cls(heads, tokens.start, o * reads[:, tokens, None, None], state)


def kept_of(native: Write, edits: Sequence[Edit]) -> Float[Tensor, "batch pos head"] | None:
    """How much of each write is left by edits that come instead: 1, 0, or -1 if there are two. None if all is."""
    if all(edit.instead is None for edit in edits):
        return None
    kept = native.value.new_ones(native.shape)
    for edit in edits:
        if edit.instead is not None:
            kept[edit.index] -= edit.instead
    return kept


def respond(
    recurrence: OfHeads, native: Write, record: Record, o: Tensor, state: Tensor | None, unread: Sequence[Unread] = ()
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """Add the linear response of all edits to the outputs and final state of what is left of the native writes.

    Args:
        recurrence: decay, erase and reads of the heads it is given, None for all.
        native: what the model itself writes, all heads and tokens.
        record: the edits of this call.
        o, state: what the native function returned for the writes that were left to it.
        unread: what some reads do not see. It stays in the state.
    """
    groups: dict[tuple[Any, ...], list[Edit]] = {}
    responses: list[tuple[Any, int, Tensor, Tensor | None]] = []
    for edit in record.edits:
        if edit.write is not None:
            groups.setdefault((edit.heads, edit.read), []).append(edit)
        if edit.instead is not None and edit.read == "next":  # the token's own read still sees the native write
            rec = recurrence(edit.heads)[:, edit.start :]
            if rec.sees(edit.read) == "next":
                keys, values = (native[edit.index] * edit.instead).factors()
                seen = rec.joined(rec.queries() @ keys.mT @ values)
                responses.append((edit.heads, edit.start, seen, None))
    for (heads, read), edits in groups.items():
        start = min(edit.start for edit in edits)
        rec = recurrence(heads)[:, start:]
        write = _sum_from(edits, start)
        responses.append((heads, start, *chunked(rec, write, read=read)))
    if record.dense:
        rec = recurrence(None)
        responses.append((None, 0, *chunked(rec, native * 0.0, dense=record.dense)))
    responses += [(part.heads, part.start, -part.o, None) for part in unread]
    dtype, o = o.dtype, at_least_float32(o).clone()  # rounded once, when all is added
    for heads, start, extra, extra_state in responses:
        o[:, start : start + extra.shape[1], index_of(heads)] += extra
        if state is not None and extra_state is not None:
            if heads is None:
                state = state + extra_state
            else:
                state = state.clone()
                state[:, index_of(heads)] += extra_state.to(state.dtype)
    return o.to(dtype), state


def total_write(native: Write, edits: Sequence[Edit]) -> Write:
    """What is left of the native write, and all edits, as one write of higher rank, all heads and tokens."""
    kept = kept_of(native, edits)
    total = native if kept is None else native * kept
    for edit in edits:
        if edit.write is None:
            continue
        rank, full = edit.write.rank, []
        for x in edit.write.factors():
            wide = x.new_zeros(*native.shape, *x.shape[-2:])
            wide[edit.index] = x
            full.append(wide if rank > 1 else wide.squeeze(-2))
        total = total + Write(*full, rank=rank)
    return total


def _sum_from(edits: Sequence[Edit], start: int) -> Write:
    """The sum of edits of the same heads, over the tokens from ``start`` on."""
    padded = []
    for edit in edits:
        assert edit.write is not None
        factors = (edit.write.key, edit.write.value)
        before = [x.new_zeros(x.shape[0], edit.start - start, *x.shape[2:]) for x in factors]
        key, value = (torch.cat(pair, 1) for pair in zip(before, factors, strict=True))
        padded.append(Write(key, value, edit.write.rank))
    return functools.reduce(lambda x, y: x + y, padded)


def _moved(x: Any, device: torch.device | str) -> Any:
    return None if x is None else x.to(device)
