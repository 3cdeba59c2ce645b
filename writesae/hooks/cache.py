"""What `run_with_cache` returns: every quantity by name, writes as factors, states rebuilt only where asked."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.clock import Clock
from writesae.hooks.names import name_of, resolve
from writesae.hooks.points import Value
from writesae.hooks.positions import PAD
from writesae.hooks.response import Record, total_write
from writesae.hooks.tap import Tap
from writesae.recurrence import Write
from writesae.recurrence.dynamics import Dynamics
from writesae.recurrence.kernels import chunked


class ActivationCache(Mapping[str, Any]):
    """Quantities of one forward pass, ``[batch, pos, head, ...]``, as they went on after all hooks.

    ``cache["blocks.9.mixer.hook_k"]`` and ``cache["k", 9]`` are the same; `write`, `delta` and `state` are worked out
    from what is there. Positions count real tokens; ``cache.positions [batch, pos]`` says which token is which.

    Args:
        taps: of the model.
        names: of all its hook points.
        aliases: other names of them, see `writesae.hooks.names.resolve`.
        device: where values are kept; None: where they are.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        names: Collection[str],
        aliases: Mapping[int, Mapping[str, str]],
        device: torch.device | str | None = None,
    ):
        self._taps = {tap.site.layer: tap for tap in taps}
        self._names, self._aliases, self._device = names, aliases, device
        self._values: dict[str, Value] = {}
        self._records: dict[int, Record] = {}
        self._positions: Tensor | None = None
        self.has_batch_dim = True

    def store(self, name: str, value: Value, clock: Clock | None = None) -> None:
        """Take in a value; ``clock`` says which tokens are which."""
        self._values[name] = value if self._device is None else value.to(self._device)
        if clock is not None and self._positions is None:
            self._positions = clock.try_positions()

    def record(self, tap: Tap, record: Record) -> None:
        """Take in what the states of a layer depend on beside its values."""
        self._records[tap.site.layer] = record if self._device is None else record.to(self._device)
        if self._positions is None:
            self._positions = tap.clock.try_positions()

    def detach(self) -> None:
        """Let go of the graph that gradients would go through."""
        self._values = {name: value.detach() for name, value in self._values.items()}

    def keep_only(self, names: Collection[str]) -> None:
        """Let go of all other values."""
        self._values = {name: value for name, value in self._values.items() if name in names}

    def remove_batch_dim(self) -> None:
        """Leave the batch dimension out of everything from here on.

        Raises:
            ValueError: there are several sequences in it.
        """
        first = next(iter(self._values.values()), None)
        if first is not None and first.shape[0] != 1:
            raise ValueError(f"remove_batch_dim with {first.shape[0]} sequences: it is for one")
        self.has_batch_dim = False

    def with_batch_dim(self) -> ActivationCache:
        """The same cache with the batch dimension in everything."""
        if self.has_batch_dim:
            return self
        whole = copy.copy(self)
        whole.has_batch_dim = True
        return whole

    def _shown(self, value: Any) -> Any:
        return value if self.has_batch_dim else value[0]

    @property
    def positions(self) -> Int[Tensor, "... pos"]:
        """The position of each token of the pass; -1 for padding."""
        if self._positions is None:
            raise ValueError("this pass's attention mask does not say which tokens are padding: pass a 2-D mask")
        return self._shown(self._positions)

    def __getitem__(self, name: str | tuple[str, int]) -> Any:
        return self._shown(self._value(name if isinstance(name, str) else name_of(*name)))

    def _value(self, name: str) -> Any:
        full = resolve(name, self._names, self._aliases)
        if full not in self._values:
            have = ", ".join(list(self._values)[:6]) or "nothing"
            raise KeyError(f"{full} was not cached; ask for it in names= (cached: {have} ...)")
        return self._values[full]

    def __contains__(self, name: object) -> bool:
        try:
            self[name]  # type: ignore[index]  # whatever it is, it is looked up
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} values of layers {sorted({int(n.split('.')[1]) for n in self})})"

    def write(self, layer: int) -> Write:
        """The native write ``k (beta v)^T`` of each token, factors ``[batch, pos, head]``, as hooks left it.

        Interventions come instead of it or beside it; they are not in it.
        """
        name = name_of("write", layer)
        if name in self._values:
            return self[name]
        rule = self._tap(layer).family.rule
        inputs = {q: self._value(name_of(q, layer)) for q in rule.state_inputs}
        return self._shown(self._records[layer].write or rule.write(inputs.__getitem__))

    def delta(self, layer: int) -> Write:
        """What each token's state gains beyond decay by itself: its write, and what it erases of the state it found.

        Delta rules: ``k delta^T`` with ``delta = beta (v - (decay S)^T k)``. Nothing erased: the write. RWKV-7: rank 2,
        with keys ``[a, k]`` and values ``[S^T b, v]``. ``S`` is the state that the token
        found, with all edits before; edits at the token itself are not in its delta.
        """
        return self._shown(self.dynamics(layer).delta())

    def pattern(self, layer: int, head: int | None = None) -> Float[Tensor, "..."]:
        """Who reads whom: how much of what each token wrote is in what each token reads, erases and decays included.

        ``pattern @ written == o`` for a text that began with an empty memory, with ``written`` the values of
        ``cache.write(layer)`` and ``o`` what the head reads (``hook_o``), if nothing edits the memory. Known as hidden
        or effective attention (Ali et al. 2403.01590); unlike attention it may be negative and need not sum to 1.
        It is the recurrence run on values that are one-hot in the position, so no state is built beyond one a chunk.

        Args:
            layer: a recurrent layer, whose recurrence's inputs are in the cache.
            head: a head, for ``[batch, query, key]``; None for all, ``[batch, head, query, key]``. Where a write has
                several values, as those of Gated DeltaProduct, there is a number for each in a last dimension, and
                ``o`` is the sum over these too. Where a token reads several times (Mamba-3's MIMO form), a dimension
                of reads comes last, and ``o`` is the sum over these, each times its ``hook_read_weights``.

        Raises:
            IndexError: no such layer or head.
        """
        tap = self._tap(layer)
        if head is not None:
            tap.site.check_head(head)
        heads = range(tap.site.n_heads) if head is None else [head]
        rule = tap.family.rule
        here = slice(None), slice(None), list(heads)
        rec = rule.recurrence(lambda quantity: self._value(name_of(quantity, layer)))[here]
        write = self._records[layer].write or rule.write(lambda quantity: self._value(name_of(quantity, layer)))
        keys = write[here].factors()[0].unbind(-2)
        one_hot = torch.eye(rec.n_pos, device=rec.q.device)[None, :, None].expand(*rec.q.shape[:3], -1)
        reads = rec.single_reads()
        of_each = [chunked(one, Write(key, one_hot))[0].transpose(1, 2) for key in keys for one in reads]
        several = [len(keys)] * (len(keys) > 1) + [len(reads)] * (rec.read_weights is not None)
        found = torch.stack(of_each, -1).unflatten(-1, several) if several else of_each[0]
        return self._shown(found if head is None else found[:, 0])

    def state(
        self, layer: int, positions: int | Sequence[int], heads: int | Sequence[int] | None = None
    ) -> Float[Tensor, "... n_positions head d_key d_value"]:
        """The states after the tokens at ``positions`` (negative ones count from each sequence's last token).

        One position or head is taken for a list of one.

        Rebuilt from the cached factors, edits included; costs ``d_key * d_value`` for what is asked, nothing else.

        Raises:
            IndexError: a sequence has no such position in this pass.
        """
        positions = [positions] if isinstance(positions, int) else positions
        heads = [heads] if isinstance(heads, int) else heads
        dynamics = self.dynamics(layer)
        if heads is not None:
            dynamics = dynamics.heads(heads)
        columns = self.columns(positions)
        wanted = sorted(set(columns.flatten().tolist()))
        found = dynamics.states_at(wanted)
        at = torch.tensor([[wanted.index(c) for c in row] for row in columns.tolist()], device=found.device)
        return self._shown(found[torch.arange(len(at), device=found.device)[:, None], at])

    def _tap(self, layer: int) -> Tap:
        if not isinstance(layer, int) or isinstance(layer, bool) or layer not in self._taps:
            raise IndexError(f"layer {layer} is not recurrent; recurrent layers are {sorted(self._taps)}")
        return self._taps[layer]

    def dynamics(self, layer: int) -> Dynamics:
        """What the memory of a layer went through in this pass, edits included."""
        rule, record = self._tap(layer).family.rule, self._records[layer]
        made = Dynamics.of(rule, {q: self._value(name_of(q, layer)) for q in rule.state_inputs})
        total = total_write(made.native, record.edits)
        return replace(made, total=total, initial=record.initial_state, dense=record.dense)

    def of_own_writes(self, layer: int) -> bool:
        """Whether the states of a layer are made of its native writes alone: no edits, and no memory from before."""
        record = self._records[layer]
        return not (record.edits or record.dense) and record.initial_state is None

    def columns(self, positions: Sequence[int]) -> Int[Tensor, "batch n"]:
        """Where in the pass each sequence's positions are (negative ones count from each sequence's last token).

        Raises:
            IndexError: a sequence has no such position in this pass.
        """
        if not all(isinstance(p, int) for p in positions):
            raise TypeError(f"positions={positions!r}: give a list of whole numbers, or a number")
        own = (self.positions if self.has_batch_dim else self.positions[None]).cpu()
        first, last = own.masked_fill(own == PAD, own.max() + 1).min(1).values, own.max(1).values
        asked = torch.tensor(list(positions)).long().expand(len(own), -1)
        asked = torch.where(asked < 0, last[:, None] + 1 + asked, asked)
        for row, p in ((asked < first[:, None]) | (asked > last[:, None])).nonzero()[:1].tolist():
            raise IndexError(
                f"position {list(positions)[p]} of sequence {row}: this pass has its positions "
                f"{int(first[row])} to {int(last[row])}"
            )
        return (own[:, None, :] == asked[:, :, None]).int().argmax(-1)
