"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import Patching, patching

__all__ = ["Patching", "patching"]
