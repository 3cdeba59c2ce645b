"""Reads that do not see what some tokens wrote: what to hide, and what that is in one call of a recurrence."""

from __future__ import annotations

from dataclasses import dataclass

from writesae.hooks.clock import Pass
from writesae.hooks.families.base import KernelCall
from writesae.hooks.interventions import Attached, Intervention, Moment, some_of
from writesae.hooks.positions import Positions, PositionSet, beams, first_column, sent
from writesae.hooks.response import Record, Unread, kept_of
from writesae.recurrence import Read
from writesae.recurrence.write import index_of


@dataclass(frozen=True, kw_only=True)
class Knockout(Intervention):
    """Some tokens do not read what some earlier tokens wrote. Everybody else reads as before, and the state stays as
    it is.

        o_t -= sum over sources j < t of pattern[t, j] written_j            (`ActivationCache.pattern`)

    So what is missing at a target is all that is left of the sources' writes by then, after decays and erases. Nothing
    else changes in the layer: what later tokens erase is still what they erased. This is attention knockout (Geva et
    al. 2304.14767), which Mamba Knockout (Endy et al. 2505.24244) brought to recurrent models. `Delete` is the edit
    that takes the write away from every later read.

    It says itself at which tokens it acts, so `intervene` takes no ``positions`` with it. A target reads its own write
    in any case. What is hidden is the native write, as hooks left it: what other interventions add to it is read, and
    so is what they put in its place. Two knockouts of the same write and read subtract it twice.

    Attributes:
        sources: the tokens that are not read: what ``positions`` of `intervene` may be.
        targets: the tokens that do not read them, likewise; None: every token after a source.
    """

    sources: Positions
    targets: Positions = None

    def places(self, positions: Positions, read: Read) -> tuple[PositionSet, PositionSet | None]:
        if positions is not None or read != "same":
            given = f"read={read!r}" if positions is None else f"positions={positions!r}"
            raise ValueError(
                f"{given} with a Knockout, which says itself who does not read whom: leave it out, and give "
                f"sources= and targets= (open a block of its own for other edits)"
            )
        sources, targets = PositionSet(self.sources), PositionSet(self.targets)
        (first, last), (first_read, last_read) = sources.ends, targets.ends
        listed, listed_reads = sources.wanted is not None, targets.wanted is not None
        if len(last) == len(last_read) or 1 in (len(last), len(last_read)):  # else, they can't be of one batch
            never_read = (last if listed else first) >= last_read
            nothing_hidden = (first_read if listed_reads else last_read) <= first
            if bool((never_read | nothing_hidden).any()):
                raise ValueError(
                    f"sources={self.sources!r} and targets={self.targets!r}: a token reads what earlier ones wrote, so "
                    f"each source needs a target after it, and each target a source before it"
                )
        return sources, targets

    def edit(self, now: Moment) -> None:
        return None


def unread(knockout: Attached, call: KernelCall, record: Record, n_hooked: int, now: Pass) -> Unread | None:
    """What the targets of a knockout do not see of the memory; None if no target is here or may still come.

    Args:
        knockout: in force.
        call: of the recurrence.
        record: its edits, the first ``n_hooked`` of which come from hooks on the write.
        now: the pass. What sources leave in the memory goes with it, and with its cache.

    Raises:
        ValueError: sources have been fed where they were not noted, or beams exchange what was.
    """
    assert knockout.targets is not None
    positions = now.positions_on_cpu()
    (sources, _), (targets, _) = (places.match(positions) for places in knockout.places)
    (missed, _), (_, later) = (places.outside(positions) for places in knockout.places)
    n_pos, before, after_last = positions.shape[1], now.unread_before(knockout), first_column(targets.flip(1))
    if after_last is None and not later:
        return None
    if missed and before is None:
        raise ValueError(
            f"{knockout.what}: its sources were fed in an earlier call, outside of this block or into another "
            f"cache, so what they wrote can't be told from the rest of the memory. Feed sources and targets in the "
            f"same block, with the same cache"
        )
    if before is not None and beams() > 1:
        raise ValueError(
            f"{knockout.what}: a target after the prompt, and several beams or sequences per text, which exchange "
            f"their memories. Give targets in the prompt, or generate one sequence per text"
        )
    start, end = first_column(sources) if before is None else 0, n_pos if later else n_pos - (after_last or 0)
    if start is None or start >= end:
        return None
    own = record.write or call.write()
    kept, device = kept_of(own, record.edits[n_hooked:]), own.value.device
    heads = some_of(knockout.heads, own.shape[2])
    there = sent(sources, device)[..., None].to(own.value.dtype)
    hidden = (own * (there.expand(own.shape) if kept is None else kept * there))[:, :, index_of(heads)]
    made = Unread.of(call.recurrence, heads, hidden, sent(targets, device), slice(start, end), before)
    if later:
        now.unread[knockout] = made.state
    return made
