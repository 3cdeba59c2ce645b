"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import patching
from writesae.methods.lensed import LogitLens
from writesae.methods.lenses import logit_lens
from writesae.methods.patched import Patching
from writesae.methods.tuned_lens import TunedLens, tune_lens

__all__ = ["LogitLens", "Patching", "TunedLens", "logit_lens", "patching", "tune_lens"]
