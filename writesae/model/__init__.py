"""`HookedRecurrentModel`: a transformers model with its memory open to reading and editing."""

from writesae.model.hooked import HookedRecurrentModel
from writesae.model.late_logits import LateLogits, late_logits
from writesae.model.memory import Memory
from writesae.model.tokens import Text, kl_divergence
from writesae.model.unembedding import Unembedding, unembedding

__all__ = [
    "HookedRecurrentModel",
    "LateLogits",
    "Memory",
    "Text",
    "Unembedding",
    "kl_divergence",
    "late_logits",
    "unembedding",
]
