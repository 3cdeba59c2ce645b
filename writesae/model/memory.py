"""What a model remembers after a text, as a thing of its own: kept, saved, exchanged head by head, and gone on from.

A `Memory` is tensors and plain settings alone. It holds recurrent states in the canonical layout of all architectures,
and beside them what transformers' cache holds of each layer (convolution states, keys and values), by the names that
these have there. A cache is made of it for each pass, so that no pass changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks import Site
from writesae.jobs.tensors import read_tensors, write_tensors
from writesae.model.origin import Origin, listed
from writesae.models.devices import device_named, dtype_named

FILE, VERSION = "memory", 1  # what such a file is called in its own words, and the version of its format

Heads = Iterable[tuple[int, int]] | None
"""Pairs ``(layer, head)``; None for all of every recurrent layer."""


@dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """All that a model remembers after a text: `HookedRecurrentModel.memory` makes one. It never changes; every method
    returns a new one.

    >>> memory = model.memory("The state of the Union")
    >>> model.generate(" is", memory=memory, max_new_tokens=5)
    >>> model.generate(" is", memory=memory.with_heads(other, [(2, 0), (2, 1)]), max_new_tokens=5)

    Attributes:
        origin: the model that made it: its name, recurrent layers and weights.
        states: layer -> the state of each head.
        others: what else is remembered, by layer and name: convolution states (``"0.conv_states.0"``), keys and values
            of attention layers (``"2.keys"``), Gated Slot Attention's memory of keys (``"0.recurrent_states.1"``).
        settings: what transformers' cache notes beside these, by the same kind of name.
        ids: the tokens that were read, padding included.
        mask: 1 where a token is real, 0 where it is padding on the left; None if all are real.
        dtype: of the model that made it.
    """

    origin: Origin
    states: Mapping[int, Float[Tensor, "batch head d_key d_value"]]
    others: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    dtype: torch.dtype

    # --- what it is ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        sizes = sorted({f"{s.n_heads} heads of {s.d_key} x {s.d_value}" for s in self.sites})
        attention = sorted({int(name.split(".")[0]) for name, x in self.others.items() if ".keys" in name and x.ndim})
        read = f"{self.n_tokens} tokens" + ("" if len(self) == 1 else f" of each of {len(self)} texts")
        more = f"; keys and values of layers {listed(attention)}" if attention else ""
        size = sum(x.numel() * x.element_size() for x in (*self.states.values(), *self.others.values()))
        return (
            f"Memory({self.origin.model_id} after {read}; states of layers {listed(self.states)}, "
            f"{', '.join(sizes)}{more}; {size / 2**20:.1f} MiB on {self.device})"
        )

    def __len__(self) -> int:
        """How many texts it is of."""
        return len(self.ids)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The recurrent layers."""
        return self.origin.sites

    @property
    def n_tokens(self) -> int:
        """Tokens that were read, padding included."""
        return self.ids.shape[1]

    @property
    def position(self) -> Int[Tensor, " batch"]:
        """The position of each text's next token: how many real tokens were read."""
        if self.mask is None:
            return torch.full((len(self),), self.n_tokens, device=self.ids.device)
        return self.mask.sum(-1)

    @property
    def device(self) -> torch.device:
        """Where it is (the first of its states, if layers lie on several devices)."""
        return next(iter(self.states.values())).device

    def state(self, layer: int) -> Float[Tensor, "batch head d_key d_value"]:
        """The states of a recurrent layer, rows are keys, whatever layout the model keeps them in. A copy.

        Raises:
            IndexError: the layer is not recurrent.
        """
        return self.states[self._site(layer).layer].clone()

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Memory:
        """The memory of one text, or of some of several.

        Raises:
            IndexError: no such text.
        """
        every = range(len(self))
        try:
            chosen = [every[rows]] if isinstance(rows, int) else [every[i] for i in _each(rows, len(self))]
        except IndexError:
            raise IndexError(f"text {rows!r} of a memory of {len(self)}: allowed are 0 to {len(self) - 1}") from None
        return self._rows(torch.tensor(chosen))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> Memory:
        """The same on another device, or with its numbers in another dtype."""
        place = None if device is None else device_named(device)
        kind = None if dtype is None else dtype_named(dtype, place)
        if isinstance(kind, str):
            raise ValueError("dtype='auto' is of checkpoints; name the dtype that the memory should have")

        def moved(x: Tensor) -> Tensor:
            return x.to(place, kind if x.is_floating_point() else None)

        made = self._map(moved)
        if kind is None:
            return made
        settings = {name: kind if isinstance(value, torch.dtype) else value for name, value in self.settings.items()}
        return replace(made, dtype=kind, settings=settings)

    # --- changing it --------------------------------------------------------------------------------------------------

    def with_state(
        self, layer: int, state: Float[Tensor, "*batch head d_key d_value"], heads: Sequence[int] | None = None
    ) -> Memory:
        """With other states in a layer.

        Args:
            layer: a recurrent layer.
            state: ``[batch, head, d_key, d_value]``; without the batch, or with a batch of 1, for all texts.
            heads: which heads these are, in order; None for all of the layer.

        Raises:
            IndexError: no such layer or head.
            ValueError: another shape, or a tensor that wants a gradient.
        """
        site = self._site(layer)
        heads = list(range(site.n_heads)) if heads is None else list(heads)
        for head in heads:
            site.check_head(head)
        if state.requires_grad:
            raise ValueError(
                "the states of a memory are constants, and this tensor wants a gradient: give state.detach(), or train "
                "an initial state with writesae.tune_memory"
            )
        wanted = (len(self), len(heads), site.d_key, site.d_value)
        batch = len(state) if state.ndim == 4 else 1
        if state.ndim not in (3, 4) or state.shape[-3:] != wanted[1:] or batch not in (1, len(self)):
            raise ValueError(
                f"state {list(state.shape)} for {len(heads)} heads of layer {layer}: give {list(wanted)}, which is "
                f"[batch, head, d_key, d_value], whatever layout the model keeps states in"
            )
        new = self.states[layer].clone()
        new[:, heads] = state.to(new).expand(wanted)
        return replace(self, states={**self.states, layer: new})

    def with_heads(self, other: Memory, heads: Heads) -> Memory:
        """With the states of some heads from another memory; all else (other heads, convolutions, keys and values,
        position) stays.

        Args:
            other: a memory of the same model, of as many texts or of one.
            heads: pairs ``(layer, head)``; None for all.

        Raises:
            IndexError: no such layer or head.
            ValueError: the memory of another model, or of another number of texts.
        """
        return self.blend(other, 1.0, heads)

    def blend(self, other: Memory, amount: float, heads: Heads = None) -> Memory:
        """States on the way from these to another memory's, ``(1 - amount) S + amount S_other``; all else stays.

        Args:
            other: a memory of the same model, of as many texts or of one.
            amount: 0 for these states, 1 for the other's; beyond either, states are extrapolated.
            heads: pairs ``(layer, head)``; None for all.

        Raises:
            IndexError: no such layer or head.
            ValueError: the memory of another model, or of another number of texts.
        """
        self._check_like(other)
        return self._changed(heads, lambda S, layer, h: S.lerp(other.states[layer][:, h].to(S), amount))

    def zeroed(self, heads: Heads = None) -> Memory:
        """With the states of some heads, pairs ``(layer, head)``, at zero; None for all. Convolutions, keys and values
        stay."""
        return self._changed(heads, lambda S, layer, h: torch.zeros_like(S))

    def _changed(self, heads: Heads, new: Callable[[Tensor, int, list[int]], Tensor]) -> Memory:
        chosen: dict[int, list[int]] = {}
        pairs = ((s.layer, h) for s in self.sites for h in range(s.n_heads)) if heads is None else heads
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"heads are pairs (layer, head), as [(2, 0), (2, 1)]; got {pair!r}")
            self._site(pair[0]).check_head(pair[1])
            chosen.setdefault(pair[0], []).append(pair[1])
        states = dict(self.states)
        for layer, some in chosen.items():
            states[layer] = states[layer].clone()
            states[layer][:, some] = new(states[layer][:, some], layer, some)
        return replace(self, states=states)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file, which says what it is of, and is there whole or not at all.

        Raises:
            ValueError: the model that made it is gone, so its weights cannot be named.
        """
        about = {
            "version": VERSION,
            "origin": self.origin.to_dict(),
            "settings": {name: _written(value) for name, value in self.settings.items()},
            "dtype": _written(self.dtype),
            "position": self.position.tolist(),
        }
        tensors = {f"{layer}.state": x for layer, x in self.states.items()} | dict(self.others) | {"ids": self.ids}
        write_tensors(Path(path), FILE, tensors | ({} if self.mask is None else {"mask": self.mask}), about)

    @classmethod
    def load(cls, path: str | Path) -> Memory:
        """Read a file that `save` wrote, onto the CPU. A pass takes it to where the model is.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, of another kind, or of a later version.
        """
        path = Path(path)
        tensors, about = read_tensors(path, FILE, "memory file", "save the memory again")
        if about["version"] != VERSION:
            raise ValueError(
                f"{path} is of version {about['version']} of memory files, and this writesae reads {VERSION}: update "
                f"writesae, or save the memory again"
            )
        ids, mask = tensors.pop("ids"), tensors.pop("mask", None)
        states = {int(name.split(".")[0]): tensors.pop(name) for name in list(tensors) if name.endswith(".state")}
        return cls(
            Origin.from_dict(about["origin"]),
            dict(sorted(states.items())),
            tensors,
            {name: _read(value) for name, value in about["settings"].items()},
            ids,
            mask,
            _read(about["dtype"]),
        )

    # --- parts --------------------------------------------------------------------------------------------------------

    def _site(self, layer: int) -> Site:
        found = next((site for site in self.sites if site.layer == layer), None)
        if found is None:
            raise IndexError(f"layer {layer!r} is not recurrent; recurrent layers are {[s.layer for s in self.sites]}")
        return found

    def _check_like(self, other: Memory) -> None:
        if not isinstance(other, Memory):
            raise TypeError(f"give another Memory; got {type(other).__name__}")
        self.origin.check_same(other.origin)
        if len(other) not in (1, len(self)):
            raise ValueError(
                f"this is a memory of {len(self)} texts and the other of {len(other)}: take as many, or one of them, "
                f"other[0]"
            )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Memory:
        """``fn`` of every tensor."""
        of_all = lambda tensors: {name: fn(x) for name, x in tensors.items()}  # noqa: E731
        mask = None if self.mask is None else fn(self.mask)
        return replace(self, states=of_all(self.states), others=of_all(self.others), ids=fn(self.ids), mask=mask)

    def _rows(self, rows: Int[Tensor, " n"]) -> Memory:
        """Copies of some texts' memories."""
        of = lambda x: x.index_select(0, rows.to(x.device))  # noqa: E731
        states, mask = {layer: of(S) for layer, S in self.states.items()}, None if self.mask is None else of(self.mask)
        others = {name: _of_rows(name, x, rows) for name, x in self.others.items()}
        return replace(self, states=states, others=others, ids=of(self.ids), mask=mask)


def _of_rows(name: str, x: Tensor, rows: Tensor) -> Tensor:
    if x.ndim < 2:  # a setting, or what an attention layer has before its first token
        return x.clone()
    axis = 1 if name.endswith("position_ids") else 0  # of an indexer, [dimensions, batch, pos]
    return x.index_select(axis, rows.to(x.device))


def _each(rows: slice | Sequence[int], n: int) -> Sequence[int]:
    return range(*rows.indices(n)) if isinstance(rows, slice) else rows


def _written(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"device": None} if isinstance(value, torch.device) else value


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return getattr(torch, value["dtype"]) if "dtype" in value else torch.device("cpu")
