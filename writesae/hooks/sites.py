"""Where memories are: recurrent layers, and their heads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_SPELLINGS = re.compile(r"(?:L(\d+)H(\d+)|(\d+)\.(\d+))")


class Head(NamedTuple):
    """One value head of one recurrent layer; equal to the plain pair ``(layer, head)``.

    >>> str(Head(2, 0)), Head(2, 0).folder, Head.parse("L2H0")
    ('2.0', 'L2H0', Head(layer=2, head=0))
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"

    @property
    def folder(self) -> str:
        """Its name where files are kept: ``L2H0``."""
        return f"L{self.layer}H{self.head}"

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return f"layer {self.layer} head {self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """From either spelling, ``2.0`` or ``L2H0``; ValueError for anything else."""
        match = _SPELLINGS.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no head: write LAYER.HEAD (2.0), or L2H0")
        layer, head = (int(number) for number in match.groups() if number is not None)
        return cls(layer, head)


@dataclass(frozen=True)
class Site:
    """A recurrent layer: where states are, and of what shape.

    Attributes:
        layer: index of the layer in the model.
        n_heads: value heads, the unit everything is indexed by.
        d_key, d_value: size of each head's state.
        rule: name of the update rule, e.g. ``gated_delta``.
    """

    layer: int
    n_heads: int
    d_key: int
    d_value: int
    rule: str

    def check_head(self, head: object) -> None:
        """Raise IndexError unless it is one of this layer's heads."""
        if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < self.n_heads:
            raise IndexError(f"head {head!r} at layer {self.layer}: allowed are 0 to {self.n_heads - 1}")
