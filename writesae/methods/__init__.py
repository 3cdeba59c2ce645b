"""Published ways to look into a recurrent memory, each one call."""

from writesae.methods.activation_patching import patching
from writesae.methods.circuit_check import CircuitCheck
from writesae.methods.circuit_graph import Circuit
from writesae.methods.circuits import circuit
from writesae.methods.corpus import EachText, each_text
from writesae.methods.deletions import DeletionSweep, deletion_sweep
from writesae.methods.direct_attribution import DirectAttribution, direct_attribution
from writesae.methods.dose import DoseResponse, dose_response
from writesae.methods.evaluated import Evaluation
from writesae.methods.evaluating import evaluate
from writesae.methods.knockouts import KnockoutSweep, knockout_sweep
from writesae.methods.lengths import memory_length
from writesae.methods.lensed import LogitLens
from writesae.methods.lenses import logit_lens
from writesae.methods.patched import Patching
from writesae.methods.patterns import Pattern, pattern
from writesae.methods.remembered import MemoryLength
from writesae.methods.state_tuning import TunedMemory, tune_memory
from writesae.methods.steering import SteeringVector, steering_vector
from writesae.methods.tuned_lens import TunedLens, tune_lens

__all__ = [
    "Circuit", "CircuitCheck", "DeletionSweep", "DirectAttribution", "DoseResponse", "EachText", "Evaluation",
    "KnockoutSweep", "LogitLens", "MemoryLength", "Patching", "Pattern", "SteeringVector", "TunedLens", "TunedMemory",
    "circuit", "deletion_sweep", "direct_attribution", "dose_response", "each_text", "evaluate", "knockout_sweep",
    "logit_lens", "memory_length", "patching", "pattern", "steering_vector", "tune_lens", "tune_memory",
]  # fmt: skip
