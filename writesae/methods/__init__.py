"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import patching
from writesae.methods.patched import Patching
from writesae.methods.state_tuning import TunedMemory, tune_memory

__all__ = ["Patching", "TunedMemory", "patching", "tune_memory"]
