"""What an adapter must say about a family of architectures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from writesae.recurrence import Recurrence, Write


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


class KernelCall(ABC):
    """One call of the model's own recurrence, seen through the canonical quantities.

    `get` computes a quantity only when asked, in float32, heads expanded to value heads; `set` replaces one, and `run`
    calls the native function with the replacements. With nothing replaced, `run` passes the arguments on untouched.
    """

    @abstractmethod
    def get(self, quantity: str, heads: Sequence[int] | None = None) -> Float[Tensor, "batch pos head ..."]:
        """A canonical quantity ``[batch, pos, head, ...]``, of the given heads only if ``heads`` is not None."""

    @abstractmethod
    def set(self, quantity: str, value: Tensor) -> None:
        """Replace a quantity (all heads) by a canonical value."""

    @property
    @abstractmethod
    def initial_state(self) -> Float[Tensor, "batch head d_key d_value"] | None:
        """The state before the call, None if zero."""

    @abstractmethod
    def recurrence(self, heads: Sequence[int] | None = None) -> Recurrence:
        """Decay, erase and reads of the given heads."""

    @abstractmethod
    def write(self, heads: Sequence[int] | None = None) -> Write:
        """The native write, leading dimensions ``[batch, pos, head]``."""

    @abstractmethod
    def run(
        self, native: Callable[..., Any]
    ) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
        """Call the native function: outputs in the model's dtype, and the final state if the model wants it."""


@dataclass(frozen=True)
class Family:
    """An adapter.

    Attributes:
        name: for messages and the support table.
        rule: of every `Site` of this family.
        mixers: ``{modeling module: name of its mixer class}``.
        kernels: functions of the modeling module that run the recurrence; they are intercepted.
        helpers: other functions of the modeling module that an installed GPU package may have taken over; on CPU
            tensors the torch versions run instead.
        inputs: quantities that enter the recurrence, in firing order.
        gate_norms: names a mixer may have for its gated norm, called as ``norm(o, z)``: where ``z`` is seen.
        dims: mixer -> ``(n_heads, d_key, d_value)``.
        call: arguments of an intercepted call -> `KernelCall`.
        recurrence, write: the same two of `KernelCall` from canonical quantities, to rebuild them from a cache.
    """

    name: str
    rule: str
    mixers: Mapping[str, str]
    kernels: tuple[str, ...]
    helpers: tuple[str, ...]
    inputs: tuple[str, ...]
    gate_norms: tuple[str, ...]
    dims: Callable[[nn.Module], tuple[int, int, int]]
    call: Callable[[dict[str, Any]], KernelCall]
    recurrence: Callable[[Mapping[str, Tensor]], Recurrence]
    write: Callable[[Mapping[str, Tensor]], Write]

    @property
    def quantities(self) -> tuple[str, ...]:
        """All hook points of a mixer, in firing order."""
        return (*self.inputs, "write", "state", "o", "z")
