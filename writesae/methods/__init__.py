"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import patching
from writesae.methods.direct_attribution import DirectAttribution, direct_attribution
from writesae.methods.knockouts import KnockoutSweep, knockout_sweep
from writesae.methods.patched import Patching
from writesae.methods.patterns import Pattern, pattern

__all__ = [
    "DirectAttribution", "KnockoutSweep", "Patching", "Pattern", "direct_attribution", "knockout_sweep", "patching",
    "pattern",
]  # fmt: skip
