"""Sparse autoencoders whose atoms are matrices of the shape in which a recurrent layer writes."""

from writesae.saes.activity.contexts import Context, Contexts
from writesae.saes.activity.reading import Codes
from writesae.saes.activity.search import top_contexts
from writesae.saes.config import VARIANTS, SAEConfig
from writesae.saes.sae import SAELoss, WriteSAE
from writesae.saes.substitute import Substitute
from writesae.saes.training.collect import collect, train_site, train_store
from writesae.saes.training.evaluate import evaluate
from writesae.saes.training.run import Settings
from writesae.saes.training.train import train_sae

__all__ = [
    "VARIANTS", "Codes", "Context", "Contexts", "SAEConfig", "SAELoss", "Settings", "Substitute", "WriteSAE", "collect",
    "evaluate", "top_contexts", "train_sae", "train_site", "train_store",
]  # fmt: skip
