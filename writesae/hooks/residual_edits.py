"""Edits of the residual stream: by sparse autoencoders of it (those of SAELens, or what acts like one), or a vector.

They stand in the same ``with`` as edits of the memory::

    with model.intervene([Reconstruct(residual_sae), Substitute(write_sae)], positions=[17]): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.attachable import AttachableSAE
from writesae.hooks.positions import Positions, PositionSet, row_of_each

Strength: TypeAlias = float | int | Float[Tensor, "batch *n"]


def is_residual_sae(what: object) -> bool:
    """Whether it can be asked for what a residual SAE is asked for (a `WriteSAE` can, and reads something else)."""
    return not isinstance(what, AttachableSAE) and all(
        hasattr(what, name) for name in ("encode", "decode", "W_dec", "cfg")
    )


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that an edit acts on.

    Attributes:
        batch: how many sequences run.
        row: of each token, its sequence.
        index: of each token, its place among the positions asked for; None where these are all tokens, or a slice.
    """

    batch: int
    row: Int[Tensor, " n"]
    index: Int[Tensor, " n"] | None

    def entries(self, rows: int, n: int, what: str) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Where each token's entry is in a table ``[rows, n]``: a row for each sequence, a column for each position.

        Raises:
            ValueError: so many rows do not fit the batch; ``what`` says what they are.
        """
        row = row_of_each(rows, self.batch, what).to(self.row.device)[self.row]
        return row, torch.zeros_like(row) if n == 1 or self.index is None else self.index

    def strength(self, scale: Strength, like: Tensor) -> float | int | Tensor:
        """A scale for each token, to go with ``like [n, ...]``, from a number, ``[batch]`` or ``[batch, n]``."""
        if not isinstance(scale, Tensor):
            return scale
        table = scale.reshape(len(scale), -1).to(like)
        found = table[self.entries(len(table), table.shape[1], f"scale {list(scale.shape)}")]
        return found.reshape(-1, *(1,) * (like.ndim - 1))


class PointEdit(ABC):
    """What is done to the values at one hook point, at the tokens asked for."""

    @property
    @abstractmethod
    def hook_name(self) -> str:
        """The hook point where it acts, by any of its names."""

    @property
    def fitted(self) -> Any:
        """The SAE that has to be where the layer is; None if there is none."""
        return None

    def places(self, positions: Positions) -> PositionSet:
        """The tokens it acts on."""
        return PositionSet(positions)

    @abstractmethod
    def __call__(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        """What stands in the place of ``x``, in its dtype and on its device."""


class ResidualEdit(PointEdit):
    """What is done to the activations at one point of the residual stream."""


@dataclass(frozen=True)
class AddVector(ResidualEdit):
    """Add ``scale * vector`` to the activations (activation addition, Turner et al. 2308.10248).

    Attributes:
        vector: ``[d_model]``; where the stream has lanes, ``[lanes, d_model]``, or one vector for all of them.
        at: the hook point, ``"blocks.9.hook_resid_post"`` or another name of it.
        scale: how much of it: a number, one for each row of the batch ``[batch]``, or for each row and position asked
            for ``[batch, n]``.
    """

    vector: Float[Tensor, "*lanes d_model"]
    at: str
    scale: Strength = 1.0

    @property
    def hook_name(self) -> str:
        return self.at

    def __call__(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        shape = self.vector.shape
        if x.shape[-len(shape) :] != shape:
            raise ValueError(
                f"a vector of shape {list(shape)} does not fit {self.at}, which has {x.shape[-1]} dimensions"
            )
        return x + tokens.strength(self.scale, x) * self.vector.to(x)


@dataclass(frozen=True)
class SAEEdit(ResidualEdit):
    """What an SAE does to the activations.

    Attributes:
        sae: ``encode`` and ``decode`` of ``[..., d_model]``, ``W_dec [atom, d_model]``, ``cfg``, as in SAELens.
        at: the hook point, by any of its names; None: where the SAE's metadata says that it was trained.
    """

    sae: Any
    at: str | None = None

    def __post_init__(self) -> None:
        if not is_residual_sae(self.sae):
            raise TypeError(
                f"{type(self).__name__} takes an SAE of the residual stream, with encode, decode, W_dec and cfg, such "
                f"as sae_lens.SAE; got {type(self.sae).__name__}. For a WriteSAE there are Recode(sae) and "
                f"Substitute(sae)"
            )
        if hasattr(self.sae.cfg, "d_out"):
            raise ValueError(
                f"{type(self.sae).__name__} is a transcoder: it reads at one point and writes at another; "
                f"{type(self).__name__} takes an SAE"
            )

    @property
    def fitted(self) -> Any:
        return self.sae

    @property
    def hook_name(self) -> str:
        metadata = getattr(self.sae.cfg, "metadata", None)
        at = self.at or getattr(metadata, "hook_name", None) or getattr(self.sae.cfg, "hook_name", None)
        if not at:
            raise ValueError(
                f"this {type(self.sae).__name__} does not say where it was trained (cfg.metadata.hook_name): "
                f'give the place, {type(self).__name__}(sae, at="blocks.9.hook_resid_post")'
            )
        return str(at)

    def __call__(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        d_in = self.sae.W_dec.shape[-1]
        if x.shape[-1] != d_in:
            raise ValueError(f"an SAE of {d_in} dimensions does not fit {self.hook_name}, which has {x.shape[-1]}")
        return self.edit(x.to(self.sae.W_dec), tokens).to(x)

    @abstractmethod
    def edit(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        """The same in the dtype and on the device of the SAE."""


@dataclass(frozen=True)
class Reconstruct(SAEEdit):
    """What the SAE makes of the activations, in their place: SAELens' ``run_with_saes``.

    Attributes:
        error_term: add back what the SAE misses, as a constant: activations stay, and gradients go through the atoms.
    """

    error_term: bool = False

    def edit(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        made = self.sae.decode(self.sae.encode(x))
        return made + (x - made).detach() if self.error_term else made


@dataclass(frozen=True, kw_only=True)
class Steer(SAEEdit):
    """Add an atom's decoder direction to the activations.

    Attributes:
        atom: index into ``W_dec``.
        scale: how much of it: a number, one for each row of the batch ``[batch]``, or for each row and position asked
            for ``[batch, n]``.
        relative: True: ``scale`` times as long as the activation it is added to, as ``intervene(sae, atom=, scale=)``
            does with a write. False: ``scale * W_dec[atom]``, as users of SAELens write it.
    """

    atom: int
    scale: Strength = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        n_atoms = len(self.sae.W_dec)
        if not 0 <= self.atom < n_atoms:
            raise IndexError(f"atom={self.atom}: this SAE has atoms 0 to {n_atoms - 1}")

    def edit(self, x: Float[Tensor, "n ..."], tokens: Tokens) -> Float[Tensor, "n ..."]:
        direction, scale = self.sae.W_dec[self.atom], tokens.strength(self.scale, x)
        if not self.relative:
            return x + scale * direction
        unit = direction / direction.norm().clamp_min(1e-30)
        return x + scale * x.norm(dim=-1, keepdim=True) * unit
