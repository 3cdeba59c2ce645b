"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import patching
from writesae.methods.patched import Patching

__all__ = ["Patching", "patching"]
