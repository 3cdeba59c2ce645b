"""What a model asks of an SAE of its memory. Nothing in this room or below it knows an SAE by name."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from writesae.hooks.interventions import Intervention


@runtime_checkable
class AttachableSAE(Protocol):
    """An SAE of what one head writes or remembers. `writesae.saes.WriteSAE` is one; yours may be another."""

    def check_fits(self, model: Any, *, check_model: bool = True) -> None:
        """Raise ValueError unless it belongs to a head of this model, with these weights if ``check_model``."""
        ...

    def adding(self, atom: int, scale: float | int) -> Intervention:
        """The intervention that adds an atom at ``scale`` times the native write's norm."""
        ...

    def read(self, model: Any, x: Any, *, check_model: bool = True, **kwargs: Any) -> Any:
        """Which atoms are active at every token of a text; ``model.encode(sae, x)`` is this."""
        ...
