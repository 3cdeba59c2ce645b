"""What a model asks of an SAE of its memory. Nothing in this room or below it knows an SAE by name."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from writesae.hooks.interventions import Intervention


@runtime_checkable
class AttachableSAE(Protocol):
    """An SAE of what one head writes or remembers. `writesae.saes.WriteSAE` is one; yours may be another."""

    def check_fits(self, model: Any, *, check_model: bool = True) -> None:
        """Raise ValueError unless it belongs to a head of this model, with these weights if ``check_model``."""
        ...

    def adding(self, atom: int, scale: float | int | Float[Tensor, " batch"]) -> Intervention:
        """The intervention that adds an atom at ``scale`` times the native write's norm."""
        ...

    def read(self, model: Any, x: Any, *, check_model: bool = True, **kwargs: Any) -> Any:
        """Which atoms are active at every token of a text; ``model.encode(sae, x)`` is this."""
        ...


def bring(sae: Any, device: torch.device) -> None:
    """Move an SAE to where it is going to be used, if it is a module and elsewhere.

    This is the one rule for an SAE and a model on different devices: the SAE goes to the layer, once, before anything
    runs. What a model computes never travels to an SAE and back.
    """
    if isinstance(sae, nn.Module) and any(x.device != device for x in (*sae.parameters(), *sae.buffers())):
        sae.to(device)


def fit(sae: Any, model: Any, *, check_model: bool = True) -> None:
    """Check that an SAE (`AttachableSAE`) belongs to a head of the model, and `bring` it to that head's layer.

    Raises:
        ValueError: it does not fit.
    """
    sae.check_fits(model, check_model=check_model)
    if (place := getattr(sae, "place", None)) is not None:
        bring(sae, model.layer_device(place.layer))
