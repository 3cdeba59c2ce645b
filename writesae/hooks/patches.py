"""What another run had, in the place of what this one has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.hooks.cache import ActivationCache
from writesae.hooks.interventions import Intervention, Moment, entries
from writesae.hooks.names import name_of
from writesae.hooks.positions import Positions, PositionSet
from writesae.hooks.quantities import RESIDUAL
from writesae.hooks.residual_edits import PointEdit, Tokens
from writesae.hooks.sites import Site
from writesae.recurrence import Read, Write
from writesae.recurrence.matrices import in_factors


@dataclass(frozen=True, eq=False)
class Patch:
    """Put a part of another run into this one: an interchange intervention (Geiger et al. 2106.02997).

    Causal tracing and activation patching are made of these.

    >>> _, cache = model.run_with_cache("... said Ahab")
    >>> with model.intervene(ws.Patch(cache, "write", 2, 0, at=17)): ...            # one head's write at one token
    >>> with model.intervene(ws.Patch(cache, "resid_post", 3, at=[17], source=[12])): ...

    It says itself at which tokens, so `intervene` gets no ``positions``.

    Attributes:
        cache: of the other run, with what is patched in it (for ``"write"`` and ``"state"``, the recurrence's inputs):
            one sequence for all, or as many as are run.
        what: ``"write"``, ``"state"`` (after the token), another hook point of a recurrence (``"k"``, ``"v"``,
            ``"log_decay"``, ``"o"``, ...) or of the residual stream (``"resid_post"``, ``"mixer_out"``, ...).
        layer: of both runs.
        head: a head, several, or None for all; None in the residual stream, which has none.
        at: positions in this run; None: all that the other run has.
        source: the position in the other run that belongs to each of ``at``; None: the same.

    Raises:
        KeyError: the cache lacks it.
        IndexError: no such layer, head or position.
        ValueError: ``source`` and ``at`` have not the same length, or a head in the residual stream.
    """

    cache: ActivationCache
    what: str
    layer: int
    head: int | Sequence[int] | None = None
    at: int | Sequence[int] | None = None
    source: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        at = self._at
        if len(self._source) != len(at):
            raise ValueError(
                f"at={self.at!r} and source={self.source!r}: give one position of the other run for each of this run"
            )
        if self.head is not None and self.what in RESIDUAL:
            raise ValueError(
                f"head={self.head!r}: {self.what} is of the residual stream, which has no heads: leave it out"
            )

    @property
    def _at(self) -> list[int]:
        if self.at is None:
            own = self.cache.positions
            return list(range(int(own.max()) + 1))
        return _listed(self.at)

    @property
    def _source(self) -> list[int]:
        return self._at if self.source is None else _listed(self.source)

    def edit(self) -> Intervention | PointEdit:
        """What it does, as an intervention in the memory or an edit at a hook point."""
        where, batch = PositionSet(self._at), self.cache.with_batch_dim()
        if self.what == "state":
            return PatchedState(self.layer, self.head, table=batch.state(self.layer, self._source), where=where)
        value: Any = batch.write(self.layer) if self.what == "write" else batch[self.what, self.layer]
        columns = batch.columns(self._source)
        table = value[torch.arange(len(columns))[:, None].to(columns.device), columns]
        if self.what == "write":
            return PatchedWrite(self.layer, self.head, table=table, where=where)
        heads = None if self.head is None else _listed(self.head)
        return PatchedPoint(name_of(self.what, self.layer), table, heads, where)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Patched(Intervention):
    """Of a memory: ``table [rows, n, head, ...]`` holds what each head gets at each position of ``where``."""

    where: PositionSet

    def places(self, positions: Positions, read: Read) -> tuple[PositionSet, PositionSet | None]:
        check_says_itself(positions)
        return self.where, None

    def check(self, site: Site, positions: PositionSet) -> None:
        super().check(site, positions)
        n_heads, *sizes = self.size
        if [n_heads, *sizes] != [site.n_heads, site.d_key, site.d_value]:
            raise ValueError(
                f"the other run has {n_heads} heads with states {sizes[0]} x {sizes[1]} in layer {site.layer}, this "
                f"model {site.n_heads} with {site.d_key} x {site.d_value}: patch between runs of one model"
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """Heads, ``d_key`` and ``d_value`` of the other run."""
        raise NotImplementedError

    def _heads(self, n: int) -> list[int]:
        return list(range(n)) if self.head is None else _listed(self.head)


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchedWrite(_Patched):
    """Writes of another run instead of the native ones."""

    table: Write

    @property
    def replaces(self) -> bool:
        return True

    @property
    def size(self) -> tuple[int, int, int]:
        return self.table.shape[-1], self.table.d_key, self.table.d_value

    def edit(self, now: Moment) -> Write:
        table = self.table[:, :, self._heads(self.size[0])].to(now.write.key.device).to(now.write.key.dtype)
        return table[entries(table.shape[0], table.shape[1], now, f"a cache of {table.shape[0]} sequences")]


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchedState(_Patched):
    """States of another run: what is missing to them is added."""

    table: Float[Tensor, "rows n head d_key d_value"]

    @property
    def needs_state(self) -> bool:
        return True

    @property
    def size(self) -> tuple[int, int, int]:
        return self.table.shape[2], self.table.shape[3], self.table.shape[4]

    def edit(self, now: Moment) -> Write:
        table = self.table[:, :, self._heads(self.size[0])].to(now.write.key.device)
        wanted = table[entries(table.shape[0], table.shape[1], now, f"a cache of {table.shape[0]} sequences")]
        state = now.target("state")
        assert isinstance(state, Tensor)
        return in_factors(wanted - state)


@dataclass(frozen=True, eq=False)
class PatchedPoint(PointEdit):
    """What another run had at a hook point.

    Attributes:
        name: of the hook point.
        table: what each position of ``where`` gets, ``[rows, n, ...]``.
        heads: which are patched; None for all, or where there are none.
        where: at which tokens.
    """

    name: str
    table: Float[Tensor, "rows n ..."]
    heads: list[int] | None
    where: PositionSet

    @property
    def hook_name(self) -> str:
        return self.name

    def places(self, positions: Positions) -> PositionSet:
        check_says_itself(positions)
        return self.where

    def __call__(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        found = self.table.to(x)[
            tokens.entries(len(self.table), self.table.shape[1], f"a cache of {len(self.table)} sequences")
        ]
        if found.shape != x.shape:
            raise ValueError(
                f"{self.name} holds {list(x.shape[1:])} per token here and {list(found.shape[1:])} in the other run: "
                f"patch between runs of one model"
            )
        if self.heads is None:
            return found
        for head in self.heads:
            if not 0 <= head < x.shape[1]:
                raise IndexError(f"head {head} of {self.name}: it has heads 0 to {x.shape[1] - 1}")
        new = x.clone()
        new[:, self.heads] = found[:, self.heads]
        return new


def _listed(x: int | Sequence[int]) -> list[int]:
    """One or several, as a list."""
    return [x] if isinstance(x, int) else list(x)


def check_says_itself(positions: Positions) -> None:
    """Raise ValueError if ``positions`` are given to something that has its own."""
    if positions is not None:
        raise ValueError(
            f"positions={positions!r} with a Patch, which says itself where it acts: leave it out, and give at= (open "
            f"a block of its own for other edits)"
        )
