"""What a sparsity is: everything an SAE and its training ask of it. And the registry of all that exist."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.jobs.choices import one_of
from writesae.recurrence.matrices import Matrices
from writesae.saes.reconstruction import Activations, Batch


@runtime_checkable
class SAE(Protocol):
    """What a sparsity sees of the SAE: its sizes, its encoder, and the tensors that the sparsity itself asked for."""

    cfg: Any  # an `SAEConfig`: n_atoms, k, ...
    b_enc: nn.Parameter

    def pre(self, x: Matrices) -> Float[Tensor, "... n_atoms"]: ...

    def __getattr__(self, name: str) -> Any: ...


class Sparsity(ABC):
    """One way to make activations of pre-activations. Subclass `Choosing` or `Thresholds` for a new one.

    A sparsity has no state of its own: its parameters and buffers are attributes of the SAE that each method is given,
    so that files and optimisers know them by one name.

    Attributes:
        chooses: atoms are chosen by rank among others. Their number is ``k`` by construction, dead atoms can be revived
            by the auxiliary loss, and ``b_enc`` need not be trained. If False, training leads thresholds to ``k``.
        calibrated: buffers that training leaves to `calibrate`; NaN until they are known.
    """

    chooses: ClassVar[bool]
    calibrated: ClassVar[tuple[str, ...]] = ()

    def tensors(self, cfg: Any) -> dict[str, nn.Parameter | Tensor]:
        """What it adds to an SAE of this `SAEConfig`: parameters are trained, plain tensors only stored."""
        return {}

    @abstractmethod
    def activate(self, sae: SAE, pre: Float[Tensor, "... n_atoms"]) -> Float[Tensor, "... n_atoms"]:
        """Activations of all atoms; zero for those that are not active."""

    @abstractmethod
    def sparsify(
        self, sae: SAE, pre: Float[Tensor, "... n_atoms"], over_batch: bool = False
    ) -> tuple[Float[Tensor, "... m"], Int[Tensor, "... m"]]:
        """The same in sparse form: activations, largest first, and their atoms."""

    @abstractmethod
    def activations(self, sae: SAE, batch: Batch, *, over_batch: bool, bandwidth: float) -> Activations:
        """Activations of one batch in training, with gradients."""

    def width(self, cfg: Any) -> int | None:
        """How many atoms `sparsify` returns for each matrix, or None if that depends on the data."""
        return None

    def further_loss(
        self, sae: SAE, batch: Batch, bandwidth: float
    ) -> tuple[Float[Tensor, ""] | float, Float[Tensor, ""] | float]:
        """What the loss has beyond the error: a penalty, whose weight follows the number of active atoms, and a term
        that has no weight. Default: neither."""
        return 0.0, 0.0

    def initialise(self, sae: SAE, x: Matrices) -> None:
        """Set its tensors from samples, before training. Default: nothing."""
        return

    def reset_atoms(self, sae: SAE, atoms: Int[Tensor, " _"]) -> None:
        """What to do for atoms that are set anew. Default: nothing."""
        return

    def lead(self, sae: SAE, excess: Float[Tensor, ""]) -> None:
        """Move thresholds a little, after each step. ``excess`` is the recent ``L0 / k - 1``, within -1 and 1."""
        return

    def calibrate(self, sae: SAE, x: Matrices) -> float:
        """Set what `calibrated` names, from samples; returns the threshold. Default: ValueError, there is nothing."""
        names = ", ".join(name for name, one in SPARSITIES.items() if one.calibrated)
        raise ValueError(f"calibrate is for {names}; this SAE has sparsity {sae.cfg.sparsity!r}")

    def ready(self, sae: SAE) -> bool:
        """Whether it can read single matrices: nothing waits for `calibrate`."""
        return not any(bool(torch.isnan(getattr(sae, name)).any()) for name in self.calibrated)


SPARSITIES: dict[str, Sparsity] = {}
"""All that exist, by the name that `SAEConfig.sparsity` gives."""

S = TypeVar("S", bound=Sparsity)


def register_sparsity(name: str) -> Callable[[type[S]], type[S]]:
    """A decorator: ``SAEConfig(sparsity=name)`` means this class from now on, in training, files and everywhere else.

    >>> @register_sparsity("mine")
    ... class Mine(Thresholds): ...

    Raises:
        ValueError: another class has that name.
    """

    def register(cls: type[S]) -> type[S]:
        other = type(SPARSITIES[name]) if name in SPARSITIES else cls
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):  # a notebook's cell runs twice
            raise ValueError(f"there is a sparsity {name!r} already, {other.__module__}.{other.__qualname__}")
        SPARSITIES[name] = cls()
        return cls

    return register


def sparsity_named(name: str) -> Sparsity:
    """The sparsity of that name; ValueError that lists those that exist."""
    return SPARSITIES[one_of("sparsity", name, SPARSITIES)]
