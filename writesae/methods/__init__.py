"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import patching
from writesae.methods.direct_attribution import DirectAttribution, direct_attribution
from writesae.methods.patched import Patching

__all__ = ["DirectAttribution", "Patching", "direct_attribution", "patching"]
